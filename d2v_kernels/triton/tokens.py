# mypy: allow-untyped-defs
"""gather_tokens, restore_tokens and their gradients by inverse gather: no atomics, no zero-fill, one launch each.

Forward, bytes an element: a row is read (from L2 when another mask has read it) and written. Noise rows are written
only; their cost is arithmetic, so a row that is copied does not pay for it.

Backward: out[b, t] = sum over (r, i) of sample b with index[r, i] == t, ascending. One warp makes one output row: it
holds the row in float32, looks through the index of its sample in blocks of up to 256 entries (4 bytes each, in L1 or
L2), and takes the smallest match that is left until none is. Reasons, in estimated instructions of a warp: a block
costs about 40 (compare, minimum by `redux`) and so does each match, which for 16 masks of 39 patches, 3 matches a
token, is some 250; 16 samples of 196 tokens are then about 1 us on 132 SMs, beside 5 us for the bytes, and 256 samples
20 us beside 75 us. Wider blocks need more registers (115 a thread at 1024 entries, 72 at 256), so that fewer warps hide
the loads.
A sorted list for each token would save these, but is itself a launch that compares every entry with every token, and
needs scratch memory; a table of the inverse needs a fill and cannot hold an index that repeats within a row.
Each gradient row is read once and each output row written once: s + k*M*s bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks as check
from .runtime import (
    NVIDIA,
    OPTIONS,
    Tile,
    column_sums,
    divide_up,
    in_order,
    on_device,
    power_of_two,
    rounded,
    warps,
)  # fmt: skip

_NONE = tl.constexpr(2**31 - 1)
FILL_SPLITS = 64  # parts of the positions, each with its partial sum


def noise_tile(channels: int) -> Tile:
    """One row a program in steps of this many channels: the widest power of two that wastes no lane, at least 256."""
    width = power_of_two(channels, 16)
    if width > 256:
        width = max(256, min(1024, channels & -channels))
    return Tile(1, width, 1)


def inverse_gather_tile(channels: int, entries: int, element_size: int) -> Tile:
    """Index entries compared at once x channels of one output row, up to 2 KB of it, a warp."""
    width = min(2048 // element_size, power_of_two(channels, 16))
    return Tile(min(256, power_of_two(entries, 32)), width, warps(width, 32))


@triton.jit(do_not_specialize=["rows", "clones", "blocks", "tiles", "index_row"])
def _gather_kernel(
    x, index, out, rows, channels, clones, blocks, tiles, x_batch, x_token, index_row, index_entry,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """rows: entries of one row of the index."""
    program = tl.program_id(0)
    c = (program % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    r = (program // tiles // blocks).to(tl.int64)
    i = ((program // tiles) % blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    t = tl.load(index + r * index_row + i * index_entry, mask=i < rows, other=0).to(tl.int64)
    mask = (i < rows) & (c < channels)
    row = tl.load(x + (r // clones) * x_batch + t * x_token + c, mask=mask, other=0.0)
    tl.store(out + (r * rows + i) * channels + c, row, mask=mask)


@triton.jit(do_not_specialize=["tokens", "first", "outer", "inner", "tiles", "index_row"])
def _inverse_gather_kernel(
    grad, index, out, tokens, first, outer, inner, channels, tiles, grad_row, grad_entry, index_row, index_entry,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[b, s] = sum of grad[r, i] over the outer rows r of sample b and i < inner with index[r, i] == first + s."""
    program = tl.program_id(0)
    c = (program % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = (program // tiles).to(tl.int64)
    wanted = first + slot % tokens
    entries = tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_C], tl.float32)
    for m in range(outer):
        r = (slot // tokens) * outer + m
        for start in range(0, inner, BLOCK_R):
            i = start + entries
            t = tl.load(index + r * index_row + i.to(tl.int64) * index_entry, mask=i < inner, other=-1)
            left = tl.where((t == wanted) & (i < inner), i, _NONE)
            match = tl.min(left, 0)
            while match != _NONE:
                place = grad + r * grad_row + match.to(tl.int64) * grad_entry + c
                total += tl.load(place, mask=c < channels, other=0.0).to(tl.float32)
                left = tl.where(left == match, _NONE, left)
                match = tl.min(left, 0)
    tl.store(out + slot * channels + c, rounded(total, out.dtype.element_ty), mask=c < channels)


@triton.jit(do_not_specialize=["tokens", "visible", "blocks", "tiles", "restore_row"])
def _restore_kernel(
    kept, restore, fill, out, tokens, visible, channels, blocks, tiles, kept_row, kept_token, restore_row,
    restore_entry, fill_row, fill_entry, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A vector fill has fill_row = fill_entry = 0."""
    program = tl.program_id(0)
    c = (program % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    r = (program // tiles // blocks).to(tl.int64)
    t = ((program // tiles) % blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    s = tl.load(restore + r * restore_row + t * restore_entry, mask=t < tokens, other=0).to(tl.int64)
    mask = (t < tokens) & (c < channels)
    is_kept = s < visible
    x = tl.load(kept + r * kept_row + s * kept_token + c, mask=mask & is_kept, other=0.0)
    y = tl.load(fill + r * fill_row + (s - visible) * fill_entry + c, mask=mask & (s >= visible), other=0.0)
    tl.store(out + (r * tokens + t) * channels + c, tl.where(is_kept, x, y), mask=mask)


@triton.jit
def _cos_sin(angle):
    """Both for an angle in [0, 2 pi], to about an ulp: pi/2 in three parts, then polynomials on [-pi/4, pi/4].

    The library's functions reduce any angle: twice the work, and an array in local memory.
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - quarter * 1.5703125
    r = r - quarter * 4.837512969970703125e-4
    r = r - quarter * 7.549789954891882e-8
    z = r * r
    sin = r + r * z * ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1)
    cos = 1.0 - 0.5 * z + z * z * ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2)
    odd = (quarter == 1.0) | (quarter == 3.0)
    cos_size, sin_size = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return (
        tl.where((quarter == 1.0) | (quarter == 2.0), -cos_size, cos_size),
        tl.where((quarter == 2.0) | (quarter == 3.0), -sin_size, sin_size),
    )


