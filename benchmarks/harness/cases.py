"""Named cases of every operator: inputs, bytes at the floor, and the contenders that must agree before they are timed.

Contenders: `eager` is the published formulation in plain PyTorch, `compile` the same under torch.compile (or the
best rewrite where one is named), others as named, `d2v` the operator through its public function (on a GPU once for
each backend, `d2v native` and `d2v triton`), `floor` one plain pass over inputs and outputs (CPU). All take their
inputs as they are and allocate their results; on a GPU they never wait for the device, so a graph can hold them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import d2v_kernels as dk

from . import numpy_masks
from .case import BF16, F32, Call, Case, Contenders, Function, Goals, Place, compile_whole, loose, with_gradients

ops = torch.ops.d2v


# ---- average_layers


def eager_average(layers: Sequence[Tensor], norm: str, out_norm: str) -> Tensor:
    """Targets as the published code forms them: per layer cast, transpose, norm; sum; divide; norm."""
    total: Any = 0
    for layer in layers:
        x = layer.float()
        if norm == "instance":
            x = F.instance_norm(x.transpose(1, 2)).transpose(1, 2)
        else:
            x = F.layer_norm(x, x.shape[-1:])
        total = total + x
    total = total / len(layers)
    return F.layer_norm(total, total.shape[-1:]) if out_norm == "layer" else total


def average(
    name: str, k: int, b: int, t: int, c: int, norm: str = "instance", out_norm: str = "none", *, dtype: torch.dtype,
    goals: Goals, compiles: bool = True, tolerance: float = 2e-4,
) -> Case:  # fmt: skip
    """Without `compiles` torch.compile does not take part: it takes some ten seconds a case."""
    compiled = compile_whole(eager_average)

    def make(place: Place, seed: int) -> Contenders:
        layers = [place.normal(seed * 100 + i, b, t, c, dtype=dtype) for i in range(k)]
        rivals: Contenders = {"eager": lambda: eager_average(layers, norm, out_norm)}
        if compiles:
            rivals["compile"] = lambda: compiled(layers, norm, out_norm)
        return {
            **place.ours(lambda: lambda: dk.average_layers(layers, norm=norm, out_norm=out_norm)),
            **rivals,
            **place.floors(layers, lambda: [torch.empty((b, t, c))]),
        }

    size = b * t * c * (k * dtype.itemsize + 4)
    label = f"{norm}{'+' + out_norm if out_norm != 'none' else ''} {name} K={k} B={b} T={t} C={c}"
    wanted = {n: g for n, g in goals.items() if compiles or n != "compile"}
    return Case("average_layers", label, dtype, size, make, wanted, tolerance, traits=(norm, out_norm),
                dtypes=(dtype, F32))  # fmt: skip


# ---- update_ema_


def parameter_shapes(width: int, depth: int) -> list[tuple[int, ...]]:
    """Tensors of `depth` transformer blocks."""
    block = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,),
             (width, 4 * width), (width,), (width,), (width,), (width,), (width,)]  # fmt: skip
    return block * depth


def ema(name: str, width: int, depth: int, source: torch.dtype, copies: bool, goals: Goals) -> Case:
    """By plan and by lists, against PyTorch's lists."""
    shapes = parameter_shapes(width, depth)
    count = sum(math.prod(s) for s in shapes)

    def make(place: Place, seed: int) -> Contenders:
        sources = [place.normal(seed * 1000 + i, *s, dtype=source) for i, s in enumerate(shapes)]

        def lists() -> tuple[list[Tensor], list[Tensor]]:
            averages = [torch.full_like(s, 0.5, dtype=F32) for s in sources]
            return averages, [torch.zeros_like(a, dtype=BF16) for a in averages] if copies else []

        def planned() -> Call:
            averages, low = lists()
            plan = dk.EmaPlan(averages, sources, low or None)
            return lambda: (plan.step(0.999), averages + low)[1]

        (ours, our_low), (theirs, their_low) = lists(), lists()

        def listed() -> list[Tensor]:
            dk.update_ema_(ours, sources, 0.999, copies=our_low or None)
            return ours + our_low

        def foreach() -> list[Tensor]:
            if source == F32:
                torch._foreach_lerp_(theirs, sources, 0.001)
            else:
                torch._foreach_mul_(theirs, 0.999)
                torch._foreach_add_(theirs, sources, alpha=0.001)
            if copies:
                torch._foreach_copy_(their_low, theirs)
            return theirs + their_low

        calls = {**place.ours(planned), "d2v list": listed, "foreach": foreach}
        if place.backends:
            return calls
        flat = [torch.cat([t.flatten() for t in tensors]) for tensors in (ours, sources)]
        written = [flat[0], *([torch.empty(flat[0].shape, dtype=BF16)] if copies else [])]
        return {**calls, **place.floors(flat, lambda: written, alone=True)}

    size = count * (8 + source.itemsize + (2 if copies else 0))
    student = "" if source == F32 else f", {str(source)[6:]} student"
    label = f"{name} {count / 1e6:.1f} M{student}{' + bf16 copy' if copies else ''}"
    # Two ways to the same float32 value may round to neighbours in bfloat16.
    return Case("update_ema_", label, source, size, make, goals, 1e-2 if copies else 2e-4, dtypes=(F32, source),
                compare=lambda r: r if len(r) < 200 else [r[0], r[-1]])  # fmt: skip


