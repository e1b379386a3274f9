"""Averages in two halves, bfloat16 and int16: the bits of float32 averages, whatever the backend."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tensors import random_rows
from torch import Tensor
from torch.library import opcheck

from d2v_kernels import EmaPlan, _native, merge_ema_state, split_ema_state, update_ema_, use_backend

ROOT = Path(__file__).resolve().parents[2]

BACKENDS = ["reference", "native"]
SOURCES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, 64, 1029, 40000]


def bits(x: Tensor) -> Tensor:
    """Bits of float32 numbers, every NaN alike."""
    return torch.where(x.isnan(), 0x7FC00000, x.contiguous().view(torch.int32))


def every_kind_of_number() -> Tensor:
    """All upper halves with lower halves around every turn: zeros, subnormals, infinities and NaN among them."""
    upper = torch.arange(0x10000, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFF])
    return (upper + lower).flatten().to(torch.int32).view(torch.float32)


def test_every_number_comes_back() -> None:
    x = every_kind_of_number()
    high, low = split_ema_state(x)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(bits(merge_ema_state(high, low)), bits(x))
    assert torch.equal(high.isnan(), x.isnan())
    assert torch.equal(bits(split_ema_state(merge_ema_state(high, low))[0].float()), bits(high.float()))


def test_the_upper_half_is_the_rounded_number() -> None:
    x = every_kind_of_number()
    high = split_ema_state(x)[0]
    ties = x.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(bits(high[~ties].float()), bits(x[~ties].bfloat16().float()))
    away = high[ties & x.isfinite()].float().abs() - x[ties & x.isfinite()].abs()
    assert bool((away > 0).all())


def test_negative_zero_and_infinity() -> None:
    x = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.4e38])
    high, low = split_ema_state(x)
    assert high.signbit().tolist() == [False, True, False, True, False]
    assert low.tolist()[:4] == [0, 0, 0, 0]
    assert high[4].isinf()
    assert torch.equal(merge_ema_state(high, low).view(torch.int32), x.view(torch.int32))


def step(route: str, high, low, sources, decay) -> None:
    if route == "plan":
        EmaPlan(high, sources, low=low).step(decay)
    else:
        update_ema_(high, sources, decay, low=low)


@pytest.mark.parametrize("route", ["list", "plan"])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=20)
@given(data=st.data(), decay=st.sampled_from([0.0, 0.5, 0.999, 0.99999, 1.0]), seed=st.integers(0, 99))
def test_bits_are_those_of_float32(backend, route, data, decay, seed) -> None:
    sizes = data.draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=4))
    averages = [random_rows((n, 1), torch.float32, seed + i)[:, 0] for i, n in enumerate(sizes)]
    dtypes = [data.draw(st.sampled_from(SOURCES)) for _ in sizes]
    sources = [random_rows((n, 1), d, seed - i)[:, 0] for i, (n, d) in enumerate(zip(sizes, dtypes, strict=True))]
    high, low = map(list, zip(*map(split_ema_state, averages), strict=True))
    with use_backend(backend):
        for _ in range(3):
            step(route, high, low, sources, decay)
            update_ema_(averages, sources, decay)
    for h, lower, average in zip(high, low, averages, strict=True):
        assert torch.equal(bits(merge_ema_state(h, lower)), bits(average))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kind_of_number_is_updated(backend) -> None:
    average = every_kind_of_number()
    source = average.roll(1234567).clone()
    high, low = split_ema_state(average)
    with use_backend(backend):
        update_ema_([high], [source], 0.75, low=[low])
        update_ema_([average], [source], 0.75)
    assert torch.equal(bits(merge_ema_state(high, low)), bits(average))
    assert torch.equal(bits(high.float()), bits(split_ema_state(average)[0].float()))


LEVEL_SCRIPT = """
import torch, d2v_kernels
x = torch.randn(5003, generator=torch.Generator().manual_seed(0))
high, low = d2v_kernels.split_ema_state(x)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    source = torch.randn(5003, generator=torch.Generator().manual_seed(1)).to(dtype)
    with d2v_kernels.use_backend("native"):
        d2v_kernels.update_ema_([high], [source], 0.9, low=[low])
        d2v_kernels.update_ema_([x], [source], 0.9)
    assert torch.equal(d2v_kernels.merge_ema_state(high, low), x), dtype
