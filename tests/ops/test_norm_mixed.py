"""dropout_add_layer_norm of a 16-bit branch beside a float32 residual: the float32 results, rounded once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tensors import BACKENDS, in_layout, layouts, random_rows, widths
from torch import Tensor
from torch.library import opcheck

from d2v_kernels import dropout_add_layer_norm, use_backend

HALVES = [torch.bfloat16, torch.float16]
ops = torch.ops.d2v


def make_keys(rows: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(3))


def leaves_of(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def gradients(
    outputs: tuple[Tensor, ...], leaves: list[Tensor | None], grads: tuple[Tensor | None, ...]
) -> list[Tensor]:
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [t for t in leaves if t is not None]
    return list(torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs]))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 4), t=st.integers(0, 9), c=widths.filter(lambda c: c > 4),
    half=st.sampled_from(HALVES), layout=layouts,
    has_weight=st.booleans(), has_bias=st.booleans(), dropout=st.sampled_from([0.0, 0.1, 0.7]),
    which=st.sampled_from([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_results_of_the_float32_operator(backend, n, t, c, half, layout, has_weight, has_bias, dropout, which, seed):
    """Whose accuracy test_norm.py has: the same arithmetic on a widened branch."""
    branch, of_copy = (in_layout(random_rows((n, t, c), half, seed + i), layout) for i in range(2))
    residual, of_normed, of_total = (
        in_layout(random_rows((n, t, c), torch.float32, seed + i), layout) for i in (2, 3, 4)
    )
    weight = random_rows((c,), torch.float32, seed + 5) if has_weight else None
    bias = random_rows((c,), half, seed + 6) if has_bias else None
    keys = make_keys(n) if dropout else None
    mine, theirs = leaves_of(branch, residual, weight, bias), leaves_of(branch.float(), residual, weight, bias)
    with use_backend(backend):
        normed, total, copy = dropout_add_layer_norm(*mine, dropout=dropout, keys=keys, copy=True)
        wide = dropout_add_layer_norm(*theirs, dropout=dropout, keys=keys)
        grads = tuple(g if use else None for g, use in zip((of_normed, of_total, of_copy), which, strict=True))
        got = gradients((normed, total, copy), mine, grads)
        parts = [g.float() for g in (grads[0], grads[2]) if g is not None]
        want = gradients(wide, theirs, (sum(parts[1:], parts[0]) if parts else None, grads[1]))
    assert [x.dtype for x in (normed, total, copy)] == [torch.float32, torch.float32, half]
    assert all(x.is_contiguous() for x in (normed, total, copy))
    for x, y in zip([normed, total, copy], [*wide, wide[0].to(half)], strict=True):
        assert torch.equal(x, y)
    assert [x.dtype for x in got] == [x.dtype for x in mine if x is not None]
    for x, y in zip(got, want, strict=True):  # compilers may form other fused multiply-adds
        scale = float(y.detach().abs().max()) if y.numel() else 0.0
        unit = max(torch.finfo(x.dtype).eps, 8 * torch.finfo(torch.float32).eps)
        torch.testing.assert_close(x.float(), y.float(), rtol=unit, atol=4e-6 * max(scale, 1.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_norm_alone(backend) -> None:
    branch, residual = random_rows((3, 5, 37), torch.bfloat16, 0), random_rows((3, 5, 37), torch.float32, 1)
    with use_backend(backend):
        normed, total = dropout_add_layer_norm(branch, residual)
        narrow, same = dropout_add_layer_norm(branch, residual, normed_dtype=torch.bfloat16)
        both = dropout_add_layer_norm(branch, residual, normed_dtype=torch.bfloat16, copy=True)
        assert torch.equal(narrow, normed.bfloat16())
        assert torch.equal(total, same)
        assert both[0] is both[2]
        one, total, copy = dropout_add_layer_norm(residual, residual, copy=True, normed_dtype=torch.float32)
        assert one is copy


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_formula_of_torch(backend) -> None:
    torch.manual_seed(0)
    leaves = leaves_of(torch.randn(3, 7, 33).bfloat16(), torch.randn(3, 7, 33), torch.randn(33), torch.randn(33))
    branch, residual, weight, bias = leaves
    total = residual + branch
    wanted = F.layer_norm(total, (33,), weight, bias, 1e-6)
    grads = torch.randn(3, 7, 33), torch.randn(3, 7, 33), torch.randn(3, 7, 33).bfloat16()
    want = gradients((wanted, total, wanted.bfloat16()), leaves, grads)
    with use_backend(backend):
        got = gradients(dropout_add_layer_norm(*leaves, eps=1e-6, copy=True), leaves, grads)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(backend, half, value) -> None:
    branch, residual = torch.randn(2, 3, 40).to(half), torch.randn(2, 3, 40)
    branch[0, 1, 3:9], residual[1, 2, 39] = value, value  # dropped or not
    branch, residual = leaves_of(branch, residual)
    with use_backend(backend):
        normed, total, copy = dropout_add_layer_norm(branch, residual, dropout=0.5, keys=make_keys(2), copy=True)
        copy.float().sum().backward()
    bad = [False, True, False, False, False, True]
    for x in (normed, copy, branch.grad, residual.grad):
        assert x.isnan().any(dim=2).flatten().tolist() == bad
    assert (~total.isfinite()).any(dim=2).flatten().tolist() == bad


def test_threads_change_no_bit() -> None:
    leaves = leaves_of(torch.randn(9, 131, 96).bfloat16(), torch.randn(9, 131, 96), torch.randn(96), torch.randn(96))
    grads = torch.randn(9, 131, 96), torch.randn(9, 131, 96), torch.randn(9, 131, 96).bfloat16()
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            y = dropout_add_layer_norm(*leaves, dropout=0.1, keys=make_keys(9), copy=True)
            runs.append([*y, *gradients(y, leaves, grads)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_opcheck(backend, dropout) -> None:
    torch.manual_seed(0)
    branch, residual, weight, keys = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8), torch.randn(8), make_keys(2)
    leaf = leaves_of(branch, residual, weight)
    forward, backward = ops.dropout_add_layer_norm_mixed.default, ops.dropout_add_layer_norm_mixed_backward.default
    with use_backend(backend):
        for wide, copy in ((True, True), (True, False), (False, True)):
            opcheck(forward, (branch, residual, weight, weight, keys, dropout, 1e-5, wide, copy))
            opcheck(forward, (leaf[0], leaf[1], None, None, keys, dropout, 1e-5, wide, copy))
            opcheck(forward, (leaf[0], leaf[1], leaf[2], leaf[2], keys, dropout, 1e-5, wide, copy))
        for grads in ((residual, branch, None), (None, None, residual), (None, branch, residual)):
            opcheck(backward, (*grads, residual, weight, keys, dropout, 1e-5, torch.bfloat16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_whole(backend, dropout) -> None:
    leaves, keys = leaves_of(torch.randn(2, 5, 8).bfloat16(), torch.randn(2, 5, 8), torch.randn(8)), make_keys(2)

    def run(branch: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        normed, total, copy = dropout_add_layer_norm(
            branch * 2, residual, weight, dropout=dropout, keys=keys, copy=True
        )
        return normed.square().sum() + total.sum() + (copy @ copy.mT).float().sum()

    with use_backend(backend):
        want = torch.autograd.grad(run(*leaves), leaves)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty(backend, shape) -> None:
    branch, residual, weight = leaves_of(torch.zeros(shape).half(), torch.zeros(shape), torch.ones(4))
    with use_backend(backend):
        y = dropout_add_layer_norm(branch, residual, weight, dropout=0.1, keys=make_keys(shape[0]), copy=True)
        sum(x.float().sum() for x in y).backward()
    assert all(x.shape == shape for x in (*y, branch.grad, residual.grad))
    assert weight.grad.tolist() == [0.0] * 4


def test_nothing_as_large_as_the_rows_is_kept_but_the_total() -> None:
    branch, residual = leaves_of(torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, total, _ = dropout_add_layer_norm(branch, residual, torch.ones(8), dropout=0.1, keys=make_keys(2), copy=True)
    assert [t.data_ptr() for t in saved if t.numel() > 8] == [total.data_ptr()]


X = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((X.half(), X[:1]), {}, ValueError, r"shape of residual: expected \(2, 3, 4\), got \(1, 3, 4\)"),
        ((X.half(), X.double()), {}, TypeError, "dtype of residual: expected float16, got float64"),
        ((X, X.bfloat16()), {}, TypeError, "dtype of residual: expected float32, got bfloat16"),
        ((X.half(), X), {"normed_dtype": torch.bfloat16}, TypeError, "expected float32 or float16, got bfloat16"),
        ((X.half(), X), {"dropout": 0.1}, ValueError, "keys: expected a tensor where dropout is above 0, got None"),
    ],
)  # fmt: skip
def test_messages(arguments, options, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        dropout_add_layer_norm(*arguments, **options)
    assert str(caught.value).startswith("dropout_add_layer_norm")
