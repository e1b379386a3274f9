"""Compiles the attention kernels for GPUs that are not there: `python -m triton_kernels.attention_compile FOLDER
ARCHITECTURE...`, in a process of its own. FOLDER gets report.json, and the PTX and the cubin of every kernel.

Then calls the launchers with other numbers of rows and tokens, and reports how many more kernels that compiled.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from support.triton_compile import BF16, Compilations, find_licences, rows

from d2v_kernels.triton import attention

# Heads, channels of a head, ALiBi, dropout, lengths: the student of 2.0 speech, and huge images (another wide block).
CASES: dict[str, tuple[int, int, bool, float, bool]] = {
    "speech": (12, 64, True, 0.1, True),
    "huge": (16, 80, False, 0.0, False),
}
OTHER_SIZES = [(1, 501), (3, 512), (24, 37), (5, 64)]


def call(case: str, n: int = 2, t: int = 500) -> None:
    """Forward and backward on views of one projection."""
    heads, width, alibi, dropout, lengths = CASES[case]
    inputs = rows(n, t, 3, heads, width).unbind(2)
    numbers = torch.zeros(n, dtype=torch.int64)
    rest = (
        torch.zeros(heads) if alibi else None, torch.zeros(n, t, dtype=torch.int32) if alibi else None,
        numbers if lengths else None, None, numbers if dropout else None, dropout, width**-0.5,
    )  # fmt: skip
    out, log_sum = attention.attention(*inputs, *rest)
    assert out.dtype == BF16
    attention.attention_backward(out, *inputs, out, log_sum, *rest)


def compile_all(folder: Path, architectures: list[int]) -> dict[str, Any]:
    kernels, more = [], 0
    for architecture in architectures:
        for case in CASES if architecture == 90 else ["speech"]:
            with Compilations(architecture) as done:
                call(case)
            for name, kernel in done.kernels.values():
                if not name.startswith("attention"):
                    continue
                file = f"sm_{architecture}-{case}-{name}"
                (folder / f"{file}.ptx").write_text(kernel.asm["ptx"])
                (folder / f"{file}.cubin").write_bytes(kernel.asm["cubin"])
                shared = kernel.metadata.shared
                part = {"attention_kernel": "forward"}.get(name, name.split("_")[1])
                tile = attention.attention_tile(part, CASES[case][1], 2)
                kernels.append(
                    {"architecture": architecture, "case": case, "name": name, "file": file, "shared": shared,
                     "pairs": tile.queries * tile.keys,
                     "licences": find_licences(kernel)}
                )  # fmt: skip
            with Compilations(architecture) as others:
                for n, t in OTHER_SIZES:
                    call(case, n, t)
            more += len(set(others.kernels) - set(done.kernels))
    return {"triton": triton.__version__, "kernels": kernels, "compiled_for_other_sizes": more}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "report.json").write_text(json.dumps(compile_all(target, [int(a) for a in sys.argv[2:]])))
