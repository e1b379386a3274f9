"""The CUDA update_ema_, list and plan, run on the CPU in several thread orders, against float64 and the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.accuracy import assert_accurate
from support.tensors import in_layout, layouts, random_rows
from torch import Tensor

from d2v_kernels import _native, merge_ema_state, split_ema_state

LOW = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [*itertools.product(LOW, LOW), (torch.float64, torch.float64)]
COPIES = [None, *LOW, torch.float64]
ORDERS = range(4)
CHUNK = 16384
SIZES = [0, 1, 3, 7, 8, 1000, CHUNK, CHUNK + 1, 2 * CHUNK + 13]


def step(library, route: str, averages, sources, copies, weight: float, weight_tensor: Tensor | None = None) -> None:
    """One update through the operator, or through the module's plan with a table in host memory."""
    if route == "list":
        torch.ops.d2v_emu.update_ema_(averages, sources, copies, weight, weight_tensor)
        return
    module = _native.native_module()
    if module is None:
        pytest.skip(f"no pybind11 module: {_native.load_errors()}")
    number = _native.TYPE_NUMBERS
    entries = []
    for i, (a, s) in enumerate(zip(averages, sources, strict=True)):
        if a.numel() == 0:
            continue  # as make_ema_plan does
        copy = (copies[i].data_ptr(), number[copies[i].dtype]) if copies else (0, _native.NO_COPY)
        entries.append((a.data_ptr(), s.data_ptr(), copy[0], a.numel(), number[a.dtype], number[s.dtype], copy[1]))
    plan = module.EmaPlan(entries, [library._name])
    table = torch.frombuffer(bytearray(plan.device_table()), dtype=torch.uint8)
    device_weight = 0 if weight_tensor is None else weight_tensor.data_ptr()
    plan.step_device(weight, table.data_ptr(), device_weight, 0, 0)


