"""The operator `torch.ops.d2v.attention`, for what PyTorch's and xformers' kernels cannot do; `attend` calls it.

That is a bias of data2vec 2.0 speech with a learned scale, and dropout from row keys. Beside the result it returns the
log-sum-exp of each query, from which backward computes the weights again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._define import Call, Gradient, define
from .._random import dropped_bytes, keep_weights

PART = 1 << 22
"""Attention weights, in elements, that the reference body makes at once: of whole rows, else of some heads of a row."""


def check_inputs(
    op: str, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None = None, positions: Tensor | None = None,
    lengths: Tensor | None = None, valid: Tensor | None = None, dropout_keys: Tensor | None = None,
    dropout: float = 0.0,
) -> torch.dtype:  # fmt: skip
    """Checks the arguments of the operator; dtype of the log-sum-exp: float32, or float64 for float64 queries."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check.rows(op, name, x, "N, T, H, D")
        check.shape(op, name, x, query.shape)
        check.dtype(op, name, x, query.dtype)
        check.device(op, name, x, query)
    n, t, h, _ = query.shape
    compute = check.compute_dtype(query.dtype)
    check.require((slopes is None) == (positions is None), op, "slopes and positions", "both or neither", "one of them")
    optional: tuple[tuple[str, Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]], ...] = (
        ("slopes", slopes, (h,), (compute,)),
        ("lengths", lengths, (n,), check.INDICES),
        ("valid", valid, (n, t), (torch.bool,)),
        ("dropout keys", dropout_keys, (n,), (torch.int64,)),
    )
    for name, given, shape, dtypes in optional:
        if given is not None:
            check.shape(op, name, given, shape)
            check.dtype(op, name, given, dtypes)
            check.device(op, name, given, query)
    if positions is not None:
        good = positions.dim() == 2 and positions.shape[0] == n and positions.shape[1] <= t
        check.require(good, op, "shape of positions", f"({n}, at most {t})", tuple(positions.shape))
        check.index(op, "positions", positions, query)
    check.dropout(op, dropout, "dropout keys", dropout_keys)
    return compute


def _shape(op: str, query: Tensor, *rest: Any) -> Call:
    dtype = check_inputs(op, query, *rest[:-1])
    n, t, h, d = query.shape
    return Call(query, (query.dtype,), (query, ((n, h, t), dtype)), (str(d),))


def _backward_shape(
    op: str, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, *rest: Any
) -> Call:
    """The gradients look like query, key, value and slopes; shape (0,) for slopes that are None."""
    dtype = check_inputs(op, query, key, value, *rest[:-1])
    for name, x in (("grad", grad), ("out", out)):
        check.rows(op, name, x, "N, T, H, D")
        check.shape(op, name, x, query.shape)
        check.device(op, name, x, query)
    n, t, h, d = query.shape
    check.shape(op, "log_sum", log_sum, (n, h, t))
    check.dtype(op, "log_sum", log_sum, dtype)
    check.device(op, "log_sum", log_sum, query)
    slopes = ((0,), dtype) if rest[0] is None else rest[0]
    return Call(query, (query.dtype,), (query, key, value, slopes), (str(d),))


def _with_unit_strides(*arguments: Any) -> tuple[Any, ...]:
    return *map(check.with_unit_stride, arguments[:5]), *arguments[5:]


class _Part:
    """Some rows, or some heads of a row, of an attention: inputs (R,H,T,D) and weights (R,H,T,T)."""

    def __init__(self, tensors: Sequence[Tensor], rest: tuple[Any, ...], rows: slice, heads: slice) -> None:
        slopes, positions, lengths, valid, keys, self.dropout, self.scale = rest
        tokens, device = tensors[0].shape[1], tensors[0].device
        self.place = (rows, slice(None), heads)
        compute = check.compute_dtype(tensors[0].dtype)
        self.inputs = [self.cut(x).to(compute).contiguous() for x in tensors]
        self.slopes = None if slopes is None else slopes[heads, None, None]
        self.positions = None if positions is None else positions[rows].to(compute)
        self.keys = None if keys is None else keys[rows, None, None, None]
        self.heads = torch.arange(heads.start, heads.stop, device=device)[:, None, None]
        self.valid = None if valid is None else valid[rows]
        if lengths is not None:
            shorter = torch.arange(tokens, device=device) < lengths[rows, None]
            self.valid = shorter if self.valid is None else self.valid & shorter
        if self.valid is not None:  # what is not a key must not lend a NaN by 0 * NaN
            kept = self.valid[:, None, :, None]
            self.inputs[1:3] = [torch.where(kept, x, x.new_zeros(())) for x in self.inputs[1:3]]

    def cut(self, x: Tensor) -> Tensor:
        """This part of (N,T,H,D), as a view (R,H,T,D)."""
        return x[self.place].transpose(1, 2)

    def distances(self) -> Tensor:
        """|pos_i - pos_j| (R,1,T,T), 0 where i or j is an extra token."""
        assert self.positions is not None
        extra, place = self.inputs[0].shape[2] - self.positions.shape[1], self.positions[:, None]
        between = (place[..., :, None] - place[..., None, :]).abs_()
        return torch.nn.functional.pad(between, (extra, 0, extra, 0)) if extra else between

    def logits(self) -> Tensor:
        s = torch.matmul(self.inputs[0] * self.scale, self.inputs[1].mT)
        if self.slopes is not None:
            s.addcmul_(self.distances(), self.slopes, value=-1.0)
        return s if self.valid is None else s.masked_fill_(~self.valid[:, None, None, :], -math.inf)

    def dropped(self, x: Tensor) -> Tensor:
        """x where dropout keeps an element, divided by the probability to be kept, else 0."""
        if self.dropout == 0.0:
            return x
        assert self.keys is not None
        t = x.shape[-1]
        queries = torch.arange(t, device=x.device)[:, None]
        kept = keep_weights(self.keys, (queries, self.heads), t, self.dropout)
        return torch.where(kept, x / (1.0 - dropped_bytes(self.dropout) / 256), x.new_zeros(()))


