"""Attention: the operator against float64 with gradients, the engines against each other, memory, choice, messages."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.accuracy import assert_accurate
from support.tensors import BACKENDS, FLOATS, dtypes
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import d2v_kernels.ops.attention as engines
import d2v_kernels.ops.attention_operator as attention_operator
from d2v_kernels import Alibi, alibi_slopes, attend, pack_lengths, registry, use_backend
from d2v_kernels._random import dropped_bytes, keep_weights

ops = torch.ops.d2v
Case = dict[str, Any]


def make_case(n, t, h, d, dtype, *, extra=0, lengths=False, valid=False, alibi=True, seed=0, joint=False) -> Case:
    """Inputs; with `joint` query, key and value are views of one projection."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query, key, value = normal(n, t, 3, h, d).to(dtype).unbind(2)
    if not joint:
        query, key, value = (x.contiguous() for x in (query, key, value))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    positions = torch.randint(0, 4 * t + 1, (n, t - extra), generator=generator).sort(1).values.int()
    return {
        "inputs": [query, key, value],
        "slopes": 0.2 * torch.rand(h, generator=generator).to(wide) if alibi else None,
        "positions": positions if alibi else None,
        "lengths": torch.randint(0, t + 1, (n,), generator=generator) if lengths else None,
        "valid": torch.rand(n, t, generator=generator) > 0.4 if valid else None,
        "keys": torch.randint(-(2**62), 2**62, (n,), generator=generator),
        "grad": normal(n, t, h, d).to(dtype),
    }


def run(case: Case, backend: str, dropout: float = 0.0) -> list[Tensor]:
    """Result, log-sum-exp, and gradients of query, key, value and slopes."""
    leaves = [x.detach().requires_grad_() for x in case["inputs"]]
    slopes = None if case["slopes"] is None else case["slopes"].clone().requires_grad_()
    rest = (case["positions"], case["lengths"], case["valid"], case["keys"] if dropout else None)
    with use_backend(backend):
        out, log_sum = ops.attention(*leaves, slopes, *rest, dropout, 0.3)
        wanted = leaves if slopes is None else [*leaves, slopes]
        return [out.detach(), log_sum, *torch.autograd.grad(out, wanted, case["grad"])]


def distances(case: Case, t: int, dtype: torch.dtype) -> Tensor:
    place = case["positions"].to(dtype)
    distance, extra = torch.zeros(len(place), 1, t, t, dtype=dtype), t - place.shape[1]
    distance[:, 0, extra:, extra:] = (place[:, :, None] - place[:, None, :]).abs()
    return distance


def formula(case: Case, dtype: torch.dtype, kept: Tensor | None = None, dropout: float = 0.0) -> list[Tensor]:
    """The same from the definition, all weights at once; `kept` (N,H,T,T) are the weights that dropout leaves.

    The gradient is written out, as an operator of the inputs' dtype has it: with its result in that dtype.
    """
    q, k, v, g = (x.transpose(1, 2).to(dtype) for x in (*case["inputs"], case["grad"]))
    n, _, t, _ = q.shape
    s = 0.3 * q @ k.mT
    if case["slopes"] is not None:
        s = s - case["slopes"].to(dtype)[:, None, None] * distances(case, t, dtype)
    is_key = torch.ones(n, t, dtype=torch.bool)
    if case["lengths"] is not None:
        is_key &= torch.arange(t) < case["lengths"][:, None]
    if case["valid"] is not None:
        is_key &= case["valid"]
    s = torch.where(is_key[:, None, None, :], s, -math.inf)
    any_key = is_key.any(1)[:, None, None, None]
    p = torch.where(any_key, torch.softmax(torch.where(any_key, s, 0.0), -1), 0.0)
    log_sum = torch.where(any_key[..., 0], torch.logsumexp(s, -1), math.inf)
    dropped, of_p = p, g @ v.mT
    if kept is not None:
        dropped, of_p = (torch.where(kept, x / (1 - dropped_bytes(dropout) / 256), 0.0) for x in (p, of_p))
    out = dropped @ v
    result = out if dtype == torch.float64 else out.to(case["grad"].dtype).to(dtype)
    of_s = p * (of_p - (g * result).sum(-1, keepdim=True))
    gradients = [0.3 * of_s @ k, 0.3 * of_s.mT @ q, dropped.mT @ g]
    results = [out.transpose(1, 2), log_sum, *(x.transpose(1, 2) for x in gradients)]
    if case["slopes"] is not None:
        results.append(-(of_s * distances(case, t, dtype)).sum((0, 2, 3)))
    return results


