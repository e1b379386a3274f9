"""dropout_add_layer_norm: accuracy of results and gradients, what is dropped, layouts, messages."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.accuracy import assert_accurate
from support.tensors import BACKENDS, FLOATS, dtypes, in_layout, layouts, random_rows, widths
from torch import Tensor
from torch.library import opcheck

from d2v_kernels import dropout_add_layer_norm, use_backend

ops = torch.ops.d2v


def leaf(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().requires_grad_()


def make_keys(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(seed))


def check(
    backend: str, branch: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, dropout: float,
    grads: tuple[Tensor, Tensor | None],
) -> None:  # fmt: skip
    """Results and gradients against float64, at the same draws."""
    branch, residual, weight, bias = leaf(branch), leaf(residual), leaf(weight), leaf(bias)
    leaves = [t for t in (branch, residual, weight, bias) if t is not None]
    keys = make_keys(len(branch)) if dropout else None
    with use_backend(backend):
        normed, total = dropout_add_layer_norm(branch, residual, weight, bias, dropout=dropout, keys=keys)
        outputs = [(normed, grads[0]), (total, grads[1])]
        outputs = [(y, g) for y, g in outputs if g is not None]
        got = torch.autograd.grad([y for y, _ in outputs], leaves, [g for _, g in outputs])
    assert normed.is_contiguous()
    assert total.is_contiguous()
    compute = torch.float64 if branch.dtype == torch.float64 else torch.float32
    results = []
    for dtype in (compute, torch.float64):
        b, r, w, o, g, h = (
            None if t is None else t.detach().to(dtype) for t in (branch, residual, weight, bias, *grads)
        )
        _, sum_of = reference.dropout_add_layer_norm(b, r, w, o, keys, dropout, 1e-5)
        # The norm is that of the total as it is given back, rounded.
        exact = total.detach().to(dtype)
        normal, _ = reference.dropout_add_layer_norm(exact * 0, exact, w, o, None, 0.0, 1e-5)
        gradients = reference.dropout_add_layer_norm_backward(g, h, exact, w, keys, dropout, 1e-5)
        of_branch = gradients[0] if dropout else gradients[1]
        kept = [x for x, t in zip(gradients[2:], (weight, bias), strict=True) if t is not None]
        results.append([normal, sum_of, of_branch, gradients[1], *kept])
    for result, careful, truth in zip([normed.detach(), total.detach(), *got], *results, strict=True):
        assert_accurate(result, careful.to(result.dtype), truth, factor=8.0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 4), t=st.integers(0, 9), c=widths.filter(lambda c: c > 1), dtype=dtypes, affine_dtype=dtypes,
    layout=layouts, has_weight=st.booleans(), has_bias=st.booleans(), has_second=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1, 0.7]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_accuracy(backend, n, t, c, dtype, affine_dtype, layout, has_weight, has_bias, has_second, dropout, seed):
    branch, residual, *grads = (in_layout(random_rows((n, t, c), dtype, seed + i), layout) for i in range(4))
    weight = random_rows((c,), affine_dtype, seed + 4) if has_weight else None
    bias = random_rows((c,), affine_dtype, seed + 5) if has_bias else None
    check(backend, branch, residual, weight, bias, dropout, (grads[0], grads[1] if has_second else None))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 125, 384), (9, 17, 768)])
def test_published_widths(backend, dtype, shape) -> None:
    branch, residual, *grads = (random_rows(shape, dtype, i, offset=2.0 * i) for i in range(4))
    weight, bias = 1.0 + 0.1 * torch.randn(shape[2]), 0.1 * torch.randn(shape[2])
    check(backend, branch, residual, weight, bias, 0.1, (grads[0], grads[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_formula_of_torch(backend) -> None:
    branch, residual = (torch.randn(3, 7, 33, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(33, requires_grad=True) for _ in range(2))
    leaves = (branch, residual, weight, bias)
    total = residual + branch
    wanted = F.layer_norm(total, (33,), weight, bias, 1e-6), total
    with use_backend(backend):
        got = dropout_add_layer_norm(branch, residual, weight, bias, eps=1e-6)
        torch.testing.assert_close(got, wanted)
        grads = [torch.randn(3, 7, 33) for _ in range(2)]
        for which in ([0], [1], [0, 1]):
            results = (
                torch.autograd.grad([y[i] for i in which], leaves, [grads[i] for i in which], True, allow_unused=True)
                for y in (got, wanted)
            )
            for x, y in zip(*results, strict=True):
                torch.testing.assert_close(x, torch.zeros_like(x) if y is None else y, rtol=1e-4, atol=1e-5)


def kept_elements(shape: tuple[int, int, int], keys: Tensor, dropout: float, backend: str) -> Tensor:
    zeros = torch.zeros(shape)
    with use_backend(backend):
        return dropout_add_layer_norm(zeros + 1, zeros, dropout=dropout, keys=keys)[1] != 0


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("c", [1, 5, 16, 37, 100])
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.999, 1.0 - 2.0**-40])
def test_backends_drop_the_same(backend, c, dropout) -> None:
    keys = torch.cat([make_keys(2), torch.tensor([0, -1, 2**63 - 1, -(2**63)])])
    shape = (len(keys), 6, c)
    assert torch.equal(*(kept_elements(shape, keys, dropout, b) for b in ("reference", backend)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_is_a_function_of_key_token_and_channel(backend) -> None:
    keys = make_keys(5)
    whole = kept_elements((5, 9, 40), keys, 0.3, backend)
    assert torch.equal(kept_elements((2, 4, 21), keys[3:], 0.3, backend), whole[3:, :4, :21])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[:, 0], whole[:, 1])


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.5, 0.9])
def test_frequency_and_independence(dropout) -> None:
    kept = kept_elements((40, 50, 200), make_keys(40), dropout, "auto").double()
    count, deviation = kept.numel(), math.sqrt(dropout * (1.0 - dropout))
    assert abs(float(kept.mean()) - (1.0 - dropout)) < 5.0 * deviation / count**0.5
    z = (kept - (1.0 - dropout)) / deviation
    for dim in range(3):  # every sample, token and channel alike
        others = [d for d in range(3) if d != dim]
        assert float(z.mean(dim=others).abs().max()) * (count / kept.shape[dim]) ** 0.5 < 5.0
    for dim, step in ((0, 1), (1, 1), (2, 1), (2, 2), (2, 4), (2, 16)):  # neighbours, words of one draw, vectors
        pairs = z.narrow(dim, 0, kept.shape[dim] - step) * z.narrow(dim, step, kept.shape[dim] - step)
        assert abs(float(pairs.mean())) < 5.0 / pairs.numel() ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_elements_are_scaled(backend) -> None:
    branch, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    keys = make_keys(2)
    kept = kept_elements((2, 3, 8), keys, 0.25, backend)
    with use_backend(backend):
        _, total = dropout_add_layer_norm(branch, residual, dropout=0.25, keys=keys)
    torch.testing.assert_close(total, residual + torch.where(kept, branch / 0.75, 0.0))
    assert torch.equal(total[~kept], residual[~kept])


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_drops_what_forward_dropped(backend) -> None:
    branch, residual = (torch.randn(2, 5, 50, requires_grad=True) for _ in range(2))
    keys = make_keys(2)
    with use_backend(backend):
        normed, _ = dropout_add_layer_norm(branch, residual, dropout=0.4, keys=keys)
        of_branch, of_residual = torch.autograd.grad(normed.square().sum() + normed[0].sum(), (branch, residual))
    kept = kept_elements((2, 5, 50), keys, 0.4, backend)
    torch.testing.assert_close(of_branch, torch.where(kept, of_residual / 0.6, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_offsets_and_outliers(backend) -> None:
    generator = torch.Generator().manual_seed(0)
    branch, residual, grad = (torch.randn(4, 5, 64, generator=generator) for _ in range(3))
    check(backend, branch, residual + 1000.0, None, None, 0.0, (grad, None))
    residual[..., 0] += 1e4
    check(backend, branch, residual, None, None, 0.0, (grad, None))
    constant = torch.full((1, 3, 37), 0.1)
    with use_backend(backend):
        normed, _ = dropout_add_layer_norm(constant, constant * 0)
    assert normed.abs().max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_channel(backend) -> None:
    """Its norm is 0 and so is the gradient, but for the rounding of one product over sqrt(eps)."""
    branch, residual, weight, bias = (torch.randn(shape, requires_grad=True) for shape in [(2, 3, 1)] * 2 + [(1,)] * 2)
    with use_backend(backend):
        normed, _ = dropout_add_layer_norm(branch, residual, weight, bias)
        normed.square().sum().backward()
    assert torch.equal(normed, bias.detach().expand(2, 3, 1))
    assert residual.grad.abs().max() < 1e-3
    assert weight.grad.abs().max() == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(backend, value) -> None:
    branch, residual = torch.randn(2, 3, 40), torch.randn(2, 3, 40)
    branch[0, 1, 3:9], residual[1, 2, 39] = value, value  # dropped or not
    branch, residual = branch.requires_grad_(), residual.requires_grad_()
    weight = torch.ones(40, requires_grad=True)
    with use_backend(backend):
        normed, total = dropout_add_layer_norm(branch, residual, weight, dropout=0.5, keys=make_keys(2))
        normed.sum().backward()
    bad = [False, True, False, False, False, True]
    for x in (normed, branch.grad, residual.grad):
        assert x.isnan().any(dim=2).flatten().tolist() == bad
    assert (~total.isfinite()).any(dim=2).flatten().tolist() == bad
    assert weight.grad.isnan().all()


def test_threads_change_no_bit() -> None:
    branch, residual = (torch.randn(9, 131, 96, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(96, requires_grad=True) for _ in range(2))
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            y = dropout_add_layer_norm(branch, residual, weight, bias, dropout=0.1, keys=make_keys(9))
            runs.append([*y, *torch.autograd.grad(y[0].square().sum() + y[1].sum(), (branch, residual, weight, bias))])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("affine", [False, True])
def test_gradcheck(backend, dropout, affine) -> None:
    inputs = [torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs += [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)] if affine else []

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return dropout_add_layer_norm(*inputs, dropout=dropout, keys=make_keys(2))

    with use_backend(backend):
        assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(backend, grad) -> None:
    x, weight = torch.randn(2, 3, 8, requires_grad=grad), torch.randn(8, requires_grad=grad)
    other, keys = torch.randn(2, 3, 8), make_keys(2)
    with use_backend(backend):
        for dropout in (0.0, 0.3):
            opcheck(ops.dropout_add_layer_norm.default, (x, other, weight, weight, keys, dropout, 1e-5))
            opcheck(ops.dropout_add_layer_norm.default, (other, x, None, None, keys, dropout, 1e-5))
            if not grad:
                for second in (None, other):
                    arguments = (other, second, x, weight, keys, dropout, 1e-5)
                    opcheck(ops.dropout_add_layer_norm_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_whole(backend, dropout) -> None:
    inputs = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(2)]
    weight, keys = torch.randn(8, requires_grad=True), make_keys(2)

    def run(branch: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        normed, total = dropout_add_layer_norm(branch * 2, residual, weight, dropout=dropout, keys=keys)
        return normed.square().sum() + total.sum()

    with use_backend(backend):
        want = torch.autograd.grad(run(*inputs, weight), (*inputs, weight))
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(*inputs, weight), (*inputs, weight))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_a_dropped_element_stays(backend) -> None:
    """In the total, and in the gradient of the branch where that of the total is NaN."""
    branch, residual = torch.full((2, 3, 40), math.nan), torch.zeros(2, 3, 40)
    with use_backend(backend):
        _, total = dropout_add_layer_norm(branch, residual, dropout=0.5, keys=make_keys(2))
        assert total.isnan().all()
        _, total = dropout_add_layer_norm(branch.nan_to_num(1.0), residual, dropout=0.5, keys=make_keys(2))
        rest = (total, None, make_keys(2), 0.5, 1e-5)
        of_branch, *_ = ops.dropout_add_layer_norm_backward(residual, branch, *rest)
    assert of_branch.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty(backend, shape) -> None:
    x, weight = torch.zeros(shape, requires_grad=True), torch.ones(4, requires_grad=True)
    with use_backend(backend):
        normed, total = dropout_add_layer_norm(x, x, weight, dropout=0.1, keys=make_keys(shape[0]))
        (normed.sum() + total.sum()).backward()
    assert normed.shape == total.shape == x.grad.shape == shape
    assert weight.grad.tolist() == [0.0] * 4


def test_nothing_as_large_as_the_rows_is_kept_but_the_total() -> None:
    branch, residual = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, total = dropout_add_layer_norm(branch, residual, torch.ones(8), dropout=0.1, keys=make_keys(2))
    assert [t.data_ptr() for t in saved if t.numel() > 8] == [total.data_ptr()]


def test_double_backward_is_refused() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    (g,) = torch.autograd.grad(dropout_add_layer_norm(x, x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        g.sum().backward()


X, KEYS = torch.ones(2, 3, 4), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((X[0], X[0]), {}, ValueError, "branch: expected 3 dimensions"),
        ((X, X[:1]), {}, ValueError, r"shape of residual: expected \(2, 3, 4\), got \(1, 3, 4\)"),
        ((X, X.half()), {}, TypeError, "dtype of residual: expected float32, got float16"),
        ((X.int(), X.int()), {}, TypeError, "dtype of branch.*got int32"),
        ((X, X, torch.ones(5)), {}, ValueError, r"shape of weight: expected \(4,\), got \(5,\)"),
        ((X, X, None, torch.ones(1, 4)), {}, ValueError, "shape of bias"),
        ((X, X, X[0, 0].int()), {}, TypeError, "dtype of weight.*got int32"),
        ((X, X, torch.ones(4, device="meta")), {}, ValueError, "device of weight"),
        ((X, X), {"eps": 0.0}, ValueError, "eps: expected above 0, got 0.0"),
        ((X, X), {"dropout": 1.0}, ValueError, "dropout: expected 0 or more and less than 1, got 1.0"),
        ((X, X), {"dropout": -0.1}, ValueError, "dropout: expected 0 or more"),
        ((X, X), {"dropout": 0.1}, ValueError, "keys: expected a tensor where dropout is above 0, got None"),
        ((X, X), {"dropout": 0.1, "keys": KEYS[:1]}, ValueError, r"shape of keys: expected \(2,\), got \(1,\)"),
        ((X, X), {"dropout": 0.1, "keys": KEYS.int()}, TypeError, "dtype of keys: expected int64, got int32"),
    ],
)  # fmt: skip
def test_messages(arguments, options, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        dropout_add_layer_norm(*arguments, **options)
    assert str(caught.value).startswith("dropout_add_layer_norm")
