"""masked_regression_loss: accuracy of loss, gradient and monitors; row selection; messages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.accuracy import assert_accurate
from support.tensors import BACKENDS, FLOATS, dtypes, in_layout, indices, random_rows, widths
from torch import Tensor
from torch.library import opcheck

from d2v_kernels import masked_regression_loss, use_backend

ops = torch.ops.d2v
layouts_2d = st.sampled_from(["contiguous", "offset", "sliced", "rows_apart"])


def check(backend: str, x: Tensor, y: Tensor, x_rows, y_rows, beta: float, scale: float) -> None:
    """Loss, monitors and gradient against float64."""
    x = x.detach().requires_grad_()
    with use_backend(backend):
        result = masked_regression_loss(x, y, x_rows, y_rows, beta=beta, scale=scale)
        (grad,) = torch.autograd.grad(result.loss * 1.5, x)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    xd, yd = x.detach(), y
    arguments = (x_rows, y_rows, beta, scale)
    careful = reference.masked_regression_loss(xd.to(compute), yd.to(compute), *arguments)
    truth = reference.masked_regression_loss(xd.double(), yd.double(), *arguments)
    for got, a, b in zip(result, careful, truth, strict=True):
        assert_accurate(got.detach(), a, b, factor=8.0)
    factor = torch.tensor(1.5, dtype=compute)
    a = reference.masked_regression_loss_backward(factor, xd.to(compute), yd.to(compute), *arguments).to(x.dtype)
    b = reference.masked_regression_loss_backward(factor.double(), xd.double(), yd.double(), *arguments)
    assert_accurate(grad, a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 70), target_rows=st.integers(1, 40), c=widths, dtype=dtypes, target_dtype=dtypes,
    index_dtype=indices, layout=layouts_2d, beta=st.sampled_from([0.0, 0.5, 4.0]), select=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_accuracy(backend, rows, target_rows, c, dtype, target_dtype, index_dtype, layout, beta, select, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = target_rows if select else rows
    x = in_layout(random_rows((rows, c), dtype, seed), layout)
    y = in_layout(random_rows((count, c), target_dtype, seed + 1), layout)
    x_rows = y_rows = None
    if select:
        picked = min(rows, 1 + seed % 30)
        x_rows = torch.randperm(rows, generator=generator)[:picked].to(index_dtype)
        y_rows = torch.randint(0, target_rows, (picked,), generator=generator).to(index_dtype)
    check(backend, x, y, x_rows, y_rows, beta, 1.0 / math.sqrt(c))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_published_shape(backend, dtype, beta) -> None:
    """Predictions of 8 rows x 157 masked patches; the target of a sample serves 4 masks."""
    generator = torch.Generator().manual_seed(0)
    x, y = random_rows((8 * 157, 768), dtype, 1), random_rows((2 * 196, 768), torch.float32, 2)
    y_rows = torch.cat([torch.randperm(196, generator=generator)[:157] + 196 * (r // 4) for r in range(8)])
    check(backend, x, y, None, y_rows, beta, 768**-0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_monitors_see_small_variance_beside_a_large_mean(backend) -> None:
    x = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)) * 0.01 + 100.0
    with use_backend(backend):
        result = masked_regression_loss(x, torch.full_like(x, 3.0))
    truth = torch.sqrt(x.double().var(dim=0) + 1e-6).mean()
    assert abs(float(result.prediction_std) / float(truth) - 1) < 1e-3
    assert abs(float(result.target_std) - 1e-3) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows(backend, rows) -> None:
    x = torch.ones(rows, 4, requires_grad=True)
    with use_backend(backend):
        result = masked_regression_loss(x, torch.zeros(rows, 4))
        result.loss.backward()
    assert result.loss.item() == 4.0 * rows
    assert result.prediction_std.isnan()
    assert result.target_std.isnan()
    assert x.grad.tolist() == [[2.0] * 4] * rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_nan_in_means_nan_out(backend, beta) -> None:
    x = torch.randn(20, 8)
    x[3, 5] = math.nan
    x = x.requires_grad_()
    with use_backend(backend):
        result = masked_regression_loss(x, torch.zeros(20, 8), beta=beta)
        result.loss.backward()
        clean = masked_regression_loss(x, torch.zeros(20, 8), torch.tensor([1, 2]), torch.tensor([1, 2]), beta=beta)
    assert result.loss.isnan()
    assert result.prediction_std.isnan()
    assert not result.target_std.isnan()
    assert x.grad.isnan().nonzero().tolist() == [[3, 5]]
    assert not clean.loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_not_selected_have_zero_gradient(backend) -> None:
    x = torch.randn(2, 5, 3, requires_grad=True)
    rows = torch.tensor([9, 0, 4])
    with use_backend(backend):
        masked_regression_loss(x, torch.zeros(2, 5, 3), rows, rows).loss.backward()
    rest = sorted(set(range(10)) - set(rows.tolist()))
    assert not x.grad.view(10, 3)[rest].any()
    torch.testing.assert_close(x.grad.view(10, 3)[rows], 2 * x.detach().view(10, 3)[rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_at_any_thread_count(backend) -> None:
    x, y = torch.randn(5000, 300), torch.randn(5000, 300)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            with use_backend(backend):
                results.append(torch.stack(masked_regression_loss(x, y)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], results[1]) or backend == "reference"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gradcheck(backend, beta) -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, dtype=torch.float64)
    rows = torch.tensor([5, 0, 2]), torch.tensor([1, 1, 3])
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda x: masked_regression_loss(x, y, *rows, beta=beta, scale=0.7).loss, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(backend, grad) -> None:
    x, y = torch.randn(7, 8, requires_grad=grad), torch.randn(9, 8)
    rows = torch.tensor([1, 4, 6]), torch.tensor([0, 0, 8])
    with use_backend(backend):
        opcheck(ops.masked_regression_loss.default, (x, y, *rows, 0.5, 2.0))
        opcheck(ops.masked_regression_loss.default, (x, y[:7], None, None, 0.0, 2.0))
        if not grad:
            opcheck(ops.masked_regression_loss_backward.default, (torch.tensor(2.0), x, y, *rows, 0.5, 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend) -> None:
    x, y = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8)

    def scaled(x: Tensor) -> Tensor:
        return masked_regression_loss(x * 2, y).loss * 3

    with use_backend(backend):
        (want,) = torch.autograd.grad(scaled(x), x)
        (got,) = torch.autograd.grad(torch.compile(scaled, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, want)


def test_monitors_carry_no_gradient() -> None:
    result = masked_regression_loss(torch.randn(4, 3, requires_grad=True), torch.randn(4, 3))
    assert result.loss.requires_grad
    assert not result.prediction_std.requires_grad
    assert not result.target_std.requires_grad


def test_target_gets_no_gradient() -> None:
    target = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="detach"):
        masked_regression_loss(torch.randn(4, 3, requires_grad=True), target).loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_out_of_range(backend) -> None:
    x, good, bad = torch.ones(4, 3), torch.tensor([0]), torch.tensor([4])
    with use_backend(backend):
        with pytest.raises(ValueError, match=r"masked_regression_loss: prediction_rows.*0 to 3"):
            masked_regression_loss(x, x, bad, good)
        with pytest.raises(ValueError, match=r"masked_regression_loss: target_rows"):
            masked_regression_loss(x, x, good, -bad)
        with pytest.raises(ValueError, match=r"masked_regression_loss_backward: prediction_rows"):
            ops.masked_regression_loss_backward(torch.tensor(1.0), x, x, bad, good, 0.0, 1.0)


X, R = torch.ones(4, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((X, torch.ones(4, 2)), {}, ValueError, "channels of target: expected 3, got 2"),
        ((X, torch.ones(5, 3)), {}, ValueError, r"selected target rows: expected 4 .*got 5"),
        ((X, X, R, R[:1]), {}, ValueError, "selected target rows"),
        ((X, X, R.float(), R), {}, TypeError, "dtype of prediction_rows"),
        ((X, X, R[None], R), {}, ValueError, "prediction_rows: expected 1 dimensions"),
        ((X.int(), X), {}, TypeError, "dtype of prediction.*int32"),
        ((X, X), {"beta": -1.0}, ValueError, "beta"),
        ((torch.tensor(1.0), X), {}, ValueError, "0-D"),
        ((X, X.to("meta")), {}, ValueError, "device of target"),
    ],
)
def test_messages(arguments, options, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        masked_regression_loss(*arguments, **options)
    assert str(caught.value).startswith("masked_regression_loss")
