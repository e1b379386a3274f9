"""One small call of every operator: `python -m benchmarks.gpu.small` runs them all, for a memory checker to watch.

Tests of how operators behave on a device, rather than what they compute, take the calls from here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from d2v_kernels import _define, _samples, registry, use_backend

from ..harness.record import parse
from . import emulator


def make_calls(device: torch.device, rows: int = 64, width: int = 256) -> dict[str, Callable[[], Any]]:
    """Operator -> call that makes its result from tensors made here; nothing is uploaded or read back by a call."""
    found = _samples.samples(device, torch.bfloat16, rows, width)
    return {op: partial(call, op, arguments) for op, arguments in found.items()}


def call(op: str, arguments: tuple[Any, ...]) -> Any:
    """The result; what the operator writes is copied before, and is the result where there is no other."""
    kinds = registry.OPERATORS[op].partition("->")[0].split(",")
    own = [tree_map_only(Tensor, torch.clone, a) if "!" in kind else a
           for kind, a in zip(kinds, arguments, strict=True)]  # fmt: skip
    result = getattr(torch.ops.d2v, op)(*own)
    return [a for kind, a in zip(kinds, own, strict=True) if "!" in kind] if result is None else result


def flat(result: Any) -> list[Tensor]:
    """Tensors of a result."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def why_not(op: str, backend: str, device: str) -> list[str]:
    """Reasons against the call of `make_calls`."""
    case = _define.case(op, device, _samples.sample(op, "cpu", torch.bfloat16))
    return next(b for b in registry.backends() if b.name == backend).why_not(case)


def main() -> None:
    """Runs every operator on every backend that can, at sizes with and without remainders; prints a line for each."""
    options = parse(
        "gpu.small", __doc__, None, native=False,
        emulated=(None, "on the CPU; LIBRARY: the CUDA sources built for it, or -"),
        backends=(["native", "triton"], "backends to run"),
    )  # fmt: skip
    device, sizes = torch.device("cuda"), ((37, 100), (64, 256))
    if options.emulated is not None:
        emulator.install(None if options.emulated == "-" else Path(options.emulated))
        device, sizes = torch.device("cpu"), ((9, 20), (16, 32))
    for backend in options.backends:
        for op in registry.OPERATORS:
            if reasons := why_not(op, backend, device.type):
                print(f"skipped {backend} {op}: {'; '.join(reasons)}", flush=True)
                continue
            with use_backend(backend):
                for rows, width in sizes:
                    flat(make_calls(device, rows, width)[op]())
            if device.type == "cuda":
                torch.cuda.synchronize()
            print(f"ran {backend} {op}", flush=True)


if __name__ == "__main__":
    main()