"""


@pytest.mark.parametrize("level", ["base", "avx2"])
def test_bits_at_lower_instruction_levels(level) -> None:
    if not _native.is_loaded(_native.CPU_LIBRARY):
        pytest.skip("no native library")
    environment = {**os.environ, "D2V_KERNELS_ISA": level}
    subprocess.run([sys.executable, "-c", LEVEL_SCRIPT], check=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ["list", "plan"])
def test_weight_0_changes_nothing(backend, route) -> None:
    average = every_kind_of_number()
    high, low = split_ema_state(average)
    nan = torch.full_like(average, float("nan"))
    with use_backend(backend):
        for decay in (1.0, torch.zeros((), dtype=torch.float64)):
            step(route, [high], [low], [nan], decay)
    assert torch.equal(bits(merge_ema_state(high, low)), bits(average))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_one_order(backend) -> None:
    average = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0)).permute(2, 0, 1)
    source = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1)).permute(2, 0, 1)
    high = torch.empty_like(average, dtype=torch.bfloat16)
    low = torch.empty_like(average, dtype=torch.int16)
    assert not high.is_contiguous()
    for half, value in zip((high, low), split_ema_state(average), strict=True):
        half.copy_(value)
    with use_backend(backend):
        update_ema_([high], [source], 0.5, low=[low])
        update_ema_([average], [source], 0.5)
    assert torch.equal(merge_ema_state(high, low), average)


def test_plan_is_native_and_follows_tensors_that_move() -> None:
    high, low = [torch.zeros(5, dtype=torch.bfloat16)], [torch.zeros(5, dtype=torch.int16)]
    source = torch.ones(5)
    plan = EmaPlan(high, [source], low=low)
    if not plan.native:
        pytest.skip("no native library")
    low[0].data = torch.full((5,), 3, dtype=torch.int16)
    plan.step(0.5)
    assert plan.native
    assert torch.equal(merge_ema_state(high[0], low[0]), torch.full((5,), 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend) -> None:
    high, low = split_ema_state(torch.randn(40))
    with use_backend(backend):
        for weight in (None, torch.tensor(0.5, dtype=torch.float64)):
            opcheck(torch.ops.d2v.update_split_ema_.default, ([high], [low], [torch.ones(40)], 0.5, weight))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"low": []}, ValueError, "number of low halves: expected 1, got 0"),
        ({"low": [torch.zeros(3)]}, TypeError, r"dtype of low\[0\]: expected int16, got float32"),
        ({"high": [torch.zeros(3)]}, TypeError, r"dtype of high\[0\]: expected bfloat16, got float32"),
        ({"low": [torch.zeros(4, dtype=torch.int16)]}, ValueError, r"shape of low\[0\]: expected \(3,\), got \(4,\)"),
        ({"sources": [torch.zeros(4)]}, ValueError, r"shape of sources\[0\]: expected \(3,\), got \(4,\)"),
        ({"sources": [torch.zeros(6)[::2]]}, ValueError, r"strides of sources\[0\]: expected \(1,\) without gaps"),
        ({"copies": [torch.zeros(3)]}, ValueError, "copies: expected none beside low halves, got 1"),
    ],
)
def test_messages(change, error, message) -> None:
    high, low = split_ema_state(torch.zeros(3))
    given_ = {"high": [high], "low": [low], "sources": [torch.zeros(3)], "copies": None} | change
    with pytest.raises(error, match=f"update_split_ema_: {message}"):
        update_ema_(given_["high"], given_["sources"], 0.5, copies=given_["copies"], low=given_["low"])


def test_float64_source_is_left_to_the_reference() -> None:
    high, low = split_ema_state(torch.zeros(3))
    update_ema_([high], [torch.ones(3, dtype=torch.float64)], 0.5, low=[low])
    assert torch.equal(merge_ema_state(high, low), torch.full((3,), 0.5))
    with use_backend("native"), pytest.raises(NotImplementedError, match="no float64 sources"):
        update_ema_([high], [torch.ones(3, dtype=torch.float64)], 0.5, low=[low])


def test_wrong_states_are_refused() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(TypeError, match="split_ema_state: dtype of average: expected float32"):
            split_ema_state(torch.zeros(3, dtype=dtype))
    for high, low in itertools.permutations([torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3)], 2):
        with pytest.raises(TypeError, match="merge_ema_state: dtypes of high and low"):
            merge_ema_state(high, low)
    with pytest.raises(ValueError, match=r"merge_ema_state: shape of low: expected \(3,\), got \(4,\)"):
        merge_ema_state(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int16))
