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
    monkeypatch.setattr(runtime_norm, "backward_tile", lambda c: Tile(4, power_of_two(c), 1))
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