# ---- gather_tokens


def gather(name: str, b: int, t: int, c: int, clones: int, n: int, dtype: torch.dtype, goals: Goals) -> Case:
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
            **place.ours(lambda: lambda: dk.gather_tokens(x, short, clones=clones)),
            "eager": lambda: torch.gather(x.repeat_interleave(clones, 0, output_size=b * clones), 1, wide),
            "x[b, index]": lambda: x[sample, index],
            "index_select": index_select,
            "view[index]": lambda: x.view(b * t, c)[flat].view(b * clones, n, c),
            **({} if place.backends else {"compile": lambda: compiled(x, sample, index)}),
            **place.floors([x], lambda: [torch.empty((b * clones, n, c), dtype=dtype)]),
        }

    size = (b * t * c + b * clones * n * c) * dtype.itemsize
    return Case("gather_tokens", f"{name} B={b} T={t} C={c} M={clones} n={n}", dtype, size, make, goals, tolerance=0.0)


def gather_backward(
    name: str, b: int, t: int, c: int, clones: int, n: int, dtype: torch.dtype, goals: Goals,
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

        def indexed() -> Tensor:  # the gradient of x[b, index] in PyTorch
            return zeros(b, t, c).index_put_((sample, index), grad, accumulate=True)

        return {
            **place.ours(lambda: lambda: ops.gather_tokens_backward(grad, short, clones, t)),
            **({} if place.backends else {"x[b, index]": indexed}),
            "eager": lambda: zeros(b * clones, t, c).scatter_add_(1, wide, grad).view(b, clones, t, c).sum(1),
            "index_add": lambda: zeros(b * t, c).index_add_(0, flat, grad.view(-1, c)).view(b, t, c),
            **place.floors([grad], lambda: [torch.empty((b, t, c), dtype=dtype)]),
        }

    size = (b * t * c + b * clones * n * c) * dtype.itemsize
    label = f"{name} B={b} T={t} C={c} M={clones} n={n}"
    return Case(op, label, dtype, size, make, goals, tolerance=2e-4 if dtype == F32 else 3e-2)


# ---- restore_tokens


def restore(name: str, n: int, t: int, visible: int, c: int, dtype: torch.dtype, goals: Goals) -> Case:
    """Decoder input: kept tokens, noise at the others; with each result where the kept ones are."""

    def make(place: Place, seed: int) -> Contenders:
        kept, order = place.normal(seed, n, visible, c, dtype=dtype), place.orders(seed, n, t)
        short, keys, wide = order.int(), torch.arange(n, device=place.device), order[:, :, None].expand(-1, -1, c)
        is_kept = (order < visible)[:, :, None]

        def eager() -> tuple[Tensor, Tensor]:
            noise = torch.randn((n, t - visible, c), dtype=dtype, device=place.device) * 0.01
            return torch.gather(torch.cat([kept, noise], dim=1), 1, wide), is_kept

        return {
            **place.ours(lambda: lambda: (dk.restore_tokens(kept, short, fill=dk.Noise(0.01, keys)), is_kept)),
            "eager": eager,
            **place.floors([kept], lambda: [torch.empty((n, t, c), dtype=dtype)]),
        }

    def kept_and_spread(result: tuple[Tensor, Tensor]) -> list[Tensor]:
        x, is_kept = result
        return [x * is_kept, (x[~is_kept[..., 0]].float().std() * 0.1).round(decimals=4)]

    size = (n * visible * c + n * t * c) * dtype.itemsize
    label = f"noise {name} N={n} T={t} V={visible} C={c}"
    return Case("restore_tokens", label, dtype, size, make, goals, tolerance=0.0, compare=kept_and_spread)


# ---- masked_regression_loss


def eager_loss(prediction: Tensor, target: Tensor, rows: Tensor, beta: float, scale: float) -> tuple[Tensor, ...]:
    """Loss and monitors as the published code computes them, without host synchronisation."""
    x, y = prediction.float(), target[rows].float()
    error = F.mse_loss(x, y, reduction="none") if beta == 0 else F.smooth_l1_loss(x, y, reduction="none", beta=beta)
    loss = (error * scale).sum()
    with torch.no_grad():
        stds = [torch.sqrt(v.var(dim=0) + 1e-6).mean() for v in (x, y)]
    return loss, *stds


def loss(
    name: str, p: int, rows: int, c: int, beta: float = 0.0, *, dtype: torch.dtype, goals: Goals,
    target_dtype: torch.dtype = F32,
) -> Case:  # fmt: skip
    """Forward and backward."""
    compiled, scale = compile_whole(eager_loss), c**-0.5

    def make(place: Place, seed: int) -> Contenders:
        leaf = place.normal(seed, p, c, dtype=dtype).requires_grad_()
        prediction, target = leaf.detach(), place.normal(seed + 1, rows, c, dtype=target_dtype)
        generator = torch.Generator(place.device).manual_seed(seed)
        picked = torch.randint(0, rows, (p,), device=place.device, generator=generator)
        one = torch.ones((), device=place.device)

        def autograd(function: Function) -> tuple[Tensor, ...]:
            value, *stds = function(leaf, target, picked, beta, scale)
            return (*torch.autograd.grad(value, leaf), value.detach(), *stds)

        def public(x: Tensor, y: Tensor, rows: Tensor, beta: float, scale: float) -> tuple[Tensor, ...]:
            return tuple(dk.masked_regression_loss(x, y, None, rows, beta=beta, scale=scale))

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

    size = p * c * 2 * dtype.itemsize + rows * c * target_dtype.itemsize
    kind = "squared" if beta == 0 else f"smooth-L1({beta:g})"
    label = f"{kind} {name} P={p} C={c},{'' if target_dtype == F32 else ' bfloat16'} target rows {rows}"
    return Case("masked_regression_loss", label, dtype, size, make, goals, loose(dtype), compare=lambda r: r,
                dtypes=(dtype, target_dtype))  # fmt: skip


# ---- GELU and norms


def trained(
    op: str, label: str, leaves: Sequence[tuple[int, ...]], dtype: torch.dtype, ours: Function, eager: Function,
    goals: Goals, *, passes: int, reads: tuple[int, ...] = (), writes: int = 2, compiles: bool = False, **more: Any,
) -> Case:  # fmt: skip
    """Result and gradients, as training computes them: of matrices in `dtype` and of float32 vectors.

    The result has the rows and the width of the last leaves. passes: over the result's bytes at the floor; reads: which
    of the leaves and the result's gradient (-1) a floor reads, if there is one; writes: results and gradients.
    """
    shape = (*leaves[0][:-1], leaves[-1][0] if len(leaves) > 1 else leaves[0][-1])
    compiled = compile_whole(eager)

    def make(place: Place, seed: int) -> Contenders:
        tensors = [place.normal(seed + i, *s, dtype=F32 if len(s) == 1 else dtype) for i, s in enumerate(leaves)]
        tensors, grad = [t.requires_grad_() for t in tensors], place.normal(seed + 9, *shape, dtype=dtype)
        inputs = [[*tensors, grad][i] for i in reads]
        outputs = lambda: [torch.empty(shape, dtype=dtype) for _ in range(writes)]  # noqa: E731
        return {
            **place.ours(lambda: lambda: with_gradients(ours, tensors, grad)),
            "eager": lambda: with_gradients(eager, tensors, grad),
            **({"compile": lambda: with_gradients(compiled, tensors, grad)} if compiles else {}),
            **(place.floors(inputs, outputs) if reads else {}),
        }

    options = {"tolerance": loose(dtype), "compare": list, **more}
    return Case(op, label, dtype, passes * math.prod(shape) * dtype.itemsize, make, goals, **options)


def gelu(name: str, rows: int, c: int, dtype: torch.dtype, goals: Goals) -> Case:
    """Activation and gradient."""
    op, label = "gelu forward + backward", f"{name} {rows} x {c}"
    return trained(op, label, [(rows, c)], dtype, dk.gelu, F.gelu, goals, passes=5, reads=(0, 0, -1))


def gelu_linear(name: str, rows: int, c: int, dtype: torch.dtype, goals: Goals) -> Case:
    """The second half of a block's MLP, hidden width 4 c, forward and backward: mostly matrix products."""

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(F.gelu(x), weight, bias.to(x.dtype))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dk.gelu_linear(x, weight, bias.to(x.dtype))

    op, label, leaves = (
        "gelu_linear forward + backward",
        f"{name} {rows} x {4 * c} -> {c}",
        [(rows, 4 * c), (c, 4 * c), (c,)],
    )
    return trained(op, label, leaves, dtype, ours, eager, goals, passes=12)


def norm_gelu(name: str, rows: int, c: int, dtype: torch.dtype, goals: Goals) -> Case:
    """The step between the convolutions of speech, forward and backward."""

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.layer_norm(x, (c,), weight.to(x.dtype), bias.to(x.dtype)))

    op, label, leaves = "layer_norm_gelu forward + backward", f"{name} {rows} x {c}", [(rows, c), (c,), (c,)]
    return trained(op, label, leaves, dtype, dk.layer_norm_gelu, eager, goals, passes=5, reads=(0, 0, -1),
                   compare=lambda r: r[:2])  # fmt: skip


