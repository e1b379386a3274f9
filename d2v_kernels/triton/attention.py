# mypy: allow-untyped-defs
"""attention with the ALiBi bias computed from kept positions: forward and backward without a T x T tensor.

Forward: one program per (row, head, block of queries) walks over the keys with a running maximum and sum in float32
(online softmax; FlashAttention, Dao et al. 2022) and leaves log-sum-exp beside the result. Backward, two kernels that
compute the weights again from it: the one for queries walks as the forward does and leaves delta = sum(grad * out) of
each query for the one for keys and values, which walks over queries for one block of keys. The gradient of the slopes,
-sum(dS * |pos_i - pos_j|), comes from the first as one float32 number a program, added up for each head in one order:
no atomics, the same bits every time. Bytes from HBM: forward 4*s an element of the query (keys and values of a head
come from L2 after their first use), backward 9*s; the published code moves about 41 bytes for each of T x T weights.

Dropout: Philox4x32-10 with the key of the row and counter (j // 4, i, head, 0) decides on weights j .. j + 3 of query
i, so both backward kernels draw what the forward drew, on any block shape.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import OPTIONS, column_sums, divide_up, dot, in_order, on_device, power_of_two, rounded

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class AttentionTile:
    """Queries and keys of one step, channels of a head (a power of two), warps, stages of the pipelined loads."""

    queries: int
    keys: int
    channels: int
    warps: int
    stages: int


def attention_tile(kernel: str, width: int, element_size: int) -> AttentionTile:
    """Of "forward", "dq" (queries and slopes) and "dkdv" (keys and values)."""
    channels = power_of_two(width, 16)
    narrow = channels <= 64
    if element_size == 4:
        # Three products in tensor floats for each product: more registers for operands, so smaller blocks.
        return AttentionTile(32 if narrow else 16, 32, channels, 8, 1)
    queries, keys, warps = {
        # 64 queries are what one warp group multiplies at once on sm_90 and later.
        "forward": (64, 64, 4 if narrow else 8),
        # Fewer keys at once, for two more operands than the forward has.
        "dq": (64, 32, 4 if narrow else 8),
        # Two accumulators of keys x channels, 8 warps to hold them.
        "dkdv": (64, 32, 8) if narrow else (32, 64, 8),
    }[kernel]
    return AttentionTile(queries, keys, channels, warps, 2)


@triton.jit
def _load_rows(base, index, stride, inside, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows base[index] of WIDTH channels, zeros where `inside` is false and in the channels that fill the block."""
    d = tl.arange(0, BLOCK_D)[None, :]
    place = base + index.to(tl.int64)[:, None] * stride + d
    if WIDTH == BLOCK_D:
        return tl.load(place, mask=inside[:, None], other=0.0)
    return tl.load(place, mask=inside[:, None] & (d < WIDTH), other=0.0)


