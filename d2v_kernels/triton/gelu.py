# mypy: allow-untyped-defs
"""GELU, and layer_norm_gelu over channels-last rows, forward and backward.

GELU alone is one read and one write; its gradient gives the activation again, from the same erf.

layer_norm_gelu, forward: each row read and written once, 2*s bytes an element (4 in bfloat16; layer norm and GELU one
after the other move 38 in eager mixed precision). Backward: x and the gradient read, the gradient of x written, 3*s
bytes; mean and deviation are computed again from the row, which is in registers anyway. Gradients of weight and bias:
up to 512 fixed parts of the rows, whose float32 sums a second kernel adds up in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import (
    OPTIONS,
    Tile,
    column_sums,
    divide_up,
    on_device,
    reciprocal,
    rounded,
    rows_per_split,
    standardised,
    total,
)

GELU_SPLITS = 512  # parts of the rows, each with its partial sums for weight and bias
GELU_ELEMENTS, GELU_WARPS = 1024, 4  # of GELU alone: 8 elements a thread, 16 bytes of bfloat16


def row_tile(channels: int) -> Tile:
    """32 elements a thread of one warp where the channels allow it."""
    return Tile.whole_rows(channels, 1024, 32)


def backward_tile(channels: int) -> Tile:
    """16 elements a thread: with the sums for weight and bias that is 128 registers, 16 warps on an SM."""
    return Tile.whole_rows(channels, 2048, 16)


def backward_stages(tile: Tile, element_size: int) -> int:
    """3: x and the gradient of the next rows arrive in shared memory meanwhile, twice two blocks; 1 where they are too
    large for two programs on an SM of the smallest GPUs."""
    return 3 if 4 * tile.rows * tile.channels * element_size <= 48 * 1024 else 1


@triton.jit
def _columns(channels: tl.constexpr, BLOCK_C: tl.constexpr, TYPE: tl.constexpr):
    """Channels (H, 1, W) of rows that are held as (H, rows, W), and which of them exist.

    W is what a warp loads at once, 16 bytes a lane, so that Triton gives every row a warp of its own: sums over the two
    dimensions of a row then need no barrier.
    """
    W: tl.constexpr = min(BLOCK_C, 512 * 8 // TYPE.primitive_bitwidth)
    c = tl.arange(0, BLOCK_C // W)[:, None, None] * W + tl.arange(0, W)[None, None, :]
    return c, c < channels


@triton.jit
def _parameter(x, given: tl.constexpr, c, inside):
    """A weight or bias as float32; zeros where there is none."""
    return tl.load(x + c, mask=inside if given else c < 0, other=0.0).to(tl.float32)


@triton.jit
def _affine(x, weight, bias, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_WEIGHT:
        x = x * weight
    if HAS_BIAS:
        x = x + bias
    return x


@triton.jit
def _normal_cdf(z, TYPE: tl.constexpr):
    """Phi(z) for a result in TYPE.

    For bfloat16 1 / (1 + 2^-q), q an odd polynomial fitted to log2(Phi / (1 - Phi)): z Phi is off by at most 5e-5, and
    by 4e-4 of itself (a ninth of bfloat16's rounding) down to 3e-4; a third of erf's instructions.
    """
    if tl.bfloat16 != TYPE:
        return 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476))
    s = z * z
    p = (8.150724966071721e-07 * s - 2.0963107090210542e-05) * s - 9.610630640519620e-04
    p = (p * s + 1.071418970823288e-01) * s + 2.300461769104004
    return reciprocal(1.0 + tl.math.exp2(-z * p))


@triton.jit
def _normal_density(z):
    return tl.math.exp2(-0.7213475204444817 * (z * z) - 1.3257480647361593)  # log2(1 / sqrt(2 pi))


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, weight, bias, out, rows, channels: tl.constexpr, x_row, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = out.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :, None]
    c, inside = _columns(channels, BLOCK_C, TYPE)
    mask = (r < rows) & inside
    values = tl.load(x + r * x_row + c, mask=mask, other=0.0).to(tl.float32)
    # Read for every row, which the cache bears: read once, they would lie in other lanes than x.
    w = _parameter(weight, HAS_WEIGHT, c + 0 * r, inside)
    b = _parameter(bias, HAS_BIAS, c + 0 * r, inside)
    z, _ = standardised(values, inside, channels, eps, 2)
    z = _affine(z, w, b, HAS_WEIGHT, HAS_BIAS)
    tl.store(out + r * channels + c, rounded(z * _normal_cdf(z, TYPE), TYPE), mask=mask)


@triton.jit(do_not_specialize=["rows", "per_split"])
def _backward_kernel(
    grad, x, weight, bias, out, weight_sums, bias_sums, rows, per_split, channels: tl.constexpr, grad_row, x_row, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = out.dtype.element_ty
    split = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_R)[None, :, None].to(tl.int64)
    c, inside = _columns(channels, BLOCK_C, TYPE)
    end = tl.minimum(rows, (split + 1) * per_split)
    w = _parameter(weight, HAS_WEIGHT, c + 0 * lane, inside)
    b = _parameter(bias, HAS_BIAS, c + 0 * lane, inside)
    zero = (c + lane).to(tl.float32) * 0.0
    weight_sum, bias_sum = zero, zero
    for start in tl.range(split * per_split, end, BLOCK_R, num_stages=STAGES):
        r = start + lane
        mask = (r < end) & inside
        values = tl.load(x + r * x_row + c, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + r * grad_row + c, mask=mask, other=0.0).to(tl.float32)
        normal, scale = standardised(values, inside, channels, eps, 2)
        z = _affine(normal, w, b, HAS_WEIGHT, HAS_BIAS)
        g = g * (_normal_cdf(z, TYPE) + z * _normal_density(z))
        if HAS_WEIGHT:
            weight_sum += g * normal
        if HAS_BIAS:
            bias_sum += g
        if HAS_WEIGHT:
            g = g * w
        share = scale * (1.0 / channels)
        g_mean, dot = total(g, 2) * share, total(g * normal, 2) * share
        tl.store(out + r * channels + c, rounded(g * scale - g_mean - normal * dot, TYPE), mask=mask)
    if HAS_WEIGHT:
        tl.store(weight_sums + split * channels + c, tl.sum(weight_sum, 1, keep_dims=True), mask=inside)
    if HAS_BIAS:
        tl.store(bias_sums + split * channels + c, tl.sum(bias_sum, 1, keep_dims=True), mask=inside)


@triton.jit
def _gelu_of(z, cdf):
    """At -inf the limit 0, where the product is not a number."""
    return tl.where(z == float("-inf"), 0.0, z * cdf)


@triton.jit  # specialised on count: a multiple of 16, as it nearly always is, lets masked accesses be 16 bytes wide
def _gelu_kernel(x, out, count, BLOCK: tl.constexpr):
    TYPE: tl.constexpr = out.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out + i, rounded(_gelu_of(z, _normal_cdf(z, TYPE)), TYPE), mask=i < count)


@triton.jit
def _gelu_backward_kernel(grad, x, out, y, count, BLOCK: tl.constexpr):
    TYPE: tl.constexpr = out.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    g = tl.load(grad + i, mask=i < count, other=0.0).to(tl.float32)
    density = _normal_density(z)
    cdf = _normal_cdf(z, TYPE)
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
    rows, channels = x.shape
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = row_tile(channels)
    with on_device(x):
        _forward_kernel[(divide_up(rows, tile.rows),)](
            x, x if weight is None else weight, x if bias is None else bias, out, rows, channels, x.stride(0), eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **tile.options,
        )  # fmt: skip
    return out


def layer_norm_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, channels = x.shape
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    affine = [torch.empty((0,) if t is None else (channels,), dtype=(x if t is None else t).dtype, device=x.device)
              for t in (weight, bias)]  # fmt: skip
    if out.numel() == 0:
        return out, affine[0].zero_(), affine[1].zero_()
    tile = backward_tile(channels)
    per_split = rows_per_split(rows, tile, GELU_SPLITS, blocks=4)
    splits = divide_up(rows, per_split)
    sums = [out if t is None else torch.empty((splits, channels), dtype=torch.float32, device=x.device)
            for t in (weight, bias)]  # fmt: skip
    with on_device(x):
        _backward_kernel[(splits,)](
            grad, x, x if weight is None else weight, x if bias is None else bias, out, *sums, rows, per_split,
            channels, grad.stride(0), x.stride(0), eps, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            STAGES=backward_stages(tile, x.element_size()), **tile.options,
        )  # fmt: skip
        for t, part, result in zip((weight, bias), sums, affine, strict=True):
            if t is not None:
                column_sums(part, result)
    return out, affine[0], affine[1]
