"""A row of the operators' benchmark, and what building one takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .floor import make_floor

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: `build` makes fresh inputs and returns the contenders."""

    op: str
    name: str
    dtype: torch.dtype
    bytes: int
    """Bytes read once plus bytes written once."""
    build: Callable[[], dict[str, Call]] = field(repr=False)
    goals: dict[str, float] = field(default_factory=dict)
    """Contender -> wanted ratio of its time over ours (for `floor`: our time over its time, at most)."""
    tolerance: float = 2e-4
    compare: Callable[[Any], Sequence[Tensor]] = field(default=lambda result: [result], repr=False)
    """Tensors of a result that must agree."""


def randn(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def floors(inputs: Sequence[Tensor], outputs: Callable[[], Sequence[Tensor]]) -> dict[str, Call]:
    return {"floor": make_floor(inputs, outputs, False), "floor (streaming)": make_floor(inputs, outputs, True)}


def compile_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)
