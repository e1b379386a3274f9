"""Every launch choice as data: pure functions of shape and dtype that return frozen records; no Triton, no GPU.

No field depends on the number of samples or rows, so a batch of another size compiles nothing. What follows a length
(time of the one-read form, length of an index) comes in powers of two. The numbers are reasoned from registers and
bytes in flight (an SM of an H200 needs about 22 KB of loads in flight to keep its share of the memory bus busy) and
wait for a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
ONE_READ_TOKENS = 512  # longest sample that the one-read form of the instance norm takes
INSTANCE_CHANNELS = 64  # 64 bfloat16 channels are one 128-byte line
LOSS_SPLITS = 64  # parts of the rows, each with its partial sums
GELU_SPLITS = 512  # the same for the gradients of weight and bias
GELU_ELEMENTS, GELU_WARPS = 1024, 4  # of GELU alone: 8 elements a thread, 16 bytes of bfloat16


@dataclass(frozen=True)
class Tile:
    """A program's block of rows x channels, its warps, and the most registers a thread may use (None: no bound)."""

    rows: int
    channels: int
    warps: int
    registers: int | None = None

    @property
    def per_thread(self) -> int:
        """Elements of the block that one thread holds."""
        return self.rows * self.channels // (self.warps * WARP)


@dataclass(frozen=True)
class EmaLaunch:
    """Elements per program (one table entry), per step of its loop, and warps."""

    chunk: int
    block: int
    warps: int


@dataclass(frozen=True)
class InverseGather:
    """Index entries compared at once, channels per program, warps."""

    entries: int
    channels: int
    warps: int


@dataclass(frozen=True)
class AttentionTile:
    """Queries and keys of one step, channels of a head (a power of two), warps, stages of the pipelined loads."""

    queries: int
    keys: int
    channels: int
    warps: int
    stages: int


def power_of_two(n: int, low: int = 1) -> int:
    """Smallest power of two that is at least n and low."""
    return max(low, 1 << max(n - 1, 0).bit_length())


