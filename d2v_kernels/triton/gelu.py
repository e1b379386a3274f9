# mypy: allow-untyped-defs
"""GELU; layer_norm_gelu over channels-last rows is in runtime_norm.py.

GELU alone is one read and one write; its gradient gives the activation again, from the same erf.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import OPTIONS, divide_up, on_device, rounded
from .runtime_norm import normal_cdf, normal_density, normed_gelu, normed_gelu_backward

GELU_ELEMENTS, GELU_WARPS = 1024, 4  # of GELU alone: 8 elements a thread, 16 bytes of bfloat16


@triton.jit
def _gelu_of(z, cdf):
    """At -inf the limit 0, where the product is not a number."""
    return tl.where(z == float("-inf"), 0.0, z * cdf)


@triton.jit  # specialised on count: a multiple of 16, as it nearly always is, lets masked accesses be 16 bytes wide
def _gelu_kernel(x, out, count, BLOCK: tl.constexpr):
    TYPE: tl.constexpr = out.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out + i, rounded(_gelu_of(z, normal_cdf(z, TYPE)), TYPE), mask=i < count)


@triton.jit
def _gelu_backward_kernel(grad, x, out, y, count, BLOCK: tl.constexpr):
    TYPE: tl.constexpr = out.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    g = tl.load(grad + i, mask=i < count, other=0.0).to(tl.float32)
    density = normal_density(z)
    cdf = normal_cdf(z, TYPE)
    slope = cdf + tl.where(density == 0.0, 0.0, z * density)  # 0 times infinity is no number
    tl.store(out + i, rounded(g * slope, TYPE), mask=i < count)
    tl.store(y + i, rounded(_gelu_of(z, cdf), TYPE), mask=i < count)


def gelu(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() > 0:
        with on_device(x):
            _gelu_kernel[(divide_up(x.numel(), GELU_ELEMENTS),)](
                x, out, x.numel(), BLOCK=GELU_ELEMENTS, num_warps=GELU_WARPS, **OPTIONS
            )
    return out


def gelu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x)
    return out, _backward_into(out, grad, x)


def gelu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    return _backward_into(grad, grad, x)


def _backward_into(out: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Gradient into `out`, which may be `grad`; returns the activation."""
    y = torch.empty_like(x)
    if x.numel() > 0:
        with on_device(x):
            _gelu_backward_kernel[(divide_up(x.numel(), GELU_ELEMENTS),)](
                grad, x, out, y, x.numel(), BLOCK=GELU_ELEMENTS, num_warps=GELU_WARPS, **OPTIONS
            )
    return y


def layer_norm_gelu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return normed_gelu(x, weight, bias, None, eps)


def layer_norm_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return normed_gelu_backward(grad, x, weight, bias, None, eps)[:3]
