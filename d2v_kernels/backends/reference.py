"""Plain PyTorch bodies: the definition of every operator, right in float64, on any device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import NO_FILL, VECTOR_FILL, check_index_range
from .._random import keep_mask, philox
from ..registry import Backend, Case

_NORM_DIMS = {"layer": (2,), "instance": (1,), "batch": (0, 1), "group": (1, 2)}


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _normalise(x: Tensor, norm: str, valid: Tensor | None, eps: float) -> Tensor:
    """Standardises x (B,T,C) over the dims of `norm`, biased variance, statistics over valid positions."""
    if norm == "none":
        return x
    dims = _NORM_DIMS[norm]
    if valid is None:
        centred = x - x.mean(dim=dims, keepdim=True)
        return centred / torch.sqrt((centred * centred).mean(dim=dims, keepdim=True) + eps)
    count = valid.expand(x.shape).sum(dim=dims, keepdim=True, dtype=x.dtype).clamp(min=1)
    zero = x.new_zeros(())
    mean = torch.where(valid, x, zero).sum(dim=dims, keepdim=True) / count
    centred = x - mean
    variance = torch.where(valid, centred * centred, zero).sum(dim=dims, keepdim=True) / count
    return centred / torch.sqrt(variance + eps)


def average_layers(
    layers: Sequence[Tensor], norm: str, out_norm: str, lengths: Tensor | None, eps: float, out_dtype: torch.dtype
) -> Tensor:
    first = layers[0]
    compute = _compute_dtype(first.dtype)
    valid = None
    if lengths is not None:
        positions = torch.arange(first.shape[1], device=first.device)
        valid = (positions < lengths.to(first.device)[:, None])[:, :, None]
    total = torch.zeros(first.shape, dtype=compute, device=first.device)
    for layer in layers:
        x = layer.to(compute)
        for name in norm.split(","):
            x = _normalise(x, name, valid, eps)
        total += x
    average = total / len(layers)
    for name in out_norm.split(","):
        average = _normalise(average, name, valid, eps)
    if valid is not None:
        average = torch.where(valid, average, average.new_zeros(()))
    return average.to(out_dtype)


def update_ema_(
    averages: Sequence[Tensor],
    sources: Sequence[Tensor],
    copies: Sequence[Tensor],
    weight: float,
    weight_tensor: Tensor | None,
) -> None:
    for i, (average, source) in enumerate(zip(averages, sources, strict=True)):
        compute = _compute_dtype(average.dtype)
        a = average.to(compute)
        if weight_tensor is not None:
            w = weight_tensor.to(device=a.device, dtype=compute)
            a = torch.where(w == 0, a, a + w * (source.to(compute) - a))
        elif weight != 0.0:
            a = a + weight * (source.to(compute) - a)
        average.copy_(a)
        if copies:
            copies[i].copy_(average)


def split_bits(average: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as bfloat16, rounded to nearest (ties away from zero), and int16, the bits beyond it."""
    bits = average.contiguous().view(torch.int32).long()
    nan = average.isnan()
    high = torch.where(nan, (bits >> 16 & 0x8000) | 0x7FC0, (bits + 0x8000) >> 16)
    low = torch.where(nan, 0, bits - (high << 16))
    # Of 64-bit integers, a cast keeps the low bits.
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def merge_bits(high: Tensor, low: Tensor) -> Tensor:
    """The float32 number of two halves."""
    bits = (high.contiguous().view(torch.int16).int() << 16) + low.int()
    return bits.view(torch.float32)


def update_split_ema_(
    high: Sequence[Tensor],
    low: Sequence[Tensor],
    sources: Sequence[Tensor],
    weight: float,
    weight_tensor: Tensor | None,
) -> None:
    for h, lower, source in zip(high, low, sources, strict=True):
        average = merge_bits(h, lower)
        update_ema_([average], [source], [], weight, weight_tensor)
        new_high, new_low = split_bits(average)
        h.copy_(new_high)
        lower.copy_(new_low)


