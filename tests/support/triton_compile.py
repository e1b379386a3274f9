"""Compiles the Triton kernels for GPUs that are not there, through the launchers themselves.

Run as `python -m support.triton_compile FOLDER ARCHITECTURE...` in a process of its own (another Triton on PYTHONPATH
if wanted). The launchers are called with CPU tensors; what would be launched is compiled instead, with exactly the
specialisation and the constants of that call. FOLDER gets report.json, and the PTX and the cubin of every kernel. With
`count` for FOLDER it prints, as JSON, how many kernels each family compiles for one size and for many; with `amd` and
the names of AMD GPUs, how many bytes of local memory each kernel takes there.
"""

from __future__ import annotations

import json
import re
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

if sys.argv[1:2] == ["amd"]:
    torch.version.hip = "7.0"  # what the launchers ask

from d2v_kernels.triton import attention, convolution, ema, gelu, layers, loss, norm, runtime_norm, tokens

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class AbsentGpu:
    """As much of a driver as compilation asks for."""

    def __init__(self, architecture: int | str) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        if isinstance(self.architecture, str):
            return GPUTarget("hip", self.architecture, 64)
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int | str:
        return self.architecture  # the key of Triton's cache

    def get_current_stream(self, device: int) -> int:
        return 0


class Compilations:
    """What the launchers compiled, launch by launch, while this context is open."""

    def __init__(self, architecture: int | str) -> None:
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


def update_ema(average: torch.dtype, source: torch.dtype, copy: torch.dtype | None, sizes=(5000,)) -> None:
    lists = [[rows(n, dtype=d) for n in sizes] if d else [] for d in (average, source, copy)]
    ema.update_ema_(*lists, 0.1, None)


def regression(dtype: torch.dtype, target: torch.dtype, selected: bool, count: int = 300, width: int = 768) -> None:
    x, y = rows(count, width, dtype=dtype), rows(count, width, dtype=target)
    index = numbers(count) if selected else None
    loss.masked_regression_loss(x, y, index, index, 0.0, 1.0)
    loss.masked_regression_loss_backward(torch.ones(()), x, y, index, index, 0.5, 1.0)


def front_end(dtype: torch.dtype, affine: torch.dtype | None, count: int = 100) -> None:
    x = rows(count, 512, dtype=dtype)
    weight = None if affine is None else rows(512, dtype=affine)
    gelu.layer_norm_gelu(x, weight, weight, 1e-5)
    gelu.layer_norm_gelu_backward(x, x, weight, weight, 1e-5)


def decoder_norm(count: int = 100) -> None:
    x = rows(count, 768)
    runtime_norm.normed_gelu(x, None, None, x, 1e-5)
    runtime_norm.normed_gelu_backward(x, x, None, None, x[0], 1e-5)


def activation(dtype: torch.dtype, count: int = 100, width: int = 3072) -> None:
    x = rows(count, width, dtype=dtype)
    gelu.gelu(x)
    gelu.gelu_backward_(x, x)


def block_norm(dtype: torch.dtype, mixed: bool, dropout: float, n: int = 3, t: int = 125, width: int = 768) -> None:
    """dropout_add_layer_norm; mixed: rows of float32 beside a branch of the dtype."""
    branch, x = (rows(n, t, width, dtype=d) for d in (dtype, F32 if mixed else dtype))
    w, rest = rows(width, dtype=F32), (torch.zeros(n, dtype=torch.int64), dropout, 1e-5)
    if mixed:
        norm.dropout_add_layer_norm_mixed(branch, x, w, w, *rest, True, True)
        norm.dropout_add_layer_norm_mixed_backward(x, branch, x, x, w, *rest, dtype)
    else:
        norm.dropout_add_layer_norm(branch, x, w, w, *rest)
        norm.dropout_add_layer_norm_backward(x, x, x, w, *rest)


def gather_backward(dtype: torch.dtype) -> None:
    tokens.gather_tokens_backward(rows(32, 39, 768, dtype=dtype), numbers(32, 39), 16, 196)


def restore(dtype: torch.dtype, noise: bool, n: int = 4, visible: int = 39, length: int = 196) -> None:
    kept, order = rows(n, visible, 768, dtype=dtype), numbers(n, length)
    fill = None if noise else rows(n, length - visible, 768, dtype=dtype)
    tokens.restore_tokens(kept, order, fill, torch.zeros(n, dtype=torch.int64) if noise else None, 0.01)
    tokens.restore_tokens_backward(rows(n, length, 768, dtype=dtype), order, visible, -1)