def test_the_formula_has_the_gradient_of_autograd() -> None:
    case = make_case(2, 9, 3, 4, torch.float64, extra=2, lengths=True)
    case["lengths"] = torch.tensor([9, 4])
    q, k, v = (x.detach().requires_grad_() for x in case["inputs"])
    slopes = case["slopes"].requires_grad_()
    s = 0.3 * q.transpose(1, 2) @ k.transpose(1, 2).mT - slopes[:, None, None] * distances(case, 9, torch.float64)
    s = s.masked_fill(~(torch.arange(9) < case["lengths"][:, None])[:, None, None], -math.inf)
    out = (s.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
    wanted = [out, s.logsumexp(-1), *torch.autograd.grad(out, (q, k, v, slopes), case["grad"])]
    case["slopes"] = slopes.detach()
    for x, y in zip(formula(case, torch.float64), wanted, strict=True):
        torch.testing.assert_close(x, y.detach())


def check(case: Case, backend: str, kept: Tensor | None = None, dropout: float = 0.0, factor: float = 6.0) -> None:
    got = run(case, backend, dropout)
    assert got[0].is_contiguous()
    careful = formula(case, torch.float64 if got[0].dtype == torch.float64 else torch.float32, kept, dropout)
    truth = formula(case, torch.float64, kept, dropout)
    for x, c, y in zip(got, careful, truth, strict=True):
        assert_accurate(x, c.to(x.dtype), y, factor=factor)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 3), t=st.integers(1, 70), h=st.integers(1, 3), d=st.sampled_from([1, 16, 24, 32, 64, 80]),
    dtype=dtypes, extra=st.integers(0, 2), lengths=st.booleans(), valid=st.booleans(), alibi=st.booleans(),
    joint=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_accuracy(backend, n, t, h, d, dtype, extra, lengths, valid, alibi, joint, seed) -> None:
    case = make_case(
        n, t, h, d, dtype, extra=min(extra, t), lengths=lengths, valid=valid, alibi=alibi, seed=seed, joint=joint
    )
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_several_blocks(backend, dtype) -> None:
    """Longer than a block of queries and of keys, in every head width of the published models' range."""
    for d, t in ((16, 130), (80, 65), (128, 65)):
        check(make_case(1, t, 2, d, dtype, extra=1, lengths=False, joint=True, seed=d), backend)


