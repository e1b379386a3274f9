"""Dropout, residual sum and layer norm in one pass: what stands between the parts of a transformer block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import registry
from .._define import REFERENCE, Call, Gradient, define
from .._random import keep_mask


def dropout_add_layer_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    keys: Tensor | None = None,
    eps: float = 1e-5,
    normed_dtype: torch.dtype | None = None,
    copy: bool = False,
) -> tuple[Tensor, ...]:
    """total = residual + kept * branch / (1 - dropout), and normed = layer_norm(total) * weight + bias.

    Dropout as in Srivastava et al. 2014, layer norm as in Ba et al. 2016: mean and biased variance over the channels of
    each token. Element (n,t,c) is kept or not as a pure function of (keys[n], t, c), so neither batch nor rank nor the
    number of threads matters: word c % 4 of Philox4x32-10 with counter (c / 4, t, 0, 0), dropped below dropout * 2^32.
    Nothing of it is stored; the backward pass draws again.

    Args:
        branch, residual: (N,T,C) of one floating dtype; or a bfloat16 or float16 branch beside a float32 residual, as
            under autocast; copied where the last stride is not 1.
        weight, bias: (C,) floating in any dtype, or None for 1 and 0.
        dropout: probability in [0, 1) that an element of branch is dropped; pass 0 in evaluation.
        keys: int64 (N,), one a sample; needed where dropout is above 0.
        eps: added to the variance.
        normed_dtype: of normed: that of residual (None) or that of branch.
        copy: give back normed in the dtype of branch, too.

    Returns:
        normed and total with the shape of branch and the dtype of residual, contiguous; then the copy, if asked for,
        which is normed itself where that has the dtype of branch. Arithmetic in float32 (float64 for float64);
        normed is the norm of total as it is returned, rounded once. Differentiable in branch, residual, weight and
        bias; gradients are bitwise repeatable. A NaN of a dropped element stays NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, strides, keys, dropout or eps that do not fit.

    Example:
        >>> branch, residual = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
        >>> weight, bias, keys = torch.ones(16), torch.zeros(16), torch.tensor([11, 12])  # a key of each sample
        >>> normed, total = dropout_add_layer_norm(branch, residual, weight, bias, dropout=0.1, keys=keys)
        >>> torch.allclose(normed, torch.nn.functional.layer_norm(total, (16,)), atol=1e-5)
        True
    """
    if normed_dtype not in (None, residual.dtype, branch.dtype):
        names = " or ".join(check.dtype_name(x.dtype) for x in (residual, branch))
        raise TypeError(f"dropout_add_layer_norm: normed_dtype: expected {names}, got {check.dtype_name(normed_dtype)}")
    branch = check.side_by_side("dropout_add_layer_norm", "branch", branch)
    residual = check.side_by_side("dropout_add_layer_norm", "residual", residual)
    if branch.dtype not in _HALVES or residual.dtype != torch.float32:
        normed, total = _dropout_add_layer_norm(branch, residual, weight, bias, keys, dropout, eps)
        return (normed, total, normed) if copy else (normed, total)
    wide = normed_dtype != branch.dtype
    normed, copied, total = _dropout_add_layer_norm_mixed(
        branch, residual, weight, bias, keys, dropout, eps, wide, copy or not wide
    )
    normed = normed if wide else copied
    return (normed, total, copied) if copy else (normed, total)


def prefers_dropout_add_layer_norm(
    device: str, branch: torch.dtype, residual: torch.dtype, channels: int, dropout: float
) -> bool:
    """Whether `dropout_add_layer_norm` beats PyTorch's dropout, sum and layer norm one after the other.

    Args:
        device: type of a device.
        branch, residual: dtypes.
        channels: of a row.
        dropout: probability.

    Returns:
        True on CPUs and, where a backend has kernels for such rows, on GPUs: with dropout, which PyTorch draws and
        keeps, and for two dtypes, of which it writes copies. Measured on CPUs; on GPUs it follows from the bytes.

    Example:
        >>> prefers_dropout_add_layer_norm("cpu", torch.bfloat16, torch.float32, 768, 0.0)
        True
    """
    mixed = residual == torch.float32 and branch in _HALVES
    if not mixed and (branch != residual or dropout == 0.0):
        return False
    if device != "cuda":
        return device == "cpu"
    op = f"dropout_add_layer_norm{'_mixed' if mixed else ''}"
    body = registry.implementation(op, device, tuple(dict.fromkeys((branch, residual))), (str(channels),))
    return body is not REFERENCE.implementations[op]


def _shape(
    op: str, branch: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None,
    dropout: float, eps: float, names: tuple[str, str] = ("branch", "residual"), mixed: bool = False,
) -> Call:  # fmt: skip
    for name, x in zip(names, (branch, residual), strict=True):
        check.rows(op, name, x, "N, T, C")
    check.shape(op, names[1], residual, branch.shape)
    if not mixed:
        check.dtype(op, names[1], residual, branch.dtype)
    check.device(op, names[1], residual, branch)
    check.vector(op, "weight", weight, branch)
    check.vector(op, "bias", bias, branch)
    if keys is not None:
        check.keys(op, "keys", keys, branch.shape[0])
        check.device(op, "keys", keys, branch)
    check.dropout(op, dropout, "keys", keys)
    check.require(0.0 < eps < math.inf, op, "eps", "above 0", eps)
    return Call(branch, check.dtypes_of(branch, weight, bias), (branch, branch), (str(branch.shape[2]),))


def _backward_shape(
    op: str, grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None,
    keys: Tensor | None, dropout: float, eps: float,
) -> Call:  # fmt: skip
    """Gradients of branch (shape (0,) without dropout: that of residual), residual, weight and bias; the latter two
    have shape (C,) and the dtype of the arithmetic."""
    for name, grad in (("grad_normed", grad_normed), ("grad_total", grad_total)):
        if grad is not None:
            _shape(op, total, grad, weight, None, keys, dropout, eps, ("total", name))
    vector = (total.shape[2:], check.compute_dtype(total.dtype))
    of_branch = (total.shape if dropout > 0.0 else (0,), total.dtype)
    return Call(total, check.dtypes_of(total, weight), (of_branch, total, vector, vector), (str(total.shape[2]),))


def _mixed_shape(
    op: str, branch: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None,
    dropout: float, eps: float, wide: bool, copy: bool,
) -> Call:  # fmt: skip
    """Normed (shape (0,) if not `wide`), the copy of it (or shape (0,)), and the total."""
    check.dtype(op, "branch", branch, _HALVES)
    check.dtype(op, "residual", residual, torch.float32)
    _shape(op, branch, residual, weight, bias, keys, dropout, eps, mixed=True)
    outputs = ((branch.shape if wanted else (0,), like.dtype) for wanted, like in ((wide, residual), (copy, branch)))
    dtypes = check.dtypes_of(branch, residual, weight, bias)
    return Call(branch, dtypes, (*outputs, residual), (str(branch.shape[2]),))


def _mixed_backward_shape(
    op: str, grad_normed: Tensor | None, grad_copy: Tensor | None, grad_total: Tensor | None, total: Tensor,
    weight: Tensor | None, keys: Tensor | None, dropout: float, eps: float, branch_dtype: torch.dtype,
) -> Call:  # fmt: skip
    """Gradients of branch, residual, weight and bias; the latter two in float32."""
    check.dtype(op, "total", total, torch.float32)
    check.require(branch_dtype in _HALVES, op, "branch_dtype", "bfloat16 or float16", branch_dtype)
    _shape(op, total, total, weight, None, keys, dropout, eps, ("total", "total"))
    for name, grad in (("grad_normed", grad_normed), ("grad_total", grad_total), ("grad_copy", grad_copy)):
        if grad is not None:
            check.dtype(op, name, grad, branch_dtype if name == "grad_copy" else torch.float32)
            _shape(op, total, grad, weight, None, keys, dropout, eps, ("total", name), mixed=True)
    vector = (total.shape[2:], torch.float32)
    dtypes = dict.fromkeys((branch_dtype, *check.dtypes_of(total, weight)))
    outputs = ((total.shape, branch_dtype), total, vector, vector)
    return Call(total, tuple(dtypes), outputs, (str(total.shape[2]),))


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def standardise_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows with mean 0 and variance 1, and what they were multiplied by."""
    centred = x - x.mean(dim=1, keepdim=True)
    scale = torch.rsqrt((centred * centred).mean(dim=1, keepdim=True) + eps)
    return centred * scale, scale


