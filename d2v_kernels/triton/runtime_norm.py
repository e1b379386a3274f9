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

from .runtime import Tile, column_sums, divide_up, on_device, rounded, rows_per_split, standardised

GELU_SPLITS = 512  # parts of the rows, each with its partial sums for weight and bias


def row_tile(channels: int) -> Tile:
    """32 elements a thread of one warp where the channels allow it."""
    return Tile.whole_rows(channels, 1024, 32)


def backward_tile(channels: int) -> Tile:
    """16 elements a thread: with the sums for weight and bias that is 128 registers, 16 warps on an SM."""
    return Tile.whole_rows(channels, 2048, 16)


@triton.jit
def _affine(x, weight, bias, c, inside, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    if HAS_WEIGHT:
        x = x * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x = x + tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def normal_cdf(z):
    return 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476))


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, weight, bias, added, out, rows, channels, x_row, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ADDED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (r < rows) & (c < channels)
    values = tl.load(x + r * x_row + c, mask=mask, other=0.0).to(tl.float32)
    z, _ = standardised(values, mask, channels, eps, 1)
    z = _affine(z, weight, bias, c, c < channels, HAS_WEIGHT, HAS_BIAS)
    y = z * normal_cdf(z)
    if HAS_ADDED:
        y += tl.load(added + r * channels + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + r * channels + c, rounded(y, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "per_split"])
def _backward_kernel(
    grad, x, weight, bias, out, weight_sums, bias_sums, shift_sums, rows, per_split, channels, grad_row, x_row, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = c < channels
    end = tl.minimum(rows, (split + 1) * per_split)
    weight_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    bias_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    shift_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(split * per_split, end, BLOCK_R):
        r = start + lane
        mask = (r < end) & inside
        values = tl.load(x + r * x_row + c, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + r * grad_row + c, mask=mask, other=0.0).to(tl.float32)
        normal, scale = standardised(values, mask, channels, eps, 1)
        z = _affine(normal, weight, bias, c, inside, HAS_WEIGHT, HAS_BIAS)
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        g = g * (normal_cdf(z) + z * density)
        if HAS_WEIGHT:
            weight_sum += g * normal
        if HAS_BIAS:
            bias_sum += g
        if HAS_WEIGHT:
            g = g * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        g_mean = tl.sum(g, 1, keep_dims=True) / channels
        dot = tl.sum(g * normal, 1, keep_dims=True) / channels
        g = (g - g_mean - normal * dot) * scale
        if HAS_SHIFT:
            shift_sum += g
        tl.store(out + r * channels + c, rounded(g, out.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        tl.store(weight_sums + split * channels + c, tl.sum(weight_sum, 0, keep_dims=True), mask=inside)
    if HAS_BIAS:
        tl.store(bias_sums + split * channels + c, tl.sum(bias_sum, 0, keep_dims=True), mask=inside)
    if HAS_SHIFT:
        tl.store(shift_sums + split * channels + c, tl.sum(shift_sum, 0, keep_dims=True), mask=inside)


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
    tile = backward_tile(channels)
    per_split = rows_per_split(rows, tile, GELU_SPLITS, blocks=4)
    splits = divide_up(rows, per_split)
    sums = [out if t is None else torch.empty((splits, channels), dtype=torch.float32, device=x.device)
            for t in vectors]  # fmt: skip
    with on_device(x):
        _backward_kernel[(splits,)](
            grad, *_or(x, weight, bias), out, *sums, rows, per_split, channels, grad.stride(0), x.stride(0), eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_SHIFT=shift is not None, **tile.options,
        )  # fmt: skip
        for t, part, result in zip(vectors, sums, results, strict=True):
            if t is not None:
                column_sums(part, result)
    return out, results[0], results[1], results[2]
