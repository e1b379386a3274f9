"""Compiles the Triton kernels for GPUs that are not there, through the launchers themselves.

Run as `python -m support.triton_compile FOLDER ARCHITECTURE...` in a process of its own (another Triton on PYTHONPATH if
wanted). The launchers are called with CPU tensors; what would be launched is compiled instead, with exactly the
specialisation and the constants of that call. FOLDER gets report.json, and the PTX and the cubin of every kernel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from d2v_kernels.backends.triton import ema, gelu, layers, loss, tokens

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class AbsentGpu:
    """As much of a driver as compilation asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # the key of Triton's cache

    def get_current_stream(self, device: int) -> int:
        return 0


class Compilations:
    """What the launchers compiled, launch by launch, while this context is open."""

    def __init__(self, architecture: int) -> None:
        self.gpu = AbsentGpu(architecture)
        self.launches: list[tuple[str, Any]] = []

    def __enter__(self) -> Compilations:
        driver.set_active(self.gpu)
        run = JITFunction.run

        def compile_only(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            kernel = run(function, *arguments, grid=grid, warmup=True, **options)
            self.launches.append((function.fn.__name__.strip("_"), kernel))
            return kernel

        self._run = run
        JITFunction.run = compile_only
        return self

    def __exit__(self, *_: object) -> None:
        JITFunction.run = self._run

    @property
    def kernels(self) -> dict[int, tuple[str, Any]]:
        """Distinct kernels, by identity."""
        return {id(kernel): (name, kernel) for name, kernel in self.launches}


def rows(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def numbers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def average(shape: tuple[int, int, int], count: int, norm: str, out_norm: str, dtype=BF16, out=F32) -> None:
    layers.average_layers([rows(*shape, dtype=dtype) for _ in range(count)], norm, out_norm, None, 1e-5, out)


def update_ema(average: torch.dtype, source: torch.dtype, copy: torch.dtype | None) -> None:
    lists = [[rows(5000, dtype=d)] if d else [] for d in (average, source, copy)]
    ema.update_ema_(*lists, 0.1, None)


def regression(dtype: torch.dtype, target: torch.dtype, selected: bool) -> None:
    x, y = rows(300, 768, dtype=dtype), rows(300, 768, dtype=target)
    index = numbers(300) if selected else None
    loss.masked_regression_loss(x, y, index, index, 0.0, 1.0)
    loss.masked_regression_loss_backward(torch.ones(()), x, y, index, index, 0.5, 1.0)


def front_end(dtype: torch.dtype, affine: torch.dtype | None) -> None:
    x = rows(100, 512, dtype=dtype)
    weight = None if affine is None else rows(512, dtype=affine)
    gelu.layer_norm_gelu(x, weight, weight, 1e-5)
    gelu.layer_norm_gelu_backward(x, x, weight, weight, 1e-5)


def restore(dtype: torch.dtype, noise: bool) -> None:
    kept = rows(4, 39, 768, dtype=dtype)
    fill, keys = (None, torch.zeros(4, dtype=torch.int64)) if noise else (rows(4, 157, 768, dtype=dtype), None)
    tokens.restore_tokens(kept, numbers(4, 196), fill, keys, 0.01)
    tokens.restore_tokens_backward(rows(4, 196, 768, dtype=dtype), numbers(4, 196), 39, -1)


# The published settings, one call each; every kernel and every form occurs.
CASES: dict[str, Callable[[], object]] = {
    "images: instance, layer": lambda: average((2, 196, 768), 10, "instance", "layer", out=BF16),
    "speech: instance": lambda: average((2, 999, 768), 8, "instance", "none"),
    "speech: instance, layer": lambda: average((2, 999, 768), 8, "instance", "layer"),
    "text: layer": lambda: average((2, 512, 768), 12, "layer", "none"),
    "huge: layer, layer": lambda: average((2, 256, 1280), 24, "layer", "layer", F32),
    "batch": lambda: average((2, 100, 768), 3, "batch", "none", F32),
    "ema, float32 student": lambda: update_ema(F32, F32, BF16),
    "ema, bfloat16 student": lambda: update_ema(F32, BF16, BF16),
    "ema, no copy": lambda: update_ema(F32, F32, None),
    "gather": lambda: tokens.gather_tokens(rows(2, 196, 768), numbers(32, 39), 16),
    "gather backward": lambda: tokens.gather_tokens_backward(rows(32, 39, 768), numbers(32, 39), 16, 196),
    "restore with noise": lambda: restore(BF16, True),
    "restore with rows": lambda: restore(F32, False),
    "loss": lambda: regression(BF16, F32, False),
    "loss, selected rows": lambda: regression(BF16, BF16, True),
    "speech front-end": lambda: front_end(BF16, F32),
    "decoder, no affine": lambda: front_end(F32, None),
}


def main(folder: Path, architectures: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"triton": triton.__version__, "kernels": []}
    for architecture in architectures:
        written: dict[int, str] = {}
        for case, call in CASES.items():
            with Compilations(architecture) as done, torch.no_grad():
                call()
            for key, (name, kernel) in done.kernels.items():
                if key not in written:
                    written[key] = f"sm_{architecture}-{len(written):02}-{name}"
                    (folder / f"{written[key]}.ptx").write_text(kernel.asm["ptx"])
                    (folder / f"{written[key]}.cubin").write_bytes(kernel.asm["cubin"])
                    entry = {"architecture": architecture, "case": case, "name": name, "file": written[key]}
                    report["kernels"].append({**entry, "warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared})
    (folder / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(a) for a in sys.argv[2:]])
