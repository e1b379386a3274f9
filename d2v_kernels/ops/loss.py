"""Masked regression loss with its collapse monitors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._define import Call, Gradient, define


class RegressionLoss(NamedTuple):
    """Result of `masked_regression_loss`; 0-D tensors, float32 (float64 for a float64 prediction)."""

    loss: Tensor
    """Scaled sum of the error; differentiable in the prediction."""
    prediction_std: Tensor
    """Mean over channels of sqrt(unbiased variance over the selected rows + 1e-6); nan for fewer than 2 rows."""
    target_std: Tensor
    """The same of the target."""


def masked_regression_loss(
    prediction: Tensor,
    target: Tensor,
    prediction_rows: Tensor | None = None,
    target_rows: Tensor | None = None,
    *,
    beta: float = 0.0,
    scale: float = 1.0,
) -> RegressionLoss:
    """Sum of squared or smooth-L1 errors between selected rows of prediction and target.

    loss = scale * sum_p sum_c rho(x[prediction_rows[p], c] - y[target_rows[p], c]); rho(d) = d^2 for beta = 0, else
    d^2 / (2 beta) where |d| < beta and |d| - beta / 2 elsewhere (data2vec section 3.4).

    Args:
        prediction: (..., C) floating, viewed as (rows, C).
        target: (..., C) floating, viewed as (rows, C); its dtype may differ. No gradient.
        prediction_rows: (P,) int32 or int64, distinct; None: all rows in order.
        target_rows: (P,) int32 or int64; None: all rows in order.
        beta: threshold of smooth-L1, 0 for the squared error.
        scale: factor on the sum.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit (row numbers on the CPU only).

    Example:
        >>> prediction, target = torch.ones(1, 4, 8, requires_grad=True), torch.zeros(1, 4, 8)
        >>> masked = torch.tensor([1, 3])  # tokens, numbered through the batch
        >>> result = masked_regression_loss(prediction, target, masked, masked, scale=1 / (2 * 8))
        >>> result.loss.item(), result.target_std.item() < 0.01
        (1.0, True)
    """
    check.strided("masked_regression_loss", prediction, target)
    for name, t in (("prediction", prediction), ("target", target)):
        if t.dim() < 1:
            raise ValueError(f"masked_regression_loss: {name}: expected shape (..., C), got a 0-D tensor")
    prediction = check.side_by_side("masked_regression_loss", "prediction", prediction)
    target = check.side_by_side("masked_regression_loss", "target", target)
    rows = _as_rows(prediction), _as_rows(target), prediction_rows, target_rows
    return RegressionLoss(*_masked_regression_loss(*rows, beta, scale))


def _as_rows(x: Tensor) -> Tensor:
    return x[None] if x.dim() == 1 else x.flatten(0, -2)


def _shape(
    op: str, prediction: Tensor, target: Tensor, prediction_rows: Tensor | None, target_rows: Tensor | None,
    beta: float, scale: float,
) -> Call:  # fmt: skip
    for name, t in (("prediction", prediction), ("target", target)):
        check.rows(op, name, t, "rows, C")
        check.device(op, name, t, prediction)
    channels = prediction.shape[1]
    check.require(target.shape[1] == channels, op, "channels of target", channels, target.shape[1])
    counts = []
    for name, rows, t in (
        ("prediction_rows", prediction_rows, prediction), ("target_rows", target_rows, target),
    ):  # fmt: skip
        if rows is not None:
            check.dims(op, name, rows, "P")
            check.index(op, name, rows, prediction)
        counts.append(t.shape[0] if rows is None else rows.shape[0])
    expected = f"{counts[0]} (as of the prediction)"
    check.require(counts[0] == counts[1], op, "selected target rows", expected, counts[1])
    check.require(0.0 <= beta < math.inf, op, "beta", "0 or more", beta)
    check.require(-math.inf < scale < math.inf, op, "scale", "a finite number", scale)
    scalar = ((), check.compute_dtype(prediction.dtype))
    return Call(prediction, (prediction.dtype, target.dtype), (scalar, scalar, scalar))


def _backward_shape(op: str, grad: Tensor, prediction: Tensor, *rest: Any) -> Call:
    return _shape(op, prediction, *rest)._replace(outputs=(prediction,))


def _select(op: str, *sides: Tensor | None) -> list[Tensor]:
    """Selected rows of prediction and target, of (prediction, target, rows, rows), in the dtype of the arithmetic."""
    result: list[Tensor] = []
    for name, x, rows in zip(("prediction_rows", "target_rows"), sides[:2], sides[2:], strict=True):
        assert x is not None
        if rows is not None:
            check.index_range(op, name, rows, x.shape[0])
            x = x[rows.long()]
        result.append(x.to(check.compute_dtype(result[0].dtype if result else x.dtype)))
    return result


def _mean_std(x: Tensor) -> Tensor:
    if x.shape[0] < 2:
        return x.new_full((), math.nan)
    return torch.sqrt(torch.var(x, dim=0, correction=1) + 1e-6).mean()


def _reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *sides, beta, scale = arguments
    x, y = _select("masked_regression_loss", *sides)
    d = x - y
    if beta == 0.0:
        error = d * d
    else:
        error = torch.where(d.abs() < beta, d * d / (2.0 * beta), d.abs() - beta / 2.0)
    return error.sum() * scale, _mean_std(x), _mean_std(y)


def _backward_reference(grad: Tensor, prediction: Tensor, target: Tensor, *rest: Any) -> Tensor:
    prediction_rows, target_rows, beta, scale = rest
    x, y = _select("masked_regression_loss_backward", prediction, target, prediction_rows, target_rows)
    d = x - y
    slope = 2.0 * d if beta == 0.0 else (d / beta).clamp(-1.0, 1.0)
    selected = (slope * (grad.to(x.dtype) * scale)).to(prediction.dtype)
    if prediction_rows is None:
        return selected
    result = torch.zeros(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    result[prediction_rows.long()] = selected
    return result


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    prediction, target, prediction_rows, target_rows, ctx.beta, ctx.scale = inputs
    ctx.save_for_backward(prediction, target, prediction_rows, target_rows)
    ctx.mark_non_differentiable(output[1], output[2])


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("masked_regression_loss: no gradient for target: detach it")
    result = _masked_regression_loss_backward(grad, *ctx.saved_tensors, ctx.beta, ctx.scale)
    return result, None, None, None, None, None


_masked_regression_loss = define(
    "masked_regression_loss(Tensor prediction, Tensor target, Tensor? prediction_rows, Tensor? target_rows,"
    " float beta, float scale) -> (Tensor, Tensor, Tensor)",
    _shape, _reference, Gradient(_gradient, _setup), triton="loss",
)  # fmt: skip
_masked_regression_loss_backward = define(
    "masked_regression_loss_backward(Tensor grad, Tensor prediction, Tensor target, Tensor? prediction_rows,"
    " Tensor? target_rows, float beta, float scale) -> Tensor",
    _backward_shape, _backward_reference, triton="loss",
)  # fmt: skip
