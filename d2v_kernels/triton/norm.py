# mypy: allow-untyped-defs
"""dropout_add_layer_norm and its gradient, each row in one pass; the mixed forms have 16-bit branches and copies beside
float32 rows.

Forward: branch and residual read, total and normed (and the copy) written: 4*s bytes an element, mixed 12 to 16.
Backward: the gradients and total read, the gradients of the residual and of a branch that lost elements written: 3*s to
5*s, mixed 12 to 20; moments come again from total, what was dropped from the keys. Gradients of weight and bias: up to
512 fixed parts of the rows, whose float32 sums a second kernel adds up in one order.

Philox takes ten rounds for four elements, up to half of a kernel's instructions; counted in code for sm_90 the kernels
keep within 60 % of what can be issued while the bytes move.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._random import dropout_threshold
from .runtime import column_sums, divide_up, in_order, on_device, rounded, rows_per_split, standardised, total
from .runtime_norm import backward_tile, row_tile

NORM_SPLITS = 512  # parts of the rows, each with its partial sums for weight and bias


@triton.jit
def _columns(channels: tl.constexpr, TYPE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels (H, 1, W) of rows that are held as (H, rows, W), and which of them exist.

    W is what a warp takes at once, 16 bytes of TYPE a lane, so that Triton gives no warp parts of two rows. 16-bit
    numbers beside float32 ones come 8 bytes a lane: Triton would move wider ones through shared memory.
    """
    LANE: tl.constexpr = 128 // TYPE.primitive_bitwidth
    W: tl.constexpr = min(BLOCK_C, 32 * LANE)
    c = tl.arange(0, BLOCK_C // W)[:, None, None] * W + tl.arange(0, W)[None, None, :]
    return tl.max_contiguous(c, [1, 1, LANE]), c < channels


@triton.jit
def _drop(x, key, t, threshold, rescale):
    """x (H, rows, W) of the tokens t (1, rows, 1) with what dropout drops times 0, where NaN stays NaN."""
    group = tl.arange(0, x.shape[0])[:, None, None] * (x.shape[2] // 4) + tl.arange(0, x.shape[2] // 4)[None, None, :]
    c0, c1 = (group + 0 * t).to(tl.uint32), (0 * group + t).to(tl.uint32)
    words = in_order(*tl.philox(key, c0, c1, 0 * c0, 0 * c0))
    return x * tl.where(words >= threshold.to(tl.uint32), rescale, 0.0)


@triton.jit(do_not_specialize=["rows", "tokens", "key_stride", "threshold"])
def _norm_kernel(
    branch, residual, weight, bias, keys, normed, copied, totals, rows, tokens, channels: tl.constexpr, branch_n,
    branch_t, residual_n, residual_t, key_stride, threshold, rescale, eps, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, COPY: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = totals.dtype.element_ty
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :, None]
    n, t = r // tokens, r % tokens
    c, inside = _columns(channels, TYPE, BLOCK_C)
    mask = (r < rows) & inside
    x = tl.load(branch + n * branch_n + t * branch_t + c, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(residual + n * residual_n + t * residual_t + c, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        x = _drop(x, tl.load(keys + n * key_stride, mask=r < rows, other=0), t, threshold, rescale)
    x = x + y
    place = r * channels + c
    tl.store(totals + place, rounded(x, TYPE), mask=mask)
    # The norm is that of the numbers that are given back.
    x, _ = standardised(rounded(x, TYPE).to(tl.float32), mask, channels, eps, 2)
    # Read for every row, which the cache bears: read once, they would lie in other lanes than x.
    if HAS_WEIGHT:
        x = x * tl.load(weight + c + 0 * r, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x = x + tl.load(bias + c + 0 * r, mask=inside, other=0.0).to(tl.float32)
    if WIDE:
        tl.store(normed + place, rounded(x, TYPE), mask=mask)
    if COPY:
        tl.store(copied + place, rounded(x, copied.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens", "per_split", "key_stride", "threshold"])
def _norm_backward_kernel(
    grad, grad_copy, grad_total, totals, weight, keys, of_branch, of_residual, weight_sums, bias_sums, rows, tokens,
    per_split, channels: tl.constexpr, grad_n, grad_t, copy_n, copy_t, straight_n, straight_t, total_n, total_t,
    key_stride, threshold, rescale, eps, HAS_GRAD: tl.constexpr, HAS_COPY: tl.constexpr, HAS_TOTAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, DROPOUT: tl.constexpr, BRANCH: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_R)[None, :, None].to(tl.int64)
    c, inside = _columns(channels, totals.dtype.element_ty, BLOCK_C)
    end = tl.minimum(rows, (split + 1) * per_split)
    bias_sum = (c + lane).to(tl.float32) * 0.0
    weight_sum = bias_sum
    for start in range(split * per_split, end, BLOCK_R):
        r = start + lane
        n, t = r // tokens, r % tokens
        mask = (r < end) & inside
        x = tl.load(totals + n * total_n + t * total_t + c, mask=mask, other=0.0).to(tl.float32)
        g = tl.zeros_like(x)
        if HAS_GRAD:
            g = tl.load(grad + n * grad_n + t * grad_t + c, mask=mask, other=0.0).to(tl.float32)
        if HAS_COPY:
            g += tl.load(grad_copy + n * copy_n + t * copy_t + c, mask=mask, other=0.0).to(tl.float32)
        x, scale = standardised(x, mask, channels, eps, 2)
        weight_sum += g * x
        bias_sum += g
        if HAS_WEIGHT:
            g = g * tl.load(weight + c + 0 * r, mask=inside, other=0.0).to(tl.float32)
        along = total(g, 2) / channels + x * (total(g * x, 2) / channels)
        g = (g - along) * scale
        if HAS_TOTAL:
            g += tl.load(grad_total + n * straight_n + t * straight_t + c, mask=mask, other=0.0).to(tl.float32)
        place = r * channels + c
        tl.store(of_residual + place, rounded(g, of_residual.dtype.element_ty), mask=mask)
        if DROPOUT:
            g = _drop(g, tl.load(keys + n * key_stride, mask=r < end, other=0), t, threshold, rescale)
        if BRANCH:
            tl.store(of_branch + place, rounded(g, of_branch.dtype.element_ty), mask=mask)
    tl.store(weight_sums + split * channels + c, tl.sum(weight_sum, 1, keep_dims=True), mask=inside)
    tl.store(bias_sums + split * channels + c, tl.sum(bias_sum, 1, keep_dims=True), mask=inside)


def dropout_add_layer_norm(
    branch: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None, dropout: float,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    normed, _, total = _forward(branch, residual, weight, bias, keys, dropout, eps, True, False)
    return normed, total


def dropout_add_layer_norm_mixed(
    branch: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None, dropout: float,
    eps: float, wide: bool, copy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(branch, residual, weight, bias, keys, dropout, eps, wide, copy)


def dropout_add_layer_norm_backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, keys: Tensor | None,
    dropout: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_branch = torch.empty(total.shape if dropout > 0.0 else (0,), dtype=total.dtype, device=total.device)
    return _backward(of_branch, grad_normed, None, grad_total, total, weight, keys, dropout, eps)


def dropout_add_layer_norm_mixed_backward(
    grad_normed: Tensor | None, grad_copy: Tensor | None, grad_total: Tensor | None, total: Tensor,
    weight: Tensor | None, keys: Tensor | None, dropout: float, eps: float, branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_branch = torch.empty(total.shape, dtype=branch_dtype, device=total.device)
    return _backward(of_branch, grad_normed, grad_copy, grad_total, total, weight, keys, dropout, eps)


def _draws(keys: Tensor | None, dropout: float) -> tuple[int, int, float]:
    """Stride of the keys, the threshold as a signed number of 32 bits (one type, so that nothing is compiled anew), and
    the factor of kept elements: 0 where the probability rounds to 1."""
    threshold = dropout_threshold(dropout)
    factor = 1.0 / (1.0 - dropout) if threshold < 2**32 else 0.0
    threshold = min(threshold, 2**32 - 1)
    return 0 if keys is None else keys.stride(0), threshold - 2**32 * (threshold >= 2**31), factor


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Of samples and tokens."""
    return (0, 0) if x is None else x.stride()[:2]


def _or(x: Tensor, *given: Tensor | None) -> list[Tensor]:
    """x for pointers that are not used."""
    return [x if t is None else t for t in given]


def _forward(
    branch: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None, dropout: float,
    eps: float, wide: bool, copy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, tokens, channels = branch.shape

    def empty(like: Tensor, wanted: bool = True) -> Tensor:
        return torch.empty(like.shape if wanted else (0,), dtype=like.dtype, device=like.device)

    normed, copied, total = empty(residual, wide), empty(branch, copy), empty(residual)
    if total.numel() == 0:
        return normed, copied, total
    tile = row_tile(channels)
    with on_device(branch):
        _norm_kernel[(divide_up(n * tokens, tile.rows),)](
            branch, residual, *_or(branch, weight, bias, keys), normed, copied, total, n * tokens, tokens, channels,
            *_strides(branch), *_strides(residual), *_draws(keys, dropout), eps, HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None, DROPOUT=dropout > 0.0, WIDE=wide, COPY=copy, **tile.options,
        )  # fmt: skip
    return normed, copied, total


def _backward(
    of_branch: Tensor, grad: Tensor | None, grad_copy: Tensor | None, grad_total: Tensor | None, total: Tensor,
    weight: Tensor | None, keys: Tensor | None, dropout: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, tokens, channels = total.shape
    of_residual = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    affine = [torch.empty((channels,), dtype=torch.float32, device=total.device) for _ in range(2)]
    if total.numel() == 0:
        return of_branch, of_residual, affine[0].zero_(), affine[1].zero_()
    tile = backward_tile(channels, True)
    per_split = rows_per_split(n * tokens, tile, NORM_SPLITS, blocks=4)
    splits = divide_up(n * tokens, per_split)
    sums = [torch.empty((splits, channels), dtype=torch.float32, device=total.device) for _ in affine]
    grads = (grad, grad_copy, grad_total)
    strides = [stride for x in (*grads, total) for stride in _strides(x)]
    with on_device(total):
        _norm_backward_kernel[(splits,)](
            *_or(total, *grads), total, *_or(total, weight, keys), of_branch, of_residual, *sums, n * tokens, tokens,
            per_split, channels, *strides, *_draws(keys, dropout), eps, HAS_GRAD=grad is not None,
            HAS_COPY=grad_copy is not None, HAS_TOTAL=grad_total is not None, HAS_WEIGHT=weight is not None,
            DROPOUT=dropout > 0.0, BRANCH=of_branch.numel() > 0, **tile.options,
        )  # fmt: skip
        for part, result in zip(sums, affine, strict=True):
            column_sums(part, result)
    return of_branch, of_residual, affine[0], affine[1]