# The published settings, one call each; every kernel and every form occurs.
CASES: dict[str, Callable[[], object]] = {
    "images: instance, layer": lambda: average((2, 196, 768), 10, "instance", "layer", out=BF16),
    "images: instance, float32": lambda: average((2, 196, 768), 10, "instance", "none", F32),
    "text: instance": lambda: average((2, 512, 768), 12, "instance", "none"),
    "speech: instance": lambda: average((2, 999, 768), 8, "instance", "none"),
    "speech: instance, layer": lambda: average((2, 999, 768), 8, "instance", "layer"),
    "text: layer": lambda: average((2, 512, 768), 12, "layer", "none"),
    "huge: layer, layer": lambda: average((2, 256, 1280), 24, "layer", "layer", F32),
    "batch": lambda: average((2, 100, 768), 3, "batch", "none", F32),
    "ema, float32 student": lambda: update_ema(F32, F32, BF16),
    "ema, bfloat16 student": lambda: update_ema(F32, BF16, BF16),
    "ema, no copy": lambda: update_ema(F32, F32, None),
    "gather": lambda: tokens.gather_tokens(rows(2, 196, 768), numbers(32, 39), 16),
    "gather backward": lambda: gather_backward(BF16),
    "gather backward, float32": lambda: gather_backward(F32),
    "restore with noise": lambda: restore(BF16, True),
    "restore with rows": lambda: restore(F32, False),
    "loss": lambda: regression(BF16, F32, False),
    "loss, selected rows": lambda: regression(BF16, BF16, True),
    "speech front-end": lambda: front_end(BF16, F32),
    "decoder, no affine": lambda: front_end(F32, None),
    "decoder, bias and residual": decoder_norm,
    "blocks under autocast": lambda: block_norm(BF16, True, 0.1),
    "blocks under autocast, no dropout": lambda: block_norm(F16, True, 0.0),
    "blocks, bfloat16": lambda: block_norm(BF16, False, 0.1),
    "blocks, float32": lambda: block_norm(F32, False, 0.1),
    "blocks, 1280 channels": lambda: block_norm(BF16, True, 0.1, width=1280),
    "blocks, the widest rows": lambda: block_norm(BF16, True, 0.1, width=4096),
    "GELU": lambda: activation(BF16),
    "GELU, float32": lambda: activation(F32),
}


def find_licences(kernel: Any) -> list[str]:
    """Flags by which LLVM's optimiser may take for granted that no NaN or infinity occurs, or reorder sums."""
    flags = r'\b(nnan|ninf|nsz|arcp|afn|reassoc|fast)\b|"[\w-]*-math"="true"'
    return sorted({line.strip() for line in kernel.asm["llir"].splitlines() if re.search(flags, line)})


def write_report(folder: Path, architectures: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kernels: list[dict[str, Any]] = []
    for architecture in architectures:
        written: dict[int, str] = {}
        for case, call in CASES.items():
            with Compilations(architecture) as done:
                call()
            for key, (name, kernel) in done.kernels.items():
                if key in written:
                    continue
                written[key] = f"sm_{architecture}-{len(written):02}-{name}"
                (folder / f"{written[key]}.ptx").write_text(kernel.asm["ptx"])
                (folder / f"{written[key]}.cubin").write_bytes(kernel.asm["cubin"])
                kernels.append(
                    {"architecture": architecture, "case": case, "name": name, "file": written[key],
                     "licences": find_licences(kernel), "shared": kernel.metadata.shared}
                )  # fmt: skip
    (folder / "report.json").write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1))


