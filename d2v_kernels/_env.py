"""The only place that reads the process environment at run time.

`D2V_KERNELS_BACKEND` = auto | reference | native | triton: backend used where none is forced.
`D2V_KERNELS_ISA` = base | avx2 | avx512 | avx512bf16 | amx: highest CPU instruction level (read by the native library;
for tests).
"""

from __future__ import annotations

import functools
import os

BACKEND_NAMES = ("auto", "reference", "native", "triton")
ISA_NAMES = ("base", "avx2", "avx512", "avx512bf16", "amx")


def _choice(name: str, allowed: tuple[str, ...], default: str) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


@functools.cache  # asked for at every call of an operator
def default_backend() -> str:
    """Value of `D2V_KERNELS_BACKEND`, `auto` when unset; `ValueError` for an unknown name."""
    return _choice("D2V_KERNELS_BACKEND", BACKEND_NAMES, "auto")


def highest_isa() -> str:
    """Value of `D2V_KERNELS_ISA`, `amx` when unset; `ValueError` for an unknown name."""
    return _choice("D2V_KERNELS_ISA", ISA_NAMES, "amx")


def triton_interpreter() -> bool:
    """True where Triton runs kernels in its interpreter (its own variable, `TRITON_INTERPRET`)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