def front_end(name: str, rows: int, c: int = 512) -> Case:
    """The same on a GPU, forward alone, with the norm in float32 as published."""

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.layer_norm(x.float(), (c,), weight, bias)).to(x.dtype)

    compiled = compile_whole(eager)

    def make(place: Place, seed: int) -> Contenders:
        x = place.normal(seed, rows, c, dtype=BF16)
        weight, bias = torch.ones(c, device=place.device), torch.zeros(c, device=place.device)
        return {
            **place.ours(lambda: lambda: dk.layer_norm_gelu(x, weight, bias)),
            "eager": lambda: eager(x, weight, bias),
            "compile": lambda: compiled(x, weight, bias),
        }

    goals = {"eager": 3.0, "ceiling": 0.9}
    return Case("layer_norm_gelu", f"{name} rows={rows} C={c}", BF16, rows * c * 4, make, goals, tolerance=1e-2)


def norm(name: str, n: int, t: int, c: int, dtype: torch.dtype, dropout: float, goals: Goals) -> Case:
    """Forward and backward of the post-norm form. What is dropped differs between contenders, its amount does not."""

    def eager(branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(residual + F.dropout(branch, dropout), (c,), weight, bias)

    def ours(branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        keys = torch.randint(0, 2**62, (n,)) if dropout > 0.0 else None
        return dk.dropout_add_layer_norm(branch, residual, weight, bias, dropout=dropout, keys=keys)[0]

    def amounts(results: tuple[Tensor, ...]) -> list[Tensor]:
        return [x.float().square().mean() for x in results[:3]]

    label, leaves = f"{name} N={n} T={t} C={c} dropout {dropout:g}", [(n, t, c), (n, t, c), (c,), (c,)]
    more = {"tolerance": 0.02, "compare": amounts} if dropout > 0.0 else {"tolerance": 1e-3}
    # Read: branch, residual, gradient, total; written: normed, total, and one gradient or two.
    return trained("dropout_add_layer_norm", label, leaves, dtype, ours, eager, goals, passes=8 if dropout > 0.0 else 7,
                   reads=(0, 1, -1), writes=4 if dropout > 0.0 else 3, compiles=True, **more)  # fmt: skip


# ---- attention


def attention(
    name: str, n: int, t: int, h: int, d: int, dropout: float, dtype: torch.dtype, goals: Goals, op: str = "attention"
) -> Case:
    """ALiBi from kept positions with a learned scale, forward and backward; with dropout, of other weights."""

    def make(place: Place, seed: int) -> Contenders:
        projected = place.normal(seed, n, t, 3, h, d, dtype=dtype).requires_grad_()
        positions = place.orders(seed, n, 2 * t)[:, :t].sort(1).values.int()
        grad = place.normal(seed + 1, n, t, h, d, dtype=dtype)
        scale = torch.full((h,), 1.0 if place.backends else 0.1, device=place.device, requires_grad=True)
        alibi = dk.Alibi(dk.alibi_slopes(h, place.device), positions, scale)
        keys = torch.arange(n, device=place.device) if dropout else None

        def run(function: Function) -> tuple[Tensor, ...]:
            return with_gradients(lambda qkv, _: function(*qkv.unbind(2)), (projected, scale), grad)

        def by(engine: str) -> Call:
            options = {"alibi": alibi, "dropout": dropout, "dropout_keys": keys, "engine": engine}
            return lambda: run(lambda q, k, v: dk.attend(q, k, v, **options))

        def eager(*qkv: Tensor) -> Tensor:
            """The distance bias as a tensor of all pairs, for every row and head; on a CPU PyTorch's attention."""
            q, k, v = (x.transpose(1, 2) for x in qkv)
            distance = (positions[:, None, :, None] - positions[:, None, None, :]).abs()
            bias = -(scale.clamp(min=0.0) * alibi.slopes)[:, None, None] * distance
            if not place.backends:
                return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout).transpose(1, 2)
            weights = ((q * d**-0.5) @ k.mT + bias).softmax(-1, dtype=F32).to(q.dtype)
            return (F.dropout(weights, dropout) @ v).transpose(1, 2)

        if not place.backends:
            return {"d2v": by("auto"), "eager": lambda: run(eager)}
        rivals = {} if dropout else {"flex (compile)": by("flex")}
        return {"d2v triton": by("triton"), "eager": lambda: run(eager), **rivals}

    def spread(result: tuple[Tensor, ...]) -> list[Tensor]:
        return [x.float().std() for x in result[:2]]

    label = f"ALiBi{f', dropout {dropout:g}' if dropout else ''} {name} {n} x {t}, {h} heads of {d}, forward + backward"
    size = 8 * n * t * h * d * dtype.itemsize  # q, k, v, the result, and their gradients
    tolerance, compare = (0.05, spread) if dropout else (5e-4 if dtype == F32 else 4e-2, list)
    return Case(op, label, dtype, size, make, goals, tolerance, compare, 14 * n * h * t * t * d, (str(d),))


# ---- MaskSampler


def masks(name: str, rows: int, copies: int, rule: dict[str, Any]) -> Case:
    """The masks of a batch against NumPy, as published and at its best."""
    shape = rule.get("grid") or (rule["tokens"],)
    tokens = math.prod(shape)

    def make(place: Place, seed: int) -> Contenders:
        sampler, ids, rng = dk.MaskSampler(**rule), list(range(rows // copies)), np.random.default_rng(seed)
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
    return Case("MaskSampler", label, torch.bool, rows * tokens, make, {"plain numpy": 50.0}, tolerance=0.02,
                compare=lambda mask: [mask.float().mean()])  # fmt: skip
