"""GELU: alone, before a linear layer without keeping the activation, and after a channel layer norm in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks as checks


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), exact (Hendrycks and Gimpel 2016), Phi the normal distribution function; the limit 0 at -inf.

    Args:
        x: floating, any shape and strides.

    Returns:
        Shape and dtype of x, contiguous. Arithmetic in float32 (float64 for float64). Differentiable.

    Raises:
        TypeError: x is not floating.
    """
    result: Tensor = torch.ops.d2v.gelu(x.contiguous())
    return result


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear(gelu(x)): y = gelu(x) W^T + b, the second half of a transformer's MLP.

    For backward x and weight are kept, gelu(x) is not: it comes out of the pass over x that makes the gradient. In a
    block of width C with hidden width H = 4 C that is H numbers a token less, about a quarter of what a block keeps.

    Args:
        x: (..., H) floating.
        weight: (C, H) in the dtype of x; under autocast in any, and cast as `torch.nn.functional.linear` does.
        bias: (C,) like weight, or None.

    Returns:
        (..., C) in the dtype of weight. Differentiable once in all three; gradients that are not needed are not
        computed.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        RuntimeError: second derivative.
    """
    place = x.device.type
    if torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place):
        dtype = torch.get_autocast_dtype(place)
        weight, bias = _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
    else:
        checks.require_dtype("gelu_linear", "weight", weight, x.dtype)
    checks.check_gelu_linear(x, weight, bias)
    rows = x.contiguous().view(x.shape[:-1].numel(), x.shape[-1])
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    result: Tensor = _GeluLinear.apply(rows, weight, bias) if differentiable else _forward(rows, weight, bias)
    return result.view(*x.shape[:-1], weight.shape[0])


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == torch.float64 else t.to(dtype)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(torch.ops.d2v.gelu(x).to(weight.dtype), weight, bias)


class _GeluLinear(torch.autograd.Function):
    """x (rows, H) contiguous, weight (C, H), bias (C,) or None, in one dtype but for x under autocast."""

    # One function for forward and context: beside a `setup_context`, PyTorch inspects forward's signature at each call,
    # which takes longer than everything else here does on the host.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        of_x = of_weight = None
        if need_x:
            of_x = (grad @ weight).to(x.dtype)
            y = torch.ops.d2v.gelu_backward_(of_x, x)
        elif need_weight:
            y = torch.ops.d2v.gelu(x)
        if need_weight:
            of_weight = grad.t() @ y.to(weight.dtype)
        return of_x, of_weight, grad.sum(0) if need_bias else None


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
