"""Exponential moving average of all parameters in one pass, with their low-precision copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .. import registry
from .._define import Call, count_write, define


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

    Raises:
        TypeError: the average is not float32.
    """
    if average.dtype != torch.float32:
        raise TypeError(f"split_ema_state: dtype of average: expected float32, got {average.dtype}")
    return _split_bits(average.detach())


def merge_ema_state(high: Tensor, low: Tensor) -> Tensor:
    """The float32 average, of the halves' shape, that `split_ema_state` has split.

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
    """

    def __init__(
        self,
        averages: Iterable[Tensor],
        sources: Iterable[Tensor],
        copies: Iterable[Tensor] | None = None,
        *,
        low: Iterable[Tensor] | None = None,
    ) -> None:
        """Takes the lists of `update_ema_`, not empty; checks them as it does."""
        self._averages, self._sources, self._copies = list(averages), list(sources), list(copies or ())
        self._low = None if low is None else list(low)
        check.require(bool(self._averages), "update_ema_", "number of averages of a plan", "at least 1", 0)
        self._build()

    @property
    def native(self) -> bool:
        """True when steps run through the native plan rather than the list operator."""
        return self._plan is not None and self._backend == "native"

    def step(self, decay: float | Tensor) -> None:
        """One update with this decay; see `update_ema_`."""
        if self._forced != registry.forced_backend():
            self._build()
        plan = self._plan
        if plan is None:
            update_ema_(self._averages, self._sources, decay, copies=self._copies, low=self._low)
            return
        if self._moved():
            if self._tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("EmaPlan: a tensor has moved; step once outside the graph capture to rebuild")
            self._build()
            self.step(decay)
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
        # A lazily negated source has other numbers in its memory.
        make = None if any(t.is_neg() for t in sources) else backend.make_ema_plan
        plan: Any = make(averages, sources, copies, low) if make else None
        self._tensors, self._written = [*written, *sources], written
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
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"update_ema_: decay: expected 0 to 1, got {decay}")
    return 1.0 - decay, None


def _local(*iterables: Iterable[Tensor]) -> list[list[Tensor]]:
    """Local shards of DTensors, after checking that mesh and placements agree entry by entry."""
    lists = [list(tensors) for tensors in iterables]
    kinds = {type(t) for tensors in lists for t in tensors}
    for kind in kinds:
        if not issubclass(kind, Tensor):
            raise TypeError(f"update_ema_: entries: expected tensors, got {kind.__name__}")
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
