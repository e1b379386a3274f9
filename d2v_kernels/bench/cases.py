"""Cases of every operator: inputs, bytes at the floor, and the contenders that must agree before they are timed.

Contenders: `eager` is the published formulation in plain PyTorch, `compile` the same under torch.compile (or the
best rewrite where one is named), others as named, `d2v` the operator through its public function (on a GPU once for
each backend, `d2v native` and `d2v triton`), `floor` one plain pass over inputs and outputs, where the place has one.
All take their inputs as they are and allocate their results; on a GPU they never wait for the device, so a graph can
hold them. With inputs cast to float64, `d2v` on the reference backend is the truth that errors are measured against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check
from .._define import NAMESPACE
from ..ops.ema import EmaPlan, merge_ema_state, split_ema_state, update_ema_
from ..ops.layers import average_layers
from ..ops.loss import masked_regression_loss
from ..ops.masks import MaskSampler
from ..ops.tokens import Noise, gather_tokens, restore_tokens
from . import numpy_masks
from .case import BF16, F32, Bytes, Call, Case, Contenders, Function, Goals, Place, compile_whole, family, loose

ops = getattr(torch.ops, NAMESPACE)
NORMS = ("none", "layer", "instance", "batch")


# ---- average_layers


def normalise(x: Tensor, norm: str) -> Tensor:
    """(B,T,C) by PyTorch's own norms."""
    if norm == "instance":
        return F.instance_norm(x.transpose(1, 2)).transpose(1, 2)
    if norm == "batch":
        return F.batch_norm(x.flatten(0, 1), None, None, training=True).view(x.shape)
    return F.layer_norm(x, x.shape[-1:]) if norm == "layer" else x


def eager_average(layers: Sequence[Tensor], norm: str, out_norm: str) -> Tensor:
    """Targets as the published code forms them: per layer cast, transpose, norm; sum; divide; norm."""
    total: Any = 0
    for layer in layers:
        total = total + normalise(layer.float(), norm)
    return normalise(total / len(layers), out_norm)


@family("average_layers", "K layers, B samples, T tokens, C channels", (8, 4, 500, 768), (3, 2, 20, 32),
        norm=("instance", "none", "layer", "batch"), out_norm=NORMS)  # fmt: skip
def average(
    name: str, k: int, b: int, t: int, c: int, *, dtype: torch.dtype, goals: Goals, norm: str = "instance",
    out_norm: str = "none", tolerance: float = 2e-4,
) -> Case:  # fmt: skip
    """Targets of the teacher's last K layers."""
    compiled = compile_whole(eager_average)

    def make(place: Place, seed: int) -> Contenders:
        layers = [place.inputs(seed * 100 + i, b, t, c, dtype=dtype) for i in range(k)]
        return {
            **place.ours(lambda: lambda: average_layers(layers, norm=norm, out_norm=out_norm)),
            "eager": lambda: eager_average(layers, norm, out_norm),
            "compile": lambda: compiled(layers, norm, out_norm),
            **place.floors(layers, lambda: [torch.empty((b, t, c))]),
        }

    wide = 8 if dtype == torch.float64 else 4
    size = Bytes("B*T*C*(K*item + result)", K=k, B=b, T=t, C=c, item=dtype.itemsize, result=wide)
    label = f"{norm}{'+' + out_norm if out_norm != 'none' else ''} {name} K={k} B={b} T={t} C={c}"
    return Case("average_layers", label, dtype, size, make, goals, tolerance, traits=(norm, out_norm),
                dtypes=(dtype, check.compute_dtype(dtype)))  # fmt: skip


# ---- update_ema_


def parameter_shapes(width: int, depth: int) -> list[tuple[int, ...]]:
    """Tensors of `depth` transformer blocks."""
    block = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,),
             (width, 4 * width), (width,), (width,), (width,), (width,), (width,)]  # fmt: skip
    return block * depth


Lists = tuple[list[Tensor], list[Tensor]]
"""Averages, and their bfloat16 copies or low halves."""


