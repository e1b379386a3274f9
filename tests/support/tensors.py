"""Inputs in every memory layout the operators promise to take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from d2v_kernels import _env, _native

from .layouts import LAYOUTS, in_layout, random_rows

__all__ = [
    "BACKENDS",
    "FLOATS",
    "INTERPRETED",
    "LAYOUTS",
    "dtypes",
    "in_layout",
    "indices",
    "layouts",
    "random_rows",
    "widths",
]

# In Triton's interpreter the operators' tests run once more, in a process of their own: see tests/triton.
INTERPRETED = _env.triton_interpreter()
FLOATS = [torch.float32, torch.bfloat16, torch.float16, *([] if INTERPRETED else [torch.float64])]
BACKENDS = [
    "reference",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(bool(_native.load_errors().get("libd2v_cpu")), reason=str(_native.load_errors())),
    ),
    *(["triton"] if INTERPRETED else []),
]

dtypes = st.sampled_from(FLOATS)
layouts = st.sampled_from(LAYOUTS)
widths = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100])
indices = st.sampled_from([torch.int32, torch.int64])