def weights(case: Case, backend: str, dropout: float) -> Tensor:
    """(N,H,T,T): attention to values that are unit vectors."""
    t = case["inputs"][0].shape[1]
    value = torch.eye(t, case["inputs"][0].shape[3])[:, None].expand(*case["inputs"][0].shape).contiguous()
    return run({**case, "inputs": [*case["inputs"][:2], value.to(case["grad"].dtype)]}, backend, dropout)[0].transpose(
        1, 2
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.1, 0.6])
def test_dropout(backend, dropout) -> None:
    """The weights that are dropped, seen through unit vectors, are those of the gradients, too."""
    case = make_case(2, 61, 2, 61, torch.float32, extra=1)
    case["slopes"] = case["slopes"] * 0.01
    plain, dropped = (weights(case, backend, p)[..., :61] for p in (0.0, dropout))
    kept = dropped != 0.0
    places = (torch.arange(61)[:, None], torch.arange(2)[:, None, None])
    assert torch.equal(kept, keep_weights(case["keys"][:, None, None, None], places, 61, dropout))
    dropout = dropped_bytes(rate := dropout) / 256
    assert abs(dropout - rate) <= 1 / 512
    torch.testing.assert_close(dropped, torch.where(kept, plain / (1 - dropout), 0.0), rtol=1e-4, atol=1e-7)
    share = 1.0 - float(kept.float().mean())
    assert abs(share - dropout) < 5.0 * (dropout * (1 - dropout) / kept.numel()) ** 0.5
    for a, b in ((kept[0], kept[1]), (kept[:, 0], kept[:, 1]), (kept[..., :30], kept[..., 30:60])):
        assert abs(float((a == b).float().mean()) - (1 - 2 * dropout * (1 - dropout))) < 0.05  # independent
    check(case, backend, kept, dropout)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_depends_on_the_row_key_alone(backend) -> None:
    case = make_case(3, 20, 2, 16, torch.float32)
    whole = run(case, backend, 0.3)
    for row in range(3):
        alone = {k: v[row : row + 1] if isinstance(v, Tensor) and k != "slopes" else v for k, v in case.items()}
        alone["inputs"] = [x[row : row + 1] for x in case["inputs"]]
        torch.testing.assert_close(run(alone, backend, 0.3)[0], whole[0][row : row + 1])


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends_drop_the_same_weights(backend) -> None:
    for dtype in (torch.float32, FLOATS[-1]):
        case = make_case(2, 40, 3, 64, dtype)
        case["slopes"] = case["slopes"] * 0.01  # no weight so small that 16 bits round it to 0
        ours, theirs = (weights(case, b, 0.4) == 0.0 for b in (backend, "reference"))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_are_zero(backend) -> None:
    case = make_case(3, 33, 2, 16, torch.float32)
    case["lengths"] = torch.tensor([33, 0, 5])
    out, log_sum, *gradients = run(case, backend)
    assert not out[1].any()
    assert log_sum[1].eq(math.inf).all()
    assert all(g.isfinite().all() for g in gradients)
    assert all(not g[1].any() for g in gradients[:3])
    assert not gradients[1][2, 5:].any()
    assert not gradients[2][2, 5:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by", ["lengths", "valid"])
def test_nan_in_padding_is_not_read(backend, by) -> None:
    case = make_case(2, 40, 2, 16, torch.float32)
    case["lengths"] = torch.tensor([7, 40])
    if by == "valid":
        case["valid"], case["lengths"] = torch.arange(40) < case["lengths"][:, None], None
    for x in case["inputs"][1:]:
        x[0, 7:] = math.nan
    assert all(x.isfinite().all() for x in run(case, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_repeat(backend) -> None:
    case = make_case(2, 70, 1, 16, torch.float32, extra=1, lengths=True)
    assert all(torch.equal(a, b) for a, b in zip(run(case, backend, 0.2), run(case, backend, 0.2), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_comes_through(backend) -> None:
    """A NaN of a query is in its own row and in every key's gradient; one of a key or a value is in every row."""
    for which in (0, 1, 2):
        case = make_case(1, 20, 1, 8, torch.float32)
        case["inputs"][which][0, 3, 0, 2] = math.nan
        out, log_sum, *gradients = run(case, backend)
        bad = out.isnan().any(-1)[0, :, 0]
        assert bad.tolist() == [which != 0 or i == 3 for i in range(20)]
        assert log_sum.isnan().sum() == (1, 20, 0)[which]
        for gradient, wanted in zip(gradients[:2], ((1, 20), (20, 20), (20, 20))[which], strict=True):
            assert gradient.isnan().any(-1).sum() == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_tensors(backend) -> None:
    for n, t, h, d in ((0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)):
        case = make_case(n, t, h, d, torch.float32)
        out, log_sum, *gradients = run(case, backend)
        assert out.shape == (n, t, h, d)
        assert log_sum.eq(math.inf).all()
        assert not gradients[3].any()
    with use_backend(backend):  # without a bias
        q = torch.randn(0, 3, 2, 16, requires_grad=True)
        attend(q, q, q, engine=backend).sum().backward()
    assert q.grad.shape == q.shape


def test_gradcheck() -> None:
    q, k, v = (torch.randn(2, 5, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    scale = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
    alibi = Alibi(alibi_slopes(2), torch.tensor([[0, 3, 4, 9], [1, 2, 3, 8]]))
    keys, lengths = torch.tensor([3, 4]), torch.tensor([5, 3])

    def function(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return attend(q, k, v, alibi=alibi._replace(scale=scale), valid=lengths, dropout=0.2, dropout_keys=keys)

    assert torch.autograd.gradcheck(function, (q, k, v, scale))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend) -> None:
    for grad in (False, True):
        q, k, v = (torch.randn(1, 5, 2, 16, requires_grad=grad) for _ in range(3))
        slopes, positions = torch.rand(2, requires_grad=grad), torch.arange(5)[None]
        rest = (torch.tensor([4]), None, torch.tensor([9]), 0.2, 0.25)
        with use_backend(backend):
            opcheck(ops.attention.default, (q, k, v, slopes, positions, *rest))
            opcheck(
                ops.attention.default, (q, k, v, None, None, None, torch.ones(1, 5, dtype=torch.bool), None, 0.0, 0.25)
            )
            if not grad:
                out, log_sum = ops.attention(q, k, v, slopes, positions, *rest)
                opcheck(ops.attention_backward.default, (v, q, k, v, out, log_sum, slopes, positions, *rest))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_backward_takes_any_layout(backend) -> None:
    """Inductor keeps four-dimensional tensors in another order where a convolution is near."""
    grad, q, k, v = torch.randn(4, 2, 9, 3, 8).unbind()
    rest = (None, None, None, None, None, 0.0, 0.3)
    with use_backend(backend):
        out, log_sum = torch.ops.d2v.attention(q, k, v, *rest)
        expected = torch.ops.d2v.attention_backward(grad, q, k, v, out, log_sum, *rest)
        moved = [x.contiguous(memory_format=torch.channels_last) for x in (grad, q, k, v, out)]
        assert moved[4].stride(-1) != 1
        result = torch.ops.d2v.attention_backward(*moved, log_sum, *rest)
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)


def test_compiles_whole() -> None:
    q, k, v = (torch.randn(2, 12, 2, 8, requires_grad=True) for _ in range(3))
    alibi = Alibi(alibi_slopes(2), torch.arange(12).expand(2, 12), torch.ones(2, requires_grad=True))
    packed = pack_lengths([5, 7, 12], "cpu")

    def function(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        y = attend(q, k, v, alibi=alibi._replace(scale=scale), valid=torch.tensor([12, 7]))
        z = attend(*(x.flatten(0, 1) for x in (y, k, v)), packed=packed)
        return (z.view_as(q) + attend(q, k, v)).square().sum()

    inputs = (q, k, v, alibi.scale)
    want = torch.autograd.grad(function(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    torch.testing.assert_close(got, want)


class Watch(TorchDispatchMode):
    """Elements of the largest tensor made, and the most bytes of tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x._base is None and x.untyped_storage()._cdata not in self.seen:
                self._note(x.untyped_storage(), x.numel())
        return result

    def _note(self, storage: torch.UntypedStorage, elements: int) -> None:
        name, size = storage._cdata, storage.nbytes()
        self.seen.add(name)
        self.largest, self.alive = max(self.largest, elements), self.alive + size
        self.peak = max(self.peak, self.alive)

        def gone() -> None:
            self.seen.discard(name)
            self.alive -= size

        weakref.finalize(storage, gone)


def test_memory_of_the_reference(monkeypatch) -> None:
    """No tensor of (rows, heads, T, T): at most PART weights, in at most eight tensors at once."""
    monkeypatch.setattr(attention_operator, "PART", 1 << 15)
    case = make_case(8, 100, 4, 16, torch.float32, extra=1)
    inputs, slopes = case["inputs"], case["slopes"]
    all_weights, part = 8 * 4 * 100 * 100, 1 << 15
    rest = (slopes, case["positions"], None, None, None, 0.0, 0.3)
    with torch.no_grad(), Watch() as watch:
        out, log_sum = reference.attention(*inputs, *rest)
        reference.attention_backward(case["grad"], *inputs, out, log_sum, *rest)
    linear = inputs[0].numel()  # tensors like query
    assert watch.largest <= max(part, linear) < all_weights / 4
    assert watch.peak > 0
    assert watch.peak <= 4 * (8 * part + 20 * linear), f"{watch.peak} bytes at once"


def test_parts_do_not_change_results(monkeypatch) -> None:
    case = make_case(3, 30, 4, 16, torch.float32, lengths=True)
    whole = run(case, "reference")
    monkeypatch.setattr(attention_operator, "PART", 5 * 900)
    for a, b in zip(run(case, "reference"), whole, strict=True):
        torch.testing.assert_close(a, b)


# ---- attend


def alibi_case(n: int = 2, t: int = 21, h: int = 4, d: int = 16) -> tuple[list[Tensor], Alibi]:
    case = make_case(n, t, h, d, torch.float32, extra=1)
    return case["inputs"], Alibi(alibi_slopes(h), case["positions"], torch.linspace(-0.5, 1.5, h))


@pytest.mark.parametrize("valid", [None, torch.tensor([21, 4]), torch.arange(42).view(2, 21) % 3 > 0])
def test_engines_agree(valid) -> None:
    inputs, alibi = alibi_case()
    sdpa = attend(*inputs, valid=valid, engine="sdpa")
    flex = engines._attend_by_flex(*inputs, engines._Options(0.25, valid, None, alibi, 0.0, None))
    for backend in ("reference", registry.choose(registry.Case("attention", "cpu", (torch.float32,))).name):
        with use_backend(backend):
            torch.testing.assert_close(sdpa, attend(*inputs, valid=valid, engine=backend))
            torch.testing.assert_close(flex, attend(*inputs, valid=valid, alibi=alibi))


def test_sdpa_rows_without_keys_are_zero() -> None:
    inputs, _ = alibi_case()
    leaves = [x.requires_grad_() for x in inputs]
    out = attend(*leaves, valid=torch.tensor([0, 5]), engine="sdpa")
    assert not out[0].any()
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(not g[0].any() and g.isfinite().all() for g in gradients)


def test_bias_and_its_scale() -> None:
    """Against PyTorch with the bias as a tensor; a negative scale is 0 and has no gradient."""
    inputs, alibi = alibi_case()
    scales = [torch.tensor([-0.5, 0.2, 1.0, 1.5], requires_grad=True) for _ in range(2)]
    got = attend(*inputs, alibi=alibi._replace(scale=scales[0]))
    distance = torch.zeros(2, 1, 21, 21)
    place = alibi.positions.float()
    distance[:, 0, 1:, 1:] = (place[:, :, None] - place[:, None, :]).abs()
    bias = -(scales[1].clamp(min=0.0) * alibi.slopes)[:, None, None] * distance
    q, k, v = (x.transpose(1, 2) for x in inputs)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y.square().sum(), s)[0] for y, s in zip((got, want), scales, strict=True)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][0] == 0.0
    one = attend(*inputs, alibi=alibi._replace(scale=torch.tensor([0.5])))
    torch.testing.assert_close(one, attend(*inputs, alibi=alibi._replace(scale=torch.full((4,), 0.5))))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("one_by_one", [0, 1 << 15])
def test_packed_is_one_sequence_after_the_other(monkeypatch, with_bias, one_by_one) -> None:
    monkeypatch.setattr(engines, "ONE_BY_ONE", one_by_one)
    lengths = [3, 0, 17, 1, 9]
    packed = pack_lengths(torch.tensor(lengths), "cpu")
    assert packed.starts.tolist() == [0, 3, 3, 20, 21, 30]
    inputs = [torch.randn(30, 2, 8, requires_grad=True) for _ in range(3)]
    place = torch.arange(30) * 2
    alibi = Alibi(alibi_slopes(2), place) if with_bias else None
    got = attend(*inputs, packed=packed, alibi=alibi)
    want = []
    for first, last in zip(packed.starts[:-1].tolist(), packed.starts[1:].tolist(), strict=True):
        own = None if alibi is None else alibi._replace(positions=place[None, first:last])
        want.append(attend(*(x[None, first:last] for x in inputs), alibi=own)[0])
    want_all = torch.cat(want)
    torch.testing.assert_close(got, want_all)
    grad = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want_all, inputs, grad))
    assert attend(*(x[:0] for x in inputs), packed=pack_lengths([0, 0], "cpu")).shape == (0, 2, 8)


@pytest.mark.parametrize("one_by_one", [0, 1 << 15])
def test_packed_sequences_drop_by_their_own_keys(monkeypatch, one_by_one) -> None:
    monkeypatch.setattr(engines, "ONE_BY_ONE", one_by_one)
    lengths, keys = torch.tensor([4, 0, 7]), torch.tensor([5, 6, 7])
    rows = [torch.randn(3, 7, 2, 8) for _ in range(3)]
    valid = torch.arange(7) < lengths[:, None]
    want = attend(*rows, valid=lengths, dropout=0.4, dropout_keys=keys)[valid]
    packed = pack_lengths(lengths, "cpu")
    got = attend(*(x[valid] for x in rows), packed=packed, dropout=0.4, dropout_keys=keys)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, attend(*(x[valid] for x in rows), packed=packed))


def test_drawn_dropout_follows_the_generator() -> None:
    inputs, alibi = alibi_case()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(attend(*inputs, alibi=alibi, dropout=0.3))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_published_slopes() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    last = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor([2.0**-i for i in range(1, 9)] + last))
    torch.testing.assert_close(alibi_slopes(16), torch.tensor([2 ** (-0.5 * i) for i in range(1, 17)]))
    assert alibi_slopes(1).tolist() == [2.0**-8]
