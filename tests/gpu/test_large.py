"""More than 2^31 elements: offsets of 64 bits. Values are small integers, so results are exact and cheap to check."""

from __future__ import annotations

import pytest
import torch

from d2v_kernels import attend, average_layers, gather_tokens, layer_norm_gelu, masked_regression_loss, update_ema_
from d2v_kernels import restore_tokens as restore

pytestmark = pytest.mark.large
BILLIONS = 2**31 + 2**20
GIB = 1 << 30


@pytest.fixture(autouse=True)
def emptied(gpu):
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def need_memory(gibibytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * GIB:
        pytest.skip(f"needs {gibibytes:g} GiB of free device memory, there are {free / GIB:.0f}")


def numbers(rows: int, width: int, gpu: torch.device) -> torch.Tensor:
    """Row r holds r mod 127, in bfloat16."""
    x = torch.empty((rows, width), device=gpu, dtype=torch.bfloat16)
    x.copy_((torch.arange(rows, device=gpu) % 127)[:, None])
    return x


def test_update_ema(gpu, backend, place) -> None:
    place.need("update_ema_", backend, torch.bfloat16)
    need_memory(14)
    average, source = (torch.full((BILLIONS,), v, device=gpu, dtype=torch.bfloat16) for v in (0.0, 2.0))
    source[-1] = 8.0
    update_ema_([average], [source], 0.5)
    assert float(average[-1]) == 4.0
    assert bool(average[:-1].eq(1.0).all())


def test_gather_tokens(gpu, backend, place) -> None:
    place.need("gather_tokens", backend, torch.bfloat16)
    need_memory(20)
    rows, width = BILLIONS // 1024, 1024
    x = numbers(rows, width, gpu)[None]
    index = torch.arange(rows - 1, -1, -1, device=gpu)[None]
    got = gather_tokens(x, index)
    assert torch.equal(got[0, :, 0], x[0, :, 0].flip(0))
    assert torch.equal(got[0, :, -1], got[0, :, 0])
    del got
    few = index[:, : rows // 1024].contiguous()
    grad = torch.ops.d2v.gather_tokens_backward(x[:, : few.shape[1]], few, 1, rows)
    assert torch.equal(grad[0, :, 7], torch.zeros_like(x[0, :, 7]).scatter_(0, few[0], x[0, : few.shape[1], 7]))


def test_restore_tokens(gpu, backend, place) -> None:
    place.need("restore_tokens", backend, torch.bfloat16)
    need_memory(12)
    rows, width = BILLIONS // 1024, 1024
    kept = numbers(100, width, gpu)[None]
    order = (torch.arange(rows, device=gpu) % 101)[None].int()
    got = restore(kept, order, fill=torch.full((width,), 200.0, device=gpu, dtype=torch.bfloat16))
    wanted = torch.cat([kept[0, :, 0], torch.full((1,), 200.0, device=gpu, dtype=torch.bfloat16)])[order[0].long()]
    assert torch.equal(got[0, :, 0], wanted)
    assert torch.equal(got[0, :, -1], wanted)


@pytest.mark.parametrize(("norm", "shape"), [("layer", (4, 2**19 + 256, 1024)), ("instance", (2200, 1000, 1024))])
def test_average_layers(gpu, backend, place, norm, shape) -> None:
    """The last sample alone gives the same as the last sample of all."""
    place.need("average_layers", backend, torch.bfloat16, norm, "none", more=(torch.bfloat16,))
    need_memory(14)
    x = torch.empty(shape, device=gpu, dtype=torch.bfloat16).normal_()
    assert x.numel() > 2**31
    whole = average_layers([x], norm=norm, out_dtype=torch.bfloat16)[-1:]
    alone = average_layers([x[-1:].clone()], norm=norm, out_dtype=torch.bfloat16)
    torch.testing.assert_close(whole, alone)


def test_loss_and_front_end(gpu, place) -> None:
    place.need("masked_regression_loss", "triton", torch.bfloat16, more=(torch.bfloat16,))
    need_memory(24)
    rows, width = BILLIONS // 1024, 1024
    x = torch.zeros((rows, width), device=gpu, dtype=torch.bfloat16)
    x[-1] = 3.0
    prediction = x.requires_grad_()
    target = torch.zeros((1, width), device=gpu, dtype=torch.bfloat16).expand(rows, width)
    loss = masked_regression_loss(prediction, target).loss
    assert float(loss.detach()) == 9.0 * width
    (grad,) = torch.autograd.grad(loss, prediction)
    assert bool(grad[-1].eq(6.0).all())
    assert not bool(grad[:-1].any())
    del grad, loss
    with torch.no_grad():
        last = torch.arange(width, device=gpu, dtype=torch.bfloat16)
        x.data[-1] = last
        torch.testing.assert_close(layer_norm_gelu(x)[-1:], layer_norm_gelu(last[None]))


def test_attention(gpu, place) -> None:
    place.need("attention", "triton", torch.bfloat16, "64")
    need_memory(30)
    shape = (2100, 1000, 16, 64)
    x = torch.empty(shape, device=gpu, dtype=torch.bfloat16).normal_()
    assert x.numel() > 2**31
    whole = attend(x, x, x, engine="triton")[-1:]
    torch.testing.assert_close(whole, attend(*[x[-1:].clone()] * 3, engine="triton"))
