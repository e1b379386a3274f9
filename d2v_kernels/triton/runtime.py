# mypy: allow-untyped-defs
"""What all kernels share: launch sizes, dtypes, the device of a launch, small functions that run inside kernels.

A launch choice is data: a pure function of shape and dtype that returns a frozen record. No field depends on the number
of samples or rows, so a batch of another size compiles nothing. What follows a length (time of the one-read form,
length of an index) comes in powers of two. The numbers are reasoned from registers and bytes in flight (an SM of an
H200 needs about 22 KB of loads in flight to keep its share of the memory bus busy) and wait for a measurement.
"""

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

WARP = 32
AMD = torch.version.hip is not None
PRECISION = tl.constexpr("ieee" if AMD else "tf32x3")
"""Of products of float32 operands, which are split in three tensor floats where a target has those."""
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRETED = tl.constexpr(IS_INTERPRETED)
NVIDIA = tl.constexpr(not (AMD or IS_INTERPRETED))
"""Whether PTX may be written."""
WIDENED = tl.constexpr(IS_INTERPRETED)
"""Products get float32 operands."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# A multiply and the add after it round once, on every version of Triton alike.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Tile:
    """A program's block of rows x channels, its warps, and the most registers a thread may use (None: no bound)."""

    rows: int
    channels: int
    warps: int
    registers: int | None = None

    @classmethod
    def whole_rows(cls, channels: int, elements: int, per_thread: int, most: int = 16) -> "Tile":
        """About so many elements of whole rows, one row or some short ones."""
        width = power_of_two(channels, 16)
        rows = max(1, min(most, elements // width))
        return cls(rows, width, warps(rows * width, per_thread))

    @classmethod
    def block(cls, channels: int, widest: int, elements: int, registers: int | None = None) -> "Tile":
        """So many elements, of at most `widest` channels, for 4 warps."""
        width = min(widest, power_of_two(channels, 16))
        return cls(elements // width, width, 4, registers)

    @classmethod
    def copy(cls, channels: int) -> "Tile":
        """Rows copied as they are: 32 elements a thread."""
        width = min(1024, power_of_two(channels, 16))
        return cls(4096 // width if width >= 256 else 16, width, 4)

    @classmethod
    def columns(cls, channels: int) -> "Tile":
        """Sums over rows of partial results or of selected rows; merges the samples' statistics into the batch's."""
        return cls(32, min(32, power_of_two(channels, 16)), 4)

    @property
    def per_thread(self) -> int:
        """Elements of the block that one thread holds."""
        return self.rows * self.channels // (self.warps * WARP)

    @property
    def options(self) -> dict:
        """What a launch passes on for it."""
        limit = {} if AMD else {"maxnreg": self.registers}
        return {"BLOCK_R": self.rows, "BLOCK_C": self.channels, "num_warps": self.warps, **limit, **OPTIONS}


def power_of_two(n: int, low: int = 1) -> int:
    """Smallest power of two that is at least n and low."""
    return max(low, 1 << max(n - 1, 0).bit_length())


def warps(elements: int, per_thread: int, most: int = 16) -> int:
    return min(most, max(1, elements // (WARP * per_thread)))


def rows_per_split(rows: int, tile: Tile, splits: int, blocks: int = 1) -> int:
    """Rows of each of at most `splits` parts, a whole number of blocks and at least so many; passed at run time."""
    return max(blocks, divide_up(divide_up(rows, tile.rows), splits)) * tile.rows


def on_device(x: Tensor):
    """Context in which a launch goes to the device of x, on its current stream."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def divide_up(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


@triton.jit
def pick(values, k):
    """values[k] of a tuple, for a k that is known at run time only: the loop over k stays a loop."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(k == i, values[i], chosen)
    return chosen


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """float32 to the stored type, to nearest even; on bits in the interpreter, which truncates to bfloat16."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(TYPE)


@triton.jit
def reciprocal(x):
    """1 / x to two units in the last place, for x of at least 1: no number is scaled, as a division has to do."""
    if NVIDIA:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def total(x, AXIS: tl.constexpr):
    """Sums over an axis, and over the first one of a block of three dimensions; all are kept."""
    if len(x.shape) == 3:
        x = tl.sum(x, 0, keep_dims=True)
    return tl.sum(x, AXIS, keep_dims=True)


@triton.jit
def dot(a, b, TYPE: tl.constexpr):
    """Product of operands in TYPE, float32 accumulation; the interpreter cannot multiply bfloat16.

    float32 operands are split in three tensor floats: about float32's accuracy, on the tensor cores; AMD's multiply
    float32 itself.
    """
    if a.dtype != TYPE:
        a = rounded(a, TYPE)
    if WIDENED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def in_order(x0, x1, x2, x3):
    """Four words of each call of Philox next to each other along the last axis."""
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def standardised(x, mask, count, eps, AXIS: tl.constexpr):
    """(x - mean) / sqrt(var + eps) over the masked part of `total`'s axes, and 1 / sqrt(var + eps). x is 0 where the
    mask is false; of what the result is there nothing is said.

    Two passes over registers. The mean of what is left after the first centring is taken off as well: it is the
    rounding error of a mean far from zero.
    """
    inverse = 1.0 / count
    centred = tl.where(mask, x - total(x, AXIS) * inverse, 0.0)
    rest = total(centred, AXIS) * inverse
    scale = tl.rsqrt(total(centred * centred, AXIS) * inverse - rest * rest + eps)
    return centred * scale - rest * scale, scale


@triton.jit
def merged_lanes(mean, m2, counts, total):
    """Mean and squared deviations of all rows of a block, whose rows have (counts, mean, m2) each.

    Chan's rule for many groups at once. The centre is corrected once, so that a mean far from zero keeps its digits.
    """
    centre = tl.sum(mean * counts, 0, keep_dims=True) / total
    centre += tl.sum((mean - centre) * counts, 0, keep_dims=True) / total
    shift = mean - centre
    return centre, tl.sum(m2 + shift * shift * counts, 0, keep_dims=True)


@triton.jit(do_not_specialize=["rows"])
def _column_sums_kernel(x, out, rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums (rows, channels) over the rows, in one order for one number of rows."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    lane = tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows, BLOCK_R):
        r = start + lane
        total += tl.load(x + r * channels + c, mask=(r < rows) & (c < channels), other=0.0)
    result = tl.sum(total, 0, keep_dims=True)
    tl.store(out + c, rounded(result, out.dtype.element_ty), mask=c < channels)


def column_sums(x: Tensor, out: Tensor) -> None:
    """out (C,) = float32 x (rows, C) summed over the rows; the last step of a deterministic reduction."""
    rows, channels = x.shape
    tile = Tile.columns(channels)
    _column_sums_kernel[(divide_up(channels, tile.channels),)](x, out, rows, channels, **tile.options)
