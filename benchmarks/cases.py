"""Named cases of every operator: inputs, bytes at the floor, and the contenders that must agree before they are timed.

Contenders: `eager` is the published formulation in plain PyTorch, `compile` the same under torch.compile (or the
best rewrite where one is named), others as named, `d2v` the operator through its public function, `floor` one plain
pass over inputs and outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import d2v_kernels as dk

from . import numpy_masks
from .case import Call, Case, compile_whole, floors, randn
from .cases_blocks import gelu_case, gelu_linear_case, norm_case, norm_gelu_case
from .floor import make_floor

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


def _average_case(
    name: str, k: int, b: int, t: int, c: int, dtype: torch.dtype, norm: str, out_norm: str, goals: dict[str, float]
) -> Case:
    def build() -> dict[str, Call]:
        layers = [randn((b, t, c), dtype, i) for i in range(k)]
        compiled = compile_whole(eager_average)
        return {
            "d2v": lambda: dk.average_layers(layers, norm=norm, out_norm=out_norm),
            "eager": lambda: eager_average(layers, norm, out_norm),
            "compile": lambda: compiled(layers, norm, out_norm),
            **floors(layers, lambda: [torch.empty((b, t, c))]),
        }

    size = b * t * c * (k * dtype.itemsize + 4)
    label = f"{norm}{'+' + out_norm if out_norm != 'none' else ''} {name} K={k} B={b} T={t} C={c}"
    return Case("average_layers", label, dtype, size, build, goals)


# ---- update_ema_


def parameter_shapes(width: int, depth: int) -> list[tuple[int, ...]]:
    """Tensors of `depth` transformer blocks."""
    block = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,),
             (width, 4 * width), (width,), (width,), (width,), (width,), (width,)]  # fmt: skip
    return block * depth


def _ema_case(name: str, width: int, depth: int, copies: bool, goals: dict[str, float]) -> Case:
    shapes = parameter_shapes(width, depth)
    count = sum(math.prod(s) for s in shapes)

    def build() -> dict[str, Call]:
        sources = [randn(s, torch.float32, i) for i, s in enumerate(shapes)]
        copy_lists: dict[str, list[Tensor]] = {}

        def averages(who: str) -> list[Tensor]:
            copy_lists[who] = [torch.zeros_like(s, dtype=torch.bfloat16) for s in sources] if copies else []
            return [randn(s, torch.float32, -i - 1) for i, s in enumerate(shapes)]

        ours, listed, theirs = averages("plan"), averages("list"), averages("foreach")
        plan = dk.EmaPlan(ours, sources, copy_lists["plan"] or None)

        def by_plan() -> list[Tensor]:
            plan.step(0.999)
            return ours + copy_lists["plan"]

        def by_list() -> list[Tensor]:
            dk.update_ema_(listed, sources, 0.999, copies=copy_lists["list"] or None)
            return listed + copy_lists["list"]

        def by_foreach() -> list[Tensor]:
            torch._foreach_lerp_(theirs, sources, 0.001)
            if copies:
                torch._foreach_copy_(copy_lists["foreach"], theirs)
            return theirs + copy_lists["foreach"]

        flat = [torch.cat([t.flatten() for t in tensors]) for tensors in (ours, sources)]
        low = torch.empty(flat[0].shape, dtype=torch.bfloat16)
        written = [flat[0], low] if copies else [flat[0]]
        return {
            "d2v": by_plan,
            "d2v list": by_list,
            "foreach": by_foreach,
            "floor": make_floor(flat, lambda: written, False),
        }

    size = count * (14 if copies else 12)
    label = f"{name} {count / 1e6:.1f} M{' + bf16 copy' if copies else ''}"
    return Case("update_ema_", label, torch.float32, size, build, goals, compare=lambda r: r)


# ---- gather_tokens


def _gather_inputs(b: int, t: int, c: int, clones: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(t, generator=generator)[:n].sort().values for _ in range(b * clones)])
    return randn((b, t, c), dtype, 1), index


def _gather_case(
    name: str, b: int, t: int, c: int, clones: int, n: int, dtype: torch.dtype, goals: dict[str, float]
) -> Case:
    def build() -> dict[str, Call]:
        x, index = _gather_inputs(b, t, c, clones, n, dtype)
        short, sample = index.int(), torch.arange(b * clones)[:, None] // clones
        flat = (sample * t + index).flatten()
        compiled = compile_whole(lambda x, index: x[sample, index])

        def clone_and_gather() -> Tensor:
            many = x.repeat_interleave(clones, 0)
            return torch.gather(many, 1, index[:, :, None].expand(-1, -1, c))

        def index_select() -> Tensor:
            out = torch.empty((b * clones * n, c), dtype=dtype)
            return torch.index_select(x.view(b * t, c), 0, flat, out=out).view(b * clones, n, c)

        return {
            "d2v": lambda: dk.gather_tokens(x, short, clones=clones),
            "eager": clone_and_gather,
            "x[b, index]": lambda: x[sample, index],
            "index_select": index_select,
            "compile": lambda: compiled(x, index),
            **floors([x], lambda: [torch.empty((b * clones, n, c), dtype=dtype)]),
        }

    size = (b * t * c + b * clones * n * c) * dtype.itemsize
    return Case("gather_tokens", f"{name} B={b} T={t} C={c} M={clones} n={n}", dtype, size, build, goals, tolerance=0.0)


def _gather_backward_case(
    name: str, b: int, t: int, c: int, clones: int, n: int, dtype: torch.dtype, goals: dict[str, float]
) -> Case:
    def build() -> dict[str, Call]:
        x, index = _gather_inputs(b, t, c, clones, n, dtype)
        x.requires_grad_()
        sample = torch.arange(b * clones)[:, None] // clones
        many = x.repeat_interleave(clones, 0)
        results = {
            "d2v": dk.gather_tokens(x, index.int(), clones=clones),
            "x[b, index]": x[sample, index],
            "eager": torch.gather(many, 1, index[:, :, None].expand(-1, -1, c)),
        }
        grad = randn((b * clones, n, c), dtype, 2)

        def backward(y: Tensor) -> Call:
            return lambda: torch.autograd.grad(y, x, grad, retain_graph=True)[0]

        calls = {who: backward(y) for who, y in results.items()}
        return {**calls, **floors([grad], lambda: [torch.empty((b, t, c), dtype=dtype)])}

    size = (b * t * c + b * clones * n * c) * dtype.itemsize
    label = f"{name} B={b} T={t} C={c} M={clones} n={n}"
    tolerance = 2e-4 if dtype == torch.float32 else 5e-2
    return Case("gather_tokens backward", label, dtype, size, build, goals, tolerance=tolerance)


# ---- attention


def eager_attention(qkv: Tensor, slopes: Tensor, places: Tensor, keys: Tensor | None, dropout: float) -> Tensor:
    """PyTorch's attention with the distance bias as a tensor of all pairs, for every row and head."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    place = places.to(slopes.dtype)
    bias = -slopes[:, None, None] * (place[:, None, :, None] - place[:, None, None, :]).abs()
    return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), dropout).transpose(1, 2)


