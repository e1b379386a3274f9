"""Sequences of different lengths one after the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check

MOST_TOKENS = (1 << 31) - 1
"""Of a packed batch, whose beginnings are int32."""


@dataclass(frozen=True)
class Packed:
    """Sequences of different lengths one after the other, without padding; made once a batch by `pack_lengths`."""

    starts: Tensor
    """(N+1,) int32 on the device: first token of each sequence, then the total."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, on the host."""
    made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What an engine made of this layout, kept for the other layers of the batch."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)


def pack_lengths(lengths: Sequence[int] | Tensor, device: torch.device | str) -> Packed:
    """Packed layout of sequences of these lengths (host numbers, or an integer tensor on the host).

    Example:
        >>> packed = pack_lengths([3, 5], "cpu")
        >>> x = torch.randn(8, 4, 16)  # the 3 tokens of the first sequence, then the 5 of the second
        >>> from d2v_kernels import attend
        >>> attend(x, x, x, packed=packed).shape
        torch.Size([8, 4, 16])
    """
    if isinstance(lengths, Tensor):
        check.require(lengths.device.type == "cpu", "pack_lengths", "device of lengths", "cpu", lengths.device)
        check.dtype("pack_lengths", "lengths", lengths, check.INDICES)
        check.dims("pack_lengths", "lengths", lengths, "N")
        lengths = lengths.tolist()
    lengths = [check.whole("pack_lengths", "lengths", n, 0, MOST_TOKENS) for n in lengths]
    check.require(sum(lengths) <= MOST_TOKENS, "pack_lengths", "sum of lengths", f"0 to {MOST_TOKENS}", sum(lengths))
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if torch.device(device).type == "cuda":
        starts = starts.pin_memory()
    return Packed(starts.to(device, non_blocking=True), tuple(lengths))
