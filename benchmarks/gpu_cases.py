"""Named cases of the GPU benchmark: the published settings, their bytes at the floor, and the contenders.

Contenders of a case: `d2v native`, `d2v triton` (one backend forced each), `eager` (the published formulation in plain
PyTorch), the best rewrite in PyTorch under its own name, and `compile` (the eager formulation under torch.compile).
All take their inputs as they are, allocate their results, and never wait for the device, so a graph can hold them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import d2v_kernels as dk
from d2v_kernels import use_backend

from .cases import eager_average, eager_loss, parameter_shapes

Call = Callable[[], Any]
Contenders = dict[str, Call]
F32, BF16 = torch.float32, torch.bfloat16
ops = torch.ops.d2v
INSTANCE = {"eager": 10.0, "compile": 2.0, "ceiling": 0.9}


@dataclass(frozen=True)
class GpuCase:
    """One row of the benchmark: `make(device, seed)` gives the contenders on one fresh set of inputs."""

    op: str
    name: str
    dtype: torch.dtype
    bytes: int
    """Bytes read once plus bytes written once."""
    make: Callable[[torch.device, int], Contenders] = field(repr=False)
    goals: dict[str, float] = field(default_factory=dict)
    """Contender -> wanted ratio of its time over ours; `ceiling`: wanted share of the copy rate; `host`: seconds."""
    tolerance: float = 2e-3
    compare: Callable[[Any], Sequence[Tensor]] = field(default=lambda r: [r], repr=False)
    """Tensors of a result that must agree, relative to their maximum."""
    flops: int = 0
    traits: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    @property
    def registered(self) -> str:
        """The operator's name in the registry."""
        return self.op.split(" ")[0]


def on_backends(call: Call) -> Contenders:
    """The call on each GPU backend."""

    def forced(name: str) -> Call:
        def run() -> Any:
            with use_backend(name):
                return call()

        return run

    return {f"d2v {name}": forced(name) for name in ("native", "triton")}


def _normal(device: torch.device, seed: int, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, device=device, dtype=F32, generator=generator).to(dtype)


def _lists(device: torch.device, seed: int, rows: int, tokens: int, n: int) -> Tensor:
    """n distinct positions of each row, ascending, int32."""
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.rand((rows, tokens), device=device, generator=generator).argsort(1)
    return order[:, :n].sort(1).values.int()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def average(
    name: str, k: int, b: int, t: int, c: int, norm: str = "instance", out_norm: str = "none", *,
    dtype: torch.dtype = BF16, goals: dict[str, float] | None = None, compiles: bool = True,
) -> GpuCase:  # fmt: skip
    """Without `compiles` torch.compile does not take part: it takes some ten seconds a case."""
    compiled = _compiled(eager_average)

    def make(device: torch.device, seed: int) -> Contenders:
        layers = [_normal(device, seed * 100 + i, b, t, c, dtype=dtype) for i in range(k)]
        calls = {
            **on_backends(lambda: dk.average_layers(layers, norm=norm, out_norm=out_norm)),
            "eager": lambda: eager_average(layers, norm, out_norm),
        }
        return {**calls, "compile": lambda: compiled(layers, norm, out_norm)} if compiles else calls

    size = b * t * c * (k * dtype.itemsize + 4)
    label = f"{norm}{'+' + out_norm if out_norm != 'none' else ''} {name} K={k} B={b} T={t} C={c}"
    wanted = {n: g for n, g in (INSTANCE if goals is None else goals).items() if compiles or n != "compile"}
    return GpuCase("average_layers", label, dtype, size, make, wanted, traits=(norm, out_norm), dtypes=(dtype, F32))