def standardise_gradient(grad: Tensor, normal: Tensor, scale: Tensor) -> Tensor:
    """Gradient of the rows from that of the standardised ones."""
    along = grad.mean(dim=1, keepdim=True) + normal * (grad * normal).mean(dim=1, keepdim=True)
    return (grad - along) * scale


def _dropout_factors(keys: Tensor | None, x: Tensor, dropout: float) -> Tensor:
    """1 / (1 - dropout) where an element of x (N,T,C) is kept, else 0: a function of keys[n], t and c alone."""
    if dropout == 0.0 or keys is None:
        return x.new_ones(())
    _, t, c = x.shape
    tokens = torch.arange(t, device=x.device)[:, None]
    kept = keep_mask(keys[:, None, None], (tokens,), c, dropout)
    return kept.to(x.dtype) * (1.0 / (1.0 - dropout))


_HALVES = (torch.bfloat16, torch.float16)
"""Of a branch beside a float32 residual."""


def _reference(
    branch: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None, dropout: float,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    added = branch.to(check.compute_dtype(branch.dtype))
    total = residual.to(added.dtype) + added * _dropout_factors(keys, added, dropout)
    rows = total.to(branch.dtype).contiguous()  # the norm is that of the numbers that are given back
    normal, _ = standardise_rows(rows.flatten(0, 1).to(added.dtype), eps)
    return affine(normal, weight, bias).to(rows.dtype).view(rows.shape), rows


def _backward_reference(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, keys: Tensor | None,
    dropout: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    compute = check.compute_dtype(total.dtype)
    normal, scale = standardise_rows(total.flatten(0, 1).to(compute), eps)
    g = grad_normed.flatten(0, 1).to(compute)
    of_weight, of_bias = (g * normal).sum(dim=0), g.sum(dim=0)
    of_total = standardise_gradient(affine(g, weight, None), normal, scale).view(total.shape)
    of_total = of_total if grad_total is None else of_total + grad_total.to(compute)
    of_branch = total.new_empty((0,))
    if dropout > 0.0:
        of_branch = (of_total * _dropout_factors(keys, of_total, dropout)).to(total.dtype)
    return of_branch, of_total.to(total.dtype, copy=True, memory_format=torch.contiguous_format), of_weight, of_bias


def _mixed_reference(
    branch: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None, dropout: float,
    eps: float, wide: bool, copy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    normed, total = _reference(branch.float(), residual, weight, bias, keys, dropout, eps)
    copied = normed.to(branch.dtype) if copy else branch.new_empty((0,))
    return normed if wide else residual.new_empty((0,)), copied, total


def _mixed_backward_reference(
    grad_normed: Tensor | None, grad_copy: Tensor | None, grad_total: Tensor | None, total: Tensor,
    weight: Tensor | None, keys: Tensor | None, dropout: float, eps: float, branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = [g.float() for g in (grad_normed, grad_copy) if g is not None]
    grad = sum(grads[1:], grads[0]) if grads else torch.zeros_like(total)
    of_branch, of_residual, *rest = _backward_reference(grad, grad_total, total, weight, keys, dropout, eps)
    return (of_branch if dropout > 0.0 else of_residual).to(branch_dtype), of_residual, rest[0], rest[1]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, bias, keys, ctx.dropout, ctx.eps = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(output[1], weight, keys)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight, keys = ctx.saved_tensors
    if grad is None and grad_total is None:
        return (None,) * 7
    grad = torch.zeros_like(total) if grad is None else check.with_unit_stride(grad)
    grad_total = None if grad_total is None else check.with_unit_stride(grad_total)
    of_branch, of_residual, *affine = _dropout_add_layer_norm_backward(
        grad, grad_total, total, weight, keys, ctx.dropout, ctx.eps
    )
    of_branch = of_residual if ctx.dropout == 0.0 else of_branch
    return of_branch, of_residual, *_affine_gradients(affine, weight, ctx.bias_dtype), None, None, None


def _setup_mixed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    branch, _, weight, bias, keys, ctx.dropout, ctx.eps, *_ = inputs
    ctx.bias_dtype, ctx.branch_dtype = None if bias is None else bias.dtype, branch.dtype
    ctx.save_for_backward(output[2], weight, keys)
    ctx.set_materialize_grads(False)


def _mixed_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight, keys = ctx.saved_tensors
    if all(grad is None for grad in grads):
        return (None,) * 9
    grad, grad_copy, grad_total = (
        None if g is None or g.shape != total.shape else check.with_unit_stride(g) for g in grads
    )
    of_branch, of_residual, *affine = _dropout_add_layer_norm_mixed_backward(
        grad, grad_copy, grad_total, total, weight, keys, ctx.dropout, ctx.eps, ctx.branch_dtype
    )
    return of_branch, of_residual, *_affine_gradients(affine, weight, ctx.bias_dtype), *(None,) * 5


def _affine_gradients(
    found: list[Tensor], weight: Tensor | None, bias_dtype: torch.dtype | None
) -> list[Tensor | None]:
    """In the dtypes of weight and bias, None for those that there are not."""
    dtypes = (None if weight is None else weight.dtype, bias_dtype)
    return [None if dtype is None else g.to(dtype) for g, dtype in zip(found, dtypes, strict=True)]


_dropout_add_layer_norm = define(
    "dropout_add_layer_norm(Tensor branch, Tensor residual, Tensor? weight, Tensor? bias, Tensor? keys, float dropout,"
    " float eps) -> (Tensor, Tensor)",
    _shape, _reference, Gradient(_gradient, _setup), triton="norm",
)  # fmt: skip
_dropout_add_layer_norm_backward = define(
    "dropout_add_layer_norm_backward(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor? weight,"
    " Tensor? keys, float dropout, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_shape, _backward_reference, triton="norm",
)  # fmt: skip
_dropout_add_layer_norm_mixed = define(
    "dropout_add_layer_norm_mixed(Tensor branch, Tensor residual, Tensor? weight, Tensor? bias, Tensor? keys,"
    " float dropout, float eps, bool wide, bool copy) -> (Tensor, Tensor, Tensor)",
    _mixed_shape, _mixed_reference, Gradient(_mixed_gradient, _setup_mixed), triton="norm",
)  # fmt: skip
_dropout_add_layer_norm_mixed_backward = define(
    "dropout_add_layer_norm_mixed_backward(Tensor? grad_normed, Tensor? grad_copy, Tensor? grad_total, Tensor total,"
    " Tensor? weight, Tensor? keys, float dropout, float eps, ScalarType branch_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _mixed_backward_shape, _mixed_backward_reference, triton="norm",
)  # fmt: skip
