"""EmaPlan.from_modules: names, wrappers, ties, buffers, copies, halves, state, tensors that a module holds anew."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from d2v_kernels import EmaPlan, merge_ema_state, split_ema_state, update_ema_, use_backend


class Net(nn.Module):
    """Parameters of several shapes, one of them tied, and buffers of three kinds."""

    def __init__(self, seed: int, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 5))
        self.first, self.last = nn.Linear(5, 3, bias=False), nn.Linear(5, 3, bias=False)
        if tied:
            self.last.weight = self.first.weight
        self.register_buffer("table", torch.randn(4), persistent=False)
        self.body[1].running_mean += seed
        self.body[1].num_batches_tracked += seed


TIED = "last.weight"


def pair(**options: bool) -> tuple[Net, Net]:
    return Net(1, **options).requires_grad_(False), Net(2, **options)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def expected(teacher: nn.Module, student: nn.Module, decay: float, buffers: str = "copy") -> dict[str, Tensor]:
    """Each tensor by itself, with the list operator."""
    result = copy.deepcopy(tensors(teacher))
    for name, source in tensors(student).items():
        parameter = isinstance(source, nn.Parameter)
        if parameter or (buffers == "average" and source.is_floating_point()):
            update_ema_([result[name]], [source], decay)
        elif buffers != "ignore":
            result[name].copy_(source)
    return result


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [n for n in want if not torch.equal(got[n], want[n])] == []


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
@pytest.mark.parametrize("decay", [0.75, 1.0, torch.tensor(0.25, dtype=torch.float64)])
def test_parameters_and_buffers(buffers, decay) -> None:
    teacher, student = pair()
    want = expected(teacher, student, decay, buffers)
    EmaPlan.from_modules(teacher, student, buffers=buffers).step(decay)
    assert_equal(tensors(teacher), want)


def test_making_a_plan_changes_no_average() -> None:
    teacher, student = pair()
    before = copy.deepcopy(tensors(teacher))
    EmaPlan.from_modules(teacher, student, copies=torch.bfloat16)
    assert_equal(tensors(teacher), before)


def in_ddp(net: Net) -> nn.Module:
    return DistributedDataParallel(net)


def with_parts_wrapped(net: Net) -> nn.Module:
    net.body[0] = checkpoint_wrapper(net.body[0])
    net.body[2] = torch.compile(net.body[2])
    return net


@pytest.mark.parametrize("wrap", [in_ddp, torch.compile, lambda n: torch.compile(in_ddp(n)), with_parts_wrapped])
def test_wrappers_have_no_names(one_rank, wrap) -> None:
    teacher, student = pair()
    want = expected(teacher, student, 0.75)
    EmaPlan.from_modules(torch.compile(teacher), wrap(student)).step(0.75)
    assert_equal(tensors(teacher), want)


def test_a_part_that_is_called_module_keeps_its_name() -> None:
    teacher, student = (nn.ModuleDict({"module": nn.Linear(2, 2)}) for _ in range(2))
    assert list(EmaPlan.from_modules(teacher, student).state_dict()) == ["module.weight", "module.bias"]
    with pytest.raises(ValueError, match=r"expected also module\.weight, module\.bias, got weight, bias"):
        EmaPlan.from_modules(teacher, student["module"])


def test_order_does_not_count() -> None:
    teacher, student = (nn.ModuleDict({k: nn.Linear(2, 2) for k in names}) for names in ("ab", "ba"))
    want = expected(teacher, student, 0.75)
    EmaPlan.from_modules(teacher, student).step(0.75)
    assert_equal(tensors(teacher), want)


def test_tied_parameters_are_averaged_once() -> None:
    teacher, student = pair()
    want = expected(teacher, student, 0.75)
    plan = EmaPlan.from_modules(teacher, student)
    plan.step(0.75)
    assert TIED not in plan.state_dict()
    assert_equal(tensors(teacher), want)
    assert teacher.first.weight is teacher.last.weight
    loose = Net(1, tied=False)
    EmaPlan.from_modules(loose, student).step(0.75)  # two averages of one source
    assert torch.equal(loose.first.weight, teacher.first.weight)
    words = r"last\.weight, which is first\.weight in the teacher, of the student: expected the tensor at first\.weight"
    with pytest.raises(ValueError, match=words):
        EmaPlan.from_modules(teacher, Net(2, tied=False))


def test_copies_of_a_dtype() -> None:
    teacher, student = pair()
    plan = EmaPlan.from_modules(teacher, student, buffers="average", copies=torch.bfloat16)
    for decay in (None, 0.75, 0.5):
        if decay is not None:
            plan.step(decay)
        averaged = [n for n, t in tensors(teacher).items() if t.is_floating_point()]
        assert_equal(plan.copies, {n: tensors(teacher)[n].bfloat16() for n in averaged})


def test_a_forward_with_the_copies() -> None:
    teacher, student = (nn.Linear(3, 3) for _ in range(2))
    plan = EmaPlan.from_modules(teacher, student, copies=torch.bfloat16)
    plan.step(0.5)
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    want = copy.deepcopy(teacher).bfloat16()(x)
    assert torch.equal(torch.func.functional_call(teacher, plan.copies, x), want)


def test_copies_in_a_module() -> None:
    teacher, student = pair()
    working = copy.deepcopy(teacher)
    working.body.bfloat16()
    plan = EmaPlan.from_modules(teacher, student, copies=working)
    plan.step(0.75)
    got, want = tensors(working), tensors(teacher)
    assert got["body.0.weight"].dtype == torch.bfloat16
    assert_equal(got, {n: t.to(got[n].dtype) for n, t in want.items()})


def test_low_precision_student() -> None:
    teacher, student = pair()
    student.bfloat16()
    want = expected(teacher, student, 0.999)
    plan = EmaPlan.from_modules(teacher, student)
    plan.step(0.999)
    assert_equal(tensors(teacher), want)


def test_halves_have_the_bits_of_float32_averages() -> None:
    teacher, student = (net.bfloat16() for net in pair())
    whole = copy.deepcopy(teacher).float()
    split, plan = EmaPlan.from_modules(teacher, student, split=True), EmaPlan.from_modules(whole, student)
    for _ in range(5):
        split.step(0.999)
        plan.step(0.999)
    names = dict(whole.named_parameters())
    assert_equal({n: split.state_dict()[n] for n in names}, names)
    assert teacher.first.weight.dtype == torch.bfloat16
    assert not torch.equal(teacher.first.weight.float(), whole.first.weight)  # the lower halves have something


@pytest.mark.parametrize("source", ["split", "whole"])
@pytest.mark.parametrize("target", ["split", "whole"])
def test_state_goes_on_bit_for_bit(source, target) -> None:
    def make(seed: int, kind: str) -> tuple[EmaPlan, Net]:
        student, teacher = Net(9).bfloat16(), Net(seed).bfloat16()
        teacher = teacher if kind == "split" else teacher.float()
        copies = None if kind == "split" else torch.bfloat16
        return EmaPlan.from_modules(teacher, student, split=kind == "split", copies=copies), teacher

    (first, _), (second, teacher) = make(1, source), make(2, target)
    first.step(0.999)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    if target == "whole":
        assert torch.equal(second.copies["first.weight"], teacher.first.weight.bfloat16())
    for _ in range(2):
        first.step(0.999)
        second.step(0.999)
    got = second.state_dict()
    assert_equal({n: t.to(got[n].dtype) for n, t in first.state_dict().items()}, got)


def test_state_of_lists() -> None:
    high, low = split_ema_state(torch.randn(5))
    plan, whole = EmaPlan([high], [torch.ones(5)], low=[low]), torch.randn(5)
    assert torch.equal(plan.state_dict()["0"], merge_ema_state(high, low))
    plan.load_state_dict({"0": whole})
    assert torch.equal(merge_ema_state(high, low), whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra": torch.ones(1)}, "names: expected the 11 of the teacher alone, got extra"),
        ({"first.weight": None}, r"names: expected also first\.weight, got none of them"),
        ({"first.weight": torch.ones(3, 4)}, r"shape of first\.weight: expected \(3, 5\), got \(3, 4\)"),
    ],
)
def test_a_wrong_state_changes_nothing(change, words) -> None:
    teacher, student = pair()
    plan, before = EmaPlan.from_modules(teacher, student), copy.deepcopy(tensors(teacher))
    state = {n: torch.full_like(t, 7) for n, t in plan.state_dict().items()} | change
    with pytest.raises(ValueError, match=f"EmaPlan.load_state_dict: {words}"):
        plan.load_state_dict({n: t for n, t in state.items() if t is not None})
    assert_equal(tensors(teacher), before)


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_tensors_that_a_module_holds_anew_are_followed(of) -> None:
    teacher, student = pair()
    plan = EmaPlan.from_modules(teacher, student, copies=torch.bfloat16)
    module, other = {"teacher": teacher, "student": student}[of], Net(3)
    module.load_state_dict(other.state_dict(), assign=True)
    module.last.weight = module.first.weight  # assign=True unties
    module.table = torch.full((4,), 5.0)
    want = expected(teacher, student, 0.75)
    plan.step(0.75)
    assert_equal(tensors(teacher), want)
    assert torch.equal(plan.copies["first.weight"], want["first.weight"].bfloat16())


def test_what_does_not_fit_any_more_is_refused_until_it_fits() -> None:
    teacher, student = pair()
    plan, before, good = EmaPlan.from_modules(teacher, student), copy.deepcopy(tensors(teacher)), student.first
    for wrong, words in (
        (nn.Linear(5, 4, bias=False), r"shape of first\.weight of the student: expected \(3, 5\), got \(4, 5\)"),
        (nn.Linear(5, 3, bias=False, device="meta"), r"device of sources\[\d\]: expected cpu, got meta"),
    ):
        student.first = student.last = wrong
        student.body[0].weight = nn.Parameter(torch.zeros(7, 5))
        for _ in range(2):
            with pytest.raises(ValueError, match=words):
                plan.step(0.5)
        assert_equal(tensors(teacher), before)
    student.first = student.last = good
    want = expected(teacher, student, 0.5)
    plan.step(0.5)
    assert_equal(tensors(teacher), want)


def test_a_shard_that_is_another_tensor_is_followed(one_rank) -> None:
    mesh = DeviceMesh("cpu", [0])
    average, source = (distribute_tensor(torch.full((4,), v), mesh, [Shard(0)]) for v in (0.0, 1.0))
    plan = EmaPlan([average], [source])
    average._local_tensor = torch.full((4,), 2.0)
    plan.step(0.5)
    assert average.full_tensor().tolist() == [1.5] * 4


def replaced(net: Net, **parts: object) -> Net:
    for name, part in parts.items():
        setattr(net, name, part)
    return net


@pytest.mark.parametrize(
    ("student", "options", "error", "words"),
    [
        (replaced(Net(2), head=nn.Linear(2, 2)), {}, ValueError, "parameters of the student: expected the 8 of the "
         "teacher alone, got head.weight, head.bias"),
        (replaced(Net(2), body=nn.Identity()), {}, ValueError, "expected also body.0.weight, body.0.bias, "
         "body.1.weight and 3 more, got none of them"),
        (replaced(Net(2), table=None), {}, ValueError, "buffers of the student: expected also table, got none"),
        (replaced(Net(2), body=nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(7), nn.Linear(7, 5))), {}, ValueError,
         r"shape of body\.0\.weight of the student: expected \(7, 5\), got \(6, 5\)"),
        (replaced(Net(2), scale=nn.Parameter(torch.ones(2, dtype=torch.complex64))), {}, TypeError,
         "scale of the student: expected one of float32.*got complex64"),
        (Net(2), {"split": True}, TypeError, "body.0.weight of the teacher: expected bfloat16, got float32"),
        (Net(2).parameters(), {}, TypeError, "student: expected a module, got generator; EmaPlan"),
        (Net(2), {"buffers": True}, ValueError, "buffers: expected copy, average or ignore, got True"),
        (Net(2), {"copies": "bf16"}, TypeError, "copies: expected a dtype, a module or None, got str"),
        (Net(2), {"copies": nn.Linear(2, 2)}, ValueError, "parameters of the copies: expected also"),
        (Net(2), {"copies": torch.int32}, TypeError, r"copies\[0\]: expected one of float32.*got int32"),
    ],
)  # fmt: skip
def test_messages(student, options, error, words) -> None:
    teacher = replaced(Net(1), scale=nn.Parameter(torch.ones(2))) if hasattr(student, "scale") else Net(1)
    with pytest.raises(error, match=words):
        EmaPlan.from_modules(teacher, student, **options)


def test_buffers_that_are_ignored_need_not_fit() -> None:
    teacher, student = Net(1), replaced(Net(2), table=None)
    EmaPlan.from_modules(teacher, student, buffers="ignore").step(0.5)


def test_halves_have_no_copies_beside_them() -> None:
    teacher, student = (net.bfloat16() for net in pair())
    with pytest.raises(ValueError, match="copies: expected none beside low halves"):
        EmaPlan.from_modules(teacher, student, split=True, copies=torch.bfloat16)


def test_a_module_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="number of averages of a plan: expected at least 1, got 0"):
        EmaPlan.from_modules(nn.ReLU(), nn.ReLU())


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_parameters_that_cannot_be_averaged_are_copied(dtype) -> None:
    teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
    for module, value in ((teacher, 0), (student, 1)):
        module.scale = nn.Parameter(torch.full((3,), value, dtype=dtype), requires_grad=False)
    EmaPlan.from_modules(teacher, student).step(0.5)
    assert teacher.scale.tolist() == [1, 1, 1]


def test_a_cut_buffer_is_refused() -> None:
    teacher, student = pair()
    plan = EmaPlan.from_modules(teacher, student)
    student.table.untyped_storage().resize_(8)
    with pytest.raises(ValueError, match=r"storage of a tensor .*: expected 16 bytes, got 8 bytes"):
        plan.step(0.5)


def test_what_is_printed_and_what_is_not_copied() -> None:
    teacher, student = nn.Linear(2, 3), nn.Linear(2, 3)
    plan = EmaPlan.from_modules(teacher, student, copies=torch.bfloat16)
    assert repr(plan).startswith("EmaPlan(2 tensors of 9 numbers, copies in bfloat16, ")
    with pytest.raises(TypeError, match=r"expected state_dict\(\) where it is copied or saved"):
        copy.deepcopy(plan)
    with pytest.raises(ValueError, match="teacher: expected another module than the student, got the same"):
        EmaPlan.from_modules(student, student)


def test_a_teacher_that_learns_and_a_student_that_does_not_are_probably_swapped() -> None:
    teacher, student = pair()
    with pytest.warns(RuntimeWarning, match="the teacher requires gradients, the student does not; were they swapped"):
        EmaPlan.from_modules(student, teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EmaPlan.from_modules(teacher, student)
        EmaPlan.from_modules(*(net.requires_grad_() for net in pair()))


def test_a_bfloat16_average_that_hardly_moves_is_told_once() -> None:
    teacher, student = (net.bfloat16() for net in pair())
    plan = EmaPlan.from_modules(teacher, student)
    split = EmaPlan.from_modules(*(net.bfloat16() for net in pair()), split=True)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for decay in (0.99, 1.0, 0.999, 0.999):
            plan.step(decay)
            split.step(decay)
    (warning,) = found
    assert "hardly move at decay 0.999" in str(warning.message) and "split=True" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(("backend", "name"), [("auto", "table"), ("reference", r"body\.0\.weight")])
def test_what_inference_mode_keeps_from_being_written_is_named(backend, name) -> None:
    with torch.inference_mode():
        teacher, student = pair()
    buffers = "ignore" if backend == "reference" else "copy"
    words = f"{name}: expected a tensor made outside of torch.inference_mode, or its clone, got one made inside"
    with use_backend(backend):
        with pytest.raises(ValueError, match=words):
            EmaPlan.from_modules(teacher, student, buffers=buffers)
        with torch.inference_mode():
            EmaPlan.from_modules(teacher, student).step(0.5)


# ---- shards


class Small(nn.Module):
    """Rows that three and four ranks cannot share evenly, and fewer rows than ranks."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))
        self.scale = nn.Parameter(torch.randn(1))
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if hasattr(t, "placements") else t for n, t in state.items()}


