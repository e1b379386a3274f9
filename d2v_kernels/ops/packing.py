"""Sequences of different lengths one after the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .tokens import gather_tokens, restore_tokens

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
    """What was made of this layout, kept for the other layers of the batch."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    def places(self, tokens: int) -> tuple[Tensor, Tensor]:
        """(1,total) int64: where each token lies in rows of `tokens` tokens, one row after the other; and (1,N*tokens):
        where each of those lies here, `total` at padding. No host read."""
        name = f"places in {tokens}"
        if name not in self.made:
            starts, total = self.starts.long(), sum(self.lengths)
            token, step = (torch.arange(n, device=starts.device) for n in (total, tokens))
            row = torch.searchsorted(starts[1:], token, right=True)
            back = torch.where(step < starts.diff()[:, None], starts[:-1, None] + step, total)
            self.made[name] = (row * tokens + token - starts[row])[None], back.view(1, -1)
        places: tuple[Tensor, Tensor] = self.made[name]
        return places

    def pad(self, x: Tensor, tokens: int | None = None) -> Tensor:
        """Rows (N,T,...) of floating tokens (total,...), 0 at padding; tokens: T, unless that of the longest."""
        tokens = self.longest if tokens is None else tokens
        flat = x.flatten(1)
        rows = restore_tokens(flat[None], self.places(tokens)[1], fill=flat.new_zeros(flat.shape[1]))
        return rows.view(len(self.lengths), tokens, *x.shape[1:])

    def unpad(self, rows: Tensor) -> Tensor:
        """Tokens (total,...) of floating rows (N,T,...)."""
        flat = rows.flatten(0, 1).flatten(1)
        return gather_tokens(flat[None], self.places(rows.shape[1])[0]).view(sum(self.lengths), *rows.shape[2:])


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
