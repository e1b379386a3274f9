"""Channel layer norm and GELU in one pass: the step between the convolutions of the speech front-end."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm_gelu(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """gelu(layer_norm(x)): y = z * Phi(z), z = (x - mean) / sqrt(var + eps) * weight + bias.

    Mean and biased variance over the channels of each row; exact GELU (Hendrycks and Gimpel 2016), Phi by erf. The
    convolutions of data2vec's speech encoder (wav2vec 2.0, Baevski et al. 2020, section 2) end in it.

    Args:
        x: (..., C) floating, channels last with stride 1, viewed as (rows, C).
        weight: (C,) floating in any dtype, or None for 1.
        bias: (C,) floating in any dtype, or None for 0.
        eps: added to the variance.

    Returns:
        Shape and dtype of x, contiguous. Arithmetic in float32 (float64 for float64). Differentiable in all three;
        gradients are bitwise repeatable.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, strides or eps that do not fit.
    """
    if x.dim() < 1:
        raise ValueError("layer_norm_gelu: x: expected shape (..., C), got a 0-D tensor")
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    result: Tensor = torch.ops.d2v.layer_norm_gelu(rows, weight, bias, eps)
    return result.view(x.shape)
