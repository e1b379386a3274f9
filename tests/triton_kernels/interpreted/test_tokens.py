"""Token rows: order of the sums, long indices, noise, the gradient of a mask token.

Not shown: the last bits of noise on a GPU, whose log is its own; what lanes of one warp do in the search for matches.
"""

from __future__ import annotations

import pytest
import torch
from support import reference
from support.accuracy import assert_accurate
from support.tensors import FLOATS, in_layout, random_rows
from torch import Tensor

from d2v_kernels import Noise, gather_tokens, restore_tokens, use_backend
from d2v_kernels.triton import tokens
from d2v_kernels.triton.runtime import Tile

ops = torch.ops.d2v


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


def in_order(grad: Tensor, index: Tensor, clones: int, tokens: int) -> Tensor:
    """One addition after the other in float32: ascending row, then entry."""
    total = torch.zeros(grad.shape[0] // clones, tokens, grad.shape[2])
    for r in range(grad.shape[0]):
        for i, t in enumerate(index[r].tolist()):
            total[r // clones, t] += grad[r, i].float()
    return total.to(grad.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "rows_apart"])
@pytest.mark.parametrize("index_kind", ["rows", "columns of a wider one", "int64"])
def test_gradient_adds_in_ascending_order(dtype, layout, index_kind) -> None:
    index = torch.randint(0, 3, (4, 50), generator=torch.Generator().manual_seed(0)).int()
    if index_kind != "rows":
        index = torch.cat([index, index], 1)[:, :50] if "columns" in index_kind else index.long()
    grad = in_layout(random_rows((4, 50, 20), dtype, 1), layout)
    got = ops.gather_tokens_backward(grad, index, 2, 5)
    assert torch.equal(got, in_order(grad, index, 2, 5))
    assert not got[:, 3:].any()


def test_index_longer_than_a_block(monkeypatch) -> None:
    monkeypatch.setattr(tokens, "inverse_gather_tile", lambda *_: Tile(32, 16, 1))
    index = torch.randint(0, 4, (2, 70), generator=torch.Generator().manual_seed(0))
    for layout in ("contiguous", "rows_apart"):
        grad = in_layout(random_rows((2, 70, 21), torch.float32, 1), layout)  # two blocks of channels, three of entries
        assert torch.equal(ops.gather_tokens_backward(grad, index, 2, 4), in_order(grad, index, 2, 4))


def test_index_that_is_transposed() -> None:
    index = torch.randint(0, 6, (5, 4), generator=torch.Generator().manual_seed(0)).T
    x = random_rows((2, 6, 9), torch.float32, 0).requires_grad_()
    y = gather_tokens(x, index, clones=2)
    assert torch.equal(y, x.detach()[torch.arange(4)[:, None] // 2, index])
    grad = random_rows(tuple(y.shape), torch.float32, 1)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], in_order(grad, index, 2, 6))


def test_nothing_to_gather() -> None:
    x = torch.randn(2, 3, 4)
    assert gather_tokens(x, torch.zeros(4, 0, dtype=torch.int32), clones=2).shape == (4, 0, 4)
    assert not ops.gather_tokens_backward(torch.zeros(4, 0, 4), torch.zeros(4, 0, dtype=torch.int32), 2, 3).any()


def test_noise_equals_the_reference() -> None:
    keys = torch.tensor([3, -7, 1 << 62, 0])
    rows = torch.tensor([[0, 1, 2, 1000, 2**31 - 1]] * 4)
    for channels, std in ((4, 1.0), (37, 0.01), (300, 1.0)):
        y = restore_tokens(torch.zeros(4, 0, channels), rows, fill=Noise(std, keys))
        wanted = reference.noise_rows(keys, rows, channels, std, torch.float32)
        torch.testing.assert_close(y, wanted, rtol=4e-6, atol=1e-6 * std)


def test_noise_of_a_row_does_not_depend_on_its_place() -> None:
    keys = torch.tensor([5, -9])
    restore = torch.tensor([[0, 3, 2, 1], [4, 0, 1, 2]])
    y = restore_tokens(torch.zeros(2, 2, 10), restore, fill=Noise(0.1, keys))
    one = restore_tokens(torch.zeros(1, 7, 10), torch.tensor([[9]]), fill=Noise(0.1, keys[1:]))
    assert torch.equal(one[0, 0], y[1, 0])
    assert not y[0, 0].any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_noise_is_normal(dtype) -> None:
    keys = torch.tensor([3, -7])
    y = restore_tokens(torch.zeros(2, 0, 256, dtype=dtype), torch.arange(24).repeat(2, 1), fill=Noise(0.5, keys))
    z = y.double().flatten() / 0.5
    count = z.numel() ** 0.5
    assert abs(z.mean()) < 5 / count
    assert abs(z.var() - 1) < 5 * 2**0.5 / count
    assert abs((z**4).mean() - 3) < 5 * 96**0.5 / count


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_of_a_mask_token(dtype, monkeypatch) -> None:
    """Several parts, several blocks in each."""
    monkeypatch.setattr(Tile, "columns", lambda channels: Tile(4, 16, 1))
    monkeypatch.setattr(tokens, "FILL_SPLITS", 3)
    restore = torch.randint(0, 12, (3, 15), generator=torch.Generator().manual_seed(0))
    grad = in_layout(random_rows((3, 15, 21), dtype, 0), "sliced")
    _, got = ops.restore_tokens_backward(grad, restore, 7, -1)
    careful = reference.restore_tokens_backward(grad, restore, 7, -1)[1]
    assert_accurate(got, careful, reference.restore_tokens_backward(grad.double(), restore, 7, -1)[1])


def test_copies_keep_the_bits() -> None:
    """Payloads of NaN, subnormals and negative zeros pass as they are."""
    bits = torch.randint(-(2**15), 2**15 - 1, (1, 6, 40), generator=torch.Generator().manual_seed(0)).short()
    x = bits.view(torch.bfloat16)
    y = gather_tokens(x, torch.tensor([[5, 0, 3]]))
    assert torch.equal(y.view(torch.int16), bits[:, [5, 0, 3]])
    z = restore_tokens(x, torch.tensor([[1, 7, 6]]), fill=x[:, 2:4])
    assert torch.equal(z.view(torch.int16), torch.cat([bits[:, 1:2], bits[:, 3:4], bits[:, 2:3]], 1))