@triton.jit
def _hardware(name: tl.constexpr, x):
    return tl.inline_asm_elementwise(name + ".approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _normal(bits_radius, bits_angle, TYPE: tl.constexpr):
    """Box-Muller: two normal numbers of two 32-bit ones.

    A result in 16 bits has no use for more than NVIDIA's own logarithm, root, sine and cosine, off by 2^-20 or less.
    Near 1 that logarithm has no digits left, and -2 ln u is 2 (1 - u); the angle is best below half a turn, and the
    length below zero makes up for half a turn less.
    """
    u = ((bits_radius >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    v = ((bits_angle >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    if NVIDIA and TYPE.primitive_bitwidth == 16:
        near_one = 2.0 - 2.0 * u
        square = tl.where(near_one < 0.0009765625, near_one, -1.3862943611198906 * _hardware("lg2", u))
        radius = -_hardware("sqrt", square)
        angle = 6.283185307179586 * v - 3.141592653589793
        cos, sin = _hardware("cos", angle), _hardware("sin", angle)
    else:
        radius = tl.sqrt_rn(-2.0 * tl.log(u))
        cos, sin = _cos_sin(6.283185307179586 * v)
    return radius * cos, radius * sin


@triton.jit(do_not_specialize=["tokens", "visible", "restore_row"])
def _restore_noise_kernel(
    kept, restore, keys, out, std, tokens, visible, channels, kept_row, kept_token, restore_row, restore_entry,
    keys_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: a copy, or Philox4x32-10 with the key of the row and counter (c // 4, noise row, 0, 0)."""
    program = tl.program_id(0).to(tl.int64)
    r, t = program // tokens, program % tokens
    s = tl.load(restore + r * restore_row + t * restore_entry).to(tl.int64)
    place = out + program * channels
    c = tl.arange(0, BLOCK)
    if s < visible:
        row = kept + r * kept_row + s * kept_token
        for start in range(0, channels, BLOCK):
            mask = start + c < channels
            tl.store(place + start + c, tl.load(row + start + c, mask=mask, other=0.0), mask=mask)
    else:
        key = tl.load(keys + r * keys_stride)
        j = (s - visible).to(tl.uint32)
        group = tl.arange(0, BLOCK // 4)
        for start in range(0, channels, BLOCK):
            c0 = (start // 4 + group).to(tl.uint32)
            zero = c0 * 0
            x0, x1, x2, x3 = tl.philox(key, c0, zero + j, zero, zero)
            z0, z1 = _normal(x0, x1, out.dtype.element_ty)
            z2, z3 = _normal(x2, x3, out.dtype.element_ty)
            z = in_order(z0, z1, z2, z3) * std
            tl.store(place + start + c, rounded(z, out.dtype.element_ty), mask=start + c < channels)


@triton.jit(do_not_specialize=["rows", "tokens", "visible", "splits", "tiles", "restore_row"])
def _fill_sums_kernel(
    grad, restore, sums, rows, tokens, visible, channels, splits, tiles, grad_row, grad_token, restore_row,
    restore_entry, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums[split, c]: gradient of a vector fill over every `splits`-th block of the rows * tokens positions."""
    program = tl.program_id(0)
    c = (program % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    split = (program // tiles).to(tl.int64)
    lane = tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    positions = rows.to(tl.int64) * tokens
    for start in range(split * BLOCK_R, positions, splits * BLOCK_R):
        p = start + lane
        r, t = p // tokens, p % tokens
        s = tl.load(restore + r * restore_row + t * restore_entry, mask=p < positions, other=-1)
        mask = (p < positions) & (s >= visible) & (c < channels)
        total += tl.load(grad + r * grad_row + t * grad_token + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + split * channels + c, tl.sum(total, 0, keep_dims=True), mask=c < channels)


def gather_tokens(x: Tensor, index: Tensor, clones: int) -> Tensor:
    check.index_range("gather_tokens", "index", index, x.shape[1])
    (rows, entries), channels = index.shape, x.shape[2]
    out = torch.empty((rows, entries, channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = Tile.copy(channels)
    blocks, tiles = divide_up(entries, tile.rows), divide_up(channels, tile.channels)
    with on_device(x):
        _gather_kernel[(rows * blocks * tiles,)](
            x, index, out, entries, channels, clones, blocks, tiles, x.stride(0), x.stride(1), *index.stride(),
            **tile.options,
        )  # fmt: skip
    return out


def _inverse_gather(grad: Tensor, index: Tensor, clones: int, tokens: int, first: int) -> Tensor:
    """Gradient of rows first .. first + tokens - 1 of each sample."""
    (rows, inner), channels = index.shape, grad.shape[2]
    out = torch.empty((rows // clones, tokens, channels), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    if index.numel() == 0:
        return out.zero_()
    outer = clones
    if all(t.stride(0) == inner * t.stride(1) for t in (grad, index)):
        outer, inner = 1, clones * inner  # the rows of a sample follow each other: one long row
    tile = inverse_gather_tile(channels, inner, grad.element_size())
    tiles = divide_up(channels, tile.channels)
    scale = clones // outer
    with on_device(grad):
        _inverse_gather_kernel[(out.shape[0] * tokens * tiles,)](
            grad, index, out, tokens, first, outer, inner, channels, tiles, scale * grad.stride(0), grad.stride(1),
            scale * index.stride(0), index.stride(1), **tile.options,
        )  # fmt: skip
    return out


def gather_tokens_backward(grad: Tensor, index: Tensor, clones: int, tokens: int) -> Tensor:
    check.index_range("gather_tokens_backward", "index", index, tokens)
    return _inverse_gather(grad, index, clones, tokens, 0)


def restore_tokens(
    kept: Tensor, restore: Tensor, fill: Tensor | None, noise_keys: Tensor | None, noise_std: float
) -> Tensor:
    (n, visible, channels), tokens = kept.shape, restore.shape[1]
    limit = visible + fill.shape[1] if fill is not None and fill.dim() == 3 else None
    check.index_range("restore_tokens", "restore", restore, limit)
    out = torch.empty((n, tokens, channels), dtype=kept.dtype, device=kept.device)
    if out.numel() == 0:
        return out
    with on_device(kept):
        if noise_keys is not None:
            tile = noise_tile(channels)
            _restore_noise_kernel[(n * tokens,)](
                kept, restore, noise_keys, out, noise_std, tokens, visible, channels, kept.stride(0), kept.stride(1),
                *restore.stride(), noise_keys.stride(0), BLOCK=tile.channels, num_warps=tile.warps, **OPTIONS,
            )  # fmt: skip
            return out
        assert fill is not None
        fill_strides = (0, 0) if fill.dim() == 1 else fill.stride()[:2]
        tile = Tile.copy(channels)
        blocks, tiles = divide_up(tokens, tile.rows), divide_up(channels, tile.channels)
        _restore_kernel[(n * blocks * tiles,)](
            kept, restore, fill, out, tokens, visible, channels, blocks, tiles, kept.stride(0), kept.stride(1),
            *restore.stride(), *fill_strides, **tile.options,
        )  # fmt: skip
    return out


def restore_tokens_backward(grad: Tensor, restore: Tensor, visible: int, fill_rows: int) -> tuple[Tensor, Tensor]:
    limit = visible + fill_rows if fill_rows >= 0 else None
    check.index_range("restore_tokens_backward", "restore", restore, limit)
    kept = _inverse_gather(grad, restore, 1, visible, 0)
    if fill_rows == check.NO_FILL:
        return kept, grad.new_empty((0,))
    if fill_rows == check.VECTOR_FILL:
        return kept, _vector_fill_gradient(grad, restore, visible)
    return kept, _inverse_gather(grad, restore, 1, fill_rows, visible)


def _vector_fill_gradient(grad: Tensor, restore: Tensor, visible: int) -> Tensor:
    n, tokens, channels = grad.shape
    out = torch.empty((channels,), dtype=grad.dtype, device=grad.device)
    if grad.numel() == 0:
        return out.zero_()
    tile = Tile.columns(channels)
    tiles = divide_up(channels, tile.channels)
    splits = min(FILL_SPLITS, divide_up(n * tokens, tile.rows))
    sums = torch.empty((splits, channels), dtype=torch.float32, device=grad.device)
    with on_device(grad):
        _fill_sums_kernel[(splits * tiles,)](
            grad, restore, sums, n, tokens, visible, channels, splits, tiles, grad.stride(0), grad.stride(1),
            *restore.stride(), **tile.options,
        )  # fmt: skip
        column_sums(sums, out)
    return out
