"""update_ema_: chunks, addresses, orders of elements, launches.

Not shown: the last bit on a GPU, where multiply and add round once; 16-byte accesses, which PTX is read for.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.tensors import FLOATS
from torch import Tensor

from d2v_kernels import EmaPlan, update_ema_, use_backend
from d2v_kernels.triton import ema
from d2v_kernels.triton.ema import TritonPlan


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(ema, "chunk_launch", lambda: ema.EmaLaunch(chunk=128, block=32, warps=1))
    with use_backend("triton"):
        yield


def exact(average: Tensor, source: Tensor, weight: float) -> Tensor:
    """Without a fused multiply-add the interpreter rounds as torch does."""
    a = average.float()
    return (a + torch.tensor(weight, dtype=torch.float32) * (source.float() - a)).to(average.dtype)


def numbers(n: int, dtype: torch.dtype, seed: int, offset: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n + offset, generator=generator).to(dtype)[offset:]


@pytest.mark.parametrize(("dtype", "source_dtype"), list(itertools.product(FLOATS, FLOATS)))
@pytest.mark.parametrize(("copy_dtype", "offset"), [(None, 0), (torch.bfloat16, 0), (torch.float16, 1)])
def test_blocks_chunks_and_tails(dtype, source_dtype, copy_dtype, offset) -> None:
    sizes = [1, 31, 32, 129, 300]
    averages = [numbers(n, dtype, n, offset) for n in sizes]
    sources = [numbers(n, source_dtype, n + 1) for n in sizes]
    copies = [torch.zeros(n, dtype=copy_dtype) for n in sizes] if copy_dtype else None
    wanted = [exact(a, s, 1.0 - 0.75) for a, s in zip(averages, sources, strict=True)]
    update_ema_(averages, sources, 0.75, copies=copies)
    assert all(torch.equal(a, w) for a, w in zip(averages, wanted, strict=True))
    for average, copy in zip(averages, copies or [], strict=copies is not None):
        assert torch.equal(copy, average.to(copy.dtype))


def test_nothing_is_written_beside_the_tensor() -> None:
    buffer, source = torch.zeros(203), torch.ones(201)
    update_ema_([buffer[1:202]], [source], 0.5, copies=[source])
    assert buffer.tolist() == [0.0] + [0.5] * 201 + [0.0]


def test_one_launch_for_each_combination_of_dtypes() -> None:
    lists = [[numbers(n, d, n) for n in (5, 700, 40)] for d in (torch.float32, torch.float32, torch.bfloat16)]
    assert TritonPlan(*lists).launches == 1
    lists[1][2] = lists[1][2].half()
    assert TritonPlan(*lists).launches == 2
    lists[0][0] = torch.zeros(0)
    assert TritonPlan([lists[0][0]], [torch.zeros(0)], []).launches == 0


def test_orders_of_elements() -> None:
    """Where all tensors have one dense order the chunks take it, else contiguous stand-ins."""
    a, s = torch.randn(6, 7).T, torch.randn(6, 7).T
    assert not TritonPlan([a], [s], [])._before
    assert len(TritonPlan([a], [s.contiguous()], [])._before) == 1
    for average, source, copy in (
        (torch.randn(6, 7).T, torch.randn(7, 6), torch.zeros(7, 6)),
        (torch.randn(3, 8, 5)[:, ::2], torch.randn(3, 4, 5), torch.zeros(5, 4, 3).permute(2, 1, 0)),
        (torch.randn(4, 6), torch.randn(6).expand(4, 6), torch.zeros(4, 6, dtype=torch.float16)),
    ):
        wanted = exact(average.clone(), source, 0.25)
        update_ema_([average], [source], 0.75, copies=[copy])
        assert torch.equal(average, wanted)
        assert torch.equal(copy, wanted.to(copy.dtype))


def test_plan_equals_list_bitwise_and_follows() -> None:
    sources = [numbers(n, torch.bfloat16, n) for n in (300, 5)]
    one, two = ([torch.ones(300), torch.ones(5)] for _ in range(2))
    plan = EmaPlan(one, sources)
    assert isinstance(plan._plan, TritonPlan)
    for decay in (0.9, torch.tensor(0.25, dtype=torch.float64), 1.0):
        plan.step(decay)
        update_ema_(two, sources, decay)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    sources[0].data = torch.zeros(300, dtype=torch.bfloat16)
    plan.step(0.0)
    assert not one[0].any()


def test_plan_takes_the_backend_that_is_forced() -> None:
    average, source = torch.zeros(10), torch.ones(10)
    plan = EmaPlan([average], [source])
    for name, kind in (("reference", "NoneType"), ("triton", "TritonPlan")):
        with use_backend(name):
            plan.step(0.5)
            assert type(plan._plan).__name__ == kind
    assert average.tolist() == [0.75] * 10


@pytest.mark.parametrize("by_tensor", [False, True])
def test_weight_zero(by_tensor) -> None:
    average, copy = torch.randn(50), torch.zeros(50, dtype=torch.float16)
    before = average.clone()
    update_ema_([average], [torch.full((50,), math.nan)], torch.zeros((), dtype=torch.float64) if by_tensor else 1.0,
                copies=[copy])  # fmt: skip
    assert torch.equal(average, before)
    assert torch.equal(copy, before.half())


def test_weight_on_another_device() -> None:
    plan = TritonPlan([torch.ones(2)], [torch.ones(2)], [])
    with pytest.raises(ValueError, match="update_ema_: device of weight: expected cpu, got meta"):
        plan.step(0.0, torch.zeros((), dtype=torch.float64, device="meta"))


def test_rounding_to_bfloat16() -> None:
    """To nearest even, with infinities and NaN: the copies of a float32 average at weight 0."""
    bits = torch.randint(-(2**31), 2**31 - 1, (4000,), generator=torch.Generator().manual_seed(0)).int()
    ties = (torch.arange(400, dtype=torch.int32) << 16) | 0x8000 | 0x3F000000
    average = torch.cat([bits, ties, torch.tensor([0x7F7FFFFF, 0x7F800000, 0x7FC00000], dtype=torch.int32)])
    average = average.view(torch.float32)
    copy = torch.zeros(average.shape, dtype=torch.bfloat16)
    update_ema_([average], [average], 1.0, copies=[copy])
    wanted = average.bfloat16()
    assert torch.equal(copy.isnan(), wanted.isnan())
    assert torch.equal(copy[~wanted.isnan()].view(torch.int16), wanted[~wanted.isnan()].view(torch.int16))
