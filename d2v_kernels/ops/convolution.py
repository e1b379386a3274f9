"""Grouped convolutions over tokens with channels last, with layer norm, GELU and residual: positions and decoder."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check
from .._define import Call, Gradient, define
from .._native import cpu_level
from .gelu import normed_gelu, normed_gelu_gradient


def conv_layer_norm_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: bool = False, eps: float = 1e-5
) -> Tensor:
    """gelu(layer_norm(conv(x) + bias)), plus x if wanted: a layer of data2vec 2.0's decoder (Baevski et al. 2022, 3.3).

    A grouped convolution of stride 1 that sees zeros around the grid and keeps its size: tap j of an axis with k taps
    meets the token j - k // 2 further on. Layer norm over the channels without gain and bias, exact GELU. Neither the
    input nor the result changes its layout, and padding is not written.

    Args:
        x: (N,T,C) or (N,H,W,C) floating, copied unless contiguous; under autocast cast to its dtype.
        weight: (D,C/G,k) or (D,C/G,k,l) floating in any dtype, as `torch.nn.Conv1d` and `Conv2d` of G groups have it;
            rounded to the dtype of x for the products.
        bias: (D,) floating in any dtype, or None.
        residual: add x, which then needs C = D.
        eps: added to the variance.

    Returns:
        (N,T,D) or (N,H,W,D) in the dtype of x, contiguous. Products are added in float32 (float64 for float64); what
        is normalised is the convolution's result in the dtype of x, which is kept for backward. Differentiable in x,
        weight and bias; gradients are bitwise repeatable on one device.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or eps that do not fit.

    Example:
        >>> images, weight = torch.randn(2, 14, 14, 96), torch.randn(96, 24, 3, 3)  # 4 groups of 24 channels
        >>> conv_layer_norm_gelu(images, weight, residual=True).shape
        torch.Size([2, 14, 14, 96])
    """
    check.strided("conv_layer_norm_gelu", x, weight, bias)
    place = x.device.type
    if torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(place))
    bias = None if bias is None else bias.contiguous()
    return _conv_layer_norm_gelu(x.contiguous(), weight.contiguous(), bias, residual, eps)[0]


def prefers_conv_layer_norm_gelu(device: str, dtype: torch.dtype) -> bool:
    """Whether `conv_layer_norm_gelu` was measured to beat PyTorch's convolution, `layer_norm_gelu` and addition.

    Args:
        device: type of a device.
        dtype: of the rows, under autocast its own.

    Returns:
        True on CPUs in bfloat16, where native code is loaded.

    Example:
        >>> prefers_conv_layer_norm_gelu("cuda", torch.bfloat16)
        False
    """
    return device == "cpu" and dtype == torch.bfloat16 and cpu_level() != ""


def _shape(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, eps: float) -> Call:
    """The result, and the convolution's result before the norm."""
    check.require(x.dim() in (3, 4), op, "x", "shape (N, T, C) or (N, H, W, C)", tuple(x.shape))
    check.dims(op, "weight", weight, "D, C / G, k" if x.dim() == 3 else "D, C / G, k, l")
    for name, t in (("x", x), ("weight", weight)):
        check.dtype(op, name, t, check.FLOATS)
        check.contiguous(op, name, t)
    check.device(op, "weight", weight, x)
    check.require(min(weight.shape) > 0, op, "weight", "channels and taps", f"shape {tuple(weight.shape)}")
    channels, (outputs, narrow) = x.shape[-1], weight.shape[:2]
    check.require(channels > 0 and channels % narrow == 0, op, "channels of x", f"a multiple of {narrow}", channels)
    groups = channels // narrow
    check.require(outputs % groups == 0, op, "rows of weight", f"a multiple of {groups} groups", outputs)
    check.vector(op, "bias", bias, weight[:, 0, 0] if x.dim() == 3 else weight[:, 0, 0, 0])
    check.require(not residual or channels == outputs, op, "rows of weight with residual", channels, outputs)
    check.require(0.0 < eps < math.inf, op, "eps", "above 0", eps)
    result = ((*x.shape[:-1], outputs), x.dtype)
    return Call(x, check.dtypes_of(x, weight, bias), (result, result))


