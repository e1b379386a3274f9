"""gelu and gelu_linear: accuracy of results and gradients, the ends of the number line, what is kept for backward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.accuracy import assert_accurate
from support.tensors import BACKENDS, FLOATS, INTERPRETED, dtypes, in_layout, random_rows
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from d2v_kernels import gelu, gelu_linear, use_backend

ops = torch.ops.d2v
layouts_2d = st.sampled_from(["contiguous", "offset", "sliced", "rows_apart", "transposed"])


def laid_out(x: Tensor, layout: str) -> Tensor:
    return x.t().contiguous().t() if layout == "transposed" else in_layout(x, layout)


def truths(grad: Tensor, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient and activation: carefully in float32 (float64 for float64), and in float64."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    careful, truth = (reference.gelu_backward(grad.to(d), x.to(d)) for d in (compute, torch.float64))
    return [t.to(x.dtype) for t in careful], list(truth)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.sampled_from([0, 1, 3, 17, 33, 100]), min_size=1, max_size=3), dtype=dtypes, layout=layouts_2d,
    size=st.sampled_from([1.0, 4.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_accuracy(backend, shape, dtype, layout, size, seed) -> None:
    x, grad = (size * random_rows(shape, torch.float32, seed + i) for i in range(2))
    x, grad = x.to(dtype), grad.to(dtype)
    if len(shape) == 2:
        x = laid_out(x, layout)
    x.requires_grad_()
    with use_backend(backend):
        y = gelu(x)
        (of_x,) = torch.autograd.grad(y, x, grad)
        both = ops.gelu_backward(grad, x.detach().contiguous())
        product = grad.clone()
        again = ops.gelu_backward_(product, x.detach().contiguous())
    for got, careful, truth in zip((of_x, y), *truths(grad, x.detach()), strict=True):
        assert_accurate(got.detach(), careful, truth)
    assert torch.equal(both[0], of_x) and torch.equal(both[1], y)
    assert torch.equal(product, of_x) and torch.equal(again, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_whole_number_line(backend, dtype) -> None:
    """Also where pieces of the native kernels' table meet, and past its end."""
    x = torch.linspace(-14.0, 14.0, 1001 if INTERPRETED else 60001).to(dtype)
    grad = torch.ones_like(x)
    with use_backend(backend):
        got = ops.gelu_backward(grad, x)
    for ours, careful, truth in zip(got, *truths(grad, x), strict=True):
        assert_accurate(ours, careful, truth, factor=3.0)
    far = x.double().abs() > 8.0
    assert (got[1].double()[far] - x.double()[far].clamp_min(0.0)).abs().max() < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [6, 71])
