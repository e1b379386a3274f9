"""masked_regression_loss: parts of the rows, monitors across parts, infinities.

Not shown: that the compiler leaves Kahan's correction as it is written, and the order of sums over lanes.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import reference
from support.accuracy import assert_accurate
from support.tensors import in_layout, random_rows
from torch import Tensor

from d2v_kernels import masked_regression_loss, use_backend
from d2v_kernels.triton import loss
from d2v_kernels.triton.runtime import Tile

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


def check(x: Tensor, y: Tensor, x_rows: Tensor | None, y_rows: Tensor | None, beta: float) -> None:
    x = x.detach().requires_grad_()
    result = masked_regression_loss(x, y, x_rows, y_rows, beta=beta, scale=0.3)
    (grad,) = torch.autograd.grad(result.loss, x)
    arguments = (x_rows, y_rows, beta, 0.3)
    x = x.detach()
    careful = reference.masked_regression_loss(x.float(), y.float(), *arguments)
    truth = reference.masked_regression_loss(x.double(), y.double(), *arguments)
    for got, a, b in zip(result, careful, truth, strict=True):
        assert_accurate(got.detach(), a, b, factor=8.0)
    one = torch.ones((), dtype=torch.float64)
    careful = reference.masked_regression_loss_backward(one.float(), x.float(), y.float(), *arguments).to(x.dtype)
    assert_accurate(grad, careful, reference.masked_regression_loss_backward(one, x.double(), y.double(), *arguments))


@pytest.mark.parametrize(("dtype", "target_dtype", "beta"), [(F32, F32, 0.0), (BF16, F32, 0.5), (F16, BF16, 0.0)])
def test_parts(dtype, target_dtype, beta, monkeypatch) -> None:
    """Three parts of several blocks, the last one short; three blocks of channels."""
    monkeypatch.setattr(loss, "LOSS_SPLITS", 4)
    monkeypatch.setattr(loss, "loss_tile", lambda channels: Tile(4, 16, 1))
    monkeypatch.setattr(Tile, "columns", lambda channels: Tile(4, 16, 1))
    x = in_layout(random_rows((60, 37), dtype, 0), "sliced")
    y = in_layout(random_rows((30, 37), target_dtype, 1, offset=5.0), "rows_apart")
    generator = torch.Generator().manual_seed(0)
    x_rows, y_rows = torch.randperm(60, generator=generator)[:41], torch.randint(0, 30, (41,), generator=generator)
    check(x, y, x_rows.int(), torch.stack([y_rows, y_rows], 1)[:, 0], beta)
    check(x[:30], y, None, None, beta)


def test_parts_with_far_means(monkeypatch) -> None:
    """The monitors merge parts whose means differ by far more than the deviations in them."""
    monkeypatch.setattr(loss, "LOSS_SPLITS", 4)
    monkeypatch.setattr(loss, "loss_tile", lambda channels: Tile(4, 16, 1))
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) + torch.arange(64.0)[:, None] * 10
    check(x, torch.full_like(x, 3.0), None, None, 0.0)
    small = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * 0.01 + 100.0
    result = masked_regression_loss(small, torch.full_like(small, 3.0))
    truth = torch.sqrt(small.double().var(dim=0) + 1e-6).mean()
    assert abs(float(result.prediction_std) / float(truth) - 1) < 1e-3
    assert abs(float(result.target_std) - 1e-3) < 1e-6


def test_infinite_error_is_infinite() -> None:
    x = torch.zeros(40, 16)
    x[0, 0] = math.inf
    assert masked_regression_loss(x, torch.zeros(40, 16)).loss == math.inf
    assert masked_regression_loss(x, torch.zeros(40, 16), beta=1.0).loss == math.inf


def test_many_equal_errors_add_up(monkeypatch) -> None:
    """2^-14 added 512 times, one row after the other, to a sum of 4096 whose last place is worth 2^-11."""
    monkeypatch.setattr(loss, "LOSS_SPLITS", 1)
    monkeypatch.setattr(loss, "loss_tile", lambda channels: Tile(1, 16, 1))
    x = torch.full((513, 1), 2.0**-7)
    x[0] = 64.0
    assert float(masked_regression_loss(x, torch.zeros(513, 1)).loss) == 4096.0 + 2.0**-5


def test_bits_repeat() -> None:
    x, y = torch.randn(200, 50), torch.randn(200, 50)
    first, second = (torch.stack(masked_regression_loss(x, y)) for _ in range(2))
    assert torch.equal(first, second)
