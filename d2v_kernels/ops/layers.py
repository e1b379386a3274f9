"""Targets: normalise each of K teacher layers, average them, normalise the average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._define import Call, define, refuse

Norm = str | tuple[str, ...]
NORMS = ("none", "layer", "instance", "batch", "group")


def average_layers(
    layers: Sequence[Tensor] | Tensor,
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
        layers: K tensors (B,T,C) of one shape, dtype (float32, bfloat16, float16, float64) and device, or one tensor
            (K,B,T,C); any strides, copied where the last one is not 1.
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

    Example:
        >>> layers = torch.randn(8, 2, 50, 16).bfloat16()  # the last 8 blocks of a teacher
        >>> target = average_layers(layers, norm="instance", out_norm="layer")
        >>> target.shape, target.dtype
        (torch.Size([2, 50, 16]), torch.float32)
    """
    if isinstance(layers, Tensor):
        check.dims("average_layers", "layers", layers, "K, B, T, C")
        layers = layers.unbind()
    layers = [check.side_by_side("average_layers", "layers", layer) for layer in layers]
    if torch.is_grad_enabled() and any(layer.requires_grad for layer in layers):
        raise NotImplementedError("average_layers: expected layers without grad, got one that requires grad; detach it")
    if out_dtype is None:
        out_dtype = torch.float64 if layers and layers[0].dtype == torch.float64 else torch.float32
    return _average_layers(layers, _join(norm), _join(out_norm), lengths, eps, out_dtype)


def _join(norm: Norm) -> str:
    return norm if isinstance(norm, str) else ",".join(norm) or "none"


def _shape(
    op: str, layers: Sequence[Tensor], norm: str, out_norm: str, lengths: Tensor | None, eps: float,
    out_dtype: torch.dtype,
) -> Call:  # fmt: skip
    check.require(len(layers) > 0, op, "number of layers", "at least 1", 0)
    first = layers[0]
    check.rows(op, "layers[0]", first, "B, T, C")
    for i, t in enumerate(layers):
        if t.shape != first.shape:
            check.shape(op, f"layers[{i}]", t, first.shape)
        if t.dtype != first.dtype:
            check.dtype(op, f"layers[{i}]", t, first.dtype)
        if t.device != first.device:
            check.device(op, f"layers[{i}]", t, first)
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            check.unit_stride(op, f"layers[{i}]", t)
    for name, norms in (("norm", norm), ("out_norm", out_norm)):
        for n in norms.split(","):
            if n not in NORMS:
                raise ValueError(f"{op}: {name}: expected one of {', '.join(NORMS)}, got {n!r}")
    check.require(0.0 < eps < math.inf, op, "eps", "above 0", eps)
    if out_dtype not in check.FLOATS:
        words = ", ".join(map(check.dtype_name, check.FLOATS))
        raise TypeError(f"{op}: out_dtype: expected one of {words}, got {check.dtype_name(out_dtype)}")
    if lengths is not None:
        check.keys(op, "lengths", lengths, first.shape[0])
        check.require(lengths.device.type == "cpu", op, "device of lengths", "cpu", lengths.device)
    return Call(first, (first.dtype, out_dtype), ((first.shape, out_dtype),), (norm, out_norm))


def _check_lengths(
    op: str, layers: Sequence[Tensor], norm: str, out_norm: str, lengths: Tensor | None, *_: Any
) -> None:
    if lengths is not None and lengths.numel() > 0:
        check.storage(op, [lengths])
        tokens, (low, high) = layers[0].shape[1], (int(v) for v in torch.aminmax(lengths))
        check.require(low >= 0 and high <= tokens, op, "lengths", f"0 to {tokens}", f"{low} to {high}")


_DIMS = {"layer": (2,), "instance": (1,), "batch": (0, 1), "group": (1, 2)}


def _normalise(x: Tensor, norm: str, valid: Tensor | None, eps: float) -> Tensor:
    """Standardises x (B,T,C) over the dims of `norm`, biased variance, statistics over valid positions."""
    if norm == "none":
        return x
    dims = _DIMS[norm]
    if valid is None:
        centred = x - x.mean(dim=dims, keepdim=True)
        return centred / torch.sqrt((centred * centred).mean(dim=dims, keepdim=True) + eps)
    count = valid.expand(x.shape).sum(dim=dims, keepdim=True, dtype=x.dtype).clamp(min=1)
    zero = x.new_zeros(())
    mean = torch.where(valid, x, zero).sum(dim=dims, keepdim=True) / count
    centred = x - mean
    variance = torch.where(valid, centred * centred, zero).sum(dim=dims, keepdim=True) / count
    return centred / torch.sqrt(variance + eps)


def _reference(
    layers: Sequence[Tensor], norm: str, out_norm: str, lengths: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    first = layers[0]
    compute = check.compute_dtype(first.dtype)
    valid = None
    if lengths is not None:
        positions = torch.arange(first.shape[1], device=first.device)
        valid = (positions < lengths.to(first.device)[:, None])[:, :, None]
    total = torch.zeros(first.shape, dtype=compute, device=first.device)
    for layer in layers:
        x = layer.to(compute)
        for name in norm.split(","):
            x = _normalise(x, name, valid, eps)
        total += x
    average = total / len(layers)
    for name in out_norm.split(","):
        average = _normalise(average, name, valid, eps)
    if valid is not None:
        average = torch.where(valid, average, average.new_zeros(()))
    return average.to(out_dtype)


_average_layers = define(
    "average_layers(Tensor[] layers, str norm, str out_norm, Tensor? lengths, float eps, ScalarType out_dtype)"
    " -> Tensor",
    _shape, _reference, refuse("average_layers", "not differentiable; detach the layers"), triton="layers",
    values=_check_lengths,
)  # fmt: skip