def _parts(tensors: Sequence[Tensor], rest: tuple[Any, ...]) -> Iterator[_Part]:
    n, t, h, _ = tensors[0].shape
    rows = max(1, PART // max(h * t * t, 1))
    heads = max(1, h) if rows > 1 else max(1, min(h, PART // max(t * t, 1)))
    for first_row in range(0, n, rows):
        for first_head in range(0, h, heads):
            those = slice(first_row, min(first_row + rows, n)), slice(first_head, min(first_head + heads, h))
            yield _Part(tensors, rest, *those)


def _reference(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n, t, h, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    log_sum = query.new_empty((n, h, t), dtype=check.compute_dtype(query.dtype))
    if query.numel() == 0:
        return out, log_sum.fill_(math.inf)
    for part in _parts((query, key, value), rest):
        s = part.logits()
        largest = s.amax(-1, keepdim=True)
        largest.masked_fill_(largest == -math.inf, 0.0)
        weights = s.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        empty = total == 0.0  # a row without a valid key: weights 0, result 0
        weights.div_(total.masked_fill(empty, 1.0))
        part.cut(out).copy_(torch.matmul(part.dropped(weights), part.inputs[2]))
        rows, _, heads = part.place
        log_sum[rows, heads] = torch.where(empty, math.inf, largest + total.log())[..., 0]
    return out, log_sum


def _backward_reference(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, t, h, _ = query.shape
    slopes = rest[0]
    results = [torch.empty((n, t, h, x.shape[3]), dtype=x.dtype, device=x.device) for x in (query, key, value)]
    of_slopes = log_sum.new_zeros((n, h))
    for part in _parts((query, key, value, grad, out), rest):
        rows, _, heads = part.place
        q, k, v, g, o = part.inputs
        p = part.logits().sub_(log_sum[rows, heads, :, None]).exp_()
        part.cut(results[2]).copy_(torch.matmul(part.dropped(p).mT, g))
        of_p = part.dropped(torch.matmul(g, v.mT))
        of_s = p.mul_(of_p.sub_((g * o).sum(-1, keepdim=True)))
        part.cut(results[0]).copy_(torch.matmul(of_s, k) * part.scale)
        part.cut(results[1]).copy_(torch.matmul(of_s.mT, q) * part.scale)
        if slopes is not None:
            of_slopes[rows, heads] = -(of_s * part.distances()).sum((2, 3))
    totals = of_slopes.new_empty(0) if slopes is None else of_slopes.sum(0).to(slopes.dtype)
    return results[0], results[1], results[2], totals.clone()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    of_query, of_key, of_value, of_slopes = _attention_backward(grad, *tensors, ctx.dropout, ctx.scale)
    return of_query, of_key, of_value, None if tensors[5] is None else of_slopes, *[None] * 6


attention_operator = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? slopes, Tensor? positions, Tensor? lengths,"
    " Tensor? valid, Tensor? dropout_keys, float dropout, float scale) -> (Tensor, Tensor)",
    _shape, _reference, Gradient(_gradient, _setup), triton="attention",
)  # fmt: skip
_attention_backward = define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor log_sum,"
    " Tensor? slopes, Tensor? positions, Tensor? lengths, Tensor? valid, Tensor? dropout_keys, float dropout,"
    " float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_shape, _backward_reference, triton="attention", prepare=_with_unit_strides,
)  # fmt: skip
