"""Token rows: gather the visible ones for M masks without making clones, and put them back."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from .._define import Call, Gradient, define
from .._random import philox


class Noise(NamedTuple):
    """Fill of masked rows: N(0, std^2), element (r, j, c) a pure function of (keys[r], j, c).

    Philox4x32-10 with key keys[r] and counter (c // 4, j), then Box-Muller; so the noise of a row does not depend on
    batch, rank or thread.
    """

    std: float
    """Standard deviation."""
    keys: Tensor
    """(N,) int64, one key a row, on the device of the kept rows."""


def gather_tokens(x: Tensor, index: Tensor, *, clones: int = 1) -> Tensor:
    """Rows of x named by index; row r of the result reads sample r // clones.

    Replaces `repeat_interleave(clones)` followed by `gather` (data2vec 2.0, section 3.2, multi-mask training).

    Args:
        x: (B,T,C) floating; copied where its last stride is not 1.
        index: (B*clones, n) int32 or int64; values may repeat within a row. Out of range raises on the CPU.
        clones: rows of index per sample.

    Returns:
        (B*clones, n, C), contiguous. Differentiable in x: gradients add in float32 in ascending row, then n, and
        are rounded once; bitwise repeatable.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit.

    Example:
        >>> x = torch.arange(6.0).view(1, 3, 2)  # one sample of three tokens
        >>> gather_tokens(x, torch.tensor([[0, 2], [1, 2]]), clones=2).tolist()  # what two masks leave of it
        [[[0.0, 1.0], [4.0, 5.0]], [[2.0, 3.0], [4.0, 5.0]]]
    """
    return _gather_tokens(check.side_by_side("gather_tokens", "x", x), index, clones)


def restore_tokens(kept: Tensor, restore: Tensor, *, fill: Tensor | Noise) -> Tensor:
    """Full sequences from kept rows: position t takes kept row restore[r, t], or a fill row when that is >= V.

    Args:
        kept: (N,V,C) floating; copied, as a tensor fill is, where its last stride is not 1.
        restore: (N,T) int32 or int64, values >= 0.
        fill: tensor (C,): one mask token for every value >= V; tensor (N,F,C): fill row restore - V; `Noise`: fresh
            noise row restore - V. Tensors have kept's dtype.

    Returns:
        (N,T,C), contiguous. Differentiable in kept and in a tensor fill; bitwise repeatable.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit.

    Example:
        >>> kept, restore = torch.ones(1, 2, 3), torch.tensor([[0, 2, 1]])  # the second of three tokens is masked
        >>> restore_tokens(kept, restore, fill=torch.zeros(3))[0, :, 0].tolist()
        [1.0, 0.0, 1.0]
        >>> restore_tokens(kept, restore, fill=Noise(0.01, torch.tensor([7]))).shape
        torch.Size([1, 3, 3])
    """
    vector, keys, std = (None, fill.keys, fill.std) if isinstance(fill, Noise) else (fill, None, 0.0)
    if vector is not None and not isinstance(vector, Tensor):
        raise TypeError(f"restore_tokens: fill: expected a tensor or Noise, got {type(fill).__name__}")
    vector = None if vector is None else check.side_by_side("restore_tokens", "fill", vector)
    return _restore_tokens(check.side_by_side("restore_tokens", "kept", kept), restore, vector, keys, std)


# ---- gather_tokens


def _gather_shape(op: str, x: Tensor, index: Tensor, clones: int) -> Call:
    check.rows(op, "x", x, "B, T, C")
    check.dims(op, "index", index, "B*clones, n")
    check.index(op, "index", index, x)
    rows, entries = index.shape
    check.require(clones >= 1, op, "clones", "at least 1", clones)
    if rows != x.shape[0] * clones:
        check.fail(op, "rows of index", "B*clones rows", tuple(index.shape))
    return Call(x, (x.dtype,), (((rows, entries, x.shape[2]), x.dtype),))


def _gather_backward_shape(op: str, grad: Tensor, index: Tensor, clones: int, tokens: int) -> Call:
    check.rows(op, "grad", grad, "B*clones, n, C")
    check.index(op, "index", index, grad)
    check.require(clones >= 1, op, "clones", "at least 1", clones)
    check.shape(op, "index", index, grad.shape[:2])
    rows, _, channels = grad.shape
    check.require(rows % clones == 0, op, "rows of index", f"a multiple of {clones}", rows)
    return Call(grad, (grad.dtype,), (((rows // clones, tokens, channels), grad.dtype),))


def _sample_of_row(rows: int, clones: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device)[:, None] // clones


def _gather_reference(x: Tensor, index: Tensor, clones: int) -> Tensor:
    check.index_range("gather_tokens", "index", index, x.shape[1])
    return x[_sample_of_row(index.shape[0], clones, x.device), index.long()]


def _gather_backward_reference(grad: Tensor, index: Tensor, clones: int, tokens: int) -> Tensor:
    check.index_range("gather_tokens_backward", "index", index, tokens)
    shape = (grad.shape[0] // clones, tokens, grad.shape[2])
    total = torch.zeros(shape, dtype=check.compute_dtype(grad.dtype), device=grad.device)
    # index_put_ with accumulate adds in ascending order and, unlike index_add_, is deterministic on GPUs too.
    rows = _sample_of_row(grad.shape[0], clones, grad.device).expand_as(index)
    total.index_put_((rows, index.long()), grad.to(total.dtype), accumulate=True)
    return total.to(grad.dtype)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, ctx.clones = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(index)


def _gather_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    (index,) = ctx.saved_tensors
    grad = check.with_unit_stride(grad)
    return _gather_tokens_backward(grad, index, ctx.clones, ctx.tokens), None, None


_gather_tokens = define(
    "gather_tokens(Tensor x, Tensor index, int clones) -> Tensor",
    _gather_shape, _gather_reference, Gradient(_gather_gradient, _gather_setup), triton="tokens",
)  # fmt: skip
_gather_tokens_backward = define(
    "gather_tokens_backward(Tensor grad, Tensor index, int clones, SymInt tokens) -> Tensor",
    _gather_backward_shape, _gather_backward_reference, triton="tokens",
)  # fmt: skip


# ---- restore_tokens


def _restore_shape(
    op: str, kept: Tensor, restore: Tensor, fill: Tensor | None, noise_keys: Tensor | None, noise_std: float
) -> Call:
    check.rows(op, "kept", kept, "N, V, C")
    check.dims(op, "restore", restore, "N, T")
    check.index(op, "restore", restore, kept)
    check.device(op, "fill", fill, kept)
    check.device(op, "noise_keys", noise_keys, kept)
    n, _, c = kept.shape
    check.require(restore.shape[0] == n, op, "rows of restore", n, restore.shape[0])
    if (fill is None) == (noise_keys is None):
        check.fail(op, "fill", "a tensor or Noise", "neither" if fill is None else "both")
    if fill is not None:
        check.dtype(op, "fill", fill, kept.dtype)
        good = tuple(fill.shape) == (c,) or (fill.dim() == 3 and fill.shape[0] == n and fill.shape[2] == c)
        check.require(good, op, "shape of fill", f"({c},) or ({n}, F, {c})", tuple(fill.shape))
        check.unit_stride(op, "fill", fill)
    if noise_keys is not None:
        check.keys(op, "noise keys", noise_keys, n)
        check.require(0.0 <= noise_std < math.inf, op, "noise std", "0 or more", noise_std)
    return Call(kept, (kept.dtype,), (((n, restore.shape[1], c), kept.dtype),))


def _restore_backward_shape(op: str, grad: Tensor, restore: Tensor, visible: int, fill_rows: int) -> Call:
    check.rows(op, "grad", grad, "N, T, C")
    check.index(op, "restore", restore, grad)
    check.shape(op, "restore", restore, grad.shape[:2])
    n, _, c = grad.shape
    fill: tuple[int, ...] = (n, fill_rows, c)
    if fill_rows in (check.VECTOR_FILL, check.NO_FILL):
        fill = (c,) if fill_rows == check.VECTOR_FILL else (0,)
    return Call(grad, (grad.dtype,), (((n, visible, c), grad.dtype), (fill, grad.dtype)))


def _uniform(bits: Tensor) -> Tensor:
    return ((bits >> 8).to(torch.float32) + 0.5) * 2.0**-24


def noise_rows(keys: Tensor, rows: Tensor, channels: int, std: float, dtype: torch.dtype) -> Tensor:
    """Normal noise (N, n, channels): element (r, i, c) depends on keys[r], rows[r, i] and c alone."""
    groups = torch.arange((channels + 3) // 4, device=keys.device)
    x0, x1, x2, x3 = philox(keys[:, None, None], (groups, rows[:, :, None].long()))
    pairs = []
    for bits_r, bits_a in ((x0, x1), (x2, x3)):
        radius = torch.sqrt(-2.0 * torch.log(_uniform(bits_r)))
        angle = (2.0 * math.pi) * _uniform(bits_a)
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    z = torch.stack(pairs, dim=-1).flatten(2)[:, :, :channels]
    return (z * std).to(dtype)


def _restore_reference(
    kept: Tensor, restore: Tensor, fill: Tensor | None, noise_keys: Tensor | None, noise_std: float
) -> Tensor:
    n, visible, c = kept.shape
    limit = visible + fill.shape[1] if fill is not None and fill.dim() == 3 else None
    check.index_range("restore_tokens", "restore", restore, limit)
    restore = restore.long()
    fill_row = (restore - visible).clamp(min=0)
    if noise_keys is not None:
        filled = noise_rows(noise_keys, fill_row, c, noise_std, kept.dtype)
    else:
        assert fill is not None
        filled = _rows_of(fill, fill_row) if fill.dim() == 3 else fill.expand(n, restore.shape[1], c)
    return torch.where((restore < visible)[:, :, None], _rows_of(kept, restore), filled)


def _rows_of(x: Tensor, row: Tensor) -> Tensor:
    """Row row[r, t] of x[r], any row where that one does not exist, zeros where there is none."""
    if x.shape[1] == 0:
        return x.new_zeros((1, 1, x.shape[2]))
    sample = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[sample, row.clamp(max=x.shape[1] - 1)]


def _restore_backward_reference(grad: Tensor, restore: Tensor, visible: int, fill_rows: int) -> tuple[Tensor, Tensor]:
    rows_of_fill = max(fill_rows, 0)
    limit = visible + fill_rows if fill_rows >= 0 else None
    check.index_range("restore_tokens_backward", "restore", restore, limit)
    n, _, c = grad.shape
    compute = check.compute_dtype(grad.dtype)
    restore = restore.long()
    # One more row takes what belongs to no wanted gradient.
    slots = visible + rows_of_fill
    total = torch.zeros((n, slots + 1, c), dtype=compute, device=grad.device)
    rows = torch.arange(n, device=grad.device)[:, None].expand_as(restore)
    total.index_put_((rows, restore.clamp(max=slots)), grad.to(compute), accumulate=True)
    kept = _in_dtype(total[:, :visible], grad.dtype)
    if fill_rows == check.NO_FILL:
        return kept, grad.new_empty((0,))
    if fill_rows == check.VECTOR_FILL:
        return kept, total[:, visible].sum(dim=0).to(grad.dtype)
    return kept, _in_dtype(total[:, visible : visible + fill_rows], grad.dtype)


def _in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _restore_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    kept, restore, fill, _, _ = inputs
    ctx.visible = kept.shape[1]
    ctx.fill_rows = check.NO_FILL
    if fill is not None and ctx.needs_input_grad[2]:
        ctx.fill_rows = check.VECTOR_FILL if fill.dim() == 1 else fill.shape[1]
    ctx.save_for_backward(restore)


def _restore_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
    (restore,) = ctx.saved_tensors
    grad = check.with_unit_stride(grad)
    kept, fill = _restore_tokens_backward(grad, restore, ctx.visible, ctx.fill_rows)
    return kept, None, None if ctx.fill_rows == check.NO_FILL else fill, None, None


_restore_tokens = define(
    "restore_tokens(Tensor kept, Tensor restore, Tensor? fill, Tensor? noise_keys, float noise_std) -> Tensor",
    _restore_shape, _restore_reference, Gradient(_restore_gradient, _restore_setup), triton="tokens",
)  # fmt: skip
_restore_tokens_backward = define(
    "restore_tokens_backward(Tensor grad, Tensor restore, SymInt visible, SymInt fill_rows) -> (Tensor, Tensor)",
    _restore_backward_shape, _restore_backward_reference, triton="tokens",
)  # fmt: skip
