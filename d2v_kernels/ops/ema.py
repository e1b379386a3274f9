"""Exponential moving average of all parameters in one pass, with their low-precision copies."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import registry
from .._define import Call, count_write, define
from .ema_modules import Buffers, Pairing, distributed_like, same_names, with_local


def update_ema_(
    averages: Iterable[Tensor],
    sources: Iterable[Tensor],
    decay: float | Tensor,
    *,
    copies: Iterable[Tensor] | None = None,
    low: Iterable[Tensor] | None = None,
) -> None:
    """averages[i] <- averages[i] + (1 - decay) * (sources[i] - averages[i]), then copies[i] <- averages[i] rounded.

    data2vec section 3.2 "Teacher parameterization". Arithmetic in float32 (float64 for float64 averages); the weight
    1 - decay is formed in float64 and rounded once.

    Args:
        averages: tensors changed in place; float32 recommended (a bfloat16 average hardly moves at decay 0.9999). What
            is written overlaps with no other tensor; a source may be its own average or copy.
        sources: tensors of the same shapes; any floating dtype.
        decay: float in [0, 1], or a 0-D float64 tensor on the device that holds 1 - decay (CUDA graphs). Weight 0
            leaves the averages untouched even where sources are NaN.
        copies: tensors of the same shapes in any floating dtype, written with the new averages.
        low: int16 tensors of the same shapes; then averages are bfloat16, and the two are the halves of float32
            averages as `split_ema_state` makes them. The result has the bits that float32 averages would have; the
            bfloat16 half is the copy for the forward pass, so there are no `copies`. 12 bytes an element are moved
            with a float32 source instead of 14 with a float32 average and a bfloat16 copy, and 4 bytes are kept
            instead of 6. Sources are float32, bfloat16 or float16; all three tensors of an entry lie in memory in one
            order without gaps.

    DTensors are updated by their local shards, where mesh and placements agree.

    Decay 0 does not copy: a + (s - a) is rounded and may miss s by a unit in the last place of the larger of |a| and
    |s|. Where averages must become sources bit for bit, copy them.

    >>> average, source = torch.zeros(2), torch.ones(2)
    >>> copy = torch.empty(2, dtype=torch.bfloat16)
    >>> update_ema_([average], [source], 0.75, copies=[copy])
    >>> average, copy
    (tensor([0.2500, 0.2500]), tensor([0.2500, 0.2500], dtype=torch.bfloat16))

    Raises:
        ValueError, TypeError: lists, shapes, dtypes, devices, placements or a decay that do not fit.
    """
    _, lists = _operator(averages, sources, copies, low)
    operator = _update_ema_ if low is None else _update_split_ema_
    with torch.no_grad():
        operator(*lists, *_weight(decay))


def split_ema_state(average: Tensor) -> tuple[Tensor, Tensor]:
    """The halves (bfloat16, int16), of the average's shape, of a float32 average; for `update_ema_` with `low`.

    The first is the average rounded to the nearest bfloat16 (ties away from zero), the second what its 32 bits have
    beyond: every number comes back from `merge_ema_state` bit for bit, -0 and infinities too; a NaN comes back as a
    NaN, without its payload. A number above 3.3895e38 has an infinite bfloat16 half, as in any rounding to bfloat16.

    >>> split_ema_state(torch.tensor([1.0 + 2.0**-16]))
    (tensor([1.], dtype=torch.bfloat16), tensor([128], dtype=torch.int16))

    Raises:
        TypeError: the average is not float32.
    """
    if average.dtype != torch.float32:
        raise TypeError(f"split_ema_state: dtype of average: expected float32, got {average.dtype}")
    return _split_bits(average.detach())


def merge_ema_state(high: Tensor, low: Tensor) -> Tensor:
    """The float32 average, of the halves' shape, that `split_ema_state` has split.

    >>> merge_ema_state(torch.ones(1, dtype=torch.bfloat16), torch.tensor([128], dtype=torch.int16)) - 1.0 == 2.0**-16
    tensor([True])

    Raises:
        ValueError, TypeError: shapes that differ, halves that are not bfloat16 and int16.
    """
    check.shape("merge_ema_state", "low", low, high.shape)
    check.device("merge_ema_state", "low", low, high)
    if high.dtype != torch.bfloat16 or low.dtype != torch.int16:
        got = f"{high.dtype} and {low.dtype}"
        raise TypeError(f"merge_ema_state: dtypes of high and low: expected bfloat16 and int16, got {got}")
    return _merge_bits(high.detach(), low)


class EmaPlan:
    """`update_ema_` of fixed lists with the pointer tables built once: one launch, no per-tensor host work.

    The backend is the list operator's; one without a plan for these tensors runs that operator. Addresses are compared
    at every step; when a tensor has moved or another backend is forced, everything is checked again, as for new lists,
    and the tables are rebuilt.

    >>> import copy, torch
    >>> student = torch.nn.Linear(2, 2)
    >>> teacher = copy.deepcopy(student).requires_grad_(False)
    >>> plan = EmaPlan.from_modules(teacher, student, copies=torch.bfloat16)
    >>> plan.step(0.999)  # after each step of the optimiser
    >>> torch.equal(plan.copies["weight"], teacher.weight.bfloat16())
    True
    """

    copies: dict[str, Tensor]
    """Name -> low-precision copy; of a plan made from lists, the names are "0", "1" and so on."""

    def __init__(
        self,
        averages: Iterable[Tensor],
        sources: Iterable[Tensor],
        copies: Iterable[Tensor] | None = None,
        *,
        low: Iterable[Tensor] | None = None,
    ) -> None:
        """Takes the lists of `update_ema_`, not empty; checks them as it does."""
        self._pairing: Pairing | None = None
        self._set(averages, sources, copies or (), low)

    @classmethod
    def from_modules(
        cls, teacher: nn.Module, student: nn.Module, *, buffers: Buffers = "copy",
        copies: nn.Module | torch.dtype | None = None, split: bool = False,
    ) -> EmaPlan:  # fmt: skip
        """A plan that averages the parameters of a student in a teacher, matched by their names.

        Modules may be wrapped by DistributedDataParallel, `torch.compile`, activation checkpointing or FSDP, whose
        prefixes do not count, and sharded by `fully_shard`, both alike: every rank then updates its shards, and
        outermost parameters that a forward has left gathered are sharded again. Tied parameters are averaged once.
        A parameter or buffer that the module holds anew (`load_state_dict(assign=True)`) is followed.

        Args:
            teacher: its parameters are the averages, with whatever values they have now; float32 recommended.
            student: parameters of the same names and shapes in any floating dtype; integer ones are copied.
            buffers: "copy": from the student at every step; "average": floating ones averaged like parameters, others
                copied; "ignore": left alone, whatever their names.
            copies: where the averages are written rounded, now and at every step: a dtype, for tensors of that dtype in
                the plan's `copies` (`torch.func.functional_call(teacher, plan.copies, x)` computes with them); or a
                module with the same names, in any floating dtypes, whose buffers are treated as the teacher's.
            split: the teacher's parameters, all bfloat16, are the upper halves of float32 averages whose lower halves
                the plan keeps (`low` of `update_ema_`); not with `copies`. What is written into such a teacher from
                outside keeps the old lower halves; `load_state_dict` sets both.

        Raises:
            ValueError, TypeError: names, shapes, dtypes, ties or placements that differ; no parameters.
        """
        pairing, plan = Pairing(teacher, student, buffers, copies, split), cls.__new__(cls)
        plan._pairing = pairing
        plan._take(pairing)
        if any(t.requires_grad for t in plan._averages) and not any(t.requires_grad for t in plan._sources):
            text = "EmaPlan.from_modules(teacher, student): the teacher requires gradients, the student does not"
            warnings.warn(f"{text}; were they swapped?", RuntimeWarning, stacklevel=2)
        if plan.copies:
            plan._run(1.0)
        return plan

    def _take(self, pairing: Pairing) -> None:
        """Lists anew; where that fails, the next step does not go on with the old tensors."""
        places, pairing.places = pairing.find(), []
        low = None if pairing.low is None else pairing.low.values()
        self._set(pairing.averages.values(), pairing.sources, pairing.copies.values(), low, list(pairing.averages))
        pairing.places = places

    def _set(
        self, averages: Iterable[Tensor], sources: Iterable[Tensor], copies: Iterable[Tensor],
        low: Iterable[Tensor] | None, names: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._averages, self._sources, self._copies = _entries(averages), _entries(sources), _entries(copies)
        self._low = None if low is None else _entries(low)
        check.require(bool(self._averages), "update_ema_", "number of averages of a plan", "at least 1", 0)
        self._names = names or [str(i) for i in range(len(self._averages))]
        self._build()
        alone = self._low is None and not self._copies
        self._is_narrow = alone and any(t.dtype == torch.bfloat16 for t in self._averages)
        self.copies = dict(zip(self._names, self._copies, strict=False))

    def __repr__(self) -> str:
        numbers, kept = sum(t.numel() for t in self._averages), "in halves" if self._low is not None else ""
        dtypes = ", ".join(sorted({check.dtype_name(t.dtype) for t in self._copies}))
        more = kept or (f"copies in {dtypes}" if dtypes else "no copies")
        return f"EmaPlan({len(self._averages)} tensors of {numbers} numbers, {more}, {self._backend})"

    def __reduce__(self) -> Any:
        raise TypeError("EmaPlan: expected state_dict() where it is copied or saved: it holds addresses of its tensors")

    @property
    def native(self) -> bool:
        """True when steps run through the native plan rather than the list operator."""
        return self._plan is not None and self._backend == "native"

    def step(self, decay: float | Tensor) -> None:
        """One update with this decay; see `update_ema_`. A plan from modules copies buffers, too."""
        if self._pairing is not None and self._pairing.replaced():
            self._take(self._pairing)
        self._run(decay)
        if self._pairing is not None:
            self._pairing.copy_buffers()
        if self._is_narrow and not isinstance(decay, Tensor) and 1.0 - 2.0**-8 < decay < 1.0:
            self._is_narrow = False
            text = (
                f"EmaPlan: bfloat16 averages hardly move at decay {decay}, as a step adds less than half a last digit"
            )
            warnings.warn(f"{text}; split=True keeps what it adds", RuntimeWarning, stacklevel=2)

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> average, float32 where it is in halves, and the buffers that are copied: what a run needs to go on.

        Whole averages and buffers are the tensors themselves, not clones. The state of a split plan and that of one
        with float32 averages are alike. Shards are DTensors, as torch.distributed.checkpoint takes them.
        """
        averages = [t.detach() for t in self._averages]
        if self._low is not None:
            local, low = _local(averages, self._low)
            pairs = zip(averages, local, low, strict=True)
            averages = [with_local(merge_ema_state(high, lower), like) for like, high, lower in pairs]
        return dict(zip(self._names, averages, strict=True)) | (self._pairing.copied if self._pairing else {})

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Sets averages and buffers to what `state_dict` gave, and writes the copies.

        A plan of shards takes the state of whole tensors, too, the same on every rank.

        Raises:
            ValueError, TypeError: names, shapes or placements that differ; then nothing is written.
        """
        op = "EmaPlan.load_state_dict"
        targets = dict(zip(self._names, self._averages, strict=True))
        targets |= self._pairing.copied if self._pairing else {}
        same_names(op, "names", targets, state)
        for name, t in targets.items():
            check.shape(op, name, state[name], t.shape)
        values = [distributed_like(state[name], t) for name, t in targets.items()]
        check.writable(op, targets)
        written, values = _local(targets.values(), values)
        check.storage(op, [written, values])
        low = [] if self._low is None else _local(self._averages, self._low)[1]
        for i, (t, value) in enumerate(zip(written, values, strict=True)):
            if i < len(low):
                value, lower = split_ema_state(value.float())
                low[i].copy_(lower)
            t.copy_(value)
        if self._copies:
            self._run(1.0)

    def _run(self, decay: float | Tensor) -> None:
        if self._forced != registry.forced_backend():
            self._build()
        plan = self._plan
        if plan is None:
            update_ema_(self._averages, self._sources, decay, copies=self._copies, low=self._low)
            return
        if self._moved() or any(t._local_tensor is not local for t, local in self._shards):
            if self._tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("EmaPlan: a tensor has moved; step once outside the graph capture to rebuild")
            self._build()
            self._run(decay)
            return
        weight, weight_tensor = _weight(decay)
        plan.step(weight, weight_tensor)
        count_write(self._written)

    def _build(self) -> None:
        op, lists = _operator(self._averages, self._sources, self._copies, self._low)
        check.storage(op, lists)
        call = (_shape if self._low is None else _split_shape)(op, lists[0], lists[1], lists[2], 0.0, None)
        averages, second, third = lists
        sources, copies, low = (second, third, []) if self._low is None else (third, [], second)
        written = [*averages, *copies, *low]
        check.resolved(op, written)
        _check_memory(op, *lists)
        backend = registry.choose(registry.Case(op, averages[0].device.type, call.dtypes))
        if backend.name == "reference":  # the others write to memory, past what PyTorch allows
            check.writable(op, dict(zip(self._names, averages, strict=False)))
        # A lazily negated source has other numbers in its memory.
        make = None if any(t.is_neg() for t in sources) else backend.make_ema_plan
        plan: Any = make(averages, sources, copies, low) if make else None
        self._tensors, self._written = [*written, *sources], written
        # The shard of a DTensor can be another tensor later, which the one held here does not tell.
        given: list[Any] = [*self._averages, *self._sources, *self._copies, *(self._low or ())]
        self._shards = [(t, t._local_tensor) for t in given if hasattr(t, "_local_tensor")]
        self._places = self._look()
        self._forced, self._backend, self._plan = registry.forced_backend(), backend.name, plan
        self._moved = plan.moved if self.native else self._has_moved

    def _look(self) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t.numel()) for t in self._tensors]

    def _has_moved(self) -> bool:
        return self._look() != self._places


def _operator(
    averages: Iterable[Tensor], sources: Iterable[Tensor], copies: Iterable[Tensor] | None,
    low: Iterable[Tensor] | None,
) -> tuple[str, list[list[Tensor]]]:  # fmt: skip
    """Which operator takes these lists, and its three lists."""
    averages, sources, copies, halves = _local(averages, sources, copies or (), low or ())
    if low is None:
        return "update_ema_", [averages, sources, copies]
    check.require(not copies, "update_split_ema_", "copies", "none beside low halves", len(copies))
    return "update_split_ema_", [averages, halves, sources]


def _weight(decay: float | Tensor) -> tuple[float, Tensor | None]:
    if isinstance(decay, Tensor):
        return 0.0, decay
    try:
        check.require(0.0 <= decay <= 1.0, "update_ema_", "decay", "0 to 1", decay)
    except TypeError:
        raise TypeError(f"update_ema_: decay: expected a number, got {type(decay).__name__}") from None
    return 1.0 - decay, None


def _entries(tensors: Any) -> list[Tensor]:
    """The list; of what is none, an entry that is refused like others that are no tensors."""
    return list(tensors) if isinstance(tensors, Iterable) else [tensors]


def _local(*iterables: Iterable[Tensor]) -> list[list[Tensor]]:
    """Local shards of DTensors, after checking that mesh and placements agree entry by entry."""
    lists = [_entries(tensors) for tensors in iterables]
    kinds = {type(t) for tensors in lists for t in tensors}
    for kind in kinds:
        if not issubclass(kind, Tensor):
            words = f"tensors, got {kind.__name__}; EmaPlan.from_modules takes modules"
            raise TypeError(f"update_ema_: entries: expected {words}")
    if not any(hasattr(kind, "placements") for kind in kinds):
        return lists
    averages = lists[0]
    for tensors in lists[1:]:
        for i, t in enumerate(tensors[: len(averages)]):
            a = averages[i]
            layout = (getattr(a, "device_mesh", None), getattr(a, "placements", None))
            other = (getattr(t, "device_mesh", None), getattr(t, "placements", None))
            if layout != other:
                raise ValueError(f"update_ema_: placement of entry {i}: expected {layout}, got {other}")
    return [[getattr(t, "to_local", lambda t=t: t)() for t in tensors] for tensors in lists]


def _distinct_dtypes(tensors: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    found = {t.dtype for t in tensors}
    return tuple(found) if len(found) == 1 else tuple(sorted(found, key=str))


def _shape(
    op: str, averages: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor], weight: float,
    weight_tensor: Tensor | None,
) -> Call:  # fmt: skip
    """Lists of equal length whose entries agree in shape and device."""
    check.require(len(sources) == len(averages), op, "number of sources", len(averages), len(sources))
    check.require(len(copies) in (0, len(averages)), op, "number of copies", len(averages), len(copies))
    if weight_tensor is not None:
        check.weight(op, weight_tensor)
    if not averages:
        return Call(None)
    first = averages[0]
    device = first.device
    shapes = [t.shape for t in averages]
    dtypes = _distinct_dtypes([*averages, *sources, *copies])
    floating, places = check.FLOAT_SET.issuperset(dtypes), {device}
    for name, tensors in (("sources", sources), ("copies", copies), ("averages", averages)):
        same = tensors is averages or [t.shape for t in tensors] == shapes
        if not tensors or (floating and same and {t.device for t in tensors} == places):
            continue
        for i, (t, shape) in enumerate(zip(tensors, shapes, strict=False)):
            if t.shape != shape:
                check.shape(op, f"{name}[{i}]", t, shape)
            if t.device != device:
                check.device(op, f"{name}[{i}]", t, first)
            if not floating:
                check.dtype(op, f"{name}[{i}]", t, check.FLOATS)
    return Call(first, dtypes)


def _split_shape(op: str, high: Sequence[Tensor], low: Sequence[Tensor], sources: Sequence[Tensor], *rest: Any) -> Call:
    """Lists of equal length; entries agree in shape, device and the order of their elements in memory."""
    call = _shape(op, high, sources, [], *rest)
    check.require(len(low) == len(high), op, "number of low halves", len(high), len(low))
    for i, (h, other) in enumerate(zip(high, low, strict=True)):
        check.dtype(op, f"high[{i}]", h, torch.bfloat16)
        check.dtype(op, f"low[{i}]", other, torch.int16)
        check.shape(op, f"low[{i}]", other, h.shape)
        check.device(op, f"low[{i}]", other, h)
        for name, t in (("high", h), ("low", other), ("sources", sources[i])):
            if not check.lies_flat(h, t):
                check.fail(op, f"strides of {name}[{i}]", f"{h.stride()} without gaps", t.stride())
    return call._replace(dtypes=_distinct_dtypes(sources))


def _check_memory(
    op: str, averages: Sequence[Tensor], second: Sequence[Tensor], third: Sequence[Tensor], *_: Any
) -> None:
    """No overlap of what is written, for both operators."""
    if op == "update_ema_":
        check.apart(op, {"averages": averages, "copies": third}, second)
    else:
        check.apart(op, {"high": averages, "low": second}, third)


def _in_one_width(averages: Sequence[Tensor], sources: Sequence[Tensor], *rest: Any) -> tuple[Any, ...]:
    """Sources converted where only one of average and source is float64: no backend needs mixed arithmetic."""
    wide, found = torch.float64, {t.dtype for t in [*averages, *sources]}
    if wide in found and 1 < len(found & check.FLOAT_SET) == len(found) and len(averages) == len(sources):
        check.storage("update_ema_", sources)
        computed = [check.compute_dtype(t.dtype) for t in averages]
        pairs = zip(computed, sources, strict=True)
        sources = [s if (c == wide) == (s.dtype == wide) else s.to(c) for c, s in pairs]
    return averages, sources, *rest


def _reference(
    averages: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor], weight: float,
    weight_tensor: Tensor | None,
) -> None:  # fmt: skip
    for i, (average, source) in enumerate(zip(averages, sources, strict=True)):
        compute = check.compute_dtype(average.dtype)
        a = average.to(compute)
        if weight_tensor is not None:
            w = weight_tensor.to(device=a.device, dtype=compute)
            a = torch.where(w == 0, a, a + w * (source.to(compute) - a))
        elif weight != 0.0:
            a = a + weight * (source.to(compute) - a)
        average.copy_(a)
        if copies:
            copies[i].copy_(average)


def _split_bits(average: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as bfloat16, rounded to nearest (ties away from zero), and int16, the bits beyond it."""
    bits = average.contiguous().view(torch.int32).long()
    nan = average.isnan()
    high = torch.where(nan, (bits >> 16 & 0x8000) | 0x7FC0, (bits + 0x8000) >> 16)
    low = torch.where(nan, 0, bits - (high << 16))
    # Of 64-bit integers, a cast keeps the low bits.
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def _merge_bits(high: Tensor, low: Tensor) -> Tensor:
    """The float32 number of two halves."""
    return ((high.contiguous().view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def _split_reference(high: Sequence[Tensor], low: Sequence[Tensor], sources: Sequence[Tensor], *rest: Any) -> None:
    for h, lower, source in zip(high, low, sources, strict=True):
        average = _merge_bits(h, lower)
        _reference([average], [source], [], *rest)
        new_high, new_low = _split_bits(average)
        h.copy_(new_high)
        lower.copy_(new_low)


_update_ema_ = define(
    "update_ema_(Tensor(a!)[] averages, Tensor[] sources, Tensor(b!)[] copies, float weight, Tensor? weight_tensor)"
    " -> ()",
    _shape, _reference, triton="ema", values=_check_memory, prepare=_in_one_width,
)  # fmt: skip
_update_split_ema_ = define(
    "update_split_ema_(Tensor(a!)[] high, Tensor(b!)[] low, Tensor[] sources, float weight, Tensor? weight_tensor)"
    " -> ()",
    _split_shape, _split_reference, values=_check_memory,
)  # fmt: skip