def ema(name: str, width: int, depth: int, source: torch.dtype, copies: bool) -> GpuCase:
    shapes = parameter_shapes(width, depth)
    count = sum(math.prod(s) for s in shapes)

    def make(device: torch.device, seed: int) -> Contenders:
        sources = [_normal(device, seed * 1000 + i, *s, dtype=source) for i, s in enumerate(shapes)]

        def lists() -> tuple[list[Tensor], list[Tensor]]:
            averages = [torch.full_like(s, 0.5, dtype=F32) for s in sources]
            return averages, [torch.zeros_like(a, dtype=BF16) for a in averages] if copies else []

        def planned(backend: str) -> Call:
            averages, low = lists()
            with use_backend(backend):
                plan = dk.EmaPlan(averages, sources, low or None)

            def run() -> list[Tensor]:
                with use_backend(backend):
                    plan.step(0.999)
                return averages + low

            return run

        ours, theirs = lists(), lists()

        def foreach() -> list[Tensor]:
            averages, low = theirs
            if source == F32:
                torch._foreach_lerp_(averages, sources, 0.001)
            else:
                torch._foreach_mul_(averages, 0.999)
                torch._foreach_add_(averages, sources, alpha=0.001)
            if copies:
                torch._foreach_copy_(low, averages)
            return averages + low

        def listed() -> list[Tensor]:
            dk.update_ema_(ours[0], sources, 0.999, copies=ours[1] or None)
            return ours[0] + ours[1]

        return {
            "d2v native": planned("native"),
            "d2v triton": planned("triton"),
            "d2v list": listed,
            "foreach": foreach,
        }

    size = count * (8 + source.itemsize + (2 if copies else 0))
    label = f"{name} {count / 1e6:.1f} M, {str(source)[6:]} student{' + bf16 copy' if copies else ''}"
    goals = {"foreach": 1.2 if source == F32 else 1.5, "ceiling": 0.9, "host": 3e-6}
    return GpuCase(
        "update_ema_", label, source, size, make, goals, compare=lambda r: [r[0], r[-1]], dtypes=(F32, source)
    )


def gather(name: str, b: int, t: int, c: int, clones: int, n: int) -> GpuCase:
    def make(device: torch.device, seed: int) -> Contenders:
        x, index = _normal(device, seed, b, t, c), _lists(device, seed, b * clones, t, n)
        sample = torch.arange(b * clones, device=device)[:, None] // clones
        flat, wide = (sample * t + index).flatten(), index.long()[:, :, None].expand(-1, -1, c)
        return {
            **on_backends(lambda: dk.gather_tokens(x, index, clones=clones)),
            "eager": lambda: torch.gather(x.repeat_interleave(clones, 0, output_size=b * clones), 1, wide),
            "view[index]": lambda: x.view(b * t, c)[flat].view(b * clones, n, c),
        }

    size = (b * t * c + b * clones * n * c) * 2
    return GpuCase("gather_tokens", f"{name} B={b} T={t} C={c} M={clones} n={n}", BF16, size, make,
                   {"ceiling": 0.9}, tolerance=0.0, dtypes=(BF16,))  # fmt: skip


def gather_backward(name: str, b: int, t: int, c: int, clones: int, n: int) -> GpuCase:
    def make(device: torch.device, seed: int) -> Contenders:
        grad, index = _normal(device, seed, b * clones, n, c), _lists(device, seed, b * clones, t, n)
        sample = torch.arange(b * clones, device=device)[:, None] // clones
        flat, wide = (sample * t + index).flatten(), index.long()[:, :, None].expand(-1, -1, c)

        def eager() -> Tensor:
            full = torch.zeros((b * clones, t, c), dtype=grad.dtype, device=device).scatter_add_(1, wide, grad)
            return full.view(b, clones, t, c).sum(1)

        def index_add() -> Tensor:
            total = torch.zeros((b * t, c), dtype=grad.dtype, device=device)
            return total.index_add_(0, flat, grad.view(-1, c)).view(b, t, c)

        ours = on_backends(lambda: ops.gather_tokens_backward(grad, index, clones, t))
        return {**ours, "eager": eager, "index_add": index_add}

    size = (b * t * c + b * clones * n * c) * 2
    return GpuCase("gather_tokens_backward", f"{name} B={b} T={t} C={c} M={clones} n={n}", BF16, size, make,
                   {"ceiling": 0.9}, tolerance=0.03, dtypes=(BF16,))  # fmt: skip


