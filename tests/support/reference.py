"""The definition of every operator, `reference.<operator>(...)`, and helpers of those definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from d2v_kernels._define import REFERENCE
from d2v_kernels.ops.tokens import noise_rows as noise_rows


def __getattr__(op: str) -> Callable[..., Any]:
    if op not in REFERENCE.implementations:
        raise AttributeError(op)
    return REFERENCE.implementations[op]
