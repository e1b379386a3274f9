"""Token rows: gather the visible ones for M masks without making clones, and put them back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Noise(NamedTuple):
    """Fill of masked rows: N(0, std^2), element (r, j, c) a pure function of (keys[r], j, c).

    Philox4x32-10 with key keys[r] and counter (c // 4, j), then Box-Muller; so the noise of a row does not depend on
    batch, rank or thread.
    """

    std: float
    """Standard deviation."""
    keys: Tensor
    """(N,) int64, one key a row, on the device of the kept rows."""


def gather_tokens(x: Tensor, index: Tensor, *, clones: int = 1) -> Tensor:
    """Rows of x named by index; row r of the result reads sample r // clones.

    Replaces `repeat_interleave(clones)` followed by `gather` (data2vec 2.0, section 3.2, multi-mask training).

    Args:
        x: (B,T,C) floating, last stride 1.
        index: (B*clones, n) int32 or int64; values may repeat within a row. Out of range raises on the CPU.
        clones: rows of index per sample.

    Returns:
        (B*clones, n, C), contiguous. Differentiable in x: gradients add in float32 in ascending row, then n, and
        are rounded once; bitwise repeatable.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit.
    """
    result: Tensor = torch.ops.d2v.gather_tokens(x, index, clones)
    return result


def restore_tokens(kept: Tensor, restore: Tensor, *, fill: Tensor | Noise) -> Tensor:
    """Full sequences from kept rows: position t takes kept row restore[r, t], or a fill row when that is >= V.

    Args:
        kept: (N,V,C) floating, last stride 1.
        restore: (N,T) int32 or int64, values >= 0.
        fill: tensor (C,): one mask token for every value >= V; tensor (N,F,C): fill row restore - V; `Noise`: fresh
            noise row restore - V. Tensors have kept's dtype.

    Returns:
        (N,T,C), contiguous. Differentiable in kept and in a tensor fill; bitwise repeatable.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit.
    """
    vector, keys, std = (None, fill.keys, fill.std) if isinstance(fill, Noise) else (fill, None, 0.0)
    if vector is not None and not isinstance(vector, Tensor):
        raise TypeError(f"restore_tokens: fill: expected a tensor or Noise, got {type(fill).__name__}")
    result: Tensor = torch.ops.d2v.restore_tokens(kept, restore, vector, keys, std)
    return result
