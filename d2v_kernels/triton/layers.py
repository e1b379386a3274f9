# mypy: allow-untyped-defs
"""average_layers: four kernels that read [B,T,C] as it lies, without a transpose.

- `_row_kernel` (norm none or layer): one warp holds a row (some rows, if short), K rows read once. K*s + s_o bytes an
  element.
- `_one_read_kernel` (instance, up to 512 tokens): all of a sample's time x 64 bytes in registers. K*s + s_o bytes.
- `_statistics_kernel`, then `_combine_kernel` (instance of longer samples, batch): 2*K*s + s_o bytes, of which the
  second read comes from L2 as far as it reaches: the second kernel walks the samples backwards, so that it begins with
  what the first one read last. `_merge_kernel` turns the samples' statistics into the batch's.

An out_norm over time (instance after layer, batch after anything) is a second round over the float32 average, 12 bytes
an element more. Statistics are two-pass in registers, or a running mean and squared deviations for every lane merged by
Chan's rule; never E[x^2] - E[x]^2.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device_table import upload
from .runtime import Tile, divide_up, merged_lanes, on_device, pick, power_of_two, rounded, standardised, warps

ONE_READ_TOKENS = 512  # longest sample that the one-read form of the instance norm takes


def row_tile(channels: int) -> Tile:
    """1024 elements a warp; up to 1024 channels the reduction needs no barrier."""
    return Tile.whole_rows(channels, 1024, 32)


def one_read_tile(tokens: int, channels: int, element_size: int) -> Tile | None:
    """A sample's time x 64 bytes of channels in registers, 64 bytes a thread; None when the sample is too long.

    128 registers fill an SM with two programs of 8 warps (256 tokens) or one of 16 (512): 32 KB in flight.
    """
    if tokens > ONE_READ_TOKENS:
        return None
    rows, width = power_of_two(tokens, 16), min(64 // element_size, power_of_two(channels, 16))
    return Tile(rows, width, warps(rows * width, 64 // element_size), registers=128)


def statistics_tile(channels: int) -> Tile:
    """Mean and squared deviations over time: three float32 values per element of the block.

    64 bfloat16 channels are one 128-byte line. Left to itself the compiler takes 64 registers for float32 input, and
    spills for it.
    """
    return Tile.block(channels, 64, 2048, registers=80)


def combine_tile(channels: int, whole_rows: bool) -> Tile:
    """Normalise and average; with `whole_rows` the block spans all channels, for a layer norm of the result."""
    return Tile.whole_rows(channels, 8192, 32, most=512) if whole_rows else Tile.block(channels, 128, 2048)


@triton.jit(do_not_specialize=["rows", "tokens"])
def _row_kernel(
    layers, batch_strides, token_strides, lengths, out, rows, tokens, channels, eps,
    HAS_LENGTHS: tl.constexpr, NORM: tl.constexpr, OUT_NORM: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    b, t = row // tokens, row % tokens
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (c < channels)
    mask = inside
    if HAS_LENGTHS:
        mask = inside & (t < tl.load(lengths + b, mask=row < rows, other=0))
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for k in range(len(layers)):
        start = pick(layers, k) + b * pick(batch_strides, k) + t * pick(token_strides, k)
        x = tl.load(start + c, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            x, _ = standardised(x, mask, channels, eps, 1)
        total += x
    total = tl.where(mask, total / len(layers), 0.0)
    if OUT_NORM:
        total, _ = standardised(total, mask, channels, eps, 1)
        total = tl.where(mask, total, 0.0)
    tl.store(out + row * channels + c, rounded(total, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _one_read_kernel(
    layers, batch_strides, token_strides, lengths, out, tokens, channels, tiles, eps,
    HAS_LENGTHS: tl.constexpr, OUT_NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    c = (program % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    t = tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    length = tokens.to(tl.int64)
    if HAS_LENGTHS:
        length = tl.load(lengths + b)
    mask = (t < length) & (c < channels)
    count = tl.maximum(length, 1).to(tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for k in range(len(layers)):
        start = pick(layers, k) + b * pick(batch_strides, k)
        x = tl.load(start + t * pick(token_strides, k) + c, mask=mask, other=0.0).to(tl.float32)
        x, _ = standardised(x, mask, count, eps, 0)
        total += x
    total = tl.where(mask, total / len(layers), 0.0)
    if OUT_NORM:
        total, _ = standardised(total, mask, count, eps, 0)
        total = tl.where(mask, total, 0.0)
    place = out + (b * tokens + t) * channels + c
    tl.store(place, rounded(total, out.dtype.element_ty), mask=(t < tokens) & (c < channels))


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _statistics_kernel(
    layers, batch_strides, token_strides, lengths, means, spreads, tokens, channels, tiles, eps,
    HAS_LENGTHS: tl.constexpr, FINAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and, FINAL, 1 / sqrt(var + eps), else the sum of squared deviations, of each (sample, layer, channel)."""
    program = tl.program_id(0)
    k = (program // tiles) % len(layers)
    b = (program // tiles // len(layers)).to(tl.int64)
    c = (program % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    lane = tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    length = tokens.to(tl.int64)
    if HAS_LENGTHS:
        length = tl.load(lengths + b)
    start = pick(layers, k) + b * pick(batch_strides, k)
    stride = pick(token_strides, k)
    mean = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i in range(tl.cdiv(length, BLOCK_R)):
        t = i * BLOCK_R + lane
        mask = (t < length) & (c < channels)
        x = tl.load(start + t * stride + c, mask=mask, other=0.0).to(tl.float32)
        delta = x - mean
        mean += tl.where(mask, delta * (1.0 / (i + 1)), 0.0)
        m2 += tl.where(mask, delta * (x - mean), 0.0)
    counts = ((length - lane + BLOCK_R - 1) // BLOCK_R).to(tl.float32)
    counts = tl.maximum(counts, 0.0)
    total = tl.maximum(length, 1).to(tl.float32)
    mean, m2 = merged_lanes(mean, m2, counts, total)
    place = (b * len(layers) + k) * channels + c
    tl.store(means + place, mean, mask=c < channels)
    if FINAL:
        m2 = tl.rsqrt(m2 / total + eps)
    tl.store(spreads + place, m2, mask=c < channels)


@triton.jit(do_not_specialize=["samples", "tokens"])
def _merge_kernel(
    means, m2s, lengths, batch_means, batch_spreads, samples, tokens, columns, eps,
    HAS_LENGTHS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Statistics (samples, columns) of each sample to those of the batch, in ascending sample."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    lane = tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    mean = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    counts = tl.zeros([BLOCK_R, 1], tl.float32)
    for i in range(tl.cdiv(samples, BLOCK_R)):
        b = i * BLOCK_R + lane
        mask = (b < samples) & (c < columns)
        more = tl.where(b < samples, tokens, 0).to(tl.float32)
        if HAS_LENGTHS:
            more = tl.load(lengths + b, mask=b < samples, other=0).to(tl.float32)
        other_mean = tl.load(means + b * columns + c, mask=mask, other=0.0)
        other_m2 = tl.load(m2s + b * columns + c, mask=mask, other=0.0)
        share = more / tl.maximum(counts + more, 1.0)
        delta = other_mean - mean
        # A sample without valid positions has no statistics, and must not lend a NaN by 0 * NaN.
        mean += tl.where(more > 0.0, delta * share, 0.0)
        m2 += tl.where(more > 0.0, other_m2 + delta * delta * counts * share, 0.0)
        counts += more
    total = tl.maximum(tl.sum(counts, 0, keep_dims=True), 1.0)
    mean, m2 = merged_lanes(mean, m2, counts, total)
    tl.store(batch_means + c, mean, mask=c < columns)
    tl.store(batch_spreads + c, tl.rsqrt(m2 / total + eps), mask=c < columns)


@triton.jit(do_not_specialize=["tokens", "time_blocks", "tiles", "statistics_stride"])
def _combine_kernel(
    layers, batch_strides, token_strides, lengths, means, spreads, out, tokens, channels, time_blocks, tiles,
    statistics_stride, eps,
    HAS_LENGTHS: tl.constexpr, OUT_NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # what was read last is still in L2
    tile = program % tiles
    b = (program // tiles // time_blocks).to(tl.int64)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    t = ((program // tiles) % time_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    length = tokens.to(tl.int64)
    if HAS_LENGTHS:
        length = tl.load(lengths + b)
    inside = c < channels
    mask = (t < length) & inside
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for k in range(len(layers)):
        place = b * statistics_stride + k * channels + c
        mean = tl.load(means + place, mask=inside, other=0.0)
        spread = tl.load(spreads + place, mask=inside, other=0.0)
        start = pick(layers, k) + b * pick(batch_strides, k)
        x = tl.load(
            start + t * pick(token_strides, k) + c, mask=mask, other=0.0, eviction_policy="evict_first"
        ).to(tl.float32)  # fmt: skip
        total += (x - mean) * spread
    total = tl.where(mask, total / len(layers), 0.0)
    if OUT_NORM:
        total, _ = standardised(total, mask, channels, eps, 1)
        total = tl.where(mask, total, 0.0)
    place = out + (b * tokens + t) * channels + c
    tl.store(place, rounded(total, out.dtype.element_ty), mask=(t < tokens) & inside)


class _Round:
    """The arguments that all kernels of one call share."""

    def __init__(self, layers: Sequence[Tensor], lengths: Tensor | None, eps: float) -> None:
        self.samples, self.tokens, self.channels = layers[0].shape
        self.device, self.eps, self.count = layers[0].device, eps, len(layers)
        strides = sorted({(x.stride(0), x.stride(1)) for x in layers})
        if len(strides) > 1:
            strides = [(x.stride(0), x.stride(1)) for x in layers]
        self.inputs = (tuple(layers), tuple(s for s, _ in strides), tuple(s for _, s in strides))
        self.has_lengths = lengths is not None
        self.lengths = layers[0] if lengths is None else lengths

    def run(self, norm: str, out_norm: str, out: Tensor) -> Tensor | None:
        """None where the out_norm needs a round of its own."""
        if norm in ("none", "layer"):
            return self.rows(norm, out_norm, out) if out_norm in ("none", "layer") else None
        size = self.inputs[0][0].element_size()
        tile = one_read_tile(self.tokens, self.channels, size) if norm == "instance" else None
        if tile is not None:
            return self.one_read(tile, out_norm, out) if out_norm in ("none", "instance") else None
        return self.combine(norm, out_norm, out) if out_norm in ("none", "layer") else None

    def rows(self, norm: str, out_norm: str, out: Tensor) -> Tensor:
        """norm and out_norm are none or layer."""
        tile, rows = row_tile(self.channels), self.samples * self.tokens
        _row_kernel[(divide_up(rows, tile.rows),)](
            *self.inputs, self.lengths, out, rows, self.tokens, self.channels, self.eps, HAS_LENGTHS=self.has_lengths,
            NORM=norm == "layer", OUT_NORM=out_norm == "layer", **tile.options,
        )  # fmt: skip
        return out

    def one_read(self, tile: Tile, out_norm: str, out: Tensor) -> Tensor:
        """norm is instance; out_norm is none or instance."""
        tiles = divide_up(self.channels, tile.channels)
        _one_read_kernel[(self.samples * tiles,)](
            *self.inputs, self.lengths, out, self.tokens, self.channels, tiles, self.eps,
            HAS_LENGTHS=self.has_lengths, OUT_NORM=out_norm == "instance", **tile.options,
        )  # fmt: skip
        return out

    def _two(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Not one allocation: the alignment of its second half would follow the batch, and with it a compilation."""
        empty = (torch.empty(shape, dtype=torch.float32, device=self.device) for _ in range(2))
        return next(empty), next(empty)

    def statistics(self, norm: str) -> tuple[Tensor, Tensor, int]:
        """Means, 1 / sqrt(var + eps), and the step from one sample's to the next one's."""
        tile, final, columns = statistics_tile(self.channels), norm == "instance", self.count * self.channels
        means, spreads = self._two(self.samples, columns)
        tiles = divide_up(self.channels, tile.channels)
        _statistics_kernel[(self.samples * self.count * tiles,)](
            *self.inputs, self.lengths, means, spreads, self.tokens, self.channels, tiles, self.eps,
            HAS_LENGTHS=self.has_lengths, FINAL=final, **tile.options,
        )  # fmt: skip
        if final:
            return means, spreads, columns
        tile = Tile.columns(columns)
        batch_means, batch_spreads = self._two(columns)
        _merge_kernel[(divide_up(columns, tile.channels),)](
            means, spreads, self.lengths, batch_means, batch_spreads, self.samples, self.tokens, columns, self.eps,
            HAS_LENGTHS=self.has_lengths, **tile.options,
        )  # fmt: skip
        return batch_means, batch_spreads, 0

    def combine(self, norm: str, out_norm: str, out: Tensor) -> Tensor:
        """norm is instance or batch; out_norm is none or layer."""
        means, spreads, stride = self.statistics(norm)
        tile = combine_tile(self.channels, out_norm == "layer")
        tiles, time_blocks = divide_up(self.channels, tile.channels), divide_up(self.tokens, tile.rows)
        _combine_kernel[(self.samples * time_blocks * tiles,)](
            *self.inputs, self.lengths, means, spreads, out, self.tokens, self.channels, time_blocks, tiles, stride,
            self.eps, HAS_LENGTHS=self.has_lengths, OUT_NORM=out_norm == "layer", **tile.options,
        )  # fmt: skip
        return out


def average_layers(
    layers: Sequence[Tensor], norm: str, out_norm: str, lengths: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    first = layers[0]
    out = torch.empty(first.shape, dtype=out_dtype, device=first.device)
    if out.numel() == 0:
        return out
    if lengths is not None:
        lengths = upload("average_layers", lengths, first.device)
    with on_device(first):
        this = _Round(layers, lengths, eps)
        if this.run(norm, out_norm, out) is None:
            # The out_norm needs statistics of the finished average: a second round over it.
            average = torch.empty(first.shape, dtype=torch.float32, device=first.device)
            this.run(norm, "none", average)
            _Round([average], lengths, eps).run(out_norm, "none", out)
    return out