@triton.jit
def _store_rows(base, index, stride, inside, x, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    place = base + index.to(tl.int64)[:, None] * stride + d
    mask = inside[:, None] & (d < WIDTH)
    tl.store(place, rounded(x, base.dtype.element_ty), mask=mask)


@triton.jit
def _key_mask(valid, j, length, HAS_VALID: tl.constexpr):
    mask = j < length
    if HAS_VALID:
        mask = mask & (tl.load(valid + j, mask=mask, other=0) != 0)
    return mask


@triton.jit
def _load_positions(positions, index, tokens, extra):
    return tl.load(positions + (index - extra), mask=(index >= extra) & (index < tokens), other=0)


@triton.jit
def _distances(place_i, place_j, i, j, extra):
    """|pos_i - pos_j|, 0 where one of them is an extra token."""
    between = tl.abs(place_i[:, None] - place_j[None, :]).to(tl.float32)
    return tl.where((i >= extra)[:, None] & (j >= extra)[None, :], between, 0.0)


@triton.jit
def _kept(key, head, i, first, threshold, BLOCK_N: tl.constexpr):
    """Which weights of queries i and keys first .. first + BLOCK_N - 1 dropout keeps."""
    group = (first // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
    row = i.to(tl.uint32)[:, None]
    c0, c1 = group + row * 0, row + group * 0
    x0, x1, x2, x3 = tl.philox(key, c0, c1, c0 * 0 + head.to(tl.uint32), c0 * 0)
    return in_order(x0, x1, x2, x3) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["tokens", "heads", "blocks", "positions_row", "threshold", "key_stride"])
def _attention_kernel(
    query, key, value, out, log_sum, slopes, positions, lengths, valid, dropout_keys, tokens, heads, blocks, extra,
    positions_row, key_stride, q_n, q_t, q_h, k_n, k_t, k_h, v_n, v_t, v_h, scale, threshold, rescale,
    ALIBI: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_VALID: tl.constexpr, DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block, h = program % blocks, (program // blocks) % heads
    n = (program // blocks // heads).to(tl.int64)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    TYPE: tl.constexpr = query.dtype.element_ty
    length = tokens
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths + n).to(tl.int32), tokens)
    slope, place_i, row_key = 0.0, i, n
    if ALIBI:
        slope = tl.load(slopes + h) * _LOG2E
        place_i = _load_positions(positions + n * positions_row, i, tokens, extra)
    if DROPOUT:
        row_key = tl.load(dropout_keys + n * key_stride)
    q = _load_rows(query + n * q_n + h.to(tl.int64) * q_h, i, q_t, i < tokens, WIDTH, BLOCK_D)
    keys, values = key + n * k_n + h.to(tl.int64) * k_h, value + n * v_n + h.to(tl.int64) * v_h
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, length, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        mask = _key_mask(valid + n * tokens, j, length, HAS_VALID)
        k = _load_rows(keys, j, k_t, mask, WIDTH, BLOCK_D)
        s = dot(q, tl.trans(k), TYPE) * (scale * _LOG2E)
        if ALIBI:
            place_j = _load_positions(positions + n * positions_row, j, tokens, extra)
            s -= slope * _distances(place_i, place_j, i, j, extra)
        s = tl.where(mask[None, :], s, float("-inf"))
        new = tl.maximum(most, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: keep exp2(-inf - shift) at 0
        p = tl.math.exp2(s - shift[:, None])
        factor = tl.math.exp2(most - shift)
        total = total * factor + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(_kept(row_key, h, i, first, threshold, BLOCK_N), p * rescale, 0.0)
        v = _load_rows(values, j, v_t, mask, WIDTH, BLOCK_D)
        acc = acc * factor[:, None] + dot(p, v, TYPE)
        most = new
    empty = total == 0.0
    acc = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    lse = tl.where(empty, float("inf"), (most + tl.math.log2(total)) * _LN2)
    pair = n * heads + h
    tl.store(log_sum + pair * tokens + i, lse, mask=i < tokens)
    _store_rows(out + n * tokens * heads * WIDTH + h * WIDTH, i, heads * WIDTH, i < tokens, acc, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "heads", "blocks", "positions_row", "threshold", "key_stride"])
def _attention_dq_kernel(
    grad, query, key, value, out, log_sum, delta, of_query, parts, slopes, positions, lengths, valid, dropout_keys,
    tokens, heads, blocks, extra, positions_row, key_stride, g_n, g_t, g_h, q_n, q_t, q_h, k_n, k_t, k_h, v_n, v_t, v_h,
    o_n, o_t, o_h, scale, threshold, rescale,
    ALIBI: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_VALID: tl.constexpr, DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block, h = program % blocks, (program // blocks) % heads
    n = (program // blocks // heads).to(tl.int64)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    TYPE: tl.constexpr = query.dtype.element_ty
    head = h.to(tl.int64)
    pair = n * heads + h
    length = tokens
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths + n).to(tl.int32), tokens)
    slope, place_i, row_key = 0.0, i, n
    if ALIBI:
        slope = tl.load(slopes + h) * _LOG2E
        place_i = _load_positions(positions + n * positions_row, i, tokens, extra)
    if DROPOUT:
        row_key = tl.load(dropout_keys + n * key_stride)
    q = _load_rows(query + n * q_n + head * q_h, i, q_t, i < tokens, WIDTH, BLOCK_D)
    g = _load_rows(grad + n * g_n + head * g_h, i, g_t, i < tokens, WIDTH, BLOCK_D)
    o = _load_rows(out + n * o_n + head * o_h, i, o_t, i < tokens, WIDTH, BLOCK_D)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + pair * tokens + i, d, mask=i < tokens)
    lse = tl.load(log_sum + pair * tokens + i, mask=i < tokens, other=float("inf")) * _LOG2E
    keys, values = key + n * k_n + head * k_h, value + n * v_n + head * v_h
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    of_slope = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, length, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        mask = _key_mask(valid + n * tokens, j, length, HAS_VALID)
        k = _load_rows(keys, j, k_t, mask, WIDTH, BLOCK_D)
        v = _load_rows(values, j, v_t, mask, WIDTH, BLOCK_D)
        s = dot(q, tl.trans(k), TYPE) * (scale * _LOG2E)
        distance = s
        if ALIBI:
            place_j = _load_positions(positions + n * positions_row, j, tokens, extra)
            distance = _distances(place_i, place_j, i, j, extra)
            s -= slope * distance
        p = tl.where(mask[None, :], tl.math.exp2(s - lse[:, None]), 0.0)
        of_p = dot(g, tl.trans(v), TYPE)
        if DROPOUT:
            of_p = tl.where(_kept(row_key, h, i, first, threshold, BLOCK_N), of_p * rescale, 0.0)
        of_s = p * (of_p - d[:, None])
        if ALIBI:
            of_slope += tl.sum(of_s * distance, 1)
        acc += dot(of_s, k, TYPE)
    if ALIBI:
        tl.store(parts + (n * blocks + block) * heads + h, -tl.sum(of_slope, 0))
    place = of_query + n * tokens * heads * WIDTH + h * WIDTH
    _store_rows(place, i, heads * WIDTH, i < tokens, acc * scale, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "heads", "blocks", "positions_row", "threshold", "key_stride"])
def _attention_dkdv_kernel(
    grad, query, key, value, log_sum, delta, of_key, of_value, slopes, positions, lengths, valid, dropout_keys, tokens,
    heads, blocks, extra, positions_row, key_stride, g_n, g_t, g_h, q_n, q_t, q_h, k_n, k_t, k_h, v_n, v_t, v_h, scale,
    threshold, rescale,
    ALIBI: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_VALID: tl.constexpr, DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block, h = program % blocks, (program // blocks) % heads
    n = (program // blocks // heads).to(tl.int64)
    first = block * BLOCK_N
    j = first + tl.arange(0, BLOCK_N)
    TYPE: tl.constexpr = query.dtype.element_ty
    head = h.to(tl.int64)
    pair = n * heads + h
    length = tokens
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths + n).to(tl.int32), tokens)
    mask = _key_mask(valid + n * tokens, j, length, HAS_VALID)
    slope, place_j, row_key = 0.0, j, n
    if ALIBI:
        slope = tl.load(slopes + h) * _LOG2E
        place_j = _load_positions(positions + n * positions_row, j, tokens, extra)
    if DROPOUT:
        row_key = tl.load(dropout_keys + n * key_stride)
    k = _load_rows(key + n * k_n + head * k_h, j, k_t, mask, WIDTH, BLOCK_D)
    v = _load_rows(value + n * v_n + head * v_h, j, v_t, mask, WIDTH, BLOCK_D)
    queries, grads = query + n * q_n + head * q_h, grad + n * g_n + head * g_h
    key_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    end = tl.where(first < length, tokens, 0)  # keys beyond the length get zeros
    for start in range(0, end, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        q = _load_rows(queries, i, q_t, i < tokens, WIDTH, BLOCK_D)
        lse = tl.load(log_sum + pair * tokens + i, mask=i < tokens, other=float("inf")) * _LOG2E
        d = tl.load(delta + pair * tokens + i, mask=i < tokens, other=0.0)
        s = dot(q, tl.trans(k), TYPE) * (scale * _LOG2E)
        if ALIBI:
            place_i = _load_positions(positions + n * positions_row, i, tokens, extra)
            s -= slope * _distances(place_i, place_j, i, j, extra)
        p = tl.where(mask[None, :], tl.math.exp2(s - lse[:, None]), 0.0)
        g = _load_rows(grads, i, g_t, i < tokens, WIDTH, BLOCK_D)
        of_p = dot(g, tl.trans(v), TYPE)
        dropped = p
        if DROPOUT:
            kept = _kept(row_key, h, i, first, threshold, BLOCK_N)
            dropped = tl.where(kept, p * rescale, 0.0)
            of_p = tl.where(kept, of_p * rescale, 0.0)
        value_acc += dot(tl.trans(dropped), g, TYPE)
        key_acc += dot(tl.trans(p * (of_p - d[:, None])), q, TYPE)
    place, stride = n * tokens * heads * WIDTH + h * WIDTH, heads * WIDTH
    _store_rows(of_value + place, j, stride, j < tokens, value_acc, WIDTH, BLOCK_D)
    _store_rows(of_key + place, j, stride, j < tokens, key_acc * scale, WIDTH, BLOCK_D)


class _Call:
    """The arguments that all kernels of one call share."""

    def __init__(self, query: Tensor, rest: tuple) -> None:
        slopes, positions, lengths, valid, dropout_keys, dropout, self.scale = rest
        self.rows, self.tokens, self.heads, self.width = query.shape
        extra = 0
        if positions is not None:
            extra = self.tokens - positions.shape[1]
            positions = positions.to(torch.int32).contiguous()
            slopes = slopes.contiguous()
        stand_in = query  # for a pointer that is not used
        given = (slopes, positions, lengths, None if valid is None else valid.contiguous().view(torch.uint8),
                 dropout_keys if dropout > 0.0 else None)  # fmt: skip
        self.tensors = [stand_in if t is None else t for t in given]
        if lengths is not None:
            self.tensors[2] = lengths.contiguous()
        self.integers = (extra, 0 if positions is None else positions.shape[1],
                         0 if dropout_keys is None else dropout_keys.stride(0))  # fmt: skip
        self.floats = (self.scale, min(round(dropout * 2.0**32), 2**32 - 1), 1.0 / (1.0 - dropout))
        self.flags = {"ALIBI": slopes is not None, "HAS_LENGTHS": lengths is not None, "HAS_VALID": valid is not None,
                      "DROPOUT": dropout > 0.0, "WIDTH": self.width}  # fmt: skip

    def run(self, kernel, tile: AttentionTile, block: int, pointers: tuple, strided: tuple) -> None:
        """One program for each row, head and block of `block` queries or keys."""
        blocks = divide_up(self.tokens, block)
        strides = [s for x in strided for s in x.stride()[:3]]
        kernel[(self.rows * self.heads * blocks,)](
            *pointers, *self.tensors, self.tokens, self.heads, blocks, *self.integers, *strides, *self.floats,
            **self.flags, BLOCK_M=tile.queries, BLOCK_N=tile.keys, BLOCK_D=tile.channels, num_warps=tile.warps,
            num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip


def attention(query: Tensor, key: Tensor, value: Tensor, *rest) -> tuple[Tensor, Tensor]:
    n, t, h, d = query.shape
    out = torch.empty((n, t, h, d), dtype=query.dtype, device=query.device)
    log_sum = torch.empty((n, h, t), dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out, log_sum.fill_(float("inf"))
    call, tile = _Call(query, rest), attention_tile("forward", d, query.element_size())
    with on_device(query):
        inputs = (query, key, value)
        call.run(_attention_kernel, tile, tile.queries, (*inputs, out, log_sum), inputs)
    return out, log_sum


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, *rest
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, t, h, d = query.shape
    slopes = rest[0]
    results = [torch.empty((n, t, h, d), dtype=query.dtype, device=query.device) for _ in range(3)]
    of_slopes = log_sum.new_empty((0,)) if slopes is None else slopes.new_empty(slopes.shape)
    if query.numel() == 0:
        return results[0], results[1], results[2], of_slopes.zero_()
    if grad.dtype != query.dtype:
        grad = grad.to(query.dtype)
    call = _Call(query, rest)
    delta, log_sum = torch.empty_like(log_sum), log_sum.contiguous()
    with on_device(query):
        tile, inputs = attention_tile("dq", d, query.element_size()), (grad, query, key, value)
        blocks = divide_up(t, tile.queries)
        parts = delta if slopes is None else torch.empty((n * blocks, h), dtype=torch.float32, device=query.device)
        pointers = (*inputs, out, log_sum, delta, results[0], parts)
        call.run(_attention_dq_kernel, tile, tile.queries, pointers, (*inputs, out))
        tile = attention_tile("dkdv", d, query.element_size())
        call.run(_attention_dkdv_kernel, tile, tile.keys, (*inputs, log_sum, delta, *results[1:]), inputs)
        if slopes is not None:
            column_sums(parts, of_slopes)
    return results[0], results[1], results[2], of_slopes
