"""Exponential moving average of all parameters in one pass, with their low-precision copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library
from .backends import triton as _triton
from .registry import Case, choose, forced_backend


def update_ema_(
    averages: Sequence[Tensor],
    sources: Sequence[Tensor],
    decay: float | Tensor,
    *,
    copies: Sequence[Tensor] | None = None,
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

    DTensors are updated by their local shards, where mesh and placements agree.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes, devices, placements or a decay that do not fit.
    """
    averages, sources, copies = _local(averages, sources, copies or ())
    weight, weight_tensor = _weight(decay)
    with torch.no_grad():
        torch.ops.d2v.update_ema_(averages, sources, copies, weight, weight_tensor)


class EmaPlan:
    """`update_ema_` of fixed lists with the pointer tables built once: one launch, no per-tensor host work.

    The backend is the list operator's; one without a plan for these tensors runs that operator. Addresses are compared
    at every step and the tables rebuilt when a tensor has moved or another backend is forced.
    """

    def __init__(
        self, averages: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor] | None = None
    ) -> None:
        """Takes the lists of `update_ema_`; checks them as it does."""
        update_ema_(averages, sources, 1.0, copies=copies)  # checks every rule, changes no average
        self._averages, self._sources = list(averages), list(sources)
        self._copies = list(copies or ())
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
            update_ema_(self._averages, self._sources, decay, copies=self._copies)
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
        averages, sources, copies = _local(self._averages, self._sources, self._copies)
        self._tensors = [*averages, *sources, *copies]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._forced = forced_backend()
        self._plan = None
        if averages:
            dtypes = tuple(sorted({t.dtype for t in self._tensors}, key=str))
            backend = choose(Case("update_ema_", averages[0].device.type, dtypes)).name
            make = {"native": _library.make_ema_plan, "triton": _triton.make_ema_plan}.get(backend)
            self._plan = make(averages, sources, copies) if make else None
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
