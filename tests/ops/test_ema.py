"""update_ema_ and EmaPlan: accuracy, mixed dtypes, copies, golden steps, messages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accuracy import assert_accurate
from support.golden import load_case
from support.tensors import BACKENDS, FLOATS, in_layout, layouts, random_rows
from torch import Tensor
from torch.library import opcheck

from d2v.config import Ema
from d2v_kernels import EmaPlan, update_ema_, use_backend

LOW = [torch.float32, torch.bfloat16, torch.float16]
DECAYS = [0.0, 0.5, 0.999, 0.99999, 1.0]


def truth_of(average: Tensor, source: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """A careful float32 step and the float64 truth."""
    w = 1.0 - decay
    compute = torch.float64 if average.dtype == torch.float64 else torch.float32
    a, s = average.to(compute), source.to(compute)
    careful = (a + w * (s - a)).to(average.dtype)
    return careful, average.double() + w * (source.double() - average.double())


def step(route: str, averages, sources, decay, copies=None) -> None:
    if route == "plan":
        EmaPlan(averages, sources, copies).step(decay)
    else:
        update_ema_(averages, sources, decay, copies=copies)


@pytest.mark.parametrize("route", ["list", "plan"])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), decay=st.sampled_from(DECAYS), seed=st.integers(0, 99))
def test_accuracy(backend, route, data, decay, seed) -> None:
    averages, sources, copies = [], [], []
    for i in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.sampled_from([(), (0,), (1,), (7,), (33, 5), (4, 3, 17), (40000,)]))
        dtype = data.draw(st.sampled_from(FLOATS))
        source_dtype = dtype if dtype == torch.float64 else data.draw(st.sampled_from(LOW))
        averages.append(in_layout(random_rows((*shape, 1), dtype, seed + i)[..., 0], data.draw(layouts)))
        sources.append(in_layout(random_rows((*shape, 1), source_dtype, seed - i)[..., 0], data.draw(layouts)))
        copies.append(torch.full(shape, 7.0, dtype=data.draw(st.sampled_from(LOW))))
    wanted = [truth_of(a, s, decay) for a, s in zip(averages, sources, strict=True)]
    with use_backend(backend):
        step(route, averages, sources, decay, copies)
    for average, copy, (careful, truth) in zip(averages, copies, wanted, strict=True):
        assert_accurate(average, careful, truth)
        assert torch.equal(copy, average.to(copy.dtype))


@pytest.mark.parametrize("route", ["list", "plan"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_tensor", [False, True])
def test_weight_zero_never_reads_the_source(backend, route, by_tensor) -> None:
    average, source = torch.randn(1000), torch.full((1000,), math.nan)
    before, copy = average.clone(), torch.zeros(1000, dtype=torch.bfloat16)
    decay = torch.zeros((), dtype=torch.float64) if by_tensor else 1.0
    with use_backend(backend):
        step(route, [average], [source], decay, [copy])
    assert torch.equal(average, before)
    assert torch.equal(copy, before.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_means_nan_out(backend) -> None:
    average, source = torch.randn(70000), torch.randn(70000)
    source[[0, 5, 69999]] = math.nan
    with use_backend(backend):
        update_ema_([average], [source], 0.9)
    assert average.isnan().nonzero()[:, 0].tolist() == [0, 5, 69999]


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_weight_is_exact(backend) -> None:
    """1 - 0.99999 formed in float32 would be wrong by 1e-3."""
    average, source = torch.zeros(5), torch.ones(5)
    with use_backend(backend):
        update_ema_([average], [source], 0.99999)
    torch.testing.assert_close(average, torch.full((5,), 1e-5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decay_as_tensor_holds_the_weight(backend) -> None:
    average, source = torch.randn(100), torch.randn(100)
    other = average.clone()
    with use_backend(backend):
        update_ema_([average], [source], 0.9)
        update_ema_([other], [source], torch.tensor(1.0 - 0.9, dtype=torch.float64))
    assert torch.equal(average, other)


def test_plan_follows_moved_tensors() -> None:
    average, source = torch.zeros(10), torch.ones(10)
    plan = EmaPlan([average], [source])
    source.data = torch.full((10,), 3.0)
    plan.step(0.5)
    assert average.tolist() == [1.5] * 10


def test_plan_equals_list_bitwise() -> None:
    shapes = [(64, 33), (5,), (70001,), ()]
    sources = [torch.randn(s) for s in shapes]
    results = []
    for route in ("list", "plan"):
        averages = [torch.ones(s) for s in shapes]
        copies = [torch.zeros(s, dtype=torch.bfloat16) for s in shapes]
        for _ in range(3):
            step(route, averages, sources, 0.999, copies)
        results.append(averages + copies)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["fp32", "bf16_fp32teacher", "fp16_fp32teacher", "bf16_bf16teacher"])
def test_golden_steps(backend, name) -> None:
    tensors, record = load_case("kernel_ema")
    names = [k.removeprefix(f"{name}/student/0/") for k in tensors if k.startswith(f"{name}/student/0/")]
    averaged = [n for n in names if n not in ("frozen", "buf") and not n.startswith("pos_conv")]
    low = tensors[f"{name}/student/0/{averaged[0]}"].dtype
    average_dtype = low if name == "bf16_bf16teacher" else torch.float32
    averages = [tensors[f"{name}/student/0/{n}"].to(average_dtype) for n in averaged]
    copies = [torch.zeros_like(tensors[f"{name}/student/0/{n}"]) for n in averaged]
    for i, decay in enumerate(record["config"][name]["decays"], start=1):
        sources = [tensors[f"{name}/student/{i}/{n}"] for n in averaged]
        with use_backend(backend):
            update_ema_(averages, sources, decay, copies=copies)
        for n, average, copy in zip(averaged, averages, copies, strict=True):
            _compare_golden(tensors, f"{name}/teacher", i, n, average, copy)


def _compare_golden(tensors, prefix: str, i: int, n: str, average: Tensor, copy: Tensor) -> None:
    for key, got in ((f"{prefix}_fp32/{i}/{n}", average), (f"{prefix}/{i}/{n}", copy)):
        if key not in tensors:
            continue
        want = tensors[key].float()
        ulp = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(got.dtype, 5e-7)
        steps = i if got.dtype == torch.bfloat16 and average.dtype == torch.bfloat16 else 1
        tolerance = steps * ulp * want.abs().clamp(min=want.abs().max() * (1.0 if ulp == 5e-7 else 0.0))
        assert bool(((got.float() - want).abs() <= tolerance).all()), key


def test_golden_schedule() -> None:
    tensors, record = load_case("kernel_ema_schedule")
    for name, c in record["config"].items():
        ema = Ema(c["ema_decay"], c["ema_end_decay"], c["ema_anneal_end_step"])
        for update, decay in zip(tensors[f"{name}/steps"].tolist(), tensors[f"{name}/decay"].tolist(), strict=True):
            assert math.isclose(ema.decay(update, 10**9), decay, rel_tol=1e-12), (name, update)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend) -> None:
    averages, sources = [torch.zeros(4), torch.ones(3, 2)], [torch.ones(4), torch.zeros(3, 2)]
    copies = [torch.empty(4, dtype=torch.bfloat16), torch.empty(3, 2)]
    with use_backend(backend):
        for c, w in ((copies, None), ([], torch.tensor(0.25, dtype=torch.float64))):
            opcheck(torch.ops.d2v.update_ema_.default, (averages, sources, c, 0.1, w))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend) -> None:
    average, source = torch.zeros(4), torch.ones(4)

    def two_steps() -> Tensor:
        update_ema_([average], [source], 0.5)
        update_ema_([average], [source], 0.5)
        return average * 2

    with use_backend(backend):
        result = torch.compile(two_steps, fullgraph=True, backend="aot_eager")()
    assert result.tolist() == [1.5] * 4


def test_parameters_that_require_grad() -> None:
    average, source = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.ones(4))
    update_ema_([average], [source], 0.5)
    assert average.tolist() == [0.5] * 4
    EmaPlan([average], [source]).step(0.5)
    assert average.tolist() == [0.75] * 4
    assert average.requires_grad


def test_empty_list() -> None:
    update_ema_([], [], 0.9)
    with pytest.raises(ValueError, match="number of averages of a plan: expected at least 1, got 0"):
        EmaPlan([], [])


@pytest.mark.parametrize(
    ("averages", "sources", "decay", "copies", "error", "words"),
    [
        ([torch.ones(2)], [], 0.9, None, ValueError, "number of sources: expected 1, got 0"),
        ([torch.ones(2)], [torch.ones(2)], 0.9, [torch.ones(2)] * 2, ValueError, "number of copies"),
        ([torch.ones(2)], [torch.ones(3)], 0.9, None, ValueError, r"sources\[0\]: expected \(2,\), got \(3,\)"),
        ([torch.ones(2)], [torch.ones(2).int()], 0.9, None, TypeError, "got int32"),
        ([torch.ones(2)], [torch.ones(2)], 1.5, None, ValueError, "decay: expected 0 to 1, got 1.5"),
        ([torch.ones(2)], [torch.ones(2)], -0.1, None, ValueError, "decay"),
        ([torch.ones(2)], [torch.ones(2)], math.nan, None, ValueError, "decay"),
        ([torch.ones(2)], [torch.ones(2)], "0.9", None, TypeError, "decay: expected a number, got str"),
        (
            [("w", torch.ones(2))],
            [torch.ones(2)],
            0.9,
            None,
            TypeError,
            "got tuple; EmaPlan.from_modules takes modules",
        ),
        ({"w": torch.ones(2)}, [torch.ones(2)], 0.9, None, TypeError, "got str; EmaPlan.from_modules takes modules"),
        (torch.nn.Linear(2, 2), [torch.ones(2)], 0.9, None, TypeError, "got Linear; EmaPlan.from_modules takes mod"),
        ([torch.ones(2)], [torch.ones(2)], torch.tensor(0.5), None, TypeError, "float64, got float32"),
        ([torch.ones(2)], [torch.ones(2, device="meta")], 0.5, None, ValueError, "device"),
    ],
)
def test_messages(averages, sources, decay, copies, error, words) -> None:
    for route in ("list", "plan"):
        with pytest.raises(error, match=words) as caught:
            step(route, averages, sources, decay, copies)
        assert str(caught.value).startswith("update_ema_")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("other", "words"),
    [
        (torch.ones(3), r"shape of sources\[0\]: expected \(4096,\), got \(3,\)"),
        (torch.ones(2, 2048), r"expected \(4096,\), got \(2, 2048\)"),
        (torch.ones(4096).int(), "got int32"),
    ],
)
def test_plan_checks_again_what_has_moved(backend, other, words) -> None:
    average, source = torch.zeros(4096), torch.ones(4096)
    with use_backend(backend):
        plan = EmaPlan([average], [source])
        source.data = other
        for _ in range(2):
            with pytest.raises((ValueError, TypeError), match=words):
                plan.step(0.5)
        assert not average.any()
        source.data = torch.ones(4096)
        plan.step(0.5)
    assert average.tolist() == [0.5] * 4096


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of", ["average", "source"])
def test_freed_and_shortened_storage(backend, of) -> None:
    for left in (0, 12):
        average, source = torch.zeros(4096), torch.ones(4096)
        with use_backend(backend):
            plan = EmaPlan([average], [source])
            (average if of == "average" else source).untyped_storage().resize_(left)
            with pytest.raises(ValueError, match=f"storage of .*: expected 16384 bytes, got {left}"):
                plan.step(0.5)
            with pytest.raises(ValueError, match=f"storage of .*: expected 16384 bytes, got {left}"):
                update_ema_([average], [source], 0.5)


def test_plan_sees_fewer_elements_at_the_same_address() -> None:
    average, source = torch.zeros(10), torch.ones(10)
    plan = EmaPlan([average], [source])
    source.data = source.data[:4]
    with pytest.raises(ValueError, match=r"expected \(10,\), got \(4,\)"):
        plan.step(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ["list", "plan"])
def test_outputs_do_not_overlap(backend, route) -> None:
    x, both = torch.arange(12.0), torch.zeros(12)
    cases = [
        ([x[:1].expand(4)], [torch.ones(4)], None),
        ([x.as_strided((3, 4), (2, 1))], [torch.ones(3, 4)], None),
        ([x[:6], x[4:10]], [torch.ones(6)] * 2, None),
        ([x[:6], x[:6]], [torch.ones(6)] * 2, None),
        ([x[:6]], [torch.ones(6)], [x[3:9]]),
        ([x[:6]], [x[1:7]], None),
        ([x[:6], x[6:]], [x[6:], torch.ones(6)], None),
    ]
    with use_backend(backend):
        for averages, sources, copies in cases:
            with pytest.raises(ValueError, match="expected no overlap, got an overlap in"):
                step(route, averages, sources, 0.5, copies)
        assert torch.equal(x, torch.arange(12.0))
        columns = both.view(3, 4)  # in one storage, one between the other's rows
        step(route, [columns[:, :2], columns[:, 2:]], [torch.ones(3, 2), torch.full((3, 2), 3.0)], 0.5)
        step(route, [x[:6], x[6:]], [x[:6], torch.zeros(6)], 0.5)  # an entry's own source may be itself
    assert columns.tolist() == [[0.5, 0.5, 1.5, 1.5]] * 3
    assert x.tolist() == [0, 1, 2, 3, 4, 5, 3, 3.5, 4, 4.5, 5, 5.5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ["list", "plan"])
def test_lazily_negated_views(backend, route) -> None:
    average, negated = torch.zeros(4), torch.complex(torch.zeros(4), torch.ones(4)).conj().imag
    with use_backend(backend):
        step(route, [average], [negated], 0.5)
        assert average.tolist() == [-0.5] * 4
        with pytest.raises(ValueError, match="got a lazily negated view"):
            step(route, [negated], [average], 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ["list", "plan"])
def test_writes_count_for_saved_tensors(backend, route) -> None:
    average, source, x = torch.ones(3), torch.zeros(3), torch.ones(3, requires_grad=True)
    y = (x * average).sum()
    with use_backend(backend):
        step(route, [average], [source], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        step(route, [torch.ones(3)], [source], 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("route", ["list", "plan"])
def test_float64_beside_other_sources(backend, route) -> None:
    averages, sources = [torch.zeros(3, dtype=torch.float64), torch.zeros(3)], [torch.ones(3), torch.ones(3).double()]
    with use_backend(backend):
        if backend == "triton":
            with pytest.raises(NotImplementedError, match="triton has no float64 kernels"):
                step(route, averages, sources, 0.9)
            return
        step(route, averages, sources, 0.9)
    assert averages[0].tolist() == [1.0 - 0.9] * 3
    assert torch.equal(averages[1], torch.full((3,), 1.0 - 0.9))


def test_generators_are_lists() -> None:
    teacher, student = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    EmaPlan(teacher.parameters(), student.parameters()).step(0.0)
    update_ema_(teacher.parameters(), student.parameters(), 0.5)
    for average, source in zip(teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(average, source)  # a + (s - a), which may round
    with pytest.raises(ValueError, match="number of averages of a plan: expected at least 1, got 0"):
        EmaPlan(iter(()), iter(()))
