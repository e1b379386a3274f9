"""Cases of what stands inside transformer blocks and between the convolutions of speech, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import Alibi, alibi_slopes, attend
from ..ops.convolution import conv_layer_norm_gelu
from ..ops.gelu import gelu as own_gelu
from ..ops.gelu import gelu_linear as own_gelu_linear
from ..ops.gelu import layer_norm_gelu
from ..ops.norm import dropout_add_layer_norm
from ..registry import use_backend
from .case import (
    BF16,
    F32,
    Bytes,
    Call,
    Case,
    Contenders,
    Function,
    Goals,
    Place,
    compile_whole,
    family,
    loose,
    with_gradients,
)

# ---- GELU and norms


def trained(
    op: str, label: str, leaves: Sequence[tuple[int, ...]], dtype: torch.dtype, ours: Function, eager: Function,
    goals: Goals, *, formula: str, reads: tuple[int, ...] = (), writes: int = 2, wide: tuple[int, ...] = (),
    rivals: Mapping[str, Function] | None = None, **more: Any,
) -> Case:  # fmt: skip
    """Result and gradients, as training computes them: of matrices in `dtype` and of float32 vectors.

    The result has the rows R and the width C of the last leaves. formula: bytes of R, C and the itemsize at the floor;
    reads: which of the leaves and the result's gradient (-1) a floor reads, if there is one; writes: results and
    gradients; wide: leaves that are float32 whatever the dtype, and then so is the result; rivals: others on GPUs.
    """
    shape = (*leaves[0][:-1], leaves[-1][0] if len(leaves) > 1 else leaves[0][-1])
    compiled, result = compile_whole(eager), F32 if wide else dtype

    def make(place: Place, seed: int) -> Contenders:
        tensors = [
            place.normal(seed + i, *s) if len(s) == 1 else place.inputs(seed + i, *s, dtype=F32 if i in wide else dtype)
            for i, s in enumerate(leaves)
        ]
        tensors = [t.requires_grad_() for t in tensors]
        grad = place.normal(seed + 9, *shape, dtype=result)
        inputs = [[*tensors, grad][i] for i in reads]
        outputs = lambda: [torch.empty(shape, dtype=dtype) for _ in range(writes)]  # noqa: E731
        return {
            **place.ours(lambda: lambda: with_gradients(ours, tensors, grad)),
            "eager": lambda: with_gradients(eager, tensors, grad),
            "compile": lambda: with_gradients(compiled, tensors, grad),
            **{n: partial(with_gradients, f, tensors, grad) for n, f in (rivals or {}).items() if place.backends},
            **(place.floors(inputs, outputs) if reads else {}),
        }

    size = Bytes(formula, R=math.prod(shape[:-1]), C=shape[-1], item=dtype.itemsize)
    return Case(op, label, dtype, size, make, goals, **{"tolerance": loose(dtype), "compare": list, **more})


@family("gelu", "R rows, C channels", (3328, 1536), (8, 32))
def gelu(name: str, rows: int, c: int, *, dtype: torch.dtype, goals: Goals) -> Case:
    """Activation and gradient."""
    op, label = "gelu forward + backward", f"{name} {rows} x {c}"
    return trained(op, label, [(rows, c)], dtype, own_gelu, F.gelu, goals, formula="5*R*C*item", reads=(0, 0, -1))


@family("gelu_linear", "R rows, C channels of the result (4 C go in)", (3328, 384), (8, 16))
def gelu_linear(name: str, rows: int, c: int, *, dtype: torch.dtype, goals: Goals) -> Case:
    """The second half of a block's MLP, hidden width 4 c, forward and backward: mostly matrix products."""

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(F.gelu(x), weight, bias.to(x.dtype))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return own_gelu_linear(x, weight, bias.to(x.dtype))

    op, label = "gelu_linear forward + backward", f"{name} {rows} x {4 * c} -> {c}"
    leaves = [(rows, 4 * c), (c, 4 * c), (c,)]
    return trained(op, label, leaves, dtype, ours, eager, goals, formula="12*R*C*item")


