"""The memory layouts that operators promise to take, and the numbers that tests put there; needs PyTorch alone."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ["contiguous", "offset", "sliced", "rows_apart", "transposed"]


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
