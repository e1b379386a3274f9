"""Exponential moving average of all parameters in one pass, with their low-precision copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library
from ._checks import require
from .backends import reference as _reference
from .backends import triton as _triton
from .registry import Case, choose, forced_backend


def update_ema_(
    averages: Sequence[Tensor],
    sources: Sequence[Tensor],
    decay: float | Tensor,
    *,
    copies: Sequence[Tensor] | None = None,
    low: Sequence[Tensor] | None = None,
) -> None:
    """averages[i] <- averages[i] + (1 - decay) * (sources[i] - averages[i]), then copies[i] <- averages[i] rounded.

    data2vec section 3.2 "Teacher parameterization". Arithmetic in float32 (float64 for float64 averages); the weight
    1 - decay is formed in float64 and rounded once.

    Args:
        averages: tensors changed in place; float32 recommended (a bfloat16 average hardly moves at decay 0.9999).
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
    averages, sources, copies, halves = _local(averages, sources, copies or (), low or ())
    weight, weight_tensor = _weight(decay)
    with torch.no_grad():
        if low is None:
            torch.ops.d2v.update_ema_(averages, sources, copies, weight, weight_tensor)
        else:
            require(not copies, "update_split_ema_", "copies", "none beside low halves", len(copies))
            torch.ops.d2v.update_split_ema_(averages, halves, sources, weight, weight_tensor)


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
    return _reference.split_bits(average.detach())


def merge_ema_state(high: Tensor, low: Tensor) -> Tensor:
    """The float32 average, of the halves' shape, that `split_ema_state` has split.

    Raises:
        ValueError, TypeError: shapes that differ, halves that are not bfloat16 and int16.
    """
    require(high.shape == low.shape, "merge_ema_state", "shape of low", tuple(high.shape), tuple(low.shape))
    if high.dtype != torch.bfloat16 or low.dtype != torch.int16:
        got = f"{high.dtype} and {low.dtype}"
        raise TypeError(f"merge_ema_state: dtypes of high and low: expected bfloat16 and int16, got {got}")
    return _reference.merge_bits(high.detach(), low)


class EmaPlan:
    """`update_ema_` of fixed lists with the pointer tables built once: one launch, no per-tensor host work.

    The backend is the list operator's; one without a plan for these tensors runs that operator. Addresses are compared
    at every step and the tables rebuilt when a tensor has moved or another backend is forced.
    """

    def __init__(
        self,
        averages: Sequence[Tensor],
        sources: Sequence[Tensor],
        copies: Sequence[Tensor] | None = None,
        *,
        low: Sequence[Tensor] | None = None,
    ) -> None:
        """Takes the lists of `update_ema_`; checks them as it does."""
        update_ema_(averages, sources, 1.0, copies=copies, low=low)  # checks every rule, changes no average
        self._averages, self._sources = list(averages), list(sources)
        self._copies = list(copies or ())
        self._low = None if low is None else list(low)
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []
        self._plan: Any = None
        self._forced = ""
        self._build()

    @property
    def native(self) -> bool:
        """True when steps run through the native plan rather than the list operator."""
        return isinstance(self._plan, _library.NativePlan)

    def step(self, decay: float | Tensor) -> None:
        """One update with this decay; see `update_ema_`."""
        if self._forced != forced_backend():
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

    def _build(self) -> None:
        averages, sources, copies, low = _local(self._averages, self._sources, self._copies, self._low or ())
        self._tensors = [*averages, *sources, *copies, *low]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._forced = forced_backend()
        self._plan = None
        if averages and self._low is None:
            dtypes = tuple(sorted({t.dtype for t in self._tensors}, key=str))
            backend = choose(Case("update_ema_", averages[0].device.type, dtypes)).name
            make = {"native": _library.make_ema_plan, "triton": _triton.make_ema_plan}.get(backend)
            self._plan = make(averages, sources, copies) if make else None
        elif averages:
            dtypes = tuple(sorted({t.dtype for t in sources}, key=str))
            if choose(Case("update_split_ema_", averages[0].device.type, dtypes)).name == "native":
                self._plan = _library.make_ema_plan(averages, sources, (), low)
        self._moved = self._plan.moved if self.native else self._has_moved

    def _has_moved(self) -> bool:
        return list(map(Tensor.data_ptr, self._tensors)) != self._addresses


def _weight(decay: float | Tensor) -> tuple[float, Tensor | None]:
    if isinstance(decay, Tensor):
        return 0.0, decay
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"update_ema_: decay: expected 0 to 1, got {decay}")
    return 1.0 - decay, None


def _local(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """Local shards of DTensors, after checking that mesh and placements agree entry by entry."""
    if not any(hasattr(t, "placements") for tensors in lists for t in tensors):
        return [list(tensors) for tensors in lists]
    averages = lists[0]
    for tensors in lists[1:]:
        for i, t in enumerate(tensors[: len(averages)]):
            a = averages[i]
            layout = (getattr(a, "device_mesh", None), getattr(a, "placements", None))
            other = (getattr(t, "device_mesh", None), getattr(t, "placements", None))
            if layout != other:
                raise ValueError(f"update_ema_: placement of entry {i}: expected {layout}, got {other}")
    return [[getattr(t, "to_local", lambda t=t: t)() for t in tensors] for tensors in lists]
