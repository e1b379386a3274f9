"""Inputs in every memory layout the operators promise to take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from d2v_kernels import _env, _library

# In Triton's interpreter the operators' tests run once more, in a process of their own: see tests/triton.
INTERPRETED = _env.triton_interpreter()
FLOATS = [torch.float32, torch.bfloat16, torch.float16, *([] if INTERPRETED else [torch.float64])]
LAYOUTS = ["contiguous", "offset", "sliced", "rows_apart", "transposed"]
BACKENDS = [
    "reference",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(bool(_library.load_errors().get("libd2v_cpu")), reason=str(_library.load_errors())),
    ),
    *(["triton"] if INTERPRETED else []),
]

dtypes = st.sampled_from(FLOATS)
layouts = st.sampled_from(LAYOUTS)
widths = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100])
indices = st.sampled_from([torch.int32, torch.int64])


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The values of x in another memory layout; the last stride stays 1."""
    if x.dim() == 0 or layout == "contiguous":
        return x.contiguous()
    if layout == "offset":  # one element past an aligned address
        buffer = x.new_empty(x.numel() + 1)
        return buffer[1:].view(x.shape).copy_(x)
    if layout == "sliced":  # channels cut out of a wider tensor
        buffer = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
        return buffer[..., 1 : 1 + x.shape[-1]].copy_(x)
    if layout == "rows_apart":  # every second row of a longer tensor
        if x.dim() < 2:
            return x.contiguous()
        buffer = x.new_full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), float("nan"))
        return buffer[..., ::2, :].copy_(x)
    if x.dim() < 3:
        return x.contiguous()
    return x.transpose(0, 1).contiguous().transpose(0, 1)  # time before batch, as fairseq keeps it


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int, offset: float = 0.0) -> Tensor:
    """Normal numbers with per-channel offsets and scales, an outlier channel and a constant one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if shape[-1] > 2 and x.numel():
        x = x * (0.5 + torch.rand(shape[-1], generator=generator, dtype=torch.float64)) + offset
        x[..., 0] = x[..., 0] * 3.0 + 50.0
        x[..., 1] = 0.75
    return x.to(dtype)
