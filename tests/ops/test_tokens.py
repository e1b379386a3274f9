"""gather_tokens and restore_tokens: exact copies, deterministic gradients, noise, messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.accuracy import assert_accurate
from support.tensors import BACKENDS, FLOATS, dtypes, in_layout, indices, layouts, random_rows, widths
from torch import Tensor
from torch.library import opcheck

from d2v_kernels import Noise, gather_tokens, restore_tokens, use_backend

ops = torch.ops.d2v


def in_float64(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(
    b=st.integers(0, 3), clones=st.integers(1, 4), t=st.integers(1, 20), n=st.integers(0, 30), c=widths,
    dtype=dtypes, index_dtype=indices, layout=layouts, seed=st.integers(0, 99),
)  # fmt: skip
def test_gather(backend, b, clones, t, n, c, dtype, index_dtype, layout, seed) -> None:
    """Forward is an exact copy; the gradient of repeated indices adds in float32 and rounds once."""
    x = in_layout(random_rows((b, t, c), dtype, seed), layout).requires_grad_()
    index = torch.randint(0, t, (b * clones, n), generator=torch.Generator().manual_seed(seed)).to(index_dtype)
    with use_backend(backend):
        y = gather_tokens(x, index, clones=clones)
        grad = in_layout(random_rows(tuple(y.shape), dtype, seed + 1), layout)
        (got,) = torch.autograd.grad(y, x, grad)
    sample = torch.arange(b * clones)[:, None] // clones
    assert torch.equal(y, x.detach()[sample, index.long()])
    assert y.is_contiguous()
    careful = reference.gather_tokens_backward(grad, index, clones, t)
    assert_accurate(got, careful, reference.gather_tokens_backward(grad.double(), index, clones, t))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gather_gradcheck(backend) -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 4, 4], [1, 1, 1], [3, 2, 0], [0, 0, 4]])
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda x: gather_tokens(x, index, clones=2), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gather_published_shape(backend, dtype) -> None:
    """39 visible of 196 patches, 16 masks a sample."""
    x = random_rows((2, 196, 768), dtype, 0).requires_grad_()
    index = torch.stack([torch.randperm(196)[:39] for _ in range(32)]).int()
    with use_backend(backend):
        y = gather_tokens(x, index, clones=16)
        grad = random_rows(tuple(y.shape), dtype, 1)
        got = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*got)
    careful = reference.gather_tokens_backward(grad, index, 16, 196)
    assert_accurate(got[0], careful, reference.gather_tokens_backward(grad.double(), index, 16, 196))


def restore_case(n: int, visible: int, masked: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(visible + masked, generator=generator) for _ in range(n)]
    return (torch.stack(rows) if rows else torch.zeros((0, visible + masked))).to(dtype)


@pytest.mark.parametrize("kind", ["rows", "vector", "noise"])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(0, 4), visible=st.integers(0, 9), masked=st.integers(0, 9), c=widths, dtype=dtypes,
    index_dtype=indices, layout=layouts, seed=st.integers(0, 99),
)  # fmt: skip
def test_restore(backend, kind, n, visible, masked, c, dtype, index_dtype, layout, seed) -> None:
    kept = in_layout(random_rows((n, visible, c), dtype, seed), layout).requires_grad_()
    restore = restore_case(n, visible, masked, seed, index_dtype)
    fills = {
        "rows": in_layout(random_rows((n, masked, c), dtype, seed + 1), layout).requires_grad_(),
        "vector": random_rows((c,), dtype, seed + 1).requires_grad_(),
        "noise": Noise(0.3, torch.arange(n) * 977 - 5),
    }
    fill = fills[kind]
    with use_backend(backend):
        y = restore_tokens(kept, restore, fill=fill)
        grad = in_layout(random_rows(tuple(y.shape), dtype, seed + 2), layout)
        inputs = [kept] if kind == "noise" else [kept, fill]
        got = torch.autograd.grad(y, inputs, grad)
    wanted = _restored(kept.detach(), restore, fill)
    if kind == "noise":
        tolerance = 4e-6 if dtype in (torch.float32, torch.float64) else 2e-2
        torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance * 0.1)
    else:
        assert torch.equal(y, wanted)
    rows = {"rows": masked, "vector": -1, "noise": -2}[kind]
    careful = reference.restore_tokens_backward(grad, restore, visible, rows)
    truth = reference.restore_tokens_backward(grad.double(), restore, visible, rows)
    for g, a, b in zip(got, careful, truth, strict=False):
        assert_accurate(g, a, b)


def _restored(kept: Tensor, restore: Tensor, fill: Tensor | Noise) -> Tensor:
    """Position by position, as the contract says it."""
    n, visible, c = kept.shape
    result = kept.new_zeros((n, restore.shape[1], c))
    for r in range(n):
        for t, s in enumerate(restore[r].tolist()):
            if s < visible:
                result[r, t] = kept[r, s]
            elif isinstance(fill, Noise):
                row = torch.tensor([[s - visible]])
                result[r, t] = reference.noise_rows(fill.keys[r : r + 1], row, c, fill.std, kept.dtype)[0, 0]
            else:
                result[r, t] = fill if fill.dim() == 1 else fill[r, s - visible]
    return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fill_shape", [(3,), (2, 2, 3)])
def test_restore_gradcheck(backend, fill_shape) -> None:
    kept = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(fill_shape, dtype=torch.float64, requires_grad=True)
    restore = torch.tensor([[0, 3, 1, 2, 4], [4, 2, 2, 0, 3]])
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda k, f: restore_tokens(k, restore, fill=f), (kept, fill))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_token_of_version_1(backend) -> None:
    """With V = T kept rows and restore >= T at masked positions, a vector fill is 1.0's mask token."""
    x, token = torch.randn(2, 6, 4), torch.randn(4)
    mask = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    restore = torch.where(mask, 6, torch.arange(6))
    with use_backend(backend):
        y = restore_tokens(x, restore, fill=token)
    assert torch.equal(y, torch.where(mask[..., None], token, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_restore_undoes_gather(backend) -> None:
    x = torch.randn(2, 10, 5)
    order = torch.stack([torch.randperm(10) for _ in range(6)])
    with use_backend(backend):
        kept = gather_tokens(x, order[:, :4], clones=3)
        y = restore_tokens(kept, order.argsort(dim=1), fill=torch.zeros(5))
    for r in range(6):
        assert torch.equal(y[r, order[r, :4]], x[r // 3, order[r, :4]])
        assert not y[r, order[r, 4:]].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_noise_is_normal_and_belongs_to_its_key(backend, dtype) -> None:
    keys = torch.tensor([3, -7, 3, 1 << 62])
    restore = torch.arange(400).repeat(4, 1)
    with use_backend(backend):
        y = restore_tokens(torch.zeros(4, 0, 250, dtype=dtype), restore, fill=Noise(0.01, keys))
        one = restore_tokens(torch.zeros(1, 0, 250, dtype=dtype), restore[:1, 5:9], fill=Noise(0.01, keys[1:2]))
    assert torch.equal(y[0], y[2])
    assert torch.equal(one[0], y[1, 5:9])
    z = y[[0, 1, 3]].double() / 0.01
    count = z.numel() ** 0.5
    assert abs(z.mean()) < 5 / count
    assert abs(z.var() - 1) < 5 * 2**0.5 / count
    assert abs((z**4).mean() - 3) < 5 * 96**0.5 / count
    assert abs((z[:, :, 1:] * z[:, :, :-1]).mean()) < 5 / count
    assert abs((y[0].double() * y[1].double()).mean() / 1e-4) < 5 / y[0].numel() ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_rows_are_copied(backend) -> None:
    x = torch.randn(1, 4, 3)
    x[0, 2] = float("nan")
    with use_backend(backend):
        y = gather_tokens(x, torch.tensor([[2, 1]]))
        z = restore_tokens(x, torch.tensor([[3, 2, 4]]), fill=torch.full((3,), float("nan")))
    assert y[0, 0].isnan().all()
    assert not y[0, 1].isnan().any()
    assert z[0].isnan().any(dim=1).tolist() == [False, True, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradient(backend) -> None:
    """y.sum() sends back a gradient whose strides are all 0."""
    x = torch.randn(2, 5, 3, requires_grad=True)
    kept = torch.randn(2, 3, 3, requires_grad=True)
    with use_backend(backend):
        gather_tokens(x, torch.tensor([[0, 0], [4, 1]])).sum().backward()
        restore_tokens(kept, torch.tensor([[0, 3], [1, 1]]), fill=torch.zeros(3)).sum().backward()
    assert x.grad[0, 0].tolist() == [2.0] * 3
    assert kept.grad[1, 1].tolist() == [2.0] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(backend, grad) -> None:
    x = torch.randn(2, 5, 8, requires_grad=grad)
    index = torch.randint(0, 5, (6, 3))
    restore = torch.tensor([[0, 3, 1, 2, 4], [4, 2, 1, 0, 3]])
    kept = torch.randn(2, 3, 8, requires_grad=grad)
    with use_backend(backend):
        opcheck(ops.gather_tokens.default, (x, index, 3))
        for fill in (torch.randn(8, requires_grad=grad), torch.randn(2, 2, 8, requires_grad=grad)):
            opcheck(ops.restore_tokens.default, (kept, restore, fill, None, 0.0))
        opcheck(ops.restore_tokens.default, (kept, restore, None, torch.tensor([1, 2]), 0.1))
        if not grad:
            opcheck(ops.gather_tokens_backward.default, (torch.randn(6, 3, 8), index, 3, 5))
            for rows in (2, -1, -2):
                opcheck(ops.restore_tokens_backward.default, (torch.randn(2, 5, 8), restore, 3, rows))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend) -> None:
    x = torch.randn(2, 5, 8, requires_grad=True)
    index, restore = torch.tensor([[0, 4], [1, 1]]), torch.tensor([[0, 2, 1], [2, 1, 0]])

    def both(x: Tensor) -> Tensor:
        kept = gather_tokens(x, index)
        return restore_tokens(kept, restore, fill=Noise(0.1, torch.tensor([1, 2]))).square().sum()

    with use_backend(backend):
        (want,) = torch.autograd.grad(both(x), x)
        (got,) = torch.autograd.grad(torch.compile(both, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, want)


def test_double_backward_is_refused() -> None:
    x = torch.randn(1, 3, 2, requires_grad=True)
    y = gather_tokens(x, torch.tensor([[0, 1]])).square().sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        g.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [5, -1, 1 << 40])
def test_index_out_of_range(backend, bad) -> None:
    index = torch.tensor([[0, bad]])
    with use_backend(backend):
        with pytest.raises(ValueError, match=r"gather_tokens: index.*0 to 4"):
            gather_tokens(torch.ones(1, 5, 3), index)
        with pytest.raises(ValueError, match=r"gather_tokens_backward: index"):
            ops.gather_tokens_backward(torch.ones(1, 2, 3), index, 1, 5)
        with pytest.raises(ValueError, match=r"restore_tokens: restore"):
            restore_tokens(torch.ones(1, 3, 3), index, fill=torch.ones(1, 2, 3))
        with pytest.raises(ValueError, match=r"restore_tokens_backward: restore"):
            ops.restore_tokens_backward(torch.ones(1, 2, 3), index, 3, 2)
        if bad < 0:
            with pytest.raises(ValueError, match=r"restore_tokens: restore"):
                restore_tokens(torch.ones(1, 3, 3), index, fill=torch.ones(3))


X, INDEX = torch.ones(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gather_tokens(X[0], INDEX), ValueError, "x: expected 3 dimensions"),
        (lambda: gather_tokens(X.int(), INDEX), TypeError, "dtype of x.*got int32"),
        (lambda: gather_tokens(X, INDEX.float()), TypeError, "dtype of index.*got float32"),
        (lambda: gather_tokens(X, INDEX, clones=2), ValueError, "rows of index"),
        (lambda: gather_tokens(X, INDEX, clones=0), ValueError, "clones: expected at least 1, got 0"),
        (lambda: gather_tokens(X, INDEX.to("meta")), ValueError, "device of index"),
        (lambda: restore_tokens(X, INDEX[:1], fill=torch.ones(3)), ValueError, "rows of restore: expected 2, got 1"),
        (lambda: restore_tokens(X, INDEX, fill=torch.ones(4)), ValueError, r"shape of fill.*got \(4,\)"),
        (lambda: restore_tokens(X, INDEX, fill=torch.ones(3).half()), TypeError, "dtype of fill"),
        (lambda: restore_tokens(X, INDEX, fill=0.5), TypeError, "got float"),
        (lambda: restore_tokens(X, INDEX, fill=Noise(0.1, torch.ones(3))), ValueError, "shape of noise keys"),
        (lambda: restore_tokens(X, INDEX, fill=Noise(0.1, torch.ones(2))), TypeError, "dtype of noise keys"),
        (lambda: restore_tokens(X, INDEX, fill=Noise(-1.0, torch.arange(2))), ValueError, "noise std"),
    ],
)
def test_messages(call, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert str(caught.value).startswith(("gather_tokens", "restore_tokens"))
