"""Targets: the mean of the teacher's normalised tensors (data2vec, section 3.3); and what a forward gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2v.config import Config
from d2v.model.layers import standardise, valid_positions
from d2v_kernels import average_layers

_EPS = 1e-5


@torch.no_grad()
def make_targets(config: Config, layers: list[Tensor], lengths: Tensor | None) -> Tensor:
    """(B,T,C) float32 targets of K teacher tensors (B,T,C): each normalised, averaged, the mean normalised.

    Args:
        config: `target` and `published`.
        lengths: (B,) tokens before the padding, on the host: later ones leave the statistics and become 0. None: all.
    """
    norm, out_norm = config.target.norm, config.target.out_norm
    if "statistics-over-padding" in config.published:
        lengths = None
    if norm == "position":
        # Over the samples, padding left out. Not published.
        valid = valid_positions(lengths, layers[0].shape[1], layers[0].device)
        weight = layers[0].new_ones(*layers[0].shape[:2], 1) if valid is None else valid[..., None]
        mean = torch.stack([standardise(t, 0, weight) for t in layers]).mean(dim=0)
        return average_layers([mean], norm="none", out_norm=out_norm, lengths=lengths, eps=_EPS)
    if "norms-over-batch" in config.published and not {"instance", "batch"} & set(norm.split(",")):
        # Published 1.0 speech keeps (T,B,C) where no tensor is instance- or batch-normed: what it calls time is then
        # the batch.
        y = average_layers([t.transpose(0, 1) for t in layers], norm=norm, out_norm=out_norm, eps=_EPS)
        return y.transpose(0, 1).contiguous()
    return average_layers(layers, norm=norm, out_norm=out_norm, lengths=lengths, eps=_EPS)


@dataclass
class Output:
    """Result of a training forward. N rows, P masked positions in all, in row-major order (row, then position)."""

    loss: Tensor
    """0-D: sum of `losses` over `sample_size`."""
    losses: dict[str, Tensor]
    """Differentiable sums: "regression"; "cls", "shared", "reconstruction" of class token, shared decoder, pixels."""
    sample_size: int
    """P."""
    prediction: Tensor
    """(P,C)."""
    targets: Tensor
    """(B,T,C) float32 targets at all positions, without gradient."""
    target_rows: Tensor
    """(P,) int64: row of `targets` viewed as (B*T, C) that each prediction regresses on."""
    prediction_std: Tensor
    """0-D: mean over channels of the predictions' standard deviation over the P rows."""
    target_std: Tensor
    """0-D: the same of the targets."""
    features: Tensor
    """(B,T,C): the stem's output, what the local encoder makes of the samples (1.0 text with an averaged stem: of their
    first masked copy); without gradient."""
    class_prediction: Tensor | None = None
    """(N,C), or None without class loss."""
    class_target: Tensor | None = None
    """(N,C): mean target of the row's sample, or None."""

    @property
    def target(self) -> Tensor:
        """(P,C): the targets of `prediction`, copied out of `targets` when asked for."""
        return self.targets.flatten(0, 1).index_select(0, self.target_rows)