def _warps(elements: int, per_thread: int, most: int = 16) -> int:
    return min(most, max(1, elements // (WARP * per_thread)))


def ema() -> EmaLaunch:
    """16 elements a thread and step: four 16-byte loads of a float32 average, four of its source, before any store."""
    return EmaLaunch(chunk=8192, block=2048, warps=4)


def elementwise() -> EmaLaunch:
    """For tensors whose layouts differ."""
    return EmaLaunch(chunk=1024, block=1024, warps=4)


def layer_rows(channels: int) -> Tile:
    """1024 elements a warp, one row or some short ones; up to 1024 channels the reduction needs no barrier."""
    width = power_of_two(channels, 16)
    rows = max(1, min(16, 1024 // width))
    return Tile(rows, width, _warps(rows * width, 32))


def instance_one_read(tokens: int, channels: int, element_size: int) -> Tile | None:
    """A sample's time x 64 bytes of channels in registers, 64 bytes a thread; None when the sample is too long.

    128 registers fill an SM with two programs of 8 warps (256 tokens) or one of 16 (512): 32 KB in flight.
    """
    if tokens > ONE_READ_TOKENS:
        return None
    rows, width = power_of_two(tokens, 16), min(64 // element_size, power_of_two(channels, 16))
    return Tile(rows, width, _warps(rows * width, 64 // element_size), registers=128)


def statistics(channels: int) -> Tile:
    """Mean and squared deviations over time: three float32 values per element of the block.

    Left to itself the compiler takes 64 registers for float32 input, and spills for it.
    """
    width = min(INSTANCE_CHANNELS, power_of_two(channels, 16))
    return Tile(2048 // width, width, 4, registers=80)


def merge(channels: int) -> Tile:
    """Merges the samples' statistics into the batch's."""
    return Tile(32, min(32, power_of_two(channels, 16)), 4)


def combine(channels: int, whole_rows: bool) -> Tile:
    """Normalise and average; with `whole_rows` the block spans all channels, for a layer norm of the result."""
    if whole_rows:
        width = power_of_two(channels, 16)
        rows = max(1, 8192 // width)
        return Tile(rows, width, _warps(rows * width, 32))
    width = min(128, power_of_two(channels, 16))
    return Tile(2048 // width, width, 4)


def copy_rows(channels: int) -> Tile:
    """Rows copied as they are: 32 elements a thread."""
    width = min(1024, power_of_two(channels, 16))
    return Tile(4096 // width if width >= 256 else 16, width, 4)


def noise_row(channels: int) -> Tile:
    """One row a program in steps of this many channels: the widest power of two that wastes no lane, at least 256."""
    width = power_of_two(channels, 16)
    if width > 256:
        width = max(256, min(1024, channels & -channels))
    return Tile(1, width, 1)


def inverse_gather(channels: int, entries: int, element_size: int) -> InverseGather:
    """One output row, up to 2 KB of it, a warp; the index is searched in blocks."""
    width = min(2048 // element_size, power_of_two(channels, 16))
    return InverseGather(min(256, power_of_two(entries, 32)), width, _warps(width, 32))


def column_sums(channels: int) -> Tile:
    """Sums over rows of partial results or of selected rows."""
    return Tile(32, min(32, power_of_two(channels, 16)), 4)


def loss(channels: int) -> Tile:
    """Rows x channels of both operands at once: six float32 values per element stay in registers."""
    width = min(64, power_of_two(channels, 16))
    return Tile(1024 // width, width, 4)


def loss_rows_per_split(rows: int, tile: Tile) -> int:
    """Rows of each of at most LOSS_SPLITS parts, a whole number of blocks; passed at run time."""
    blocks = -(-rows // tile.rows)
    return -(-blocks // LOSS_SPLITS) * tile.rows


def gelu_rows(channels: int) -> Tile:
    """Whole rows, 32 elements a thread of one warp where the channels allow it."""
    width = power_of_two(channels, 16)
    rows = max(1, min(16, 1024 // width))
    return Tile(rows, width, _warps(rows * width, 32))


def gelu_backward_rows(channels: int) -> Tile:
    """Whole rows, 16 elements a thread: with the sums for weight and bias that is 128 registers, 16 warps on an SM."""
    width = power_of_two(channels, 16)
    rows = max(1, min(16, 2048 // width))
    return Tile(rows, width, _warps(rows * width, 16))


def gelu_rows_per_split(rows: int, tile: Tile) -> int:
    """Rows of each of at most GELU_SPLITS parts, at least four blocks; passed at run time."""
    blocks = -(-rows // tile.rows)
    return max(4, -(-blocks // GELU_SPLITS)) * tile.rows


def attention(width: int, element_size: int) -> AttentionTile:
    """Forward: 64 queries are what one warp group multiplies at once on sm_90 and later."""
    channels = power_of_two(width, 16)
    if element_size == 4:
        return _attention_float32(channels)
    return AttentionTile(64, 64, channels, 4 if channels <= 64 else 8, 2)


def attention_dq(width: int, element_size: int) -> AttentionTile:
    """Backward of queries and slopes: fewer keys at once, for two more operands than the forward has."""
    channels = power_of_two(width, 16)
    if element_size == 4:
        return _attention_float32(channels)
    return AttentionTile(64, 32, channels, 4 if channels <= 64 else 8, 2)


def attention_dkdv(width: int, element_size: int) -> AttentionTile:
    """Backward of keys and values: two accumulators of keys x channels, 8 warps to hold them."""
    channels = power_of_two(width, 16)
    if element_size == 4:
        return _attention_float32(channels)
    return AttentionTile(64, 32, channels, 8, 2) if channels <= 64 else AttentionTile(32, 64, channels, 8, 2)


def _attention_float32(channels: int) -> AttentionTile:
    """Three products in tensor floats for each product: more registers for operands, so smaller blocks."""
    return AttentionTile(32 if channels <= 64 else 16, 32, channels, 8, 1)