def restore(name: str, n: int, t: int, visible: int, c: int) -> GpuCase:
    def make(device: torch.device, seed: int) -> Contenders:
        kept = _normal(device, seed, n, visible, c)
        generator = torch.Generator(device).manual_seed(seed)
        order = torch.rand((n, t), device=device, generator=generator).argsort(1)
        short, keys, wide = order.int(), torch.arange(n, device=device), order[:, :, None].expand(-1, -1, c)
        is_kept = (order < visible)[:, :, None]

        def eager() -> tuple[Tensor, Tensor]:
            noise = torch.randn((n, t - visible, c), dtype=kept.dtype, device=device) * 0.01
            return torch.gather(torch.cat([kept, noise], dim=1), 1, wide), is_kept

        ours = on_backends(lambda: (dk.restore_tokens(kept, short, fill=dk.Noise(0.01, keys)), is_kept))
        return {**ours, "eager": eager}

    size = (n * visible * c + n * t * c) * 2
    return GpuCase("restore_tokens", f"noise {name} N={n} T={t} V={visible} C={c}", BF16, size, make,
                   {"ceiling": 0.9}, compare=lambda r: [r[0] * r[1]], tolerance=0.0, dtypes=(BF16,))  # fmt: skip


def loss(name: str, p: int, rows: int, c: int, beta: float = 0.0, target_dtype: torch.dtype = F32) -> GpuCase:
    compiled = _compiled(eager_loss)

    def make(device: torch.device, seed: int) -> Contenders:
        prediction, target = _normal(device, seed, p, c), _normal(device, seed + 1, rows, c, dtype=target_dtype)
        generator = torch.Generator(device).manual_seed(seed)
        picked = torch.randint(0, rows, (p,), device=device, generator=generator)
        leaf, one, scale = prediction.requires_grad_(), torch.ones((), device=device), c**-0.5

        def ours() -> tuple[Tensor, ...]:
            arguments = (prediction.detach(), target, None, picked, beta, scale)
            forward = ops.masked_regression_loss(*arguments)
            return (ops.masked_regression_loss_backward(one, *arguments), *forward)

        def autograd(function: Callable[..., Any]) -> tuple[Tensor, ...]:
            value, *stds = function(leaf, target, picked, beta, scale)
            return (*torch.autograd.grad(value, leaf), value.detach(), *stds)

        return {
            **on_backends(ours),
            "eager": lambda: autograd(eager_loss),
            "compile": lambda: autograd(compiled),
        }

    size = p * c * 4 + rows * c * target_dtype.itemsize
    label = f"{'squared' if beta == 0 else 'smooth-L1'} {name} P={p} C={c}, {str(target_dtype)[6:]} target rows {rows}"
    return GpuCase("masked_regression_loss forward + backward", label, BF16, size, make, {"eager": 4.0, "compile": 1.5},
                   tolerance=2e-2, compare=lambda r: r, dtypes=(BF16, target_dtype))  # fmt: skip


def front_end(name: str, rows: int, c: int = 512) -> GpuCase:
    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.layer_norm(x.float(), (c,), weight, bias)).to(x.dtype)

    compiled = _compiled(eager)

    def make(device: torch.device, seed: int) -> Contenders:
        x, weight, bias = _normal(device, seed, rows, c), torch.ones(c, device=device), torch.zeros(c, device=device)
        return {
            **on_backends(lambda: dk.layer_norm_gelu(x, weight, bias)),
            "eager": lambda: eager(x, weight, bias),
            "compile": lambda: compiled(x, weight, bias),
        }

    return GpuCase("layer_norm_gelu", f"{name} rows={rows} C={c}", BF16, rows * c * 4, make,
                   {"eager": 3.0, "ceiling": 0.9}, tolerance=1e-2, dtypes=(BF16,))  # fmt: skip


