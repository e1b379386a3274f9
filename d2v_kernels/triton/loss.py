# mypy: allow-untyped-defs
"""masked_regression_loss with its collapse monitors, and its gradient.

Forward: each selected element of prediction and target is read once (s_p + s_t bytes; a target row that serves several
masks comes from L2). 64 parts of the rows x blocks of 64 channels leave partial sums: the error, and for each channel
mean and squared deviations of both sides, by a running mean in every lane merged by Chan's rule. A second kernel merges
the parts for each block of channels, a third adds up the blocks. Fixed parts, fixed order, no atomics: the same bits
every time. Backward recomputes: s_p + s_t read, s_p written; rows not selected are zeroed by one fill before.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks as check
from .runtime import OPTIONS, Tile, divide_up, merged_lanes, on_device, rounded, rows_per_split

LOSS_SPLITS = 64  # parts of the rows, each with its partial sums


def loss_tile(channels: int) -> Tile:
    """Rows x channels of both operands at once: six float32 values per element stay in registers."""
    return Tile.block(channels, 64, 1024)


@triton.jit
def _pair(
    prediction, target, prediction_rows, target_rows, prediction_entry, target_entry, prediction_row, target_row,
    p, c, inside, mask, HAS_PREDICTION_ROWS: tl.constexpr, HAS_TARGET_ROWS: tl.constexpr,
):  # fmt: skip
    """Selected rows p of both sides in float32, and the row of the prediction."""
    i, j = p, p
    if HAS_PREDICTION_ROWS:
        i = tl.load(prediction_rows + p * prediction_entry, mask=inside, other=0).to(tl.int64)
    if HAS_TARGET_ROWS:
        j = tl.load(target_rows + p * target_entry, mask=inside, other=0).to(tl.int64)
    x = tl.load(prediction + i * prediction_row + c, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(target + j * target_row + c, mask=mask, other=0.0).to(tl.float32)
    return x, y, i


@triton.jit
def _compensated(total, lost, value):
    """Kahan's sum; without the correction once the sum is infinite."""
    value = value - lost
    sum = total + value
    lost = tl.where(tl.abs(sum) < float("inf"), (sum - total) - value, 0.0)
    return sum, lost