def _backward_shape(
    op: str, grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, eps: float
) -> Call:
    """Gradients of x, weight and bias; shape (0,) for one that is None."""
    call = _shape(op, x, weight, bias, residual, eps)
    for name, t in (("grad", grad), ("y", y)):
        check.shape(op, name, t, (*x.shape[:-1], weight.shape[0]))
        check.dtype(op, name, t, x.dtype)
        check.device(op, name, t, x)
    return call._replace(outputs=(x, weight, ((0,), x.dtype) if bias is None else bias))


def _contiguous(*arguments: Any) -> tuple[Any, ...]:
    """A gradient may arrive expanded, and a compiler keeps tensors near convolutions in another order."""
    return tuple(t.contiguous() if isinstance(t, Tensor) else t for t in arguments)


def _padding(weight: Tensor) -> list[int]:
    return [k // 2 for k in weight.shape[2:]]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, eps: float) -> tuple[Tensor, Tensor]:
    compute, outputs = check.compute_dtype(x.dtype), weight.shape[0]
    if x.numel() == 0:  # PyTorch refuses a grid that is smaller than the kernel
        return x.new_empty((*x.shape[:-1], outputs)), x.new_empty((*x.shape[:-1], outputs))
    convolve = F.conv1d if x.dim() == 3 else F.conv2d
    taps, shift = weight.to(x.dtype).to(compute), None if bias is None else bias.to(compute)
    groups, padding = x.shape[-1] // weight.shape[1], _padding(weight)
    with torch.autocast(x.device.type, enabled=False):
        y = convolve(x.to(compute).movedim(-1, 1), taps, shift, padding=padding, groups=groups)
    for axis in range(2, y.dim()):  # an even kernel gives one position too many
        y = y.narrow(axis, 0, x.shape[axis - 1])
    y = y.movedim(1, -1).to(x.dtype).contiguous()
    out = normed_gelu(_rows(y).to(compute), None, None, eps)
    out = out + _rows(x).to(compute) if residual else out
    return out.to(x.dtype).view(y.shape), y


def _backward_reference(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    compute, axes = check.compute_dtype(x.dtype), x.dim() - 2
    of_bias = x.new_empty((0,)) if bias is None else torch.zeros_like(bias)
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight), of_bias
    wide, taps = grad.to(compute), weight.to(x.dtype).to(compute)
    of_y = normed_gelu_gradient(_rows(wide), _rows(y).to(compute), None, None, eps)[0].view(y.shape)
    surplus = [n for k in reversed(weight.shape[2:]) for n in (0, 1 - k % 2)]
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        F.pad(of_y.movedim(-1, 1), surplus), x.to(compute).movedim(-1, 1), taps, None, [1] * axes, _padding(weight),
        [1] * axes, False, [0] * axes, x.shape[-1] // weight.shape[1], [True, True, False],
    )  # fmt: skip
    of_x = of_x.movedim(1, -1)
    of_x = (of_x + wide if residual else of_x).to(x.dtype).contiguous()
    of_bias = of_bias if bias is None else _rows(of_y).sum(0).to(bias.dtype)
    return of_x, of_weight.to(weight.dtype).contiguous(), of_bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.residual, ctx.eps = inputs
    ctx.save_for_backward(x, output[1], weight, bias)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    x, y, weight, bias = ctx.saved_tensors
    of_x, of_weight, of_bias = _conv_layer_norm_gelu_backward(grad, x, y, weight, bias, ctx.residual, ctx.eps)
    return of_x, of_weight, None if bias is None else of_bias, None, None


_conv_layer_norm_gelu = define(
    "conv_layer_norm_gelu(Tensor x, Tensor weight, Tensor? bias, bool residual, float eps) -> (Tensor, Tensor)",
    _shape, _reference, Gradient(_gradient, _setup), triton="convolution",
)  # fmt: skip
_conv_layer_norm_gelu_backward = define(
    "conv_layer_norm_gelu_backward(Tensor grad, Tensor x, Tensor y, Tensor weight, Tensor? bias, bool residual,"
    " float eps) -> (Tensor, Tensor, Tensor)",
    _backward_shape, _backward_reference, triton="convolution", prepare=_contiguous,
)  # fmt: skip