@family("layer_norm_gelu", "R rows, C channels", (8000, 512), (8, 32))
def norm_gelu(name: str, rows: int, c: int, *, dtype: torch.dtype, goals: Goals) -> Case:
    """The step between the convolutions of speech, forward and backward."""

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.layer_norm(x, (c,), weight.to(x.dtype), bias.to(x.dtype)))

    op, label, leaves = "layer_norm_gelu forward + backward", f"{name} {rows} x {c}", [(rows, c), (c,), (c,)]
    return trained(op, label, leaves, dtype, layer_norm_gelu, eager, goals, formula="5*R*C*item", reads=(0, 0, -1),
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
            **place.ours(lambda: lambda: layer_norm_gelu(x, weight, bias)),
            "eager": lambda: eager(x, weight, bias),
            "compile": lambda: compiled(x, weight, bias),
        }

    goals, size = {"eager": 3.0, "compile": 1.0, "ceiling": 0.9}, Bytes("4*R*C", R=rows, C=c)
    return Case("layer_norm_gelu", f"{name} rows={rows} C={c}", BF16, size, make, goals, tolerance=1e-2)


@family("conv_layer_norm_gelu", "N rows, T tokens, C channels, D channels of the result, G groups, K taps",
        (8, 250, 768, 768, 16, 9), (2, 9, 32, 32, 4, 3), axes=1)  # fmt: skip
