"""Targets: normalise each of K teacher layers, average them, normalise the average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Norm = str | tuple[str, ...]


def average_layers(
    layers: Sequence[Tensor],
    *,
    norm: Norm = "instance",
    out_norm: Norm = "none",
    lengths: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean over K layers of each layer's standardised values, standardised again.

    data2vec, section 3.3 "Training targets" (Baevski et al. 2022); formula:
    y = out_norm((1/K) sum_k norm(a_k)), norm(a) = (a - mean) / sqrt(var + eps), biased variance, no affine.

    Args:
        layers: K tensors (B,T,C) of one shape, dtype (float32, bfloat16, float16, float64) and device; any strides
            with the last one 1.
        norm: axes of each layer's statistics: "none", "layer" (over C for each b, t), "instance" (over T for each
            b, c), "batch" (over B, T for each c), "group" (over T, C for each b); a tuple is applied in order.
            Tuples and "group" run on the reference backend.
        out_norm: the same for the mean.
        lengths: (B,) int64 on the host: statistics over the first lengths[b] positions; later ones are written 0.
        eps: added to the variance.
        out_dtype: dtype of the result; None: float32, or float64 for float64 layers.

    Returns:
        (B,T,C), contiguous, without gradient. Arithmetic in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, strides, lengths or names that do not fit.
        NotImplementedError: a layer requires grad, or the forced backend cannot run the case.
    """
    if torch.is_grad_enabled() and any(layer.requires_grad for layer in layers):
        raise NotImplementedError("average_layers: expected layers without grad, got one that requires grad; detach it")
    if out_dtype is None:
        out_dtype = torch.float64 if layers and layers[0].dtype == torch.float64 else torch.float32
    result: Tensor = torch.ops.d2v.average_layers(layers, _join(norm), _join(out_norm), lengths, eps, out_dtype)
    return result


def _join(norm: Norm) -> str:
    return norm if isinstance(norm, str) else ",".join(norm) or "none"
