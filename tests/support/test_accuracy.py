"""The comparison helpers must fail on planted errors."""

import pytest
import torch

from support.accuracy import assert_accurate
from support.tensors import LAYOUTS, in_layout


def _case() -> tuple[torch.Tensor, torch.Tensor]:
    truth = torch.randn(64, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return truth, truth.float()


def test_right_result_passes() -> None:
    truth, careful = _case()
    assert_accurate(careful.clone(), careful, truth)


def test_one_wrong_element_fails() -> None:
    truth, careful = _case()
    wrong = careful.clone()
    wrong[3, 5] += 1e-5
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(wrong, careful, truth)


def test_small_bias_fails() -> None:
    truth, careful = _case()
    careful = truth.bfloat16()
    with pytest.raises(AssertionError, match="bias"):
        assert_accurate((careful.float() + 0.0005).bfloat16().nextafter(careful + 1), careful, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [100, 6400])
def test_cut_bits_fail(dtype: torch.dtype, count: int) -> None:
    """Within four times the error of rounding, and in few elements no bias: only the direction gives it away."""
    truth = _case()[0].flatten()[:count]
    careful = truth.to(dtype)
    cut = torch.where(careful.double().abs() > truth.abs(), careful.nextafter(torch.zeros_like(careful)), careful)
    assert_accurate(careful.clone(), careful, truth)
    with pytest.raises(AssertionError, match=r"bias|rounding"):
        assert_accurate(cut, careful, truth)


def test_missing_nan_fails() -> None:
    truth, careful = _case()
    truth[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="nan"):
        assert_accurate(careful, careful, truth)


@pytest.mark.parametrize("what", ["shape", "dtype"])
def test_wrong_kind_fails(what: str) -> None:
    truth, careful = _case()
    wrong = careful[:-1] if what == "shape" else careful.double()
    with pytest.raises(AssertionError, match=what):
        assert_accurate(wrong, careful, truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_values(layout: str) -> None:
    x = torch.randn(3, 4, 5)
    y = in_layout(x, layout)
    assert torch.equal(x, y)
    assert y.stride(-1) == 1