def loop_ema(sources: list[Tensor], averages: list[Tensor], rounded: list[Tensor]) -> Lists:
    """As the published code has it, and the copies."""
    for i, (a, s) in enumerate(zip(averages, sources, strict=True)):
        a.mul_(0.999).add_(s, alpha=0.001)
        if rounded:
            rounded[i].copy_(a)
    return averages, rounded


def foreach_ema(sources: list[Tensor], averages: list[Tensor], rounded: list[Tensor]) -> Lists:
    """By PyTorch's lists."""
    if sources[0].dtype == averages[0].dtype:
        torch._foreach_lerp_(averages, sources, 0.001)
    else:
        torch._foreach_mul_(averages, 0.999)
        torch._foreach_add_(averages, sources, alpha=0.001)
    if rounded:
        torch._foreach_copy_(rounded, averages)
    return averages, rounded


@family("update_split_ema_", "C channels, L blocks of a transformer", (768, 2), (16, 1))
def split_ema(name: str, c: int, depth: int, *, dtype: torch.dtype, goals: Goals) -> Case:
    """Averages in halves, against float32 averages with bfloat16 copies."""
    return ema(name, c, depth, dtype=dtype, goals=goals, split=True)


@family("update_ema_", "C channels, L blocks of a transformer", (768, 2), (16, 1), copies=False)
def ema(
    name: str, width: int, depth: int, *, dtype: torch.dtype, goals: Goals, copies: bool = False, split: bool = False
) -> Case:
    """By plan and by lists, against PyTorch's lists."""
    shapes = parameter_shapes(width, depth)
    count = sum(math.prod(s) for s in shapes)

    def make(place: Place, seed: int) -> Contenders:
        sources = [place.normal(seed * 1000 + i, *s, dtype=dtype) for i, s in enumerate(shapes)]
        halves = split and place.to is None

        def lists(ours: bool = False) -> Lists:
            averages = [torch.full_like(s, 0.5, dtype=place.kind(F32)) for s in sources]
            if ours and halves:
                high, low = zip(*map(split_ema_state, averages), strict=True)
                return list(high), list(low)
            rounded = copies or (halves and not ours)
            return averages, [torch.zeros_like(a, dtype=place.kind(BF16)) for a in averages] if rounded else []

        def by(update: Callable[[Lists], Callable[..., None]]) -> Call:
            found = lists(True)
            step = update(found)
            return lambda: (step(), found)[1]

        def planned(found: Lists) -> Callable[..., None]:
            plan = EmaPlan(found[0], sources, **{"low" if halves else "copies": found[1] or None})
            return partial(plan.step, 0.999)

        def listed(found: Lists) -> Callable[..., None]:
            return partial(update_ema_, found[0], sources, 0.999, **{"low" if halves else "copies": found[1] or None})

        theirs, calls = lists(), {**place.ours(lambda: by(planned)), "d2v list": by(listed)}
        calls["foreach"] = partial(foreach_ema, sources, *theirs)
        if place.backends:
            return calls
        calls |= {"eager": partial(loop_ema, sources, *lists())}
        calls |= {"compile": partial(compile_whole(loop_ema), sources, *lists())}
        flat = [torch.cat([t.flatten() for t in tensors]) for tensors in (theirs[0], sources)]
        written = [flat[0], *([torch.empty(flat[0].shape, dtype=BF16)] if theirs[1] else [])]
        return {**calls, **place.floors(flat, lambda: written, alone=True)}

    def agree(result: Lists) -> list[Tensor]:
        first, second = result
        if second and second[0].dtype == torch.int16:
            return [merge_ema_state(high, low) for high, low in zip(first, second, strict=True)]
        tensors = first if split else first + second
        return tensors if len(tensors) < 200 else [tensors[0], tensors[-1]]

    size = Bytes(f"N*(8 + item{' + 2' if copies else ''})", N=count, item=dtype.itemsize)
    student = "" if dtype == F32 else f", {check.dtype_name(dtype)} student"
    label = f"{name} {count / 1e6:.1f} M{student}{' + bf16 copy' if copies else ''}"
    # Two ways to the same float32 value may round to neighbours in bfloat16.
    return Case("update_split_ema_" if split else "update_ema_", label, dtype, size, make, goals,
                1e-2 if copies else 2e-4, dtypes=(dtype,) if split else (F32, dtype), compare=agree)  # fmt: skip


