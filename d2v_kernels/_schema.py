"""Registers the operators `torch.ops.d2v.*`: schemas, bodies, fake kernels, gradients.

A schema stands here once; native code registers the same argument lists under `d2v_native` (a test compares them).
A body checks, asks the registry for a backend, and makes one call. Double backward is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from .registry import implementation

SCHEMAS = (
    "average_layers(Tensor[] layers, str norm, str out_norm, Tensor? lengths, float eps, ScalarType out_dtype)"
    " -> Tensor",
    "update_ema_(Tensor(a!)[] averages, Tensor[] sources, Tensor(b!)[] copies, float weight, Tensor? weight_tensor)"
    " -> ()",
    "update_split_ema_(Tensor(a!)[] high, Tensor(b!)[] low, Tensor[] sources, float weight, Tensor? weight_tensor)"
    " -> ()",
    "gather_tokens(Tensor x, Tensor index, int clones) -> Tensor",
    "gather_tokens_backward(Tensor grad, Tensor index, int clones, SymInt tokens) -> Tensor",
    "restore_tokens(Tensor kept, Tensor restore, Tensor? fill, Tensor? noise_keys, float noise_std) -> Tensor",
    "restore_tokens_backward(Tensor grad, Tensor restore, SymInt visible, SymInt fill_rows) -> (Tensor, Tensor)",
    "masked_regression_loss(Tensor prediction, Tensor target, Tensor? prediction_rows, Tensor? target_rows,"
    " float beta, float scale) -> (Tensor, Tensor, Tensor)",
    "masked_regression_loss_backward(Tensor grad, Tensor prediction, Tensor target, Tensor? prediction_rows,"
    " Tensor? target_rows, float beta, float scale) -> Tensor",
    "layer_norm_gelu(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    "layer_norm_gelu_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "gelu(Tensor x) -> Tensor",
    "gelu_backward(Tensor grad, Tensor x) -> (Tensor, Tensor)",
    "gelu_backward_(Tensor(a!) grad, Tensor x) -> Tensor",
    "attention(Tensor query, Tensor key, Tensor value, Tensor? slopes, Tensor? positions, Tensor? lengths,"
    " Tensor? valid, Tensor? dropout_keys, float dropout, float scale) -> (Tensor, Tensor)",
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor log_sum,"
    " Tensor? slopes, Tensor? positions, Tensor? lengths, Tensor? valid, Tensor? dropout_keys, float dropout,"
    " float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    "dropout_add_layer_norm(Tensor branch, Tensor residual, Tensor? weight, Tensor? bias, Tensor? keys, float dropout,"
    " float eps) -> (Tensor, Tensor)",
    "dropout_add_layer_norm_backward(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor? weight,"
    " Tensor? keys, float dropout, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)

_library = torch.library.Library("d2v", "DEF")


def _average_layers(
    layers: list[Tensor], norm: str, out_norm: str, lengths: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    shape = checks.check_average_layers(layers, norm, out_norm, lengths, eps, out_dtype)
    checks.check_lengths(lengths, shape[1])
    first = layers[0]
    body = implementation("average_layers", first.device.type, (first.dtype, out_dtype), norm, out_norm)
    result: Tensor = body(layers, norm, out_norm, lengths, eps, out_dtype)
    return result


def _average_layers_fake(
    layers: list[Tensor], norm: str, out_norm: str, lengths: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    shape = checks.check_average_layers(layers, norm, out_norm, lengths, eps, out_dtype)
    return layers[0].new_empty(shape, dtype=out_dtype)


def _update_ema(
    averages: list[Tensor], sources: list[Tensor], copies: list[Tensor], weight: float, weight_tensor: Tensor | None
) -> None:
    checks.check_update_ema(averages, sources, copies, weight_tensor)
    if not averages:
        return
    dtypes = tuple(sorted({t.dtype for t in (*averages, *sources, *copies)}, key=str))
    body = implementation("update_ema_", averages[0].device.type, dtypes)
    body(averages, sources, copies, weight, weight_tensor)


def _update_ema_fake(
    averages: list[Tensor], sources: list[Tensor], copies: list[Tensor], weight: float, weight_tensor: Tensor | None
) -> None:
    checks.check_update_ema(averages, sources, copies, weight_tensor)


def _update_split_ema(
    high: list[Tensor], low: list[Tensor], sources: list[Tensor], weight: float, weight_tensor: Tensor | None
) -> None:
    checks.check_update_split_ema(high, low, sources, weight_tensor)
    if not high:
        return
    dtypes = tuple(sorted({t.dtype for t in sources}, key=str))
    implementation("update_split_ema_", high[0].device.type, dtypes)(high, low, sources, weight, weight_tensor)


def _update_split_ema_fake(
    high: list[Tensor], low: list[Tensor], sources: list[Tensor], weight: float, weight_tensor: Tensor | None
) -> None:
    checks.check_update_split_ema(high, low, sources, weight_tensor)


def _gather_tokens(x: Tensor, index: Tensor, clones: int) -> Tensor:
    checks.check_gather_tokens(x, index, clones)
    result: Tensor = implementation("gather_tokens", x.device.type, (x.dtype,))(x, index, clones)
    return result


def _gather_tokens_fake(x: Tensor, index: Tensor, clones: int) -> Tensor:
    return x.new_empty(checks.check_gather_tokens(x, index, clones))


def _gather_tokens_backward(grad: Tensor, index: Tensor, clones: int, tokens: int) -> Tensor:
    checks.check_gather_tokens_backward(grad, index, clones, tokens)
    body = implementation("gather_tokens_backward", grad.device.type, (grad.dtype,))
    result: Tensor = body(grad, index, clones, tokens)
    return result


def _gather_tokens_backward_fake(grad: Tensor, index: Tensor, clones: int, tokens: int) -> Tensor:
    return grad.new_empty(checks.check_gather_tokens_backward(grad, index, clones, tokens))


def _restore_tokens(
    kept: Tensor, restore: Tensor, fill: Tensor | None, noise_keys: Tensor | None, noise_std: float
) -> Tensor:
    checks.check_restore_tokens(kept, restore, fill, noise_keys, noise_std)
    body = implementation("restore_tokens", kept.device.type, (kept.dtype,))
    result: Tensor = body(kept, restore, fill, noise_keys, noise_std)
    return result


def _restore_tokens_fake(
    kept: Tensor, restore: Tensor, fill: Tensor | None, noise_keys: Tensor | None, noise_std: float
) -> Tensor:
    return kept.new_empty(checks.check_restore_tokens(kept, restore, fill, noise_keys, noise_std))


def _restore_tokens_backward(grad: Tensor, restore: Tensor, visible: int, fill_rows: int) -> tuple[Tensor, Tensor]:
    checks.check_restore_tokens_backward(grad, restore, visible, fill_rows)
    body = implementation("restore_tokens_backward", grad.device.type, (grad.dtype,))
    result: tuple[Tensor, Tensor] = body(grad, restore, visible, fill_rows)
    return result


def _restore_tokens_backward_fake(grad: Tensor, restore: Tensor, visible: int, fill_rows: int) -> tuple[Tensor, Tensor]:
    kept, fill = checks.check_restore_tokens_backward(grad, restore, visible, fill_rows)
    return grad.new_empty(kept), grad.new_empty(fill)


def _masked_regression_loss(
    prediction: Tensor, target: Tensor, prediction_rows: Tensor | None, target_rows: Tensor | None, beta: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "masked_regression_loss"
    checks.check_masked_regression_loss(op, prediction, target, prediction_rows, target_rows, beta)
    body = implementation(op, prediction.device.type, (prediction.dtype, target.dtype))
    result: tuple[Tensor, Tensor, Tensor] = body(prediction, target, prediction_rows, target_rows, beta, scale)
    return result


def _masked_regression_loss_fake(
    prediction: Tensor, target: Tensor, prediction_rows: Tensor | None, target_rows: Tensor | None, beta: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "masked_regression_loss"
    dtype = checks.check_masked_regression_loss(op, prediction, target, prediction_rows, target_rows, beta)
    loss, prediction_std, target_std = (prediction.new_empty((), dtype=dtype) for _ in range(3))
    return loss, prediction_std, target_std


def _masked_regression_loss_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, prediction_rows: Tensor | None, target_rows: Tensor | None,
    beta: float, scale: float,
) -> Tensor:  # fmt: skip
    op = "masked_regression_loss_backward"
    checks.check_masked_regression_loss(op, prediction, target, prediction_rows, target_rows, beta)
    body = implementation(op, prediction.device.type, (prediction.dtype, target.dtype))
    result: Tensor = body(grad, prediction, target, prediction_rows, target_rows, beta, scale)
    return result


def _masked_regression_loss_backward_fake(
    grad: Tensor, prediction: Tensor, target: Tensor, prediction_rows: Tensor | None, target_rows: Tensor | None,
    beta: float, scale: float,
) -> Tensor:  # fmt: skip
    op = "masked_regression_loss_backward"
    checks.check_masked_regression_loss(op, prediction, target, prediction_rows, target_rows, beta)
    return prediction.new_empty(prediction.shape)


def _layer_norm_gelu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    checks.check_layer_norm_gelu("layer_norm_gelu", x, weight, bias, eps)
    body = implementation("layer_norm_gelu", x.device.type, _dtypes(x, weight, bias))
    result: Tensor = body(x, weight, bias, eps)
    return result


def _layer_norm_gelu_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    checks.check_layer_norm_gelu("layer_norm_gelu", x, weight, bias, eps)
    return x.new_empty(x.shape)


def _layer_norm_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_layer_norm_gelu_backward(grad, x, weight, bias, eps)
    body = implementation("layer_norm_gelu_backward", x.device.type, _dtypes(grad, x, weight, bias))
    result: tuple[Tensor, Tensor, Tensor] = body(grad, x, weight, bias, eps)
    return result


def _layer_norm_gelu_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_layer_norm_gelu_backward(grad, x, weight, bias, eps)
    affine = [x.new_empty((0,)) if t is None else t.new_empty(t.shape) for t in (weight, bias)]
    return x.new_empty(x.shape), affine[0], affine[1]


def _gelu(x: Tensor) -> Tensor:
    checks.check_gelu("gelu", x)
    result: Tensor = implementation("gelu", x.device.type, (x.dtype,))(x)
    return result


def _gelu_fake(x: Tensor) -> Tensor:
    checks.check_gelu("gelu", x)
    return torch.empty_like(x)


def _gelu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    checks.check_gelu("gelu_backward", x, grad)
    result: tuple[Tensor, Tensor] = implementation("gelu_backward", x.device.type, (x.dtype,))(grad, x)
    return result


def _gelu_backward_fake(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    checks.check_gelu("gelu_backward", x, grad)
    return torch.empty_like(x), torch.empty_like(x)


def _gelu_backward_in_place(grad: Tensor, x: Tensor) -> Tensor:
    checks.check_gelu("gelu_backward_", x, grad)
    result: Tensor = implementation("gelu_backward_", x.device.type, (x.dtype,))(grad, x)
    return result


def _gelu_backward_in_place_fake(grad: Tensor, x: Tensor) -> Tensor:
    checks.check_gelu("gelu_backward_", x, grad)
    return torch.empty_like(x)


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    checks.check_attention("attention", query, key, value, *rest[:-1])
    body = implementation("attention", query.device.type, (query.dtype,), str(query.shape[3]))
    result: tuple[Tensor, Tensor] = body(query, key, value, *rest)
    return result


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = checks.check_attention("attention", query, key, value, *rest[:-1])
    n, t, h, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((n, h, t), dtype=dtype)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, query, key, value, out = map(_rows_with_unit_stride, (grad, query, key, value, out))
    checks.check_attention_backward(grad, query, key, value, out, log_sum, *rest[:-1])
    body = implementation("attention_backward", query.device.type, (query.dtype,), str(query.shape[3]))
    result: tuple[Tensor, Tensor, Tensor, Tensor] = body(grad, query, key, value, out, log_sum, *rest)
    return result


def _attention_backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, query, key, value, out = map(_rows_with_unit_stride, (grad, query, key, value, out))
    checks.check_attention_backward(grad, query, key, value, out, log_sum, *rest[:-1])
    slopes = rest[0]
    of_slopes = log_sum.new_empty((0,)) if slopes is None else slopes.new_empty(slopes.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), of_slopes


def _add_norm(branch: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    op = "dropout_add_layer_norm"
    checks.check_add_norm(op, branch, residual, *rest)
    body = implementation(op, branch.device.type, _dtypes(branch, *rest[:2]))
    result: tuple[Tensor, Tensor] = body(branch, residual, *rest)
    return result


def _add_norm_fake(branch: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    checks.check_add_norm("dropout_add_layer_norm", branch, residual, *rest)
    return branch.new_empty(branch.shape), branch.new_empty(branch.shape)


def _add_norm_backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.check_add_norm_backward(grad, grad_total, total, weight, *rest)
    body = implementation("dropout_add_layer_norm_backward", total.device.type, _dtypes(total, weight))
    result: tuple[Tensor, Tensor, Tensor, Tensor] = body(grad, grad_total, total, weight, *rest)
    return result


def _add_norm_backward_fake(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = checks.check_add_norm_backward(grad, grad_total, total, weight, *rest)
    of_branch = total.new_empty(total.shape if rest[1] > 0.0 else (0,))
    affine = [total.new_empty(total.shape[2:], dtype=dtype) for _ in range(2)]
    return of_branch, total.new_empty(total.shape), affine[0], affine[1]


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype, ...]:
    return tuple(dict.fromkeys(t.dtype for t in tensors if t is not None))


def _rows_with_unit_stride(grad: Tensor) -> Tensor:
    """A gradient may arrive expanded or transposed, and what a compiler keeps in another order (inductor, near
    convolutions); the operators need channels side by side."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