def our_attention(qkv: Tensor, slopes: Tensor, places: Tensor, keys: Tensor | None, dropout: float) -> Tensor:
    """The same; with dropout, of other weights."""
    q, k, v = qkv.unbind(2)
    return dk.attend(q, k, v, alibi=dk.Alibi(slopes, places), dropout=dropout, dropout_keys=keys)


def _attention_case(name: str, shape: tuple[int, int, int, int], dropout: float, goals: dict[str, float]) -> Case:
    """Forward and backward, with the gradient of the slopes."""
    n, t, h, d = shape

    def build() -> dict[str, Call]:
        qkv, grad = (
            randn((n, t, 3, h, d), torch.float32, 0).requires_grad_(),
            randn(shape, torch.float32, 1),
        )
        slopes = (dk.alibi_slopes(h) * 0.1).requires_grad_()
        places, keys = torch.arange(t).expand(n, t), torch.arange(n) if dropout else None

        def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            y = function(qkv, slopes, places, keys, dropout)
            return (y.detach(), *torch.autograd.grad(y, (qkv, slopes), grad))

        return {"d2v": lambda: run(our_attention), "eager": lambda: run(eager_attention)}

    def spread(result: tuple[Tensor, ...]) -> list[Tensor]:
        return [x.std() for x in result[:2]]

    label = f"ALiBi{f', dropout {dropout:g}' if dropout else ''} {name} {n} x {t}, {h} heads of {d}, forward + backward"
    size = 4 * n * t * h * d * 4 + 4 * n * t * h * d * 4  # q, k, v, the result, and their gradients
    tolerance, compare = (0.05, spread) if dropout else (5e-4, list)
    return Case("attention", label, torch.float32, size, build, goals, tolerance=tolerance, compare=compare)


