"""The measured floor of an operator on a CPU: one plain pass over its inputs and outputs (floor.cpp)."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_kernels.bench.case import Place

from .record import ROOT

_SOURCE = Path(__file__).with_name("floor.cpp")
_PIECE = 16384  # bytes of the largest array in one step


class FloorPlace(Place):
    """A CPU whose cases have floors beside the other contenders."""

    def floors(self, inputs: Sequence[Tensor], outputs: Callable[[], Sequence[Tensor]], *, alone: bool = False) -> Any:
        """One pass over inputs and outputs; `alone`: not with streaming stores, too."""
        names = {"floor": False} if alone else {"floor": False, "floor (streaming)": True}
        return {name: make_floor([t.detach() for t in inputs], outputs, stream) for name, stream in names.items()}


@functools.cache
def _library() -> ctypes.CDLL:
    target = ROOT / "build" / "floor.so"
    target.parent.mkdir(exist_ok=True)
    if not target.exists() or target.stat().st_mtime < _SOURCE.stat().st_mtime:
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
        subprocess.run(["g++", *flags, str(_SOURCE), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def _table(tensors: Sequence[Tensor]) -> tuple[ctypes.Array, ctypes.Array]:
    sizes = [t.numel() * t.element_size() for t in tensors]
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors]), (ctypes.c_int64 * len(sizes))(*sizes)


def make_floor(
    inputs: Sequence[Tensor], outputs: Callable[[], Sequence[Tensor]], stream: bool
) -> Callable[[], Sequence[Tensor]]:
    """Measured floor: one plain pass (floor.cpp) that reads `inputs` and writes freshly allocated `outputs()`; in place
    when they are inputs too."""
    library, (in_pointers, in_sizes) = _library(), _table(inputs)

    def floor() -> Sequence[Tensor]:
        results = outputs()
        out_pointers, out_sizes = _table(results)
        largest = max([*in_sizes, *out_sizes])
        library.stream_once(
            len(inputs), in_pointers, in_sizes, len(results), out_pointers, out_sizes,
            ctypes.c_int64(max(largest // _PIECE, 1)), torch.get_num_threads(), int(stream),
        )  # fmt: skip
        return results

    return floor
