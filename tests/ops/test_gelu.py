"""layer_norm_gelu: accuracy of result and gradients, layouts, affine or not, messages."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.accuracy import assert_accurate
from support.tensors import BACKENDS, FLOATS, dtypes, in_layout, random_rows, widths
from torch import Tensor
from torch.library import opcheck

from d2v_kernels import layer_norm_gelu, use_backend

ops = torch.ops.d2v
layouts_2d = st.sampled_from(["contiguous", "offset", "sliced", "rows_apart"])


def leaf(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().requires_grad_()


def check(backend: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, grad: Tensor, eps: float = 1e-5) -> None:
    """Result and gradients against float64."""
    x, weight, bias = leaf(x), leaf(weight), leaf(bias)
    wanted = [t for t in (x, weight, bias) if t is not None]
    with use_backend(backend):
        y = layer_norm_gelu(x, weight, bias, eps=eps)
        got = torch.autograd.grad(y, wanted, grad)
    assert y.is_contiguous()
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    results = []
    for dtype in (compute, torch.float64):
        a, w, b = (None if t is None else t.detach().to(dtype) for t in (x, weight, bias))
        gradients = reference.layer_norm_gelu_backward(grad.to(dtype), a, w, b, eps)
        kept = [g for g, t in zip(gradients, (x, weight, bias), strict=True) if t is not None]
        results.append([reference.layer_norm_gelu(a, w, b, eps), *kept])
    for result, careful, truth in zip([y.detach(), *got], *results, strict=True):
        assert_accurate(result, careful.to(result.dtype), truth, factor=8.0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 40), c=widths, dtype=dtypes, affine_dtype=dtypes, layout=layouts_2d, has_weight=st.booleans(),
    has_bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_accuracy(backend, rows, c, dtype, affine_dtype, layout, has_weight, has_bias, seed) -> None:
    x, grad = (in_layout(random_rows((rows, c), dtype, seed + i), layout) for i in range(2))
    weight = random_rows((c,), affine_dtype, seed + 2) if has_weight else None
    bias = random_rows((c,), affine_dtype, seed + 3) if has_bias else None
    check(backend, x, weight, bias, grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(129, 512), (37, 768), (9, 1280)])
def test_published_widths(backend, dtype, shape) -> None:
    x, grad = random_rows(shape, dtype, 0, offset=3.0), random_rows(shape, dtype, 1)
    check(backend, x, 1.0 + 0.1 * torch.randn(shape[1]), 0.1 * torch.randn(shape[1]), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_is_the_formula_of_torch(dtype) -> None:
    x = torch.randn(3, 7, 33, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(33, dtype=dtype, requires_grad=True) for _ in range(2))
    y = layer_norm_gelu(x, weight, bias, eps=1e-6)
    z = F.gelu(F.layer_norm(x, (33,), weight, bias, 1e-6))
    torch.testing.assert_close(y, z)
    grad = torch.randn_like(y)
    got, want = (torch.autograd.grad(result, (x, weight, bias), grad) for result in (y, z))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_offset_keeps_variance(backend) -> None:
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) + 1000.0
    check(backend, x, None, None, torch.randn(20, 64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend) -> None:
    x = torch.randn(6, 16)
    x[2, 3] = math.nan
    x = x.requires_grad_()
    weight = torch.ones(16, requires_grad=True)
    with use_backend(backend):
        y = layer_norm_gelu(x, weight)
        y.sum().backward()
    assert y.isnan().any(dim=1).tolist() == [False, False, True, False, False, False]
    assert x.grad.isnan().all(dim=1).tolist() == [False, False, True, False, False, False]
    assert weight.grad.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values(backend) -> None:
    """Far out GELU is 0 or the identity, and its gradient 0 or 1; nothing overflows."""
    bias = torch.tensor([-60.0, -12.0, 12.0, 60.0])
    x = torch.randn(3, 4, requires_grad=True)
    with use_backend(backend):
        y = layer_norm_gelu(x, None, bias)
        y.sum().backward()
    assert y[:, :2].abs().max() < 1e-12
    torch.testing.assert_close(y[:, 2:], F.layer_norm(x, (4,))[:, 2:] + bias[2:])
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_repeat_bitwise(backend) -> None:
    x, weight = torch.randn(300, 96, requires_grad=True), torch.randn(96, requires_grad=True)
    with use_backend(backend):
        y = layer_norm_gelu(x, weight)
        runs = [torch.autograd.grad(y, (x, weight), y.detach(), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("affine", [False, True])
def test_gradcheck(backend, affine) -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    more = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)] if affine else []
    with use_backend(backend):
        assert torch.autograd.gradcheck(layer_norm_gelu, (x, *more))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(backend, grad) -> None:
    x, weight = torch.randn(5, 8, requires_grad=grad), torch.randn(8, requires_grad=grad)
    with use_backend(backend):
        opcheck(ops.layer_norm_gelu.default, (x, weight, None, 1e-5))
        opcheck(ops.layer_norm_gelu.default, (x, None, weight, 1e-5))
        if not grad:
            opcheck(ops.layer_norm_gelu_backward.default, (torch.randn(5, 8), x, None, weight, 1e-5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend) -> None:
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(8, requires_grad=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return layer_norm_gelu(x * 2, weight).square().sum()

    with use_backend(backend):
        want = torch.autograd.grad(run(x, weight), (x, weight))
        got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(x, weight), (x, weight))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_expanded(backend) -> None:
    empty, x = torch.zeros(0, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    with use_backend(backend):
        layer_norm_gelu(empty, weight).sum().backward()
        assert weight.grad.tolist() == [0.0] * 4
        layer_norm_gelu(x).sum().backward()
    assert x.grad.isfinite().all()


def test_double_backward_is_refused() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    (g,) = torch.autograd.grad(layer_norm_gelu(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        g.sum().backward()


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((X, torch.ones(4)), {}, ValueError, r"shape of weight: expected \(3,\), got \(4,\)"),
        ((X, None, torch.ones(1, 3)), {}, ValueError, "shape of bias"),
        ((X.int(),), {}, TypeError, "dtype of x.*got int32"),
        ((X, X[0].int()), {}, TypeError, "dtype of weight.*got int32"),
        ((torch.tensor(1.0),), {}, ValueError, "0-D"),
        ((X,), {"eps": 0.0}, ValueError, "eps: expected above 0, got 0.0"),
        ((X, torch.ones(3, device="meta")), {}, ValueError, "device of weight"),
    ],
)
def test_messages(arguments, options, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        layer_norm_gelu(*arguments, **options)
    assert str(caught.value).startswith("layer_norm_gelu")