def attention(name: str, n: int, t: int, h: int, d: int, dropout: float) -> GpuCase:
    """ALiBi from kept positions with a learned scale, forward and backward."""

    def make(device: torch.device, seed: int) -> Contenders:
        projected = _normal(device, seed, n, t, 3, h, d).requires_grad_()
        positions = _lists(device, seed, n, 2 * t, t)
        grad, scale = _normal(device, seed + 1, n, t, h, d), torch.ones(h, device=device).requires_grad_()
        alibi = dk.Alibi(dk.alibi_slopes(h, device), positions, scale)
        keys = torch.arange(n, device=device)

        def by(engine: str) -> Call:
            def run() -> list[Tensor]:
                q, k, v = projected.unbind(2)
                y = dk.attend(
                    q, k, v, alibi=alibi, dropout=dropout, dropout_keys=keys if dropout else None, engine=engine
                )
                return [y, *torch.autograd.grad(y, (projected, scale), grad)]

            return run

        def eager() -> list[Tensor]:
            q, k, v = projected.transpose(1, 3).unbind(2)
            distance = (positions[:, None, :, None] - positions[:, None, None, :]).abs()
            bias = -(scale.clamp(min=0.0) * alibi.slopes)[:, None, None] * distance
            weights = ((q * d**-0.5) @ k.mT + bias).softmax(-1, dtype=F32).to(q.dtype)
            y = (F.dropout(weights, dropout) @ v).transpose(1, 2)
            return [y, *torch.autograd.grad(y, (projected, scale), grad)]

        rivals = {} if dropout else {"flex (compile)": by("flex")}
        return {"d2v triton": by("triton"), "eager": eager, **rivals}

    label = f"ALiBi {name} N={n} T={t} H={h} D={d}{f' dropout {dropout:g}' if dropout else ''}"
    return GpuCase("attention forward + backward", label, BF16, n * t * h * d * 2 * 13, make, {"eager": 3.0},
                   tolerance=4e-2, compare=lambda r: r if not dropout else [], flops=14 * n * h * t * t * d,
                   traits=(str(d),), dtypes=(BF16,))  # fmt: skip


def published_cases() -> list[GpuCase]:
    """What is measured on a GPU, the most wanted first."""
    return [
        average("speech 2.0", 8, 3, 999, 768),
        average("images B16", 10, 16, 196, 768, out_norm="layer"),
        ema("base", 768, 12, F32, True),
        ema("base", 768, 12, BF16, True),
        gather("images B16", 16, 196, 768, 16, 39),
        gather_backward("images B16", 16, 196, 768, 16, 39),
        restore("images B16", 256, 196, 39, 768),
        loss("images B16", 256 * 157, 16 * 196, 768),
        attention("speech 2.0", 24, 500, 12, 64, 0.0),
        front_end("speech 2.0, first layer", 3 * 63999),
        average("images B256", 10, 256, 196, 768, out_norm="layer"),
        average("speech 1.0", 8, 11, 999, 768, compiles=False),
        average("images huge14", 24, 8, 256, 1280, out_norm="layer"),
        average("text 2.0", 12, 4, 512, 768, compiles=False),
        average("text 1.0", 10, 16, 512, 768, "layer", goals={"eager": 6.0, "compile": 1.0, "ceiling": 0.9}),
        average("speech 2.0 large", 16, 1, 999, 1024, compiles=False),
        average("images large", 18, 8, 196, 1024, out_norm="layer", compiles=False),
        average("images B16", 10, 16, 196, 768, out_norm="layer", dtype=F32, compiles=False),
        ema("huge", 1280, 32, F32, True),
        ema("base", 768, 12, F32, False),
        gather("images B256", 256, 196, 768, 16, 39),
        gather_backward("images B256", 256, 196, 768, 16, 39),
        gather("speech 2.0", 3, 999, 768, 8, 500),
        gather_backward("speech 2.0", 3, 999, 768, 8, 500),
        gather("text 2.0", 4, 512, 768, 8, 266),
        restore("speech 2.0", 24, 999, 500, 768),
        restore("text 2.0", 32, 512, 266, 768),
        loss("speech 2.0", 24 * 499, 3 * 999, 768),
        loss("images B16", 256 * 157, 16 * 196, 768, target_dtype=BF16),
        loss("text 1.0", 16 * 157, 16 * 512, 768, beta=4.0),
        attention("speech 2.0", 24, 500, 12, 64, 0.1),
        attention("speech 2.0 large", 12, 450, 16, 64, 0.1),
        loss("images B256", 4096 * 157, 256 * 196, 768),
    ]


def tiny_cases() -> list[GpuCase]:
    """One small case of each kind, for runs without a GPU."""
    return [
        average("tiny", 3, 2, 20, 32),
        average("tiny", 3, 2, 20, 32, "layer", goals={}),
        ema("tiny", 16, 1, F32, True),
        ema("tiny", 16, 1, BF16, False),
        gather("tiny", 2, 12, 32, 2, 5),
        gather_backward("tiny", 2, 12, 32, 2, 5),
        restore("tiny", 4, 12, 5, 32),
        loss("tiny", 12, 20, 32),
        front_end("tiny", 9, 32),
        attention("tiny", 2, 20, 2, 16, 0.0),
        attention("tiny", 2, 20, 2, 16, 0.1),
    ]