def convolution(
    name: str, n: int, t: int, c: int, d: int, groups: int, taps: int, *, dtype: torch.dtype, goals: Goals,
    axes: int = 1,
) -> Case:  # fmt: skip
    """A layer of 2.0's decoder, with residual where the channels agree, forward and backward; axes 2: T is the square
    of an image's side, K taps on each axis."""
    side = math.isqrt(t)
    if axes not in (1, 2) or (axes == 2 and side * side != t):
        raise ValueError(f"conv_layer_norm_gelu: axes: expected 1, or 2 with a square T, got {axes} with T={t}")
    grid, residual = ((t,) if axes == 1 else (side, side)), c == d

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv_layer_norm_gelu(x, weight, bias, residual=residual)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, row: bool = False) -> Tensor:
        z, padding, convolve = x.movedim(-1, 1), taps // 2, F.conv1d if axes == 1 else F.conv2d
        if row:
            y = F.conv2d(z.unsqueeze(2), weight.unsqueeze(2), bias.to(x.dtype), padding=(0, padding), groups=groups)
            y = y.squeeze(2).movedim(1, -1)
        else:
            y = convolve(z, weight, bias.to(x.dtype), padding=padding, groups=groups).movedim(1, -1)
        for axis, size in enumerate(grid, 1):
            y = y.narrow(axis, 0, size)
        y = F.gelu(F.layer_norm(y, (d,)))
        return y + x if residual else y

    op, label = "conv_layer_norm_gelu forward + backward", f"{name} {n} x {t}, {c} -> {d}, {groups} groups, K={taps}"
    leaves = [(n, *grid, c), (d, c // groups, *[taps] * axes), (d,)]
    rivals = {"eager, a grid of one row": partial(eager, row=True)} if axes == 1 else {}
    # Read: x twice, the gradient, the convolution's result; written: that, the result, the gradient of x.
    return trained(op, label + (" x K" if axes == 2 else ""), leaves, dtype, ours, eager, goals, rivals=rivals,
                   formula=f"R*(3*{c} + 4*C)*item", flops=6 * n * t * d * c // groups * taps**axes)  # fmt: skip


@family("dropout_add_layer_norm_mixed", "N rows, T tokens, C channels", (8, 125, 384), (2, 6, 32), dropout=0.0)
def mixed_norm(name: str, n: int, t: int, c: int, *, dtype: torch.dtype, goals: Goals, dropout: float = 0.0) -> Case:
    """A 16-bit branch beside a float32 residual, as under autocast."""
    if dtype.itemsize != 2:
        raise TypeError(f"dropout_add_layer_norm_mixed: dtype: expected bfloat16 or float16, got {dtype}")
    return norm(name, n, t, c, dtype=dtype, goals=goals, dropout=dropout, mixed=True)


@family("dropout_add_layer_norm", "N rows, T tokens, C channels", (8, 125, 384), (2, 6, 32), dropout=0.0)
def norm(
    name: str, n: int, t: int, c: int, *, dtype: torch.dtype, goals: Goals, dropout: float = 0.0, mixed: bool = False
) -> Case:
    """Forward and backward of the post-norm form. What is dropped differs between contenders, its amount does not."""
    drops = dropout > 0.0

    def eager(branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total = residual + F.dropout(branch, dropout)
        return F.layer_norm(total, (c,), weight.to(total.dtype), bias.to(total.dtype))

    def ours(branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        keys = torch.arange(n, device=branch.device) if drops else None
        return dropout_add_layer_norm(branch, residual, weight, bias, dropout=dropout, keys=keys)[0]

    def amounts(results: tuple[Tensor, ...]) -> list[Tensor]:
        return [x.float().square().mean() for x in results[:3]]

    op = f"dropout_add_layer_norm{'_mixed' if mixed else ''}"
    label, leaves = f"{name} N={n} T={t} C={c} dropout {dropout:g}", [(n, t, c), (n, t, c), (c,), (c,)]
    close = max(1e-3, loose(dtype))
    more: dict[str, Any] = {"tolerance": close, "compare": lambda r: r[:3]}
    if drops:
        more = {"tolerance": 0.02 if n * t * c > 4096 else 0.3, "compare": amounts, "exact": close}
    # Read: branch, residual, gradient, total; written: normed, total, and one gradient or two.
    formula = "R*C*(2*item + 6*4)" if mixed else f"{8 if drops else 7}*R*C*item"
    return trained(op, label, leaves, dtype, ours, eager, goals, formula=formula, reads=(0, 1, -1),
                   writes=4 if drops else 3, wide=(1,) if mixed else (), **more)  # fmt: skip


# ---- attention


@family("attention", "N rows, T tokens, H heads, D channels of a head", (2, 249, 12, 64), (2, 20, 2, 16), dropout=0.0)
def attention(
    name: str, n: int, t: int, h: int, d: int, *, dtype: torch.dtype, goals: Goals, dropout: float = 0.0,
    op: str = "attention",
) -> Case:  # fmt: skip
    """ALiBi from kept positions with a learned scale, forward and backward; with dropout, of other weights."""

    def make(place: Place, seed: int) -> Contenders:
        projected = place.normal(seed, n, t, 3, h, d, dtype=dtype).requires_grad_()
        positions = place.orders(seed, n, 2 * t)[:, :t].sort(1).values.int()
        grad = place.normal(seed + 1, n, t, h, d, dtype=dtype)
        scale = torch.full((h,), 0.1, device=place.device, dtype=place.kind(F32), requires_grad=True)
        alibi = Alibi(alibi_slopes(h, place.device), positions, scale)
        keys = torch.arange(n, device=place.device) if dropout else None

        def run(function: Function) -> tuple[Tensor, ...]:
            return with_gradients(lambda qkv, _: function(*qkv.unbind(2)), (projected, scale), grad)

        def by(engine: str) -> Call:
            options: dict[str, Any] = {"alibi": alibi, "dropout": dropout, "dropout_keys": keys, "engine": engine}
            return lambda: run(lambda q, k, v: attend(q, k, v, **options))

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
            compiled = compile_whole(eager)
            return {"d2v": by("auto"), "eager": lambda: run(eager), "compile": lambda: run(compiled)}
        rivals = {} if dropout else {"flex (compile)": by("flex")}

        def ours() -> tuple[Tensor, ...]:
            with use_backend("triton"):  # where the interpreter stands in for a GPU, it is not the preferred one
                return by("triton")()

        return {"d2v triton": ours, "eager": lambda: run(eager), **rivals}

    def spread(result: tuple[Tensor, ...]) -> list[Tensor]:
        return [x.float().std() for x in result[:2]]

    label = f"ALiBi{f', dropout {dropout:g}' if dropout else ''} {name} {n} x {t}, {h} heads of {d}, forward + backward"
    # q, k, v, the result, and their gradients
    size, close = (
        Bytes("8*N*T*H*D*item", N=n, T=t, H=h, D=d, item=dtype.itemsize),
        4e-2 if dtype.itemsize == 2 else 5e-4,
    )
    tolerance, compare, exact = (0.05, spread, close) if dropout else (close, list, None)
    return Case(op, label, dtype, size, make, goals, tolerance, compare, 14 * n * h * t * t * d, (str(d),), exact=exact)