@triton.jit(do_not_specialize=["count", "per_split", "tiles"])
def _partial_loss_kernel(
    prediction, target, prediction_rows, target_rows, prediction_entry, target_entry, prediction_row, target_row,
    errors, moments, count, per_split, channels, tiles, beta,
    HAS_PREDICTION_ROWS: tl.constexpr, HAS_TARGET_ROWS: tl.constexpr, SMOOTH: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """errors (splits, tiles); moments (splits, 4, C): mean and squared deviations of prediction, then of target."""
    program = tl.program_id(0)
    split = (program // tiles).to(tl.int64)
    c = (program % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    lane = tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    begin = split * per_split
    rows = tl.minimum(count - begin, per_split)
    zero = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    error, lost, x_mean, x_m2, y_mean, y_m2 = zero, zero, zero, zero, zero, zero
    for i in range(tl.cdiv(rows, BLOCK_R)):
        inside = i * BLOCK_R + lane < rows
        mask = inside & (c < channels)
        x, y, _ = _pair(
            prediction, target, prediction_rows, target_rows, prediction_entry, target_entry, prediction_row,
            target_row, begin + i * BLOCK_R + lane, c, inside, mask, HAS_PREDICTION_ROWS, HAS_TARGET_ROWS,
        )  # fmt: skip
        share = 1.0 / (i + 1)
        delta = x - x_mean
        x_mean += tl.where(mask, delta * share, 0.0)
        x_m2 += tl.where(mask, delta * (x - x_mean), 0.0)
        delta = y - y_mean
        y_mean += tl.where(mask, delta * share, 0.0)
        y_m2 += tl.where(mask, delta * (y - y_mean), 0.0)
        d = x - y  # 0 where masked
        value = d * d
        if SMOOTH:
            value = tl.where(tl.abs(d) < beta, value / (2.0 * beta), tl.abs(d) - 0.5 * beta)
            value = tl.where(mask, value, 0.0)
        error, lost = _compensated(error, lost, value)
    counts = tl.maximum(((rows - lane + BLOCK_R - 1) // BLOCK_R).to(tl.float32), 0.0)
    total = rows.to(tl.float32)
    x_mean, x_m2 = merged_lanes(x_mean, x_m2, counts, total)
    y_mean, y_m2 = merged_lanes(y_mean, y_m2, counts, total)
    tl.store(errors + program, tl.sum(tl.sum(error, 1), 0))
    place = moments + split * 4 * channels + c
    tl.store(place, x_mean, mask=c < channels)
    tl.store(place + channels, x_m2, mask=c < channels)
    tl.store(place + 2 * channels, y_mean, mask=c < channels)
    tl.store(place + 3 * channels, y_m2, mask=c < channels)


@triton.jit(do_not_specialize=["splits", "count", "per_split"])
def _merge_loss_kernel(
    moments, deviations, splits, count, per_split, channels, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """deviations (2, tiles): sum over a block of channels of sqrt(unbiased variance + 1e-6)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    split = tl.arange(0, SPLITS)[:, None].to(tl.int64)
    mask = (split < splits) & (c < channels)
    counts = tl.minimum(count - split * per_split, per_split)
    counts = tl.where(split < splits, counts, 0).to(tl.float32)
    total = count.to(tl.float32)
    for side in tl.static_range(2):
        place = moments + (split * 4 + 2 * side) * channels + c
        mean = tl.load(place, mask=mask, other=0.0)
        m2 = tl.load(place + channels, mask=mask, other=0.0)
        mean, m2 = merged_lanes(mean, m2, counts, total)
        std = tl.where(c < channels, tl.sqrt_rn(m2 / tl.maximum(total - 1.0, 1.0) + 1e-6), 0.0)
        tl.store(deviations + side * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(std, 1), 0))


@triton.jit(do_not_specialize=["errors_count", "tiles", "count"])
def _finish_loss_kernel(
    errors, deviations, loss, prediction_std, target_std, errors_count, tiles, count, channels, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, errors_count, BLOCK):
        total += tl.load(errors + start + i, mask=start + i < errors_count, other=0.0)
    tl.store(loss, tl.sum(total, 0) * scale)
    prediction_sum = tl.zeros([BLOCK], tl.float32)
    target_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        mask = start + i < tiles
        prediction_sum += tl.load(deviations + start + i, mask=mask, other=0.0)
        target_sum += tl.load(deviations + tiles + start + i, mask=mask, other=0.0)
    nothing = tl.where(count < 2, float("nan"), 0.0)
    tl.store(prediction_std, tl.sum(prediction_sum, 0) / channels + nothing)
    tl.store(target_std, tl.sum(target_sum, 0) / channels + nothing)


@triton.jit(do_not_specialize=["count", "tiles"])
def _loss_backward_kernel(
    grad, prediction, target, prediction_rows, target_rows, prediction_entry, target_entry, prediction_row, target_row,
    out, count, channels, tiles, beta, scale,
    HAS_PREDICTION_ROWS: tl.constexpr, HAS_TARGET_ROWS: tl.constexpr, SMOOTH: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c = (program % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    p = (program // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    inside = p < count
    mask = inside & (c < channels)
    x, y, row = _pair(
        prediction, target, prediction_rows, target_rows, prediction_entry, target_entry, prediction_row, target_row,
        p, c, inside, mask, HAS_PREDICTION_ROWS, HAS_TARGET_ROWS,
    )  # fmt: skip
    d = x - y
    slope = 2.0 * d
    if SMOOTH:
        slope = tl.where(d >= beta, 1.0, tl.where(d <= -beta, -1.0, d / beta))  # NaN stays NaN
    slope = slope * (tl.load(grad).to(tl.float32) * scale)
    tl.store(out + row * channels + c, rounded(slope, out.dtype.element_ty), mask=mask)


class _Selection:
    """The arguments that forward and backward share."""

    def __init__(
        self, op: str, prediction: Tensor, target: Tensor, prediction_rows: Tensor | None, target_rows: Tensor | None
    ) -> None:
        for name, rows, x in (
            ("prediction_rows", prediction_rows, prediction), ("target_rows", target_rows, target),
        ):  # fmt: skip
            if rows is not None:
                check.index_range(op, name, rows, x.shape[0])
        self.count = prediction.shape[0] if prediction_rows is None else prediction_rows.shape[0]
        self.channels = prediction.shape[1]
        numbers = [x if r is None else r for r, x in ((prediction_rows, prediction), (target_rows, target))]
        steps = [1 if r is None else r.stride(0) for r in (prediction_rows, target_rows)]
        self.arguments = (prediction, target, *numbers, *steps, prediction.stride(0), target.stride(0))
        self.flags = {
            "HAS_PREDICTION_ROWS": prediction_rows is not None,
            "HAS_TARGET_ROWS": target_rows is not None,
        }


def masked_regression_loss(
    prediction: Tensor, target: Tensor, prediction_rows: Tensor | None, target_rows: Tensor | None, beta: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    this = _Selection("masked_regression_loss", prediction, target, prediction_rows, target_rows)
    count, channels, device = this.count, this.channels, prediction.device
    if count == 0 or channels == 0:
        missing = [torch.full((), math.nan, dtype=torch.float32, device=device) for _ in range(2)]
        return torch.zeros((), dtype=torch.float32, device=device), missing[0], missing[1]
    tile = loss_tile(channels)
    tiles, per_split = divide_up(channels, tile.channels), rows_per_split(count, tile, LOSS_SPLITS)
    splits = divide_up(count, per_split)
    errors = torch.empty((splits * tiles,), dtype=torch.float32, device=device)
    moments = torch.empty((splits, 4, channels), dtype=torch.float32, device=device)
    merge = Tile.columns(channels)
    column_tiles = divide_up(channels, merge.channels)
    deviations = torch.empty((2, column_tiles), dtype=torch.float32, device=device)
    loss, prediction_std, target_std = (torch.empty((), dtype=torch.float32, device=device) for _ in range(3))
    with on_device(prediction):
        _partial_loss_kernel[(splits * tiles,)](
            *this.arguments, errors, moments, count, per_split, channels, tiles, beta, **this.flags, SMOOTH=beta != 0.0,
            **tile.options,
        )  # fmt: skip
        _merge_loss_kernel[(column_tiles,)](
            moments, deviations, splits, count, per_split, channels, SPLITS=LOSS_SPLITS,
            BLOCK_C=merge.channels, num_warps=merge.warps, **OPTIONS,
        )  # fmt: skip
        _finish_loss_kernel[(1,)](
            errors, deviations, loss, prediction_std, target_std, splits * tiles, column_tiles, count, channels, scale,
            BLOCK=1024, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return loss, prediction_std, target_std


def masked_regression_loss_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, prediction_rows: Tensor | None, target_rows: Tensor | None,
    beta: float, scale: float,
) -> Tensor:  # fmt: skip
    this = _Selection("masked_regression_loss_backward", prediction, target, prediction_rows, target_rows)
    make = torch.empty if prediction_rows is None else torch.zeros
    out = make(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    if this.count == 0 or this.channels == 0:
        return out
    tile = Tile.copy(this.channels)
    tiles, blocks = divide_up(this.channels, tile.channels), divide_up(this.count, tile.rows)
    with on_device(prediction):
        _loss_backward_kernel[(blocks * tiles,)](
            grad, *this.arguments, out, this.count, this.channels, tiles, beta, scale, **this.flags, SMOOTH=beta != 0.0,
            **tile.options,
        )  # fmt: skip
    return out
