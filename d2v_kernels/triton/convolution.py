# mypy: allow-untyped-defs
"""conv_layer_norm_gelu: grouped convolutions as products with channels last (implicit GEMM), without atomics.

The convolution is a product for each group: row t of its left operand holds what the taps meet at token t, column
tap * C/G + c; the right operand is the weight. That matrix is never written: a program loads blocks of it from x, each
tap's from rows that lie a fixed distance away, so that all but the first load of a row should come from L1. Columns run
through all taps, so that only the last block of them is padded, whatever C/G is (24 and 48 are no powers of two); D/G
is. The gradient of x is the same product of the gradient with the taps in the other direction. The gradient of the
weight multiplies that matrix, transposed, by the gradient of the result, in parts of the rows whose float32 sums a
second kernel adds in one order. Norm, GELU and residual are a following pass, and not the epilogue, because backward
needs the convolution's result: it has to be written anyway, and a program that held whole rows (BLOCK_M x 768 float32)
would leave no registers. The bias' gradient comes out of the backward pass of that norm.

Bytes of HBM, item size s, a token: forward (C + D) s and the norm's 2 D s (3 D s with residual); backward 3 D s of the
norm, (C + D) s (and D s with residual) of the gradient of x, and of the weight's, which reads x once and the gradient
once for each block of columns, mostly from L2. FLOPs: 2 D C/G taps a token, three times with backward. Forward in
bfloat16 that is 86 (48 channels, 9 taps, residual) to 228 (19 taps) FLOPs a byte, where an H200 has 257: products bound
it as long as they reach less than a third of the peak. Of a step of 128 x 64 x 64, whose products take 256 cycles of an
SM, 48 KB go through L1 and shared memory, and each of four warps issues about 200 instructions besides.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import OPTIONS, column_sums, divide_up, dot, on_device, power_of_two, rounded
from .runtime_norm import normed_gelu, normed_gelu_backward

PROGRAMS = 512
"""Of the weight's gradient, at most twice as many; 80 KB each, so that two are on an SM of an H200 at a time."""
LEAST_ROWS = 1024
"""Of a part of the rows, for its sums have to be written and read again."""

_FAR = tl.constexpr(1 << 30)


@dataclass(frozen=True)
class ConvolutionTile:
    """Rows, columns of the windows and output channels of one step, warps, stages of the pipelined loads."""

    rows: int
    columns: int
    outputs: int
    warps: int
    stages: int

    @property
    def options(self) -> dict:
        """What a launch passes on for it."""
        blocks = {"BLOCK_R": self.rows, "BLOCK_Q": self.columns, "BLOCK_N": self.outputs}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages, **OPTIONS}


def convolution_tile(outputs: int, element_size: int) -> ConvolutionTile:
    """Of the product with the weight; outputs: channels of a group of the result. Two stages of 24 KB: three programs,
    which is what registers allow, leave an SM of an H200 about 80 KB of L1 for rows that are met again."""
    width = min(64, power_of_two(outputs, 16))
    return ConvolutionTile(64, 32, width, 4, 1) if element_size == 4 else ConvolutionTile(128, 64, width, 4, 2)


def weights_tile(columns: int, outputs: int, element_size: int) -> ConvolutionTile:
    """Of the weight's gradient, which sums over rows: many columns, so that the other operand is read seldom."""
    width, most = min(64, power_of_two(outputs, 16)), 64 if element_size == 4 else 256
    block = min(most, power_of_two(columns, 16))
    if element_size == 4:
        return ConvolutionTile(32, block, width, 4, 1)
    return ConvolutionTile(64, block, width, 8 if block == most else 4, 2)