def _sample_of_row(rows: int, clones: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device)[:, None] // clones


def gather_tokens(x: Tensor, index: Tensor, clones: int) -> Tensor:
    check_index_range("gather_tokens", "index", index, x.shape[1])
    return x[_sample_of_row(index.shape[0], clones, x.device), index.long()]


def gather_tokens_backward(grad: Tensor, index: Tensor, clones: int, tokens: int) -> Tensor:
    check_index_range("gather_tokens_backward", "index", index, tokens)
    shape = (grad.shape[0] // clones, tokens, grad.shape[2])
    total = torch.zeros(shape, dtype=_compute_dtype(grad.dtype), device=grad.device)
    # index_put_ with accumulate adds in ascending order and, unlike index_add_, is deterministic on GPUs too.
    rows = _sample_of_row(grad.shape[0], clones, grad.device).expand_as(index)
    total.index_put_((rows, index.long()), grad.to(total.dtype), accumulate=True)
    return total.to(grad.dtype)


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


def restore_tokens(
    kept: Tensor, restore: Tensor, fill: Tensor | None, noise_keys: Tensor | None, noise_std: float
) -> Tensor:
    n, visible, c = kept.shape
    limit = visible + fill.shape[1] if fill is not None and fill.dim() == 3 else None
    check_index_range("restore_tokens", "restore", restore, limit)
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


def restore_tokens_backward(grad: Tensor, restore: Tensor, visible: int, fill_rows: int) -> tuple[Tensor, Tensor]:
    rows_of_fill = max(fill_rows, 0)
    limit = visible + fill_rows if fill_rows >= 0 else None
    check_index_range("restore_tokens_backward", "restore", restore, limit)
    n, _, c = grad.shape
    compute = _compute_dtype(grad.dtype)
    restore = restore.long()
    # One more row takes what belongs to no wanted gradient.
    slots = visible + rows_of_fill
    total = torch.zeros((n, slots + 1, c), dtype=compute, device=grad.device)
    rows = torch.arange(n, device=grad.device)[:, None].expand_as(restore)
    total.index_put_((rows, restore.clamp(max=slots)), grad.to(compute), accumulate=True)
    kept = _copy(total[:, :visible], grad.dtype)
    if fill_rows == NO_FILL:
        return kept, grad.new_empty((0,))
    if fill_rows == VECTOR_FILL:
        return kept, total[:, visible].sum(dim=0).to(grad.dtype)
    return kept, _copy(total[:, visible : visible + fill_rows], grad.dtype)


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _select(op: str, name: str, x: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return x
    check_index_range(op, name, rows, x.shape[0])
    return x[rows.long()]


def _mean_std(x: Tensor) -> Tensor:
    if x.shape[0] < 2:
        return x.new_full((), math.nan)
    return torch.sqrt(torch.var(x, dim=0, correction=1) + 1e-6).mean()


def masked_regression_loss(
    prediction: Tensor,
    target: Tensor,
    prediction_rows: Tensor | None,
    target_rows: Tensor | None,
    beta: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "masked_regression_loss"
    compute = _compute_dtype(prediction.dtype)
    x = _select(op, "prediction_rows", prediction, prediction_rows).to(compute)
    y = _select(op, "target_rows", target, target_rows).to(compute)
    d = x - y
    if beta == 0.0:
        error = d * d
    else:
        error = torch.where(d.abs() < beta, d * d / (2.0 * beta), d.abs() - beta / 2.0)
    return error.sum() * scale, _mean_std(x), _mean_std(y)


def masked_regression_loss_backward(
    grad: Tensor,
    prediction: Tensor,
    target: Tensor,
    prediction_rows: Tensor | None,
    target_rows: Tensor | None,
    beta: float,
    scale: float,
) -> Tensor:
    op = "masked_regression_loss_backward"
    compute = _compute_dtype(prediction.dtype)
    x = _select(op, "prediction_rows", prediction, prediction_rows).to(compute)
    d = x - _select(op, "target_rows", target, target_rows).to(compute)
    slope = 2.0 * d if beta == 0.0 else (d / beta).clamp(-1.0, 1.0)
    selected = (slope * (grad.to(compute) * scale)).to(prediction.dtype)
    if prediction_rows is None:
        return selected
    result = torch.zeros(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    result[prediction_rows.long()] = selected
    return result


def _normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(z * math.sqrt(0.5)))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def _standardise_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows with mean 0 and variance 1, and what they were multiplied by."""
    centred = x - x.mean(dim=1, keepdim=True)
    scale = torch.rsqrt((centred * centred).mean(dim=1, keepdim=True) + eps)
    return centred * scale, scale


def layer_norm_gelu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    normal, _ = _standardise_rows(x.to(_compute_dtype(x.dtype)), eps)
    z = _affine(normal, weight, bias)
    return (z * _normal_cdf(z)).to(x.dtype).contiguous()


def layer_norm_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    compute = _compute_dtype(x.dtype)
    normal, scale = _standardise_rows(x.to(compute), eps)
    z = _affine(normal, weight, bias)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    g = grad.to(compute) * (_normal_cdf(z) + z * density)
    of_weight = x.new_empty((0,)) if weight is None else (g * normal).sum(dim=0).to(weight.dtype)
    of_bias = x.new_empty((0,)) if bias is None else g.sum(dim=0).to(bias.dtype)
    g = _affine(g, weight, None)
    along = g.mean(dim=1, keepdim=True) + normal * (g * normal).mean(dim=1, keepdim=True)
    return ((g - along) * scale).to(x.dtype).contiguous(), of_weight, of_bias


def gelu(x: Tensor) -> Tensor:
    z = x.to(_compute_dtype(x.dtype))
    # At -inf the product is not a number; the limit is 0.
    return torch.where(z == -math.inf, 0.0, z * _normal_cdf(z)).to(x.dtype)


def gelu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    z = x.to(_compute_dtype(x.dtype))
    bounded = z.clamp(-1e4, 1e4)  # keeps NaN
    slope = _normal_cdf(z) + bounded * torch.exp(-0.5 * bounded * bounded) / math.sqrt(2.0 * math.pi)
    return (grad.to(z.dtype) * slope).to(x.dtype), gelu(x)


def gelu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    of_x, y = gelu_backward(grad, x)
    grad.copy_(of_x)
    return y


def _dropout_factors(keys: Tensor | None, x: Tensor, dropout: float) -> Tensor:
    """1 / (1 - dropout) where an element of x (N,T,C) is kept, else 0: a function of keys[n], t and c alone."""
    if dropout == 0.0 or keys is None:
        return x.new_ones(())
    _, t, c = x.shape
    tokens = torch.arange(t, device=x.device)[:, None]
    kept = keep_mask(keys[:, None, None], (tokens,), c, dropout)
    return kept.to(x.dtype) * (1.0 / (1.0 - dropout))


def dropout_add_layer_norm(
    branch: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None, dropout: float,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    added = branch.to(_compute_dtype(branch.dtype))
    total = residual.to(added.dtype) + added * _dropout_factors(keys, added, dropout)
    rows = total.to(branch.dtype).contiguous()  # the norm is that of the numbers that are given back
    normal, _ = _standardise_rows(rows.flatten(0, 1).to(added.dtype), eps)
    return _affine(normal, weight, bias).to(rows.dtype).view(rows.shape), rows


def dropout_add_layer_norm_backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, keys: Tensor | None,
    dropout: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    compute = _compute_dtype(total.dtype)
    normal, scale = _standardise_rows(total.flatten(0, 1).to(compute), eps)
    g = grad_normed.flatten(0, 1).to(compute)
    of_weight, of_bias = (g * normal).sum(dim=0), g.sum(dim=0)
    g = _affine(g, weight, None)
    along = g.mean(dim=1, keepdim=True) + normal * (g * normal).mean(dim=1, keepdim=True)
    of_total = ((g - along) * scale).view(total.shape)
    of_total = of_total if grad_total is None else of_total + grad_total.to(compute)
    of_branch = total.new_empty((0,))
    if dropout > 0.0:
        of_branch = (of_total * _dropout_factors(keys, of_total, dropout)).to(total.dtype)
    return of_branch, _copy(of_total, total.dtype), of_weight, of_bias


ATTENTION_PART = 1 << 22
"""Attention weights, in elements, that exist at once: of whole rows, else of some heads of a row, at least one."""


class _AttentionPart:
    """Some rows, or some heads of a row, of an attention: inputs (R,H,T,D) and weights (R,H,T,T)."""

    def __init__(self, tensors: Sequence[Tensor], rest: tuple[Any, ...], rows: slice, heads: slice) -> None:
        slopes, positions, lengths, valid, keys, self.dropout, self.scale = rest
        tokens, device = tensors[0].shape[1], tensors[0].device
        self.place = (rows, slice(None), heads)
        compute = _compute_dtype(tensors[0].dtype)
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
        kept = keep_mask(self.keys, (queries, self.heads), t, self.dropout)
        return torch.where(kept, x / (1.0 - self.dropout), x.new_zeros(()))


def _attention_parts(tensors: Sequence[Tensor], rest: tuple[Any, ...]) -> Iterator[_AttentionPart]:
    n, t, h, _ = tensors[0].shape
    rows = max(1, ATTENTION_PART // max(h * t * t, 1))
    heads = max(1, h) if rows > 1 else max(1, min(h, ATTENTION_PART // max(t * t, 1)))
    for first_row in range(0, n, rows):
        for first_head in range(0, h, heads):
            those = slice(first_row, min(first_row + rows, n)), slice(first_head, min(first_head + heads, h))
            yield _AttentionPart(tensors, rest, *those)


def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n, t, h, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    log_sum = query.new_empty((n, h, t), dtype=_compute_dtype(query.dtype))
    if query.numel() == 0:
        return out, log_sum.fill_(math.inf)
    for part in _attention_parts((query, key, value), rest):
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


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, t, h, _ = query.shape
    slopes = rest[0]
    results = [torch.empty((n, t, h, x.shape[3]), dtype=x.dtype, device=x.device) for x in (query, key, value)]
    of_slopes = log_sum.new_zeros((n, h))
    for part in _attention_parts((query, key, value, grad, out), rest):
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
    totals = of_slopes[0, :0] if slopes is None else of_slopes.sum(0).to(slopes.dtype)
    return results[0], results[1], results[2], totals.clone()


def _limits(case: Case) -> list[str]:
    return []


BACKEND = Backend(
    "reference",
    {
        "average_layers": average_layers,
        "update_ema_": update_ema_,
        "update_split_ema_": update_split_ema_,
        "gather_tokens": gather_tokens,
        "gather_tokens_backward": gather_tokens_backward,
        "restore_tokens": restore_tokens,
        "restore_tokens_backward": restore_tokens_backward,
        "masked_regression_loss": masked_regression_loss,
        "masked_regression_loss_backward": masked_regression_loss_backward,
        "layer_norm_gelu": layer_norm_gelu,
        "layer_norm_gelu_backward": layer_norm_gelu_backward,
        "gelu": gelu,
        "gelu_backward": gelu_backward,
        "gelu_backward_": gelu_backward_,
        "attention": attention,
        "attention_backward": attention_backward,
        "dropout_add_layer_norm": dropout_add_layer_norm,
        "dropout_add_layer_norm_backward": dropout_add_layer_norm_backward,
    },
    _limits,
)
