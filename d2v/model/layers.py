"""The step after every convolution: layer norm over channels, then GELU."""

from __future__ import annotations

from torch import Tensor

from d2v_kernels import layer_norm_gelu

NORM_EPS = 1e-5


def norm_gelu(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """GELU of a layer norm of x (..., C) over C, with gain and bias (C,) or without, in one pass."""
    return layer_norm_gelu(x.contiguous(), weight, bias, eps=NORM_EPS)