def test_ends_of_the_number_line(backend, dtype, count) -> None:
    """Limits at infinity (where x Phi(x) itself is no number), NaN, zero; in whole vectors and in the rest."""
    values = [-math.inf, math.inf, math.nan, -1e4, 1e4, 0.0]
    want = torch.tensor([0.0, math.inf, math.nan, 0.0, 1e4, 0.0], dtype=dtype).repeat(count // 6)
    slope = torch.tensor([0.0, 1.0, math.nan, 0.0, 1.0, 0.5], dtype=dtype).repeat(count // 6)
    x = torch.tensor(values, dtype=dtype).repeat(count // 6)
    with use_backend(backend):
        of_x, y = ops.gelu_backward(torch.ones_like(x), x)
        torch.testing.assert_close(gelu(x), want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(of_x, slope, rtol=1e-6, atol=0, equal_nan=True)


def test_reference_is_the_formula_of_torch() -> None:
    x = torch.linspace(-20.0, 20.0, 999, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(999, dtype=torch.float64)
    with use_backend("reference"):
        torch.testing.assert_close(ops.gelu_backward(grad, x.detach())[0], torch.autograd.grad(F.gelu(x), x, grad)[0])
        torch.testing.assert_close(gelu(x), F.gelu(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(backend, grad) -> None:
    x = torch.randn(5, 8, requires_grad=grad)
    with use_backend(backend):
        opcheck(ops.gelu.default, (x,))
        if not grad:
            opcheck(ops.gelu_backward.default, (torch.randn(5, 8), x))
            opcheck(ops.gelu_backward_.default, (torch.randn(5, 8), x))


def linear_inputs(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 5, 8)) -> list[Tensor]:
    return [random_rows(s, dtype, i).requires_grad_() for i, s in enumerate((shape, (4, shape[-1]), (4,)))]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(F.gelu(x), weight, bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 5, 8), (7, 33), (6,), (0, 8), (2, 0, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gelu_linear_is_linear_of_gelu(backend, shape, with_bias) -> None:
    inputs = linear_inputs(shape=shape)[: 3 if with_bias else 2]
    want = plain(*inputs)
    grad = torch.randn_like(want)
    wanted = torch.autograd.grad(want, inputs, grad)
    with use_backend(backend):
        got = gelu_linear(*inputs)
        gradients = torch.autograd.grad(got, inputs, grad)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_gradcheck(backend) -> None:
    with use_backend(backend):
        assert torch.autograd.gradcheck(gelu_linear, linear_inputs(torch.float64))
        assert torch.autograd.gradcheck(gelu, linear_inputs(torch.float64)[:1])


PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_needed_gradients_are_computed(needed) -> None:
    inputs = [t.detach().requires_grad_(n) for t, n in zip(linear_inputs(), needed, strict=True)]
    twins = [t.detach().clone().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
    with torch.autograd.profiler.profile() as profile:
        gelu_linear(*inputs).square().sum().backward()
    plain(*twins).square().sum().backward()
    for ours, theirs in zip(inputs, twins, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-2)
    products = sum(e.count for e in profile.key_averages() if e.key in PRODUCTS)
    assert products == 1 + needed[0] + needed[1]


def kept_bytes(call, *inputs: Tensor) -> int:
    """Bytes kept for backward beside the inputs."""
    given = {t.untyped_storage().data_ptr() for t in inputs}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        place = t.untyped_storage().data_ptr()
        if place not in given:
            kept[place] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(*inputs)
    return sum(kept.values())


def test_the_activation_is_not_kept() -> None:
    inputs = linear_inputs()
    assert kept_bytes(plain, *inputs) == inputs[0].numel() * 4
    assert kept_bytes(gelu_linear, *inputs) == 0


def test_strides_and_no_grad() -> None:
    x, weight, bias = (t.detach() for t in linear_inputs(shape=(6, 8)))
    want = plain(x, weight, bias)
    before = x.clone()
    for layout in ("transposed", "sliced", "rows_apart"):
        torch.testing.assert_close(gelu_linear(laid_out(x, layout), weight.t().contiguous().t(), bias), want)
    with torch.inference_mode():
        torch.testing.assert_close(gelu_linear(x, weight, bias), want)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_autocast(kept) -> None:
    """The product in bfloat16; gradients in the dtypes of the inputs."""
    x, weight, bias = linear_inputs()
    x = x.detach().to(kept).requires_grad_()
    results = []
    for call in (plain, gelu_linear):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x, weight, bias)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (x, weight, bias))])
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_checkpoint_gives_the_same_bits() -> None:
    inputs = linear_inputs()
    runs = []
    for call in (gelu_linear, lambda *a: checkpoint(gelu_linear, *a, use_reentrant=False)):
        y = call(*inputs)
        runs.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole(autocast) -> None:
    inputs = linear_inputs()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return gelu_linear(gelu(x * 2), weight, bias).float().square().sum()

    want = torch.autograd.grad(run(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    torch.testing.assert_close(got, want, rtol=1e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-5)


def test_double_backward_is_refused() -> None:
    inputs = linear_inputs()
    (g,) = torch.autograd.grad(gelu_linear(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        g.sum().backward()
    (g,) = torch.autograd.grad(gelu(inputs[0]).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="gelu: double backward"):
        g.sum().backward()


X, W = torch.ones(2, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gelu(X.int()), TypeError, "gelu: dtype of x.*got int32"),
        (lambda: ops.gelu(X.t()), ValueError, "gelu: layout of x: expected contiguous"),
        (lambda: ops.gelu_backward(X.double(), X), TypeError, "gelu_backward: dtype of grad: expected float32"),
        (lambda: ops.gelu_backward_(X[:1], X), ValueError, r"gelu_backward_: shape of grad: expected \(2, 3\)"),
        (lambda: gelu_linear(X, W.t()), ValueError, "gelu_linear: columns of weight: expected 3, got 4"),
        (lambda: gelu_linear(X, W[0]), ValueError, r"gelu_linear: weight: expected 2 dimensions \(C, H\)"),
        (lambda: gelu_linear(X, W, X[0]), ValueError, r"gelu_linear: shape of bias: expected \(4,\), got \(3,\)"),
        (lambda: gelu_linear(X, W.double()), TypeError, "gelu_linear: dtype of weight: expected float32, got float64"),
        (lambda: gelu_linear(X, W, W[:, 0].half()), TypeError, "gelu_linear: dtype of bias: expected float32"),
        (lambda: gelu_linear(X[0, 0], W), ValueError, "gelu_linear: x: .*0-D"),
        (lambda: gelu_linear(X, W.to("meta")), ValueError, "gelu_linear: device of weight"),
    ],
)
def test_messages(call, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert str(caught.value).startswith("gelu")