# ---- restore_tokens


def _restore_case(name: str, n: int, t: int, visible: int, c: int, dtype: torch.dtype, goals: dict[str, float]) -> Case:
    def build() -> dict[str, Call]:
        generator = torch.Generator().manual_seed(0)
        restore = torch.stack([torch.randperm(t, generator=generator) for _ in range(n)])
        short, keys = restore.int(), torch.arange(n)
        kept = randn((n, visible, c), dtype, 1)
        index = restore[:, :, None].expand(-1, -1, c)

        def eager() -> Tensor:
            noise = torch.randn((n, t - visible, c), dtype=dtype) * 0.01
            return torch.gather(torch.cat([kept, noise], dim=1), 1, index)

        return {
            "d2v": lambda: dk.restore_tokens(kept, short, fill=dk.Noise(0.01, keys)),
            "eager": eager,
            **floors([kept], lambda: [torch.empty((n, t, c), dtype=dtype)]),
        }

    def kept_rows(result: Tensor) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        restore = torch.stack([torch.randperm(t, generator=generator) for _ in range(n)])
        return [result[restore < visible], (result[restore >= visible].float().std() * 0.1).round(decimals=4)]

    size = (n * visible * c + n * t * c) * dtype.itemsize
    label = f"noise {name} N={n} T={t} V={visible} C={c}"
    return Case("restore_tokens", label, dtype, size, build, goals, tolerance=2e-5, compare=kept_rows)


# ---- masked_regression_loss


def eager_loss(prediction: Tensor, target: Tensor, rows: Tensor, beta: float, scale: float) -> tuple[Tensor, ...]:
    """Loss and monitors as the published code computes them, without host synchronisation."""
    x, y = prediction.float(), target[rows].float()
    error = F.mse_loss(x, y, reduction="none") if beta == 0 else F.smooth_l1_loss(x, y, reduction="none", beta=beta)
    loss = (error * scale).sum()
    with torch.no_grad():
        stds = [torch.sqrt(v.var(dim=0) + 1e-6).mean() for v in (x, y)]
    return loss, *stds


def _loss_case(
    name: str, p: int, rows: int, c: int, dtype: torch.dtype, beta: float, goals: dict[str, float]
) -> Case:  # fmt: skip
    def build() -> dict[str, Call]:
        prediction = randn((p, c), dtype, 0).requires_grad_()
        target = randn((rows, c), torch.float32, 1)
        picked = torch.randint(0, rows, (p,), generator=torch.Generator().manual_seed(2))
        scale = c**-0.5

        def run(function: Callable[..., Any]) -> tuple[Tensor, ...]:
            loss, *stds = function(prediction, target, picked, beta, scale)
            return (*torch.autograd.grad(loss, prediction), loss.detach(), *stds)

        def ours(x: Tensor, y: Tensor, rows: Tensor, beta: float, scale: float) -> tuple[Tensor, ...]:
            return tuple(dk.masked_regression_loss(x, y, None, rows, beta=beta, scale=scale))

        compiled = compile_whole(eager_loss)
        return {
            "d2v": lambda: run(ours),
            "eager": lambda: run(eager_loss),
            "compile": lambda: run(compiled),
            **floors([prediction.detach(), target], lambda: [torch.empty((p, c), dtype=dtype)]),
        }

    size = p * c * 2 * dtype.itemsize + rows * c * 4
    kind = "squared" if beta == 0 else f"smooth-L1({beta:g})"
    label = f"{kind} {name} P={p} C={c}, target rows {rows}"
    tolerance = 2e-4 if dtype == torch.float32 else 2e-2
    return Case("masked_regression_loss", label, dtype, size, build, goals, tolerance=tolerance, compare=lambda r: r)


# ---- MaskSampler