# A call at a first size, then the same at others: batches of other sizes, other lengths in the same power of two.
VARIED: dict[str, tuple[Callable[[int, int], object], list[tuple[int, int]]]] = {
    "instance, one read": (
        lambda b, t: average((b, t, 768), 3, "instance", "layer"),
        [(2, 200), (1, 129), (3, 256), (7, 255), (16, 192)],
    ),
    "instance, two passes": (
        lambda b, t: average((b, t, 768), 3, "instance", "none"),
        [(2, 999), (1, 513), (3, 1024), (5, 2048), (16, 1500)],
    ),
    "batch": (lambda b, t: average((b, t, 768), 3, "batch", "none"), [(2, 99), (1, 1), (3, 16), (16, 100), (33, 7)]),
    "layer": (lambda b, t: average((b, t, 768), 3, "layer", "none"), [(2, 99), (1, 1), (3, 16), (16, 100), (33, 7)]),
    "odd width": (lambda b, t: average((b, t, 100), 3, "layer", "none"), [(2, 99), (3, 7), (5, 40), (11, 21), (16, 8)]),
    "ema": (
        lambda n, size: update_ema(F32, F32, BF16, [size] * n),
        [(2, 5000), (1, 1), (5, 16), (40, 8192), (3, 8193)],
    ),
    "gather": (
        lambda b, n: tokens.gather_tokens(rows(b, 196, 768), numbers(2 * b, n), 2),
        [(2, 39), (1, 1), (3, 16), (16, 48), (5, 196)],
    ),
    "gather backward": (
        lambda b, n: tokens.gather_tokens_backward(rows(2 * b, n, 768), numbers(2 * b, n), 2, 196),
        [(2, 150), (1, 129), (3, 144), (16, 192), (5, 250)],
    ),
    "restore with noise": (lambda n, t: restore(BF16, True, n, 7, t), [(2, 150), (1, 129), (16, 160), (5, 250)]),
    "restore with rows": (lambda n, t: restore(BF16, False, n, 16, t), [(2, 150), (1, 129), (16, 160), (5, 250)]),
    "loss": (lambda n, _: regression(BF16, F32, True, n), [(300, 0), (1, 0), (2, 0), (16, 0), (4096, 0), (70001, 0)]),
    "GELU": (lambda n, width: activation(BF16, n, width), [(100, 3072), (1, 512), (3, 1280), (70001, 768)]),
    "blocks": (
        lambda n, t: block_norm(BF16, True, 0.6 if n % 2 else 0.1, n, t),
        [(2, 125), (1, 1), (3, 16), (16, 48), (5, 999)],
    ),
    "blocks, no dropout": (lambda n, t: block_norm(BF16, False, 0.0, n, t), [(2, 125), (1, 1), (3, 16), (16, 48)]),
    "front-end": (lambda n, _: front_end(BF16, F32, n), [(100, 0), (1, 0), (16, 0), (4097, 0), (70000, 0)]),
}


def count_compilations() -> dict[str, tuple[int, int]]:
    """Kernels compiled for the first size, and for all sizes."""
    counts = {}
    for name, (call, sizes) in VARIED.items():
        found: set[int] = set()
        first = 0
        for size in sizes:
            with Compilations(90) as done:
                call(*size)
            found |= set(done.kernels)
            first = first or len(found)
        counts[name] = (first, len(found))
    return counts


def attend(dtype: torch.dtype, alibi: bool, dropout: float) -> None:
    q, k, v = rows(2, 500, 3, 12, 64, dtype=dtype).unbind(2)
    keys = torch.zeros(2, dtype=torch.int64)
    bias = (torch.zeros(12), torch.zeros(2, 500, dtype=torch.int32)) if alibi else (None, None)
    rest = (*bias, keys, None, keys if dropout else None, dropout, 0.125)
    out, log_sum = attention.attention(q, k, v, *rest)
    attention.attention_backward(out, q, k, v, out, log_sum, *rest)


def convolve(x: Tensor, weight: Tensor, residual: bool) -> None:
    bias = weight.flatten(1)[:, 0].contiguous()
    out, y = convolution.conv_layer_norm_gelu(x, weight, bias, residual, 1e-5)
    convolution.conv_layer_norm_gelu_backward(out, x, y, weight, bias, residual, 1e-5)


PRODUCTS: dict[str, Callable[[], object]] = {
    "attention": lambda: attend(BF16, True, 0.1),
    "attention, float32": lambda: attend(F32, False, 0.0),
    "positions": lambda: convolve(rows(2, 500, 768), rows(768, 48, 19, dtype=F32), False),
    "decoder of images": lambda: convolve(rows(2, 14, 14, 768), rows(768, 48, 3, 3, dtype=F32), True),
    "decoder of speech": lambda: convolve(rows(2, 500, 384), rows(384, 24, 7, dtype=F32), True),
    "decoder, float32": lambda: convolve(rows(2, 500, 768, dtype=F32), rows(384, 48, 7, dtype=F32), False),
}


def measure_amd(architectures: list[str]) -> list[tuple[str, str, str, int]]:
    """Architecture, case, kernel and bytes of local memory (LDS) of everything that is compiled."""
    found = []
    for architecture in architectures:
        for case, call in {**CASES, **PRODUCTS}.items():
            with Compilations(architecture) as done:
                call()
            for name, kernel in done.kernels.values():
                assert kernel.asm["hsaco"], name
                found.append((architecture, case, name, kernel.metadata.shared))
    return found


if __name__ == "__main__":
    if sys.argv[1] == "amd":
        print(json.dumps(measure_amd(sys.argv[2:])))
    elif sys.argv[1] == "count":
        print(json.dumps(count_compilations()))
    else:
        write_report(Path(sys.argv[1]), [int(a) for a in sys.argv[2:]])
