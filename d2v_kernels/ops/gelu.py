"""GELU: alone, before a linear layer without keeping the activation, and after a channel layer norm in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _checks as check
from .._define import Call, Gradient, define
from ..products import product
from .norm import affine, standardise_gradient, standardise_rows


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), exact (Hendrycks and Gimpel 2016), Phi the normal distribution function; the limit 0 at -inf.

    Args:
        x: floating, any shape and strides.

    Returns:
        Shape and dtype of x, contiguous. Arithmetic in float32 (float64 for float64). Differentiable.

    Raises:
        TypeError: x is not floating.

    Example:
        >>> x = torch.randn(4, 3)
        >>> torch.allclose(gelu(x), torch.nn.functional.gelu(x), atol=1e-6)
        True
    """
    check.strided("gelu", x)
    return _gelu(x.contiguous())


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

    Example:
        >>> hidden, weight = torch.randn(2, 5, 64, requires_grad=True), torch.randn(16, 64, requires_grad=True)
        >>> gelu_linear(hidden, weight).sum().backward()
        >>> hidden.grad.shape, weight.grad.shape
        (torch.Size([2, 5, 64]), torch.Size([16, 64]))
    """
    check.strided("gelu_linear", x, weight, bias)
    place = x.device.type
    if torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place):
        dtype = torch.get_autocast_dtype(place)
        wide = torch.float64  # what autocast leaves alone
        weight = weight if weight.dtype == wide else weight.to(dtype)
        bias = bias if bias is None or bias.dtype == wide else bias.to(dtype)
    else:
        check.dtype("gelu_linear", "weight", weight, x.dtype)
    _check_linear(x, weight, bias)
    x = x.contiguous()
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    y: Tensor = _GeluLinear.apply(rows, weight, bias) if differentiable else _forward(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(_gelu(x).to(weight.dtype), weight.t(), bias)


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
            of_x = product(grad, weight).to(x.dtype)
            y = _gelu_backward_(of_x, x)
        elif need_weight:
            y = _gelu(x)
        if need_weight:
            of_weight = product(grad.t(), y.to(weight.dtype))
        return of_x, of_weight, grad.sum(0) if need_bias else None


def layer_norm_gelu(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """gelu(layer_norm(x)): y = z * Phi(z), z = (x - mean) / sqrt(var + eps) * weight + bias.

    Mean and biased variance over the channels of each row; exact GELU (Hendrycks and Gimpel 2016), Phi by erf. The
    convolutions of data2vec's speech encoder (wav2vec 2.0, Baevski et al. 2020, section 2) end in it.

    Args:
        x: (..., C) floating, channels last, viewed as (rows, C); copied where the last stride is not 1.
        weight: (C,) floating in any dtype, or None for 1.
        bias: (C,) floating in any dtype, or None for 0.
        eps: added to the variance.

    Returns:
        Shape and dtype of x, contiguous. Arithmetic in float32 (float64 for float64). Differentiable in all three;
        gradients are bitwise repeatable.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, strides or eps that do not fit.

    Example:
        >>> frames, weight, bias = torch.randn(2, 100, 512), torch.ones(512), torch.zeros(512)
        >>> layer_norm_gelu(frames, weight, bias).shape
        torch.Size([2, 100, 512])
    """
    check.strided("layer_norm_gelu", x)
    if x.dim() < 1:
        raise ValueError("layer_norm_gelu: x: expected shape (..., C), got a 0-D tensor")
    x = check.side_by_side("layer_norm_gelu", "x", x)
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    return _layer_norm_gelu(rows, weight, bias, eps).view(x.shape)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "gelu_linear"
    check.strided(op, x, weight, bias)
    check.dtype(op, "x", x, check.FLOATS)
    check.dtype(op, "weight", weight, check.FLOATS)
    check.require(x.dim() >= 1, op, "x", "shape (..., H)", "a 0-D tensor")
    check.dims(op, "weight", weight, "C, H")
    check.require(weight.shape[1] == x.shape[-1], op, "columns of weight", x.shape[-1], weight.shape[1])
    check.device(op, "weight", weight, x)
    if bias is not None:
        if not torch.compiler.is_compiling():
            check.storage(op, [bias])  # PyTorch's sum does not look
        check.device(op, "bias", bias, x)
        check.shape(op, "bias", bias, weight.shape[:1])
        check.dtype(op, "bias", bias, weight.dtype)


def _shape(op: str, x: Tensor) -> Call:
    if x.dtype not in check.FLOATS:
        check.dtype(op, "x", x, check.FLOATS)
    if not x.is_contiguous():
        check.contiguous(op, "x", x)
    return Call(x, (x.dtype,), (x,))


def _backward_shape(op: str, grad: Tensor, x: Tensor) -> Call:
    """Gradient of x, and gelu(x) again; of the operator that writes the gradient in place only the latter."""
    call = _shape(op, x)
    check.contiguous(op, "grad", grad)
    check.dtype(op, "grad", grad, x.dtype)
    check.device(op, "grad", grad, x)
    check.shape(op, "grad", grad, x.shape)
    return call if op.endswith("_") else call._replace(outputs=(x, x))


def _check_apart(op: str, grad: Tensor, x: Tensor) -> None:
    """The gradient that is written is x itself or lies elsewhere."""
    distance = grad.data_ptr() - x.data_ptr()
    if distance != 0 and abs(distance) < grad.nbytes:
        check.fail(op, "memory of grad", "no part of x's", f"an overlap {distance} bytes from the start of x")


def _norm_shape(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Call:
    check.rows(op, "x", x, "rows, C")
    check.vector(op, "weight", weight, x)
    check.vector(op, "bias", bias, x)
    check.require(0.0 < eps < math.inf, op, "eps", "above 0", eps)
    return Call(x, check.dtypes_of(x, weight, bias), (x,))


def _norm_backward_shape(
    op: str, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Call:
    """The results look like x, weight and bias; shape (0,) for one that is None."""
    _norm_shape(op, x, weight, bias, eps)
    check.rows(op, "grad", grad, "rows, C")
    check.device(op, "grad", grad, x)
    check.shape(op, "grad", grad, x.shape)
    of_weight, of_bias = (((0,), x.dtype) if t is None else t for t in (weight, bias))
    return Call(x, check.dtypes_of(grad, x, weight, bias), (x, of_weight, of_bias))


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(z * math.sqrt(0.5)))


def _reference(x: Tensor) -> Tensor:
    z = x.to(check.compute_dtype(x.dtype))
    # At -inf the product is not a number; the limit is 0.
    return torch.where(z == -math.inf, 0.0, z * _normal_cdf(z)).to(x.dtype)


def _backward_reference(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    z = x.to(check.compute_dtype(x.dtype))
    bounded = z.clamp(-1e4, 1e4)  # keeps NaN
    slope = _normal_cdf(z) + bounded * torch.exp(-0.5 * bounded * bounded) / math.sqrt(2.0 * math.pi)
    return (grad.to(z.dtype) * slope).to(x.dtype), _reference(x)


def _backward_in_place_reference(grad: Tensor, x: Tensor) -> Tensor:
    of_x, y = _backward_reference(grad, x)
    grad.copy_(of_x)
    return y


def normed_gelu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    normal, _ = standardise_rows(x.to(check.compute_dtype(x.dtype)), eps)
    z = affine(normal, weight, bias)
    return (z * _normal_cdf(z)).to(x.dtype).contiguous()


def normed_gelu_gradient(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    compute = check.compute_dtype(x.dtype)
    normal, scale = standardise_rows(x.to(compute), eps)
    z = affine(normal, weight, bias)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    g = grad.to(compute) * (_normal_cdf(z) + z * density)
    of_weight = x.new_empty((0,)) if weight is None else (g * normal).sum(dim=0).to(weight.dtype)
    of_bias = x.new_empty((0,)) if bias is None else g.sum(dim=0).to(bias.dtype)
    of_x = standardise_gradient(affine(g, weight, None), normal, scale)
    return of_x.to(x.dtype).contiguous(), of_weight, of_bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return _gelu_backward(grad.contiguous(), x)[0]


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _norm_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    grad = check.with_unit_stride(grad)
    of_x, of_weight, of_bias = _layer_norm_gelu_backward(grad, x, weight, bias, ctx.eps)
    return of_x, None if weight is None else of_weight, None if bias is None else of_bias, None


_layer_norm_gelu = define(
    "layer_norm_gelu(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    _norm_shape, normed_gelu, Gradient(_norm_gradient, _norm_setup), triton="gelu",
)  # fmt: skip
_layer_norm_gelu_backward = define(
    "layer_norm_gelu_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _norm_backward_shape, normed_gelu_gradient, triton="gelu",
)  # fmt: skip
_gelu = define("gelu(Tensor x) -> Tensor", _shape, _reference, Gradient(_gradient, _setup), triton="gelu")
_gelu_backward = define(
    "gelu_backward(Tensor grad, Tensor x) -> (Tensor, Tensor)", _backward_shape, _backward_reference, triton="gelu"
)
_gelu_backward_ = define(
    "gelu_backward_(Tensor(a!) grad, Tensor x) -> Tensor",
    _backward_shape, _backward_in_place_reference, triton="gelu", values=_check_apart,
)  # fmt: skip