def _mask_case(name: str, rows: int, copies: int, rule: dict[str, Any]) -> Case:
    shape = rule.get("grid") or (rule["tokens"],)
    tokens = math.prod(shape)

    def build() -> dict[str, Call]:
        sampler = dk.MaskSampler(**rule)
        ids = list(range(rows // copies))
        rng = np.random.default_rng(0)

        def by_numpy(style: str) -> Call:
            spans = getattr(numpy_masks, f"{style}_span_masks")
            blocks = getattr(numpy_masks, f"{style}_block_masks")

            def draw() -> Tensor:
                if rule["kind"] == "span":
                    return torch.from_numpy(spans(rows, tokens, rule["ratio"], rule["span"], rng))
                inverse = rule.get("inverse", False)
                mask = blocks(rows, shape, rule["ratio"], rule["adjust"], rule["span"], inverse, rng)
                numpy_masks.list_masks(mask)
                return torch.from_numpy(mask)

            return draw

        return {
            "d2v": lambda: sampler.draw(ids, 0, copies=copies).mask,
            "plain numpy": by_numpy("plain"),
            "vector numpy": by_numpy("vector"),
        }

    label = f"{rule['kind']} {name} {rows} x {tokens}"
    return Case("MaskSampler", label, torch.bool, rows * tokens, build, {"plain numpy": 50.0}, tolerance=0.02,
                compare=lambda mask: [mask.float().mean()])  # fmt: skip


def all_cases() -> list[Case]:
    """Every case of `make bench`, with the goals of this project."""
    fp32, bf16 = torch.float32, torch.bfloat16
    cases = []
    for dtype, compile_goal in ((fp32, 1.8), (bf16, 3.0)):
        instance = {"eager": 10.0, "compile": compile_goal, "floor": 3.0}
        cases += [
            _average_case("speech", 8, 4, 500, 768, dtype, "instance", "none", instance),
            _average_case("images", 10, 16, 196, 768, dtype, "instance", "layer", instance),
            _average_case("odd width", 12, 4, 512, 1023, dtype, "instance", "none", instance),
            _average_case("long", 8, 1, 3000, 768, dtype, "instance", "none", instance),
        ]
        layer = {"eager": 4.5 if dtype == fp32 else 8.0, "compile": 1.8, "floor": 2.0}
        cases += [
            _average_case("text", 8, 4, 500, 768, dtype, "layer", "none", layer),
            _average_case("odd width", 12, 4, 512, 1023, dtype, "layer", "none", layer),
        ]
    cases += [
        _ema_case("2 blocks", 768, 2, False, {"foreach": 0.95}),
        _ema_case("2 blocks", 768, 2, True, {"foreach": 1.5}),
        _ema_case("tiny", 64, 3, True, {"foreach": 1.5}),
    ]
    gather = {"x[b, index]": 2.5, "index_select": 1.3, "floor": 1.5}
    for dtype in (fp32, bf16):
        cases += [
            _gather_case("images", 16, 196, 768, 8, 39, dtype, gather),
            _gather_case("speech", 3, 999, 768, 8, 500, dtype, gather),
            _gather_backward_case("images", 16, 196, 768, 8, 39, dtype, {"x[b, index]": 3.0}),
            _restore_case("images", 64, 196, 39, 768, dtype, {"eager": 3.0}),
            _loss_case("images", 64 * 157, 16 * 196, 768, dtype, 0.0, {"compile": 2.7, "floor": 1.5}),
            _loss_case("images", 64 * 157, 16 * 196, 768, dtype, 2.0, {"compile": 2.7, "floor": 1.5}),
        ]
        cases += [
            gelu_case("images", 3328, 1536, dtype, {"eager": 1.5 if dtype == fp32 else 1.0}),
            gelu_case("tiny", 1024, 256, dtype, {"eager": 1.5 if dtype == fp32 else 1.0}),
            norm_gelu_case("speech", 8000, 512, dtype, {"eager": 1.3 if dtype == fp32 else 1.0}),
            gelu_linear_case("images", 3328, 384, dtype, {"eager": 1.0}),
        ]
    cases += [
        norm_case("speech", 8, 125, 384, fp32, 0.1, {"eager": 1.8}),
        norm_case("images", 208, 64, 384, fp32, 0.0, {"eager": 0.9}),
    ]
    speech = {"kind": "block", "tokens": 999, "ratio": 0.5, "adjust": 0.05, "span": 5}
    images = {"kind": "block", "grid": (14, 14), "ratio": 0.8, "adjust": 0.07, "span": 3, "inverse": True}
    return [
        *cases,
        _attention_case("speech", (2, 249, 12, 64), 0.0, {"eager": 1.3}),
        _attention_case("speech", (2, 249, 12, 64), 0.1, {"eager": 1.7}),
        _mask_case("speech 1.0", 11, 1, {"kind": "span", "tokens": 999, "ratio": 0.65, "span": 10}),
        _mask_case("speech 2.0", 24, 8, speech),
        _mask_case("images", 256, 16, images),
    ]
