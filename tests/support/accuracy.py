"""Comparison with the float64 truth: an operator may err a small factor more than a careful computation does."""

from __future__ import annotations

import torch
from torch import Tensor


def worst_error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute error where the truth is finite."""
    good = truth.isfinite()
    difference = (actual.double() - truth.double()).abs()[good]
    return float(difference.max()) if difference.numel() else 0.0


def assert_accurate(actual: Tensor, careful: Tensor, truth: Tensor, *, factor: float = 4.0) -> None:
    """Fails unless `actual` is as good an answer as `careful`.

    Args:
        actual: result under test.
        careful: the same formula in fp32 (or the compute dtype), rounded once to actual's dtype.
        truth: the formula in float64, unrounded.
        factor: how many times the careful result's worst error is allowed.
    """
    assert actual.shape == truth.shape, f"shape: expected {tuple(truth.shape)}, got {tuple(actual.shape)}"
    assert actual.dtype == careful.dtype, f"dtype: expected {careful.dtype}, got {actual.dtype}"
    if truth.numel() == 0:
        return
    assert torch.equal(actual.isnan(), truth.isnan()), "nan positions differ from the truth's"
    finite = truth[truth.isfinite()].abs()
    size = float(finite.max()) if finite.numel() else 0.0
    allowed = factor * worst_error(careful, truth) + 2.0 * torch.finfo(torch.float32).eps * size * _room(actual.dtype)
    got = worst_error(actual, truth)
    assert got <= allowed, f"error: expected at most {allowed:.3g} (truth up to {size:.3g}), got {got:.3g}"
    _assert_unbiased(actual, truth, allowed)
    assert_rounded(actual, truth)


def _room(dtype: torch.dtype) -> float:
    """Rounding noise allowed in any case; the truth of a float64 result is no better than the result itself."""
    return 1e-5 if dtype == torch.float64 else 1.0


def _assert_unbiased(actual: Tensor, truth: Tensor, allowed: float) -> None:
    """Many small errors of one sign are a mistake even where each is within bounds."""
    good = truth.isfinite()
    error = (actual.double() - truth.double())[good]
    if error.numel() < 4096:
        return
    bias, spread = float(error.mean()), float(error.std())
    limit = 6.0 * spread / error.numel() ** 0.5 + 0.02 * allowed
    assert abs(bias) <= limit, f"bias: expected at most {limit:.3g}, got {bias:.3g}"


def assert_rounded(actual: Tensor, truth: Tensor) -> None:
    """Fails where 16-bit results were cut off instead of rounded: each is then smaller by half a unit on average, which
    a bound of several units hides. Distinct values only, and not fewer than 64, where chance could do the same."""
    if actual.dtype not in (torch.bfloat16, torch.float16):
        return
    good = truth.isfinite() & actual.isfinite()
    size, order = truth[good].double().abs().sort()
    signed = (actual.double() * truth.double().sign())[good][order]
    is_new = torch.diff(size, prepend=size.new_tensor([0.0])) > 0.0
    size, error = size[is_new], (signed - size)[is_new]
    kind = torch.finfo(actual.dtype)
    unit = kind.eps * torch.exp2(size.clamp_min(kind.smallest_normal).log2().floor())
    units = (error / unit).clamp(-1.0, 1.0)[error != 0]
    if units.numel() < 64:
        return
    mean, limit = float(units.mean()), 0.25 + 2.0 * float(units.std()) / units.numel() ** 0.5
    assert abs(mean) <= limit, f"rounding: expected errors around 0, at most {limit:.2f} units, got {mean:.2f}"
