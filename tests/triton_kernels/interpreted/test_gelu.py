"""layer_norm_gelu: parts of the rows, widths beyond a warp.

Not shown: the accuracy of a GPU's erf and exp; the order of sums over the lanes of a warp, so bounds, not bits.
"""

from __future__ import annotations

import pytest
import torch
from support import reference
from support.accuracy import assert_accurate
from support.tensors import FLOATS, in_layout, random_rows

from d2v_kernels import use_backend
from d2v_kernels.triton import runtime_norm
from d2v_kernels.triton.runtime import Tile, power_of_two

ops = torch.ops.d2v


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "channels"), [(50, 40), (3, 1100)])
def test_gradients_over_parts(dtype, rows, channels, monkeypatch) -> None:
    monkeypatch.setattr(runtime_norm, "GELU_SPLITS", 3)
    monkeypatch.setattr(runtime_norm, "backward_tile", lambda c, affine: Tile(4, power_of_two(c), 1))
    x = in_layout(random_rows((rows, channels), dtype, 0, offset=2.0), "sliced")
    grad = in_layout(random_rows((rows, channels), dtype, 1), "rows_apart")
    weight, bias = random_rows((channels,), torch.float32, 2), random_rows((channels,), dtype, 3)
    with use_backend("triton"):
        got = ops.layer_norm_gelu_backward(grad, x, weight, bias, 1e-5)
    results = []
    for kind in (torch.float32, torch.float64):
        results.append(reference.layer_norm_gelu_backward(*(t.to(kind) for t in (grad, x, weight, bias)), 1e-5))
    for result, careful, truth in zip(got, *results, strict=True):
        assert_accurate(result, careful.to(result.dtype), truth, factor=8.0)


def test_the_short_form_of_bfloat16() -> None:
    """Every number from -9 to 9: within 0.62 of a unit, of which rounding is a half; 2e-7 besides where it is tiny."""
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite() & (x.abs() <= 9.0)]
    with use_backend("triton"):
        got = ops.gelu(x).double()
    z = x.double()
    truth = 0.5 * z * torch.special.erfc(-z / 2.0**0.5)
    large = truth.abs() >= 3e-4
    unit = 2.0**-7 * torch.exp2(truth.abs().clamp_min(2.0**-126).log2().floor())
    assert float(((got - truth).abs() / unit)[large].max()) < 0.62
    assert float(((got - truth).abs() - unit / 2)[~large & (z < -1.0)].max()) < 2e-7
    assert float(((got - truth).abs() / unit)[~large & (z.abs() < 1e-2) & (truth.abs() > 1e-37)].max()) < 0.62