# ---- gather_tokens


@family("gather_tokens", "B samples, T tokens, C channels, M masked copies, n visible tokens", (16, 196, 768, 8, 39),
        (2, 12, 32, 2, 5))  # fmt: skip
def gather(name: str, b: int, t: int, c: int, clones: int, n: int, *, dtype: torch.dtype, goals: Goals) -> Case:
    """Visible tokens of all clones."""
    compiled = compile_whole(lambda x, sample, index: x[sample, index])

    def make(place: Place, seed: int) -> Contenders:
        x = place.normal(seed, b, t, c, dtype=dtype)
        index = place.orders(seed, b * clones, t)[:, :n].sort(1).values
        short, sample = index.int(), torch.arange(b * clones, device=place.device)[:, None] // clones
        flat, wide = (sample * t + index).flatten(), index[:, :, None].expand(-1, -1, c)

        def index_select() -> Tensor:
            out = torch.empty((b * clones * n, c), dtype=dtype, device=place.device)
            return torch.index_select(x.view(b * t, c), 0, flat, out=out).view(b * clones, n, c)

        return {
            **place.ours(lambda: lambda: gather_tokens(x, short, clones=clones)),
            "eager": lambda: torch.gather(x.repeat_interleave(clones, 0, output_size=b * clones), 1, wide),
            "x[b, index]": lambda: x[sample, index],
            "index_select": index_select,
            "view[index]": lambda: x.view(b * t, c)[flat].view(b * clones, n, c),
            "compile": lambda: compiled(x, sample, index),
            **place.floors([x], lambda: [torch.empty((b * clones, n, c), dtype=dtype)]),
        }

    size = Bytes("(B*T*C + B*M*n*C)*item", B=b, T=t, C=c, M=clones, n=n, item=dtype.itemsize)
    return Case("gather_tokens", f"{name} B={b} T={t} C={c} M={clones} n={n}", dtype, size, make, goals, tolerance=0.0)


@family("gather_tokens_backward", "B samples, T tokens, C channels, M masked copies, n visible tokens",
        (16, 196, 768, 8, 39), (2, 12, 32, 2, 5))  # fmt: skip
def gather_backward(
    name: str, b: int, t: int, c: int, clones: int, n: int, *, dtype: torch.dtype, goals: Goals,
    op: str = "gather_tokens_backward",
) -> Case:  # fmt: skip
    """Gradients of all clones added up."""

    def make(place: Place, seed: int) -> Contenders:
        grad = place.normal(seed, b * clones, n, c, dtype=dtype)
        index = place.orders(seed, b * clones, t)[:, :n].sort(1).values
        short, sample = index.int(), torch.arange(b * clones, device=place.device)[:, None] // clones
        flat, wide = (sample * t + index).flatten(), index[:, :, None].expand(-1, -1, c)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=place.device)

        def eager() -> Tensor:
            return zeros(b * clones, t, c).scatter_add_(1, wide, grad).view(b, clones, t, c).sum(1)

        def indexed() -> Tensor:  # the gradient of x[b, index] in PyTorch
            return zeros(b, t, c).index_put_((sample, index), grad, accumulate=True)

        return {
            **place.ours(lambda: lambda: ops.gather_tokens_backward(grad, short, clones, t)),
            **({} if place.backends else {"x[b, index]": indexed}),
            "eager": eager,
            "compile": compile_whole(eager),
            "index_add": lambda: zeros(b * t, c).index_add_(0, flat, grad.view(-1, c)).view(b, t, c),
            **place.floors([grad], lambda: [torch.empty((b, t, c), dtype=dtype)]),
        }

    size = Bytes("(B*T*C + B*M*n*C)*item", B=b, T=t, C=c, M=clones, n=n, item=dtype.itemsize)
    label = f"{name} B={b} T={t} C={c} M={clones} n={n}"
    return Case(op, label, dtype, size, make, goals, tolerance=1.5 * loose(dtype))


# ---- restore_tokens


