"""Masked regression loss with its collapse monitors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    """
    for name, t in (("prediction", prediction), ("target", target)):
        if t.dim() < 1:
            raise ValueError(f"masked_regression_loss: {name}: expected shape (..., C), got a 0-D tensor")
    loss = torch.ops.d2v.masked_regression_loss(
        _as_rows(prediction), _as_rows(target), prediction_rows, target_rows, beta, scale
    )
    return RegressionLoss(*loss)


def _as_rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
