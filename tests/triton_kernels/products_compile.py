"""Compiles the kernels that multiply matrices, for GPUs that are not there: `python -m triton_kernels.products_compile
FOLDER ARCHITECTURE...`, in a process of its own. FOLDER gets report.json, and the PTX and the cubin of every kernel.

Then calls the launchers with other numbers of rows and tokens, and reports how many more kernels that compiled.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from support.triton_compile import BF16, F32, Compilations, convolve, find_licences, rows

from d2v_kernels.triton import attention, convolution

# Heads, channels of a head, ALiBi, dropout, lengths: the student of 2.0 speech, and huge images (another wide block).
ATTENTION: dict[str, tuple[int, int, bool, float, bool]] = {
    "speech": (12, 64, True, 0.1, True),
    "huge": (16, 80, False, 0.0, False),
}
# Channels, taps, residual of positions and decoder in 2.0: (D, C / 16, k), or two axes. The grid of images is fixed.
CONVOLUTIONS: dict[str, tuple[int, tuple[int, ...], bool]] = {
    "positions": (768, (768, 48, 19), False),
    "images": (768, (768, 48, 3, 3), True),
    "decoder's first": (768, (384, 48, 7), False),
    "decoder": (384, (384, 24, 7), True),
    "large images": (1024, (1024, 64, 5, 5), True),
}
ELSEWHERE = ("speech", *CONVOLUTIONS)
"""Compiled for other architectures than sm_90, too."""
OTHER_SIZES = [(1, 501), (3, 512), (24, 37), (5, 64)]
FAMILIES = ("attention", "convolution")


def call(case: str, n: int = 2, t: int = 500) -> None:
    """Forward and backward."""
    if case in CONVOLUTIONS:
        channels, taps, residual = CONVOLUTIONS[case]
        grid = (t,) if len(taps) == 3 else (14, 14)
        convolve(rows(n, *grid, channels), rows(*taps, dtype=F32), residual)
        return
    heads, width, alibi, dropout, lengths = ATTENTION[case]
    inputs = rows(n, t, 3, heads, width).unbind(2)  # views of one projection
    numbers = torch.zeros(n, dtype=torch.int64)
    rest = (
        torch.zeros(heads) if alibi else None, torch.zeros(n, t, dtype=torch.int32) if alibi else None,
        numbers if lengths else None, None, numbers if dropout else None, dropout, width**-0.5,
    )  # fmt: skip
    out, log_sum = attention.attention(*inputs, *rest)
    assert out.dtype == BF16
    attention.attention_backward(out, *inputs, out, log_sum, *rest)


def pairs(case: str, name: str) -> int:
    """Numbers of the left operand in one turn of a kernel's loop: pairs of query and key, or of row and column."""
    if case in CONVOLUTIONS:
        channels, (outputs, narrow, *taps), _ = CONVOLUTIONS[case]
        wide = outputs * narrow // channels
        tile = convolution.weights_tile(math.prod(taps) * narrow, wide, 2)
        if name == "convolution_kernel":
            tile = convolution.convolution_tile(wide, 2)
        return tile.rows * tile.columns
    part = {"attention_kernel": "forward"}.get(name, name.split("_")[1])
    block = attention.attention_tile(part, ATTENTION[case][1], 2)
    return block.queries * block.keys


def compile_all(folder: Path, architectures: list[int]) -> dict[str, Any]:
    kernels, more = [], 0
    for architecture in architectures:
        for case in [*ATTENTION, *CONVOLUTIONS] if architecture == 90 else ELSEWHERE:
            with Compilations(architecture) as done:
                call(case)
            for number, (name, kernel) in enumerate(done.kernels.values()):
                if not name.startswith(FAMILIES):
                    continue
                file = f"sm_{architecture}-{case}-{number}-{name}"
                (folder / f"{file}.ptx").write_text(kernel.asm["ptx"])
                (folder / f"{file}.cubin").write_bytes(kernel.asm["cubin"])
                shared = kernel.metadata.shared
                kernels.append(
                    {"architecture": architecture, "case": case, "name": name, "file": file, "shared": shared,
                     "pairs": pairs(case, name), "licences": find_licences(kernel)}
                )  # fmt: skip
            with Compilations(architecture) as others:
                for n, t in OTHER_SIZES:
                    call(case, n, t)
            more += len(set(others.kernels) - set(done.kernels))
    return {"triton": triton.__version__, "kernels": kernels, "compiled_for_other_sizes": more}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "report.json").write_text(json.dumps(compile_all(target, [int(a) for a in sys.argv[2:]])))
