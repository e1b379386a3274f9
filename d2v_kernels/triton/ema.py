# mypy: allow-untyped-defs
"""update_ema_ and its plan: one launch per combination of dtypes, whatever the number of tensors.

Bytes an element: the average read and written, the source read, the copy written; 4 + 4 + 4 + 2 = 14 for a float32
average and student with a bfloat16 copy. A table in device memory has a row (average, source, copy, count) for every
8192 elements of every tensor. A pointer from a table is accessed 16 bytes at a time only if the hint stands after the
cast to a pointer and full blocks carry no mask; what is not aligned takes the same path without the hint.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks as check
from .._device_table import DeviceTable
from .runtime import OPTIONS, TYPES, on_device, rounded


@dataclass(frozen=True)
class EmaLaunch:
    """Elements per program (one table entry), per step of its loop, and warps."""

    chunk: int
    block: int
    warps: int


def chunk_launch() -> EmaLaunch:
    """16 elements a thread and step: four 16-byte loads of a float32 average, four of its source, before any store."""
    return EmaLaunch(chunk=8192, block=2048, warps=4)


@triton.jit
def _moved(a, s, w, TYPE: tl.constexpr):
    """The new average, as stored; the old one at weight 0, even where the source is NaN."""
    a32 = a.to(tl.float32)
    return tl.where(w == 0.0, a, rounded(a32 + w * (s.to(tl.float32) - a32), TYPE))


@triton.jit
def _update_chunk(average, source, copy, count, w, HAS_COPY: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    full = count // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        a = _moved(tl.load(average + start + i), tl.load(source + start + i), w, average.dtype.element_ty)
        tl.store(average + start + i, a)
        if HAS_COPY:
            tl.store(copy + start + i, rounded(a.to(tl.float32), copy.dtype.element_ty))
    if full < count:
        mask = full + i < count
        s = tl.load(source + full + i, mask=mask, other=0.0)
        a = _moved(tl.load(average + full + i, mask=mask, other=0.0), s, w, average.dtype.element_ty)
        tl.store(average + full + i, a, mask=mask)
        if HAS_COPY:
            tl.store(copy + full + i, rounded(a.to(tl.float32), copy.dtype.element_ty), mask=mask)


@triton.jit
def _weight(weight, weight_address, DEVICE_WEIGHT: tl.constexpr):
    w = weight
    if DEVICE_WEIGHT:
        w = tl.load(weight_address).to(tl.float32)
    return w


@triton.jit
def _update_ema_kernel(
    table, weight, weight_address,
    AVERAGE: tl.constexpr, SOURCE: tl.constexpr, COPY: tl.constexpr, HAS_COPY: tl.constexpr,
    DEVICE_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    w = _weight(weight, weight_address, DEVICE_WEIGHT)
    entry = table + tl.program_id(0).to(tl.int64) * 4
    a, s, c = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    count = tl.load(entry + 3).to(tl.int32)
    average = a.to(tl.pointer_type(AVERAGE))
    source = s.to(tl.pointer_type(SOURCE))
    copy = c.to(tl.pointer_type(COPY))
    if ((a | s | c) & 15) == 0:
        average = tl.multiple_of(average, 16)
        source = tl.multiple_of(source, 16)
        copy = tl.multiple_of(copy, 16)
        _update_chunk(average, source, copy, count, w, HAS_COPY, BLOCK)
    else:
        _update_chunk(average, source, copy, count, w, HAS_COPY, BLOCK)


Types = tuple[torch.dtype, torch.dtype, torch.dtype | None]


class TritonPlan:
    """Tables of `update_ema_` for fixed tensors, whose addresses the caller guards; see `EmaPlan`."""

    def __init__(self, averages: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        self._device = averages[0].device
        self._before: list[tuple[Tensor, Tensor]] = []
        self._after: list[tuple[Tensor, Tensor]] = []
        self._has_copies = bool(copies)
        self._anchor = averages[0]
        config = chunk_launch()
        rows: dict[Types, list[np.ndarray]] = {}
        for i, (average, source) in enumerate(zip(averages, sources, strict=True)):
            copy = copies[i] if copies else None
            tensors = [average, source] if copy is None else [average, source, copy]
            count = average.numel()
            if count == 0:
                continue
            if not check.lies_flat(*tensors):
                tensors = [self._stand_in(t, column) for column, t in enumerate(tensors)]
            first = np.arange(0, count, config.chunk, dtype=np.int64)
            row = np.zeros((len(first), 4), dtype=np.int64)
            for column, t in enumerate(tensors):
                row[:, column] = t.data_ptr() + first * t.element_size()
            row[:, 3] = np.minimum(count - first, config.chunk)
            rows.setdefault((average.dtype, source.dtype, None if copy is None else copy.dtype), []).append(row)
        # (types, first row, number of rows) of each launch.
        self._groups: list[tuple[Types, int, int]] = []
        first_row = 0
        for types, parts in rows.items():
            length = sum(len(part) for part in parts)
            self._groups.append((types, first_row, length))
            first_row += length
        if rows:
            table = np.concatenate([part for parts in rows.values() for part in parts])
            self._table = DeviceTable("update_ema_", torch.from_numpy(table), self._device)

    def _stand_in(self, t: Tensor, column: int) -> Tensor:
        """Contiguous memory, for tensors whose elements lie in different orders: two more passes over them."""
        if t.is_contiguous():
            return t
        flat = torch.empty_like(t, memory_format=torch.contiguous_format)
        if column < 2:
            self._before.append((flat, t))
        if column != 1:
            self._after.append((t, flat))
        return flat

    @property
    def launches(self) -> int:
        """Kernels that one step launches."""
        return len(self._groups)

    def step(self, weight: float, weight_tensor: Tensor | None) -> None:
        """One update; `weight_tensor`, a 0-D float64 tensor on the device, replaces `weight`."""
        check.weight("update_ema_", weight_tensor, self._device)
        if weight_tensor is None and weight == 0.0 and not self._has_copies:
            return
        config = chunk_launch()
        with on_device(self._anchor):
            for to, of in self._before:
                to.copy_(of)
            for types, first, length in self._groups:
                average, source, copy = types
                table = self._table.on_current_stream()[first : first + length]
                _update_ema_kernel[(length,)](
                    table, weight, table if weight_tensor is None else weight_tensor,
                    AVERAGE=TYPES[average], SOURCE=TYPES[source], COPY=TYPES[average if copy is None else copy],
                    HAS_COPY=copy is not None, DEVICE_WEIGHT=weight_tensor is not None, BLOCK=config.block,
                    num_warps=config.warps, **OPTIONS,
                )  # fmt: skip
            for to, of in self._after:
                to.copy_(of)


def update_ema_(
    averages: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor], weight: float,
    weight_tensor: Tensor | None,
) -> None:  # fmt: skip
    TritonPlan(averages, sources, copies).step(weight, weight_tensor)