def _refuse(name: str, why: str) -> Any:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{name}: {why}")

    return backward


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, ctx.clones = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(index)


def _gather_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    (index,) = ctx.saved_tensors
    grad = _rows_with_unit_stride(grad)
    return torch.ops.d2v.gather_tokens_backward(grad, index, ctx.clones, ctx.tokens), None, None


def _restore_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    kept, restore, fill, _, _ = inputs
    ctx.visible = kept.shape[1]
    ctx.fill_rows = checks.NO_FILL
    if fill is not None and ctx.needs_input_grad[2]:
        ctx.fill_rows = checks.VECTOR_FILL if fill.dim() == 1 else fill.shape[1]
    ctx.save_for_backward(restore)


def _restore_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
    (restore,) = ctx.saved_tensors
    grad = _rows_with_unit_stride(grad)
    kept, fill = torch.ops.d2v.restore_tokens_backward(grad, restore, ctx.visible, ctx.fill_rows)
    return kept, None, None if ctx.fill_rows == checks.NO_FILL else fill, None, None


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    prediction, target, prediction_rows, target_rows, ctx.beta, ctx.scale = inputs
    ctx.save_for_backward(prediction, target, prediction_rows, target_rows)
    ctx.mark_non_differentiable(output[1], output[2])


def _loss_gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    prediction, target, prediction_rows, target_rows = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("masked_regression_loss: no gradient for target: detach it")
    result = torch.ops.d2v.masked_regression_loss_backward(
        grad, prediction, target, prediction_rows, target_rows, ctx.beta, ctx.scale
    )
    return result, None, None, None, None, None


