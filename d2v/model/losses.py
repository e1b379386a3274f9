"""What a training forward is judged by: regression at the masked positions, class token, shared decoder, pixels."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from d2v.config import Config
from d2v.model.targets import Output
from d2v_kernels import masked_regression_loss


def compute_loss(
    config: Config, prediction: Tensor, encoded: Tensor, targets: Tensor, features: Tensor, rows: Tensor, copies: int,
    lengths: Tensor | None,
) -> Output:  # fmt: skip
    """Regression and class loss.

    Args:
        config: of the model.
        prediction: (P,C).
        encoded: (N,E+V,C), the class token among the E in front.
        targets: (B,T,C).
        features: (N,T,C) or (B,T,C), the stem's.
        rows: (P,) int64, rows of the student's (N*T) that were predicted.
        copies: M, so that N = B*M.
        lengths: (B,) tokens before the padding, on the host; None: no padding.
    """
    batch, tokens, _ = targets.shape
    sample_size = rows.shape[0]
    # Row r of the student belongs to sample r // M; the targets are never repeated.
    row = rows // tokens
    target_rows = rows - (row - row // copies) * tokens
    beta, scale = config.loss.beta, config.loss_scale
    regression = masked_regression_loss(prediction, targets, None, target_rows, beta=beta, scale=scale)
    losses = {"regression": regression.loss}
    class_prediction = class_target = None
    if config.loss.class_weight > 0.0:
        class_prediction = encoded[:, config.encoder.extra_tokens - 1]
        if lengths is None or "statistics-over-padding" in config.published:
            mean = targets.mean(dim=1)
        else:  # padding has targets of 0
            mean = targets.sum(dim=1) / lengths.to(targets)[:, None]
        class_target = mean.repeat_interleave(copies, dim=0)
        weight = class_weight(config, sample_size, batch * copies)
        losses["cls"] = masked_regression_loss(class_prediction, class_target, beta=beta, scale=scale * weight).loss
    total = torch.stack(list(losses.values())).sum()
    return Output(
        loss=total / max(sample_size, 1), losses=losses, sample_size=sample_size, prediction=prediction,
        targets=targets, target_rows=target_rows, prediction_std=regression.prediction_std,
        target_std=regression.target_std, features=features.detach()[:: features.shape[0] // batch],
        class_prediction=class_prediction, class_target=class_target,
    )  # fmt: skip


def add_losses(
    config: Config, out: Output, shared: Tensor | None, pixels: Tensor | None, raw: Tensor | None
) -> Output:  # fmt: skip
    """With the losses of the shared decoder's predictions (P,C), and of pixels (P,R) against `raw` (B,T,R), whose
    variances are unbiased, as published; None: no such loss."""
    losses = {}

    def regress(prediction: Tensor, targets: Tensor, weight: float) -> Tensor:
        scale = config.loss_scale * weight
        return masked_regression_loss(
            prediction, targets, None, out.target_rows, beta=config.loss.beta, scale=scale
        ).loss  # fmt: skip

    if shared is not None:
        losses["shared"] = regress(shared, out.targets, 1.0)
    if pixels is not None and raw is not None:
        variance, mean = torch.var_mean(raw.float(), dim=2, keepdim=True)
        wanted = (raw.float() - mean) / (variance + 1e-6).sqrt()
        losses["reconstruction"] = regress(pixels, wanted, config.loss.reconstruction)
    total = out.loss + torch.stack(list(losses.values())).sum() / max(out.sample_size, 1)
    return dataclasses.replace(out, losses={**out.losses, **losses}, loss=total)


def class_weight(config: Config, sample_size: int, rows: int) -> float:
    """Factor on the class loss, which the division by the sample size turns into a weight of the mean over rows.

    Published: weight * P, so that the effective weight grows with the rows of a micro-batch. Here it is
    weight * class_rows for any number of rows.
    """
    if "class-loss-per-micro-batch" in config.published:
        return config.loss.class_weight * sample_size
    return config.loss.class_weight * config.loss.class_rows * sample_size / rows
