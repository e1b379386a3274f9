"""The CUDA token operators, run on the CPU in several thread orders, against float64 and the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.accuracy import assert_accurate
from support.tensors import dtypes, in_layout, indices, layouts, random_rows
from torch import Tensor

emu = torch.ops.d2v_emu
ORDERS = st.integers(0, 3)
WIDTHS = st.sampled_from([1, 3, 8, 16, 33, 64, 100, 257])
SETTINGS = settings(deadline=None, max_examples=40)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_index_layout(index: Tensor, layout: str) -> Tensor:
    """Index tensors may have any strides: columns before rows, or every second column of a wider one."""
    if layout == "transposed":
        return index.T.contiguous().T
    return torch.stack([index, index], dim=2).flatten(1)[:, ::2] if layout == "sliced" else index


def index_of(rows: int, columns: int, limit: int, seed: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Row numbers with many repetitions."""
    return in_index_layout(torch.randint(0, limit, (rows, columns), generator=generator(seed)).to(dtype), layout)


def add_in_order(grad: Tensor, index: Tensor, clones: int, slots: int) -> Tensor:
    """What the contract says of every bit: rows added one by one, ascending, and rounded once."""
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    total = torch.zeros((index.shape[0] // clones, slots, grad.shape[2]), dtype=compute)
    for r, row in enumerate(index.tolist()):
        for n, slot in enumerate(row):
            if slot < slots:
                total[r // clones, slot] += grad[r, n].to(compute)
    return total.to(grad.dtype)


@SETTINGS
@given(
    b=st.integers(0, 3), clones=st.sampled_from([1, 2, 5, 33]), t=st.integers(1, 20), n=st.integers(0, 40), c=WIDTHS,
    dtype=dtypes, index_dtype=indices, layout=layouts, seed=st.integers(0, 99), order=ORDERS,
)  # fmt: skip
def test_gather(emulated, b, clones, t, n, c, dtype, index_dtype, layout, seed, order) -> None:
    emulated.d2v_emu_set_order(order)
    x = in_layout(random_rows((b, t, c), dtype, seed), layout)
    index = index_of(b * clones, n, t, seed, index_dtype, layout)
    y = emu.gather_tokens(x, index, clones)
    assert torch.equal(y, reference.gather_tokens(x, index, clones))
    grad = in_layout(random_rows(tuple(y.shape), dtype, seed + 1), layout)
    got = emu.gather_tokens_backward(grad, index, clones, t)
    careful = reference.gather_tokens_backward(grad, index, clones, t)
    assert_accurate(got, careful, reference.gather_tokens_backward(grad.double(), index, clones, t))
    assert torch.equal(got, add_in_order(grad, index, clones, t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gather_distinct(emulated, dtype) -> None:
    """39 visible of 196 patches, 16 masks a sample; every sum is of few rows."""
    emulated.d2v_emu_set_order(2)
    x = random_rows((1, 196, 768), dtype, 0)
    index = torch.stack([torch.randperm(196, generator=generator(i))[:39] for i in range(16)]).int()
    y = emu.gather_tokens(x, index, 16)
    assert torch.equal(y, reference.gather_tokens(x, index, 16))
    grad = random_rows(tuple(y.shape), dtype, 1)
    assert torch.equal(emu.gather_tokens_backward(grad, index, 16, 196), add_in_order(grad, index, 16, 196))


@pytest.mark.parametrize("order", range(4))
def test_gradient_of_one_row_repeated(emulated, order) -> None:
    """All columns name one slot, with numbers whose sum depends on the order of addition."""
    emulated.d2v_emu_set_order(order)
    grad = torch.randn(2, 300, 8, generator=generator(0)) * 10.0 ** torch.arange(-3, 5)
    index = torch.full((2, 300), 4)
    got = emu.gather_tokens_backward(grad, index, 2, 6)
    assert torch.equal(got, add_in_order(grad, index, 2, 6))


def restore_case(n: int, visible: int, masked: int, repeated: bool, seed: int, dtype: torch.dtype) -> Tensor:
    if repeated and visible + masked > 0:
        return torch.randint(0, visible + masked, (n, 2 * (visible + masked)), generator=generator(seed)).to(dtype)
    rows = [torch.randperm(visible + masked, generator=generator(seed + i)) for i in range(n)]
    return (torch.stack(rows) if rows else torch.zeros((0, visible + masked))).to(dtype)


@pytest.mark.parametrize("kind", ["rows", "vector", "noise"])
@SETTINGS
@given(
    n=st.integers(0, 4), visible=st.integers(0, 9), masked=st.integers(0, 9), c=WIDTHS, dtype=dtypes,
    index_dtype=indices, layout=layouts, repeated=st.booleans(), seed=st.integers(0, 99), order=ORDERS,
)  # fmt: skip
def test_restore(emulated, kind, n, visible, masked, c, dtype, index_dtype, layout, repeated, seed, order) -> None:
    emulated.d2v_emu_set_order(order)
    kept = in_layout(random_rows((n, visible, c), dtype, seed), layout)
    restore = in_index_layout(restore_case(n, visible, masked, repeated, seed, index_dtype), layout)
    fills = {
        "rows": (in_layout(random_rows((n, masked, c), dtype, seed + 1), layout), None),
        "vector": (random_rows((c,), dtype, seed + 1), None),
        "noise": (None, torch.arange(2 * n)[::2] * 977 - (5 << 33)),
    }
    y = emu.restore_tokens(kept, restore, *fills[kind], 0.3)
    wanted = reference.restore_tokens(kept, restore, *fills[kind], 0.3)
    if kind == "noise":
        tolerance = 4e-6 if dtype in (torch.float32, torch.float64) else 2e-2
        torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance * 0.1)
        copied = restore.long() < visible
        assert torch.equal(y[copied], wanted[copied])
    else:
        assert torch.equal(y, wanted)
    rows = {"rows": masked, "vector": -1, "noise": -2}[kind]
    grad = in_layout(random_rows(tuple(y.shape), dtype, seed + 2), layout)
    got = emu.restore_tokens_backward(grad, restore, visible, rows)
    careful = reference.restore_tokens_backward(grad, restore, visible, rows)
    truth = reference.restore_tokens_backward(grad.double(), restore, visible, rows)
    for g, a, b in zip(got, careful, truth, strict=True):
        assert_accurate(g, a, b)
    in_order = add_in_order(grad, restore, 1, visible + max(rows, 0))
    assert torch.equal(got[0], in_order[:, :visible])
    assert kind != "rows" or torch.equal(got[1], in_order[:, visible:])


def test_noise_depends_on_key_row_and_channel_alone(emulated) -> None:
    keys = torch.tensor([12345678901234567, -3])
    wide = emu.restore_tokens(torch.zeros(2, 1, 1000), torch.arange(1, 40).expand(2, 39), None, keys, 1.0)
    odd = emu.restore_tokens(torch.zeros(2, 0, 999), torch.arange(0, 39).int().expand(2, 39), None, keys, 1.0)
    assert torch.equal(wide[..., :999], odd)
    assert abs(float(wide.mean())) < 0.02
    assert abs(float(wide.std()) - 1.0) < 0.01
    assert float(wide.abs().max()) > 3.5


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_vector_fill_gradient_of_many_rows(emulated, dtype, order) -> None:
    """More rows than a chunk: both stages of the sum, whose bits depend on the shape alone."""
    emulated.d2v_emu_set_order(order)
    grad = random_rows((3, 300, 72), dtype, 1)
    restore = torch.stack([torch.randperm(300, generator=generator(i)) for i in range(3)])
    got = emu.restore_tokens_backward(grad, restore, 100, -1)
    careful = reference.restore_tokens_backward(grad, restore, 100, -1)
    truth = reference.restore_tokens_backward(grad.double(), restore, 100, -1)
    assert_accurate(got[1], careful[1], truth[1])
    emulated.d2v_emu_set_order(0)
    again = emu.restore_tokens_backward(grad, restore, 100, -1)
    assert torch.equal(got[1], again[1])
    sliced = in_layout(grad, "sliced")  # the narrow path adds in the same order
    assert torch.equal(emu.restore_tokens_backward(sliced, restore, 100, -1)[1], again[1])


def test_nan_and_signed_zero_are_copied(emulated) -> None:
    x = torch.tensor([[[float("nan"), -0.0, float("inf"), 1.0]] * 3])
    y = emu.gather_tokens(x, torch.tensor([[2, 0]]), 1)
    assert torch.equal(y.view(torch.int32), x[:, :2].contiguous().view(torch.int32))


@pytest.mark.parametrize("value", [-1, 5])
def test_an_index_out_of_range_stops_the_kernel(emulated, value) -> None:
    index = torch.tensor([[0, value]])
    x = torch.zeros(1, 5, 8)
    with pytest.raises(RuntimeError):
        emu.gather_tokens(x, index, 1)
    with pytest.raises(RuntimeError):
        emu.gather_tokens_backward(x[:, :2], index, 1, 5)
    with pytest.raises(RuntimeError):
        emu.restore_tokens(x[:, :2], index, torch.zeros(1, 3, 8), None, 0.0)
    with pytest.raises(RuntimeError):
        emu.restore_tokens_backward(x[:, :2], index, 2, 3)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("gather_tokens", (torch.zeros(2, 3), torch.zeros(2, 1).int(), 1), "x: expected 3 dimensions, got 2"),
        ("gather_tokens", (torch.zeros(2, 3, 4), torch.zeros(2, 1), 1), "dtype of index: expected int32 or int64"),
        ("gather_tokens", (torch.zeros(2, 3, 4), torch.zeros(2, 1).int(), 2), "rows of index: expected 4, got 2"),
        ("gather_tokens", (torch.zeros(2, 3, 4), torch.zeros(2, 1).int(), 0), "clones: expected at least 1, got 0"),
        ("gather_tokens", (torch.zeros(2, 4, 3).mT, torch.zeros(2, 1).int(), 1), "last stride of x: expected 1"),
        ("restore_tokens", (torch.zeros(2, 3, 4), torch.zeros(2, 1).int(), None, None, 0.0), "got neither"),
    ],
)
def test_messages(emulated, op, arguments, message) -> None:
    with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):
        getattr(emu, op)(*arguments)