def _gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_gradient(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    result: Tensor = torch.ops.d2v.gelu_backward(grad.contiguous(), x)[0]
    return result


def _norm_gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _norm_gelu_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    grad = _rows_with_unit_stride(grad)
    of_x, of_weight, of_bias = torch.ops.d2v.layer_norm_gelu_backward(grad, x, weight, bias, ctx.eps)
    return of_x, None if weight is None else of_weight, None if bias is None else of_bias, None


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])


def _attention_gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    of_query, of_key, of_value, of_slopes = torch.ops.d2v.attention_backward(grad, *tensors, ctx.dropout, ctx.scale)
    return of_query, of_key, of_value, None if tensors[5] is None else of_slopes, *[None] * 6


def _add_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, bias, keys, ctx.dropout, ctx.eps = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(output[1], weight, keys)
    ctx.set_materialize_grads(False)


def _add_norm_gradient(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight, keys = ctx.saved_tensors
    if grad is None and grad_total is None:
        return (None,) * 7
    grad = torch.zeros_like(total) if grad is None else _rows_with_unit_stride(grad)
    grad_total = None if grad_total is None else _rows_with_unit_stride(grad_total)
    of_branch, of_residual, of_weight, of_bias = torch.ops.d2v.dropout_add_layer_norm_backward(
        grad, grad_total, total, weight, keys, ctx.dropout, ctx.eps
    )
    of_branch = of_residual if ctx.dropout == 0.0 else of_branch
    of_weight = None if weight is None else of_weight.to(weight.dtype)
    of_bias = None if ctx.bias_dtype is None else of_bias.to(ctx.bias_dtype)
    return of_branch, of_residual, of_weight, of_bias, *[None] * 3


_BODIES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "average_layers": (_average_layers, _average_layers_fake),
    "update_ema_": (_update_ema, _update_ema_fake),
    "update_split_ema_": (_update_split_ema, _update_split_ema_fake),
    "gather_tokens": (_gather_tokens, _gather_tokens_fake),
    "gather_tokens_backward": (_gather_tokens_backward, _gather_tokens_backward_fake),
    "restore_tokens": (_restore_tokens, _restore_tokens_fake),
    "restore_tokens_backward": (_restore_tokens_backward, _restore_tokens_backward_fake),
    "masked_regression_loss": (_masked_regression_loss, _masked_regression_loss_fake),
    "masked_regression_loss_backward": (_masked_regression_loss_backward, _masked_regression_loss_backward_fake),
    "layer_norm_gelu": (_layer_norm_gelu, _layer_norm_gelu_fake),
    "layer_norm_gelu_backward": (_layer_norm_gelu_backward, _layer_norm_gelu_backward_fake),
    "gelu": (_gelu, _gelu_fake),
    "gelu_backward": (_gelu_backward, _gelu_backward_fake),
    "gelu_backward_": (_gelu_backward_in_place, _gelu_backward_in_place_fake),
    "attention": (_attention, _attention_fake),
    "attention_backward": (_attention_backward, _attention_backward_fake),
    "dropout_add_layer_norm": (_add_norm, _add_norm_fake),
    "dropout_add_layer_norm_backward": (_add_norm_backward, _add_norm_backward_fake),
}
_GRADIENTS = {
    "average_layers": (_refuse("average_layers", "not differentiable; detach the layers"), _no_setup),
    "gather_tokens": (_gather_gradient, _gather_setup),
    "gather_tokens_backward": (_refuse("gather_tokens", "double backward is not supported"), _no_setup),
    "restore_tokens": (_restore_gradient, _restore_setup),
    "restore_tokens_backward": (_refuse("restore_tokens", "double backward is not supported"), _no_setup),
    "masked_regression_loss": (_loss_gradient, _loss_setup),
    "masked_regression_loss_backward": (
        _refuse("masked_regression_loss", "double backward is not supported"),
        _no_setup,
    ),
    "layer_norm_gelu": (_norm_gelu_gradient, _norm_gelu_setup),
    "layer_norm_gelu_backward": (_refuse("layer_norm_gelu", "double backward is not supported"), _no_setup),
    "gelu": (_gelu_gradient, _gelu_setup),
    "gelu_backward": (_refuse("gelu", "double backward is not supported"), _no_setup),
    "attention": (_attention_gradient, _attention_setup),
    "attention_backward": (_refuse("attention", "double backward is not supported"), _no_setup),
    "dropout_add_layer_norm": (_add_norm_gradient, _add_norm_setup),
    "dropout_add_layer_norm_backward": (
        _refuse("dropout_add_layer_norm", "double backward is not supported"),
        _no_setup,
    ),
}


def register_operators() -> None:
    """Defines every operator; called once, when the package is imported."""
    for schema in SCHEMAS:
        name = schema.split("(", 1)[0]
        body, fake = _BODIES[name]
        _library.define(schema)
        _library.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"d2v::{name}", fake, lib=_library)
        if name in _GRADIENTS:
            backward, setup = _GRADIENTS[name]
            torch.library.register_autograd(f"d2v::{name}", backward, setup_context=setup, lib=_library)
