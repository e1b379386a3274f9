"""Dropout, residual sum and layer norm in one pass: what stands between the parts of a transformer block."""

from __future__ import annotations

import torch
from torch import Tensor


def dropout_add_layer_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    keys: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """total = residual + kept * branch / (1 - dropout), and normed = layer_norm(total) * weight + bias.

    Dropout as in Srivastava et al. 2014, layer norm as in Ba et al. 2016: mean and biased variance over the channels of
    each token. Element (n,t,c) is kept or not as a pure function of (keys[n], t, c), so neither batch nor rank nor the
    number of threads matters: word c % 4 of Philox4x32-10 with counter (c / 4, t, 0, 0), dropped below dropout * 2^32.
    Nothing of it is stored; the backward pass draws again.

    Args:
        branch, residual: (N,T,C) of one floating dtype, last stride 1.
        weight, bias: (C,) floating in any dtype, or None for 1 and 0.
        dropout: probability in [0, 1) that an element of branch is dropped; pass 0 in evaluation.
        keys: int64 (N,), one a sample; needed where dropout is above 0.
        eps: added to the variance.

    Returns:
        normed and total, both with shape and dtype of branch, contiguous. Arithmetic in float32 (float64 for float64);
        normed is the norm of total as it is returned. Differentiable in branch, residual, weight and bias; gradients
        are bitwise repeatable. A NaN of a dropped element stays NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, strides, keys, dropout or eps that do not fit.
    """
    normed, total = torch.ops.d2v.dropout_add_layer_norm(branch, residual, weight, bias, keys, dropout, eps)
    return normed, total