@family("restore_tokens", "N rows, T tokens, V visible tokens, C channels", (64, 196, 39, 768), (4, 12, 5, 32))
def restore(
    name: str, n: int, t: int, visible: int, c: int, *, dtype: torch.dtype, goals: Goals, std: float = 0.01
) -> Case:
    """Decoder input: kept tokens, noise at the others; with each result where the kept ones are."""

    def make(place: Place, seed: int) -> Contenders:
        kept, order = place.normal(seed, n, visible, c, dtype=dtype), place.orders(seed, n, t)
        short, keys, wide = order.int(), torch.arange(n, device=place.device), order[:, :, None].expand(-1, -1, c)
        is_kept = (order < visible)[:, :, None]

        def eager() -> tuple[Tensor, Tensor]:
            noise = torch.randn((n, t - visible, c), dtype=dtype, device=place.device) * std
            return torch.gather(torch.cat([kept, noise], dim=1), 1, wide), is_kept

        return {
            **place.ours(lambda: lambda: (restore_tokens(kept, short, fill=Noise(std, keys)), is_kept)),
            "eager": eager,
            "compile": compile_whole(eager),
            **place.floors([kept], lambda: [torch.empty((n, t, c), dtype=dtype)]),
        }

    def kept_and_spread(result: tuple[Tensor, Tensor]) -> list[Tensor]:
        x, is_kept = result
        return [x * is_kept, x[~is_kept[..., 0]].float().std()]

    size = Bytes("(N*V*C + N*T*C)*item", N=n, T=t, V=visible, C=c, item=dtype.itemsize)
    label = f"noise {name} N={n} T={t} V={visible} C={c}"
    # Noise is small beside what is kept: other noise would be off by about std.
    return Case("restore_tokens", label, dtype, size, make, goals,
                0.02 if n * t * c > 4096 else 0.3, kept_and_spread, exact=std / 100.0)  # fmt: skip


@family("restore_tokens_backward", "N rows, T tokens, V visible tokens, C channels", (64, 196, 39, 768), (4, 12, 5, 32))
def restore_backward(name: str, n: int, t: int, visible: int, c: int, *, dtype: torch.dtype, goals: Goals) -> Case:
    """Gradients of the kept tokens and of one mask token at the others."""

    def make(place: Place, seed: int) -> Contenders:
        grad, order = place.normal(seed, n, t, c, dtype=dtype), place.orders(seed, n, t)
        short, wide = order.int(), order[:, :, None].expand(-1, -1, c)

        def eager() -> tuple[Tensor, Tensor]:
            slots = torch.zeros_like(grad).scatter_add_(1, wide, grad)
            return slots[:, :visible], slots[:, visible:].sum((0, 1))

        return {
            **place.ours(lambda: lambda: ops.restore_tokens_backward(grad, short, visible, check.VECTOR_FILL)),
            "eager": eager,
            "compile": compile_whole(eager),
            **place.floors([grad], lambda: [torch.empty((n, visible, c), dtype=dtype)]),
        }

    size = Bytes("(N*T*C + N*V*C + C)*item", N=n, T=t, V=visible, C=c, item=dtype.itemsize)
    label = f"{name} N={n} T={t} V={visible} C={c}"
    return Case("restore_tokens_backward", label, dtype, size, make, goals, loose(dtype), compare=list)


# ---- masked_regression_loss


def eager_loss(prediction: Tensor, target: Tensor, rows: Tensor, beta: float, scale: float) -> tuple[Tensor, ...]:
    """Loss and monitors as the published code computes them, without host synchronisation."""
    x, y = prediction.float(), target[rows].float()
    error = F.mse_loss(x, y, reduction="none") if beta == 0 else F.smooth_l1_loss(x, y, reduction="none", beta=beta)
    loss = (error * scale).sum()
    with torch.no_grad():
        stds = [torch.sqrt(v.var(dim=0) + 1e-6).mean() for v in (x, y)]
    return loss, *stds


@family("masked_regression_loss", "P predicted rows, R rows of targets, C channels", (10048, 3136, 768), (12, 20, 32),
        beta=0.0)  # fmt: skip