def careful_and_truth(average: Tensor, source: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    careful = average.clone()
    reference.update_ema_([careful], [source], [], weight, None)
    return careful, average.double() + weight * (source.double() - average.double())


def check(library, route: str, averages, sources, copies, weight: float, weight_tensor: Tensor | None = None) -> None:
    wanted = [careful_and_truth(a, s, weight) for a, s in zip(averages, sources, strict=True)]
    step(library, route, averages, sources, copies, 0.75 if weight_tensor is not None else weight, weight_tensor)
    for i, (average, (careful, truth)) in enumerate(zip(averages, wanted, strict=True)):
        assert_accurate(average, careful, truth)
        if copies:
            assert torch.equal(copies[i], average.to(copies[i].dtype))


def values(size: int, dtype: torch.dtype, seed: int, offset: int = 0) -> Tensor:
    """Numbers that begin `offset` elements behind an aligned address."""
    buffer = torch.empty(size + offset, dtype=dtype)
    return buffer[offset:].copy_(random_rows((size, 1), dtype, seed)[:, 0])


@pytest.mark.parametrize("route", ["list", "plan"])
@pytest.mark.parametrize("types", PAIRS, ids=lambda t: "-".join(str(d)[6:] for d in t))
def test_every_type_size_and_order(emulated, types, route) -> None:
    for order, copy in zip(itertools.cycle(ORDERS), COPIES):
        emulated.d2v_emu_set_order(order)
        averages = [values(n, types[0], n) for n in SIZES]
        sources = [values(n, types[1], n + 1) for n in SIZES]
        copies = [torch.full((n,), 7.0, dtype=copy) for n in SIZES] if copy else []
        check(emulated, route, averages, sources, copies, 0.01)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("route", ["list", "plan"])
def test_mixed_types_in_one_list(emulated, route, order) -> None:
    emulated.d2v_emu_set_order(order)
    cases = [(a, s, c) for (a, s), c in itertools.product(PAIRS, [torch.bfloat16, torch.float32])]
    averages = [values(300 + i, a, i) for i, (a, _, _) in enumerate(cases)]
    sources = [values(300 + i, s, -i) for i, (_, s, _) in enumerate(cases)]
    copies = [torch.empty(300 + i, dtype=c) for i, (_, _, c) in enumerate(cases)]
    check(emulated, route, averages, sources, copies, 0.25)


@pytest.mark.parametrize("offsets", [(1, 1, 1), (0, 1, 0), (1, 0, 0), (0, 0, 1), (3, 7, 5), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("types", PAIRS[:4], ids=lambda t: "-".join(str(d)[6:] for d in t))
def test_results_do_not_depend_on_alignment(emulated, types, offsets) -> None:
    emulated.d2v_emu_set_order(2)
    sizes = [1, 5, 8, 1029, CHUNK + 9]
    results = []
    for average, source, copy in ((0, 0, 0), offsets):
        averages = [values(n, types[0], n, average) for n in sizes]
        sources = [values(n, types[1], n + 1, source) for n in sizes]
        copies = [values(n, torch.bfloat16, n, copy) for n in sizes]
        step(emulated, "list", averages, sources, copies, 0.1)
        results.append([*averages, *copies])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("route", ["list", "plan"])
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("weight", [0.0, 1e-60, 1e-5, 0.5, 1.0])
@pytest.mark.parametrize("types", [PAIRS[0], PAIRS[4], PAIRS[9]], ids=lambda t: "-".join(str(d)[6:] for d in t))
def test_weights(emulated, types, weight, on_device, route) -> None:
    averages, sources = [values(2000, types[0], 1)], [values(2000, types[1], 2)]
    copies = [torch.full((2000,), 7.0, dtype=torch.float16)]
    tensor = torch.tensor(weight, dtype=torch.float64) if on_device else None
    check(emulated, route, averages, sources, copies, weight, tensor)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("route", ["list", "plan"])
def test_weight_0_keeps_averages_where_sources_are_nan(emulated, route, on_device) -> None:
    average = values(5000, torch.float32, 3)
    before, copy = average.clone(), torch.zeros(5000, dtype=torch.bfloat16)
    source = torch.full((5000,), float("nan"))
    tensor = torch.zeros((), dtype=torch.float64) if on_device else None
    step(emulated, route, [average], [source], [copy], 0.0, tensor)
    assert torch.equal(average, before)
    assert torch.equal(copy, before.bfloat16())
    step(emulated, route, [average], [source], [copy], 0.5)
    assert average.isnan().all()
    assert copy.isnan().all()


def test_more_tensors_than_one_launch_takes(emulated) -> None:
    averages = [torch.full((2,), float(i)) for i in range(2000)]
    sources = [torch.zeros(2, dtype=torch.bfloat16 if i % 2 else torch.float32) for i in range(2000)]
    step(emulated, "list", averages, sources, [], 0.5)
    assert all(torch.equal(a, torch.full((2,), i / 2)) for i, a in enumerate(averages))


@settings(deadline=None, max_examples=40)
@given(data=st.data(), order=st.sampled_from(ORDERS), seed=st.integers(0, 99))
def test_layouts(emulated, data, order, seed) -> None:
    emulated.d2v_emu_set_order(order)
    averages, sources, copies = [], [], []
    for i in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.sampled_from([(), (0,), (1,), (33, 5), (4, 3, 17), (3, 70, 100)]))
        types = data.draw(st.sampled_from(PAIRS))
        averages.append(in_layout(random_rows((*shape, 1), types[0], seed + i)[..., 0], data.draw(layouts)))
        sources.append(in_layout(random_rows((*shape, 1), types[1], seed - i)[..., 0], data.draw(layouts)))
        copies.append(in_layout(torch.full(shape, 7.0, dtype=data.draw(st.sampled_from(LOW))), data.draw(layouts)))
    check(emulated, "list", averages, sources, copies, 0.1)


def test_expanded_source_is_read_and_expanded_average_refused(emulated) -> None:
    average = torch.zeros(4, 6)
    check(emulated, "list", [average], [torch.ones(6).expand(4, 6)], [], 0.5)
    with pytest.raises(RuntimeError, match=r"update_ema_: average: .*overlapping.*stride 0 in dimension 0"):
        step(emulated, "list", [torch.ones(6).expand(4, 6)], [average], [], 0.5)


@pytest.mark.parametrize("route", ["list", "plan"])
@pytest.mark.parametrize("offsets", [(0, 0, 0), (1, 1, 1), (0, 1, 0), (3, 3, 5), (8, 4, 8)], ids=str)
@pytest.mark.parametrize("source_type", LOW, ids=lambda d: str(d)[6:])
def test_halves_have_the_bits_of_float32(emulated, source_type, offsets, route) -> None:
    emulated.d2v_emu_set_order(sum(offsets) % 4)
    averages = [values(n, torch.float32, n) for n in SIZES]
    sources = [values(n, source_type, n + 1, offsets[2]) for n in SIZES]
    high = [torch.empty(n + offsets[0], dtype=torch.bfloat16)[offsets[0] :] for n in SIZES]
    low = [torch.empty(n + offsets[1], dtype=torch.int16)[offsets[1] :] for n in SIZES]
    for halves in zip(high, low, averages, strict=True):
        for half, value in zip(halves[:2], split_ema_state(halves[2]), strict=True):
            half.copy_(value)
    for weight in (0.3, 1e-5):
        step(emulated, "list", averages, sources, [], weight)
        if route == "list":
            torch.ops.d2v_emu.update_split_ema_(high, low, sources, 0.75, torch.tensor(weight, dtype=torch.float64))
        else:
            step_halves_by_plan(emulated, high, low, sources, weight)
    for h, lower, average in zip(high, low, averages, strict=True):
        assert torch.equal(merge_ema_state(h, lower), average)


def step_halves_by_plan(library, high, low, sources, weight: float) -> None:
    module = _native.native_module()
    if module is None:
        pytest.skip(f"no pybind11 module: {_native.load_errors()}")
    plan = module.EmaPlan(_native.plan_entries(high, sources, [], low), [library._name])
    table = torch.frombuffer(bytearray(plan.device_table()), dtype=torch.uint8)
    plan.step_device(weight, table.data_ptr(), 0, 0, 0)


@pytest.mark.parametrize("route", ["list", "plan"])
def test_halves_and_whole_averages_in_one_table(emulated, route) -> None:
    """Groups of a table: an average in halves is none of a bfloat16 average."""
    averages = [values(700, torch.bfloat16, 1), values(300, torch.float32, 2)]
    high, low = split_ema_state(averages[1])
    sources = [values(700, torch.float32, 3), values(300, torch.float32, 4)]
    module = _native.native_module()
    if module is None:
        pytest.skip(f"no pybind11 module: {_native.load_errors()}")
    whole = (averages[0].data_ptr(), sources[0].data_ptr(), 0, 700, 1, 0, _native.NO_COPY)
    plan = module.EmaPlan([*_native.plan_entries([high], [sources[1]], [], [low]), whole], [emulated._name])
    table = torch.frombuffer(bytearray(plan.device_table()), dtype=torch.uint8)
    wanted = [a.clone() for a in averages]
    step(emulated, route, wanted, sources, [], 0.25)
    plan.step_device(0.25, table.data_ptr(), 0, 0, 0)
    assert torch.equal(averages[0], wanted[0])
    assert torch.equal(merge_ema_state(high, low), wanted[1])


@pytest.mark.parametrize(
    ("low", "source", "message"),
    [
        ([], torch.zeros(3), "number of low halves: expected 1, got 0"),
        ([torch.zeros(3)], torch.zeros(3), "dtypes of high and low: expected bfloat16 and int16"),
        ([torch.zeros(4).short()], torch.zeros(3), "low: expected 3, got 4"),
        ([torch.zeros(3).short()], torch.zeros(3).double(), "dtype of source: expected float32, bfloat16 or float16"),
        ([torch.zeros(6).short()[::2]], torch.zeros(3), "layouts: expected high, low and source without gaps"),
    ],
)
def test_messages_of_halves(emulated, low, source, message) -> None:
    with pytest.raises(RuntimeError, match=f"update_split_ema_: {message}"):
        torch.ops.d2v_emu.update_split_ema_([torch.zeros(3).bfloat16()], low, [source], 0.5, None)


def refused(
    average=3, source=3, copies=(), dtype=torch.float32, source_dtype=torch.float32, weight=None
) -> tuple[list[Tensor], list[Tensor], list[Tensor], float, Tensor | None]:
    """Arguments of the operator; 3 elements each unless a shape is given."""
    sources = [] if source is None else [torch.zeros(source, dtype=source_dtype)]
    return [torch.zeros(average, dtype=dtype)], sources, [torch.zeros(c) for c in copies], 0.5, weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (refused(source=None), "number of sources: expected 1, got 0"),
        (refused(copies=(3, 3)), "number of copies: expected 1, got 2"),
        (refused(source=4), "source: expected 3, got 4"),
        (refused(source=(3, 1)), "source: expected 1 dimensions, got 2"),
        (refused(copies=[2]), "copy: expected 3, got 2"),
        (refused(source_dtype=torch.float64), "dtypes: expected float64 for both of average and source or for neither"),
        (refused(dtype=torch.int32), "dtype of average: expected float32, bfloat16, float16 or float64"),
        (refused(weight=torch.zeros(())), "dtype of weight: expected float64"),
        (refused(weight=torch.zeros(1).double()), "weight: expected 0 dimensions, got 1"),
    ],
)
def test_messages(emulated, arguments, message) -> None:
    with pytest.raises(RuntimeError, match=f"update_ema_: {message}"):
        torch.ops.d2v_emu.update_ema_(*arguments)


def test_nothing_to_do(emulated) -> None:
    torch.ops.d2v_emu.update_ema_([torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0)], 0.5, None)