def step_sharded(mesh: DeviceMesh, **options: Any) -> None:
    """On each rank of a mesh: a plan of shards against a plan of the whole modules, which every rank has, too."""
    dtype = torch.bfloat16 if "split" in options else torch.float32
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain, sharded = ([Small(seed, dtype) for seed in (1, 2)] for _ in range(2))
    for net in sharded:
        fully_shard(net.layers, mesh=mesh)
        fully_shard(net, mesh=mesh)
    reference, plan = (EmaPlan.from_modules(*pair, **options) for pair in (plain, sharded))
    for decay in (0.999, 0.75, torch.tensor(0.25, dtype=torch.float64)):
        # A forward without a backward leaves the outermost parameters gathered.
        assert torch.equal(sharded[0](x), plain[0](x))
        reference.step(decay)
        plan.step(decay)
        assert_equal(whole(plan.state_dict()), reference.state_dict())
        assert_equal(whole(plan.copies), reference.copies)
    assert torch.equal(sharded[0](x), plain[0](x))
    other = {n: t + 0.3 if t.is_floating_point() else t for n, t in reference.state_dict().items()}
    for p in (reference, plan):
        p.load_state_dict(other)
    assert_equal(whole(plan.state_dict()), reference.state_dict())
    with pytest.raises(
        ValueError, match=r"scale: expected all or none sharded .*, got the teacher not, the student sha"
    ):
        EmaPlan.from_modules(plain[0], sharded[1])