def loss(
    name: str, p: int, rows: int, c: int, *, dtype: torch.dtype, goals: Goals, beta: float = 0.0,
    target_dtype: torch.dtype = F32,
) -> Case:  # fmt: skip
    """Forward and backward."""
    compiled, scale = compile_whole(eager_loss), c**-0.5

    def make(place: Place, seed: int) -> Contenders:
        leaf = place.inputs(seed, p, c, dtype=dtype).requires_grad_()
        prediction, target = leaf.detach(), place.inputs(seed + 1, rows, c, dtype=target_dtype)
        generator = torch.Generator(place.device).manual_seed(seed)
        picked = torch.randint(0, rows, (p,), device=place.device, generator=generator)
        one = torch.ones((), device=place.device)

        def autograd(function: Function) -> tuple[Tensor, ...]:
            value, *stds = function(leaf, target, picked, beta, scale)
            return (*torch.autograd.grad(value, leaf), value.detach(), *stds)

        def public(x: Tensor, y: Tensor, rows: Tensor, beta: float, scale: float) -> tuple[Tensor, ...]:
            return tuple(masked_regression_loss(x, y, None, rows, beta=beta, scale=scale))

        def launches() -> tuple[Tensor, ...]:  # no autograd on the host, whose time is a goal of its own
            arguments = (prediction, target, None, picked, beta, scale)
            forward = ops.masked_regression_loss(*arguments)
            return (ops.masked_regression_loss_backward(one, *arguments), *forward)

        return {
            **place.ours(lambda: launches if place.backends else lambda: autograd(public)),
            "eager": lambda: autograd(eager_loss),
            "compile": lambda: autograd(compiled),
            **place.floors([prediction, target], lambda: [torch.empty((p, c), dtype=dtype)]),
        }

    size = Bytes("2*P*C*item + R*C*target", P=p, R=rows, C=c, item=dtype.itemsize, target=target_dtype.itemsize)
    kind = "squared" if beta == 0 else f"smooth-L1({beta:g})"
    label = f"{kind} {name} P={p} C={c},{'' if target_dtype == F32 else ' bfloat16'} target rows {rows}"
    return Case("masked_regression_loss", label, dtype, size, make, goals, loose(dtype), compare=lambda r: r,
                dtypes=(dtype, target_dtype))  # fmt: skip


# ---- MaskSampler


@family("MaskSampler", "N rows, M copies of a sample, T tokens", (24, 8, 999), (4, 2, 50), kind=("block", "span"))
def masks_of_kind(
    name: str, rows: int, copies: int, tokens: int, *, dtype: torch.dtype, goals: Goals, kind: str = "block"
) -> Case:
    """With the rule of data2vec 2.0 speech (block) or of 1.0 (span)."""
    rule = {"ratio": 0.5, "adjust": 0.05, "span": 5} if kind == "block" else {"ratio": 0.65, "span": 10}
    return masks(name, rows, copies, {"kind": kind, "tokens": tokens, **rule})


def masks(name: str, rows: int, copies: int, rule: dict[str, Any]) -> Case:
    """The masks of a batch against NumPy, as published and at its best."""
    shape = rule.get("grid") or (rule["tokens"],)
    tokens = math.prod(shape)

    def make(place: Place, seed: int) -> Contenders:
        sampler, ids, rng = MaskSampler(**rule), list(range(rows // copies)), np.random.default_rng(seed)
        values = {k: v for k, v in rule.items() if k in ("ratio", "adjust", "span", "inverse")}

        def by_numpy(style: str) -> Tensor:
            draw = getattr(numpy_masks, f"{style}_{rule['kind']}_masks")
            mask = draw(rows, tokens if rule["kind"] == "span" else shape, rng=rng, **values)
            if rule["kind"] != "span":
                numpy_masks.list_masks(mask)
            return torch.from_numpy(mask)

        return {
            "d2v": lambda: sampler.draw(ids, 0, copies=copies).mask,
            "plain numpy": partial(by_numpy, "plain"),
            "vector numpy": partial(by_numpy, "vector"),
        }

    label = f"{rule['kind']} {name} {rows} x {tokens}"
    size, near = Bytes("N*T", N=rows, T=tokens), 0.02 if rows * tokens > 4096 else 0.3
    return Case("MaskSampler", label, torch.bool, size, make, {"plain numpy": 50.0}, near,
                compare=lambda mask: [mask.float().mean()], exact=0.0)  # fmt: skip
