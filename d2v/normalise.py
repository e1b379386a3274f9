"""The step after every convolution: layer norm over channels, then GELU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from d2v_kernels import layer_norm_gelu

NORM_EPS = 1e-5


def norm_gelu(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """GELU of a layer norm of x (..., C) over C, with gain and bias (C,) or without: one pass on a GPU.

    On a CPU the operator is these two calls of PyTorch, so they are made here.
    """
    if x.is_cuda:
        return layer_norm_gelu(x.contiguous(), weight, bias, eps=NORM_EPS)
    return F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS))
