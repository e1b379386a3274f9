# mypy: allow-untyped-defs
"""Layer norm and GELU of rows in one pass, forward and backward: layer_norm_gelu, and the end of a convolution.

Forward: each row read and written once, 2*s bytes an element (4 in bfloat16; layer norm and GELU one after the other
move 38 in eager mixed precision), and s more for a tensor that is added. Backward: x and the gradient read, the
gradient of x written, 3*s bytes; mean and deviation are computed again from the row, which is in registers anyway.
Gradients of vectors: up to 512 fixed parts of the rows, whose float32 sums a second kernel adds up in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import (
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


def row_tile(channels: int) -> Tile:
    """32 elements a thread of one warp where the channels allow it."""
    return Tile.whole_rows(channels, 1024, 32)


def backward_tile(channels: int, affine: bool) -> Tile:
    """32 elements a thread, so that rows of 768 and 1024 have a warp of their own, or 16 where sums for weight and bias
    are held, too: both are 128 registers, 16 warps on an SM."""
    return Tile.whole_rows(channels, 2048, 16 if affine else 32)


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
def normal_cdf(z, TYPE: tl.constexpr):
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
def normal_density(z):
    return tl.math.exp2(-0.7213475204444817 * (z * z) - 1.3257480647361593)  # log2(1 / sqrt(2 pi))


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, weight, bias, added, out, rows, channels: tl.constexpr, x_row, eps, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
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
    y = z * normal_cdf(z, TYPE)
    if HAS_ADDED:
        y += tl.load(added + r * channels + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + r * channels + c, rounded(y, TYPE), mask=mask)


@triton.jit(do_not_specialize=["rows", "per_split"])
def _backward_kernel(
    grad, x, weight, bias, out, weight_sums, bias_sums, shift_sums, rows, per_split, channels: tl.constexpr,
    grad_row, x_row, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = out.dtype.element_ty
    split = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_R)[None, :, None].to(tl.int64)
    c, inside = _columns(channels, BLOCK_C, TYPE)
    end = tl.minimum(rows, (split + 1) * per_split)
    w = _parameter(weight, HAS_WEIGHT, c + 0 * lane, inside)
    b = _parameter(bias, HAS_BIAS, c + 0 * lane, inside)
    zero = (c + lane).to(tl.float32) * 0.0
    weight_sum, bias_sum, shift_sum = zero, zero, zero
    for start in tl.range(split * per_split, end, BLOCK_R, num_stages=STAGES):
        r = start + lane
        mask = (r < end) & inside
        values = tl.load(x + r * x_row + c, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + r * grad_row + c, mask=mask, other=0.0).to(tl.float32)
        normal, scale = standardised(values, inside, channels, eps, 2)
        z = _affine(normal, w, b, HAS_WEIGHT, HAS_BIAS)
        g = g * (normal_cdf(z, TYPE) + z * normal_density(z))
        if HAS_WEIGHT:
            weight_sum += g * normal
        if HAS_BIAS:
            bias_sum += g
        if HAS_WEIGHT:
            g = g * w
        share = scale * (1.0 / channels)
        g_mean, dot = total(g, 2) * share, total(g * normal, 2) * share
        g = g * scale - g_mean - normal * dot
        if HAS_SHIFT:
            shift_sum += g
        tl.store(out + r * channels + c, rounded(g, TYPE), mask=mask)
    if HAS_WEIGHT:
        tl.store(weight_sums + split * channels + c, tl.sum(weight_sum, 1, keep_dims=True), mask=inside)
    if HAS_BIAS:
        tl.store(bias_sums + split * channels + c, tl.sum(bias_sum, 1, keep_dims=True), mask=inside)
    if HAS_SHIFT:
        tl.store(shift_sums + split * channels + c, tl.sum(shift_sum, 1, keep_dims=True), mask=inside)


def normed_gelu(x: Tensor, weight: Tensor | None, bias: Tensor | None, added: Tensor | None, eps: float) -> Tensor:
    """gelu(layer_norm(x)) of (rows, C), plus a contiguous tensor of that shape if given."""
    rows, channels = x.shape
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = row_tile(channels)
    with on_device(x):
        _forward_kernel[(divide_up(rows, tile.rows),)](
            *_or(x, weight, bias, added), out, rows, channels, x.stride(0), eps, HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None, HAS_ADDED=added is not None, **tile.options,
        )  # fmt: skip
    return out


def _or(x: Tensor, *given: Tensor | None) -> list[Tensor]:
    """x, and x for pointers that are not used."""
    return [x, *(x if t is None else t for t in given)]


def normed_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, and of a vector `shift` that was added to all rows of x; shape (0,) for None."""
    rows, channels = x.shape
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    vectors = (weight, bias, shift)
    results = [torch.empty((0,) if t is None else (channels,), dtype=(x if t is None else t).dtype, device=x.device)
               for t in vectors]  # fmt: skip
    if out.numel() == 0:
        return out, results[0].zero_(), results[1].zero_(), results[2].zero_()
    tile = backward_tile(channels, weight is not None or bias is not None)
    per_split = rows_per_split(rows, tile, GELU_SPLITS, blocks=4)
    splits = divide_up(rows, per_split)
    sums = [out if t is None else torch.empty((splits, channels), dtype=torch.float32, device=x.device)
            for t in vectors]  # fmt: skip
    with on_device(x):
        _backward_kernel[(splits,)](
            grad, *_or(x, weight, bias), out, *sums, rows, per_split, channels, grad.stride(0), x.stride(0), eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_SHIFT=shift is not None,
            STAGES=backward_stages(tile, x.element_size()), **tile.options,
        )  # fmt: skip
        for t, part, result in zip(vectors, sums, results, strict=True):
            if t is not None:
                column_sums(part, result)
    return out, results[0], results[1], results[2]