def test_the_example_of_the_guide(one_rank) -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "ema.md").read_text()
    example = re.findall(r"```python\n(.*?)\n```", guide, re.DOTALL)[-1]
    student = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    names: dict[str, Any] = {"copy": copy, "fully_shard": fully_shard, "EmaPlan": EmaPlan, "student": student,
                             "mesh": DeviceMesh("cpu", [0])}  # fmt: skip
    exec(compile(example, "ema.md", "exec"), names)
    teacher = names["teacher"]
    with pytest.raises(AssertionError, match="deepcopy"):
        copy.deepcopy(student)
    teacher(torch.ones(1, 2))
    assert not any(hasattr(p, "full_tensor") for p in teacher.parameters())
    teacher.reshard()
    assert_equal({n: p.full_tensor() for n, p in teacher.named_parameters()}, names["whole"])


@torch.no_grad()
def run_rank(rank: int, folder: str) -> None:
    """One of four ranks, of which the first one, two, three and all share models."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    teacher, student = Small(1), DistributedDataParallel(Small(2))
    EmaPlan.from_modules(teacher, student).step(0.75)
    assert_equal(tensors(teacher), expected(Small(1), Small(2), 0.75))
    for ranks in range(1, 5):
        mesh = DeviceMesh("cpu", list(range(ranks)))
        for options in ({}, {"copies": torch.bfloat16}, {"buffers": "average"}, {"split": True}):
            if rank < ranks:
                step_sharded(mesh, **options)
    # A rank that is done closes its connections while others may still read from them.
    dist.barrier()
    dist.destroy_process_group()


def test_shards_equal_the_whole_bit_for_bit(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=4)