@triton.jit
def _load_windows(
    x, r, inside, place, q, height,
    WIDTH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SIGN: tl.constexpr, GROUPS: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """Rows of the windows: column q = tap * IN + c is channel c of the token that the tap meets, 0 outside the grid.

    r: rows of x; place: their places in the grid; x: first row and channel of the group.
    """
    tap, c = q // IN, q % IN
    down, across = SIGN * (tap // KW - KH // 2), SIGN * (tap % KW - KW // 2)
    step = (down.to(tl.int64) * WIDTH + across) * (GROUPS * IN) + c
    rows = r.to(tl.int64) * (GROUPS * IN)
    # One comparison an axis: below 0 is a large unsigned number, and what lies behind the end is put far away.
    row = tl.where(inside, place // WIDTH, _FAR)
    down = tl.where(q < KH * KW * IN, down, _FAR)
    mask = (row[:, None] + down[None, :]).to(tl.uint32) < height.to(tl.uint32)
    if KW > 1:
        mask &= ((place % WIDTH)[:, None] + across[None, :]).to(tl.uint32) < WIDTH
    return tl.load(x + (rows[:, None] + step[None, :]), mask=mask, other=0.0, cache_modifier=".ca")


@triton.jit(do_not_specialize=["rows", "height"])
def _convolution_kernel(
    x, weight, bias, added, out, rows, height,
    WIDTH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SIGN: tl.constexpr, GROUPS: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADDED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """weight: (GROUPS, KH * KW * IN, OUT). Neighbouring programs have the same rows and other groups."""
    PARTS: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    COLUMNS: tl.constexpr = KH * KW * IN
    program = tl.program_id(0)
    part, g = program % PARTS, (program // PARTS) % GROUPS
    r = program // (PARTS * GROUPS) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    place, inside = r % (height * WIDTH), r < rows
    acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for first in range(0, COLUMNS, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        windows = _load_windows(x + g * IN, r, inside, place, q, height, WIDTH, KH, KW, SIGN, GROUPS, IN)
        taps = weight + (g * COLUMNS + q).to(tl.int64)[:, None] * OUT + n[None, :]
        w = tl.load(taps, mask=(q < COLUMNS)[:, None] & (n < OUT)[None, :], other=0.0)
        acc += dot(windows, w, x.dtype.element_ty)
    c = g * OUT + n
    if HAS_BIAS:
        acc += tl.load(bias + c, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
    mask = inside[:, None] & (n < OUT)[None, :]
    offset = r.to(tl.int64)[:, None] * (GROUPS * OUT) + c[None, :]
    if HAS_ADDED:
        acc += tl.load(added + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offset, rounded(acc, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "height", "per_split"])
def _convolution_weights_kernel(
    x, grad, sums, rows, height, per_split,
    WIDTH: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, GROUPS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums: (splits, GROUPS, KH * KW * IN, OUT), of each split's rows. Neighbouring programs have the same rows."""
    PARTS: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    COLUMNS: tl.constexpr = KH * KW * IN
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK_Q - 1) // BLOCK_Q
    program = tl.program_id(0)
    part, block = program % PARTS, (program // PARTS) % BLOCKS
    g, split = (program // (PARTS * BLOCKS)) % GROUPS, program // (PARTS * BLOCKS * GROUPS)
    q, n = block * BLOCK_Q + tl.arange(0, BLOCK_Q), part * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = split * per_split
    end = tl.minimum(rows, begin + per_split)
    lane, grid = tl.arange(0, BLOCK_R), height * WIDTH
    place = (begin + lane) % grid
    acc = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_R):
        r = start + lane
        windows = _load_windows(x + g * IN, r, r < end, place, q, height, WIDTH, KH, KW, 1, GROUPS, IN)
        offset = r.to(tl.int64)[:, None] * (GROUPS * OUT) + (g * OUT + n)[None, :]
        of_y = tl.load(grad + offset, mask=(r < end)[:, None] & (n < OUT)[None, :], other=0.0)
        acc += dot(tl.trans(windows), of_y, x.dtype.element_ty)
        place += BLOCK_R % grid  # and again below the grid's size, without a division
        place = tl.where(place >= grid, place - grid, place)
    offset = ((split * GROUPS + g) * COLUMNS + q).to(tl.int64)[:, None] * OUT + n[None, :]
    tl.store(sums + offset, acc, mask=(q < COLUMNS)[:, None] & (n < OUT)[None, :])


class _Call:
    """Sizes of one call: a grid of T tokens is one of height T and width 1."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.x, self.weight = x, weight
        self.rows, self.height = x.shape[:-1].numel(), x.shape[1]
        self.outputs, self.narrow = weight.shape[:2]
        self.groups = x.shape[-1] // self.narrow
        self.taps = weight.shape[2:].numel()
        if self.rows >= _FAR.value // 2:
            raise ValueError(f"conv_layer_norm_gelu: tokens of x: expected less than 2^29, got {self.rows}")
        self.flags = {"WIDTH": x.shape[2] if x.dim() == 4 else 1, "KH": weight.shape[2],
                      "KW": weight.shape[3] if x.dim() == 4 else 1, "GROUPS": self.groups}  # fmt: skip

    def packed(self, outputs_last: bool) -> Tensor:
        """The weight in the dtype of x, as (G, taps, C/G, D/G), or the last two exchanged for the gradient of x."""
        parts = self.weight.view(self.groups, -1, self.narrow, self.taps)
        parts = parts.permute((0, 3, 2, 1) if outputs_last else (0, 3, 1, 2))
        return torch.empty(parts.shape, dtype=self.x.dtype, device=self.x.device).copy_(parts)

    def convolve(self, x: Tensor, bias: Tensor | None, added: Tensor | None, forward: bool) -> Tensor:
        """The convolution of x, or with the taps exchanged that of the result's gradient; plus bias and a tensor."""
        packed = self.packed(forward)
        narrow, outputs = packed.shape[2:]
        out = torch.empty((*x.shape[:-1], self.groups * outputs), dtype=x.dtype, device=x.device)
        tile = convolution_tile(outputs, x.element_size())
        programs = divide_up(self.rows, tile.rows) * self.groups * divide_up(outputs, tile.outputs)
        _convolution_kernel[(programs,)](
            x, packed, x if bias is None else bias, x if added is None else added, out, self.rows, self.height,
            **self.flags, SIGN=1 if forward else -1, IN=narrow, OUT=outputs, HAS_BIAS=bias is not None,
            HAS_ADDED=added is not None, **tile.options,
        )  # fmt: skip
        return out

    def weight_gradient(self, grad: Tensor) -> Tensor:
        """Of the weight, from the gradient of the convolution's result."""
        columns, outputs = self.taps * self.narrow, self.outputs // self.groups
        tile = weights_tile(columns, outputs, grad.element_size())
        blocks = self.groups * divide_up(columns, tile.columns) * divide_up(outputs, tile.outputs)
        per_split = max(LEAST_ROWS, divide_up(self.rows, divide_up(PROGRAMS, blocks)))
        per_split = divide_up(per_split, tile.rows) * tile.rows
        splits = divide_up(self.rows, per_split)
        sums = torch.empty((splits, self.weight.numel()), dtype=torch.float32, device=grad.device)
        _convolution_weights_kernel[(splits * blocks,)](
            self.x, grad, sums, self.rows, self.height, per_split, **self.flags, IN=self.narrow, OUT=outputs,
            **tile.options,
        )  # fmt: skip
        total = sums[0]
        if splits > 1:
            total = torch.empty_like(total)
            column_sums(sums, total)
        parts = total.view(self.groups, self.taps, self.narrow, outputs).permute(0, 3, 2, 1)
        result = torch.empty_like(self.weight)
        result.view(parts.shape).copy_(parts)
        return result


def conv_layer_norm_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, eps: float
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        empty = x.new_empty((*x.shape[:-1], weight.shape[0]))
        return empty, torch.empty_like(empty)
    with on_device(x):
        y = _Call(x, weight).convolve(x, bias, None, forward=True)
    added = x.view(-1, x.shape[-1]) if residual else None
    return normed_gelu(y.view(-1, y.shape[-1]), None, None, added, eps).view(y.shape), y


def conv_layer_norm_gelu_backward(
    grad: Tensor, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (y.shape[:-1].numel(), y.shape[-1])
    of_y, *_, of_bias = normed_gelu_backward(grad.view(rows), y.view(rows), None, None, bias, eps)
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight), of_bias
    call = _Call(x, weight)
    with on_device(x):
        of_x = call.convolve(of_y.view(y.shape), None, grad if residual else None, forward=False)
        return of_x, call.weight_gradient(of_y), of_bias
