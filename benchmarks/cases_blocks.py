"""Rows of the operators inside transformer blocks and between the convolutions of speech."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import d2v_kernels as dk

from .case import Call, Case, compile_whole, floors, randn

# ---- GELU


def _with_gradients(function: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad))


def gelu_case(name: str, rows: int, c: int, dtype: torch.dtype, goals: dict[str, float]) -> Case:
    """Activation and gradient, as training computes them."""

    def build() -> dict[str, Call]:
        x, grad = randn((rows, c), dtype, 0).requires_grad_(), randn((rows, c), dtype, 1)
        return {
            "d2v": lambda: _with_gradients(dk.gelu, [x], grad),
            "eager": lambda: _with_gradients(F.gelu, [x], grad),
            **floors([x.detach(), x.detach(), grad], lambda: [torch.empty((rows, c), dtype=dtype) for _ in range(2)]),
        }

    tolerance = 2e-4 if dtype == torch.float32 else 2e-2
    return Case("gelu forward + backward", f"{name} {rows} x {c}", dtype, 5 * rows * c * dtype.itemsize, build, goals,
                tolerance=tolerance, compare=lambda r: r)  # fmt: skip


def norm_gelu_case(name: str, rows: int, c: int, dtype: torch.dtype, goals: dict[str, float]) -> Case:
    """The step between the convolutions of speech, forward and backward."""

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.layer_norm(x, (c,), weight.to(x.dtype), bias.to(x.dtype)))

    def build() -> dict[str, Call]:
        x, grad = randn((rows, c), dtype, 0), randn((rows, c), dtype, 1)
        leaves = [t.requires_grad_() for t in (x, 1.0 + 0.1 * randn((c,), torch.float32, 2), torch.zeros(c))]
        return {
            "d2v": lambda: _with_gradients(dk.layer_norm_gelu, leaves, grad),
            "eager": lambda: _with_gradients(eager, leaves, grad),
            **floors([x.detach(), x.detach(), grad], lambda: [torch.empty((rows, c), dtype=dtype) for _ in range(2)]),
        }

    tolerance = 2e-4 if dtype == torch.float32 else 2e-2
    return Case("layer_norm_gelu forward + backward", f"{name} {rows} x {c}", dtype, 5 * rows * c * dtype.itemsize,
                build, goals, tolerance=tolerance, compare=lambda r: r[:2])  # fmt: skip


def gelu_linear_case(name: str, rows: int, c: int, dtype: torch.dtype, goals: dict[str, float]) -> Case:
    """The second half of a block's MLP, hidden width 4 c, forward and backward: mostly matrix products."""

    def build() -> dict[str, Call]:
        x, grad = randn((rows, 4 * c), dtype, 0), randn((rows, c), dtype, 1)
        weight, bias = randn((c, 4 * c), dtype, 2) * (4 * c) ** -0.5, randn((c,), dtype, 3)
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        return {
            "d2v": lambda: _with_gradients(dk.gelu_linear, leaves, grad),
            "eager": lambda: _with_gradients(lambda x, w, b: F.linear(F.gelu(x), w, b), leaves, grad),
        }

    tolerance = 2e-4 if dtype == torch.float32 else 2e-2
    return Case("gelu_linear forward + backward", f"{name} {rows} x {4 * c} -> {c}", dtype,
                12 * rows * c * dtype.itemsize, build, goals, tolerance=tolerance, compare=lambda r: r)  # fmt: skip


# ---- dropout_add_layer_norm


def norm_case(name: str, n: int, t: int, c: int, dtype: torch.dtype, dropout: float, goals: dict[str, float]) -> Case:
    """Forward and backward of the post-norm form. What is dropped differs between contenders, its amount does not."""

    def build() -> dict[str, Call]:
        leaves = [randn((n, t, c), dtype, i).requires_grad_() for i in range(2)]
        leaves += [randn((c,), torch.float32, 2 + i).requires_grad_() for i in range(2)]
        grad = randn((n, t, c), dtype, 4)

        def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            y = function(*leaves)
            return (y.detach(), *torch.autograd.grad(y, leaves, grad))

        def ours(branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            keys = torch.randint(0, 2**62, (n,)) if dropout > 0.0 else None
            return dk.dropout_add_layer_norm(branch, residual, weight, bias, dropout=dropout, keys=keys)[0]

        def eager(branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(residual + F.dropout(branch, dropout), (c,), weight, bias)

        quick = compile_whole(eager)
        inputs = [*(x.detach() for x in leaves[:2]), grad]
        return {
            "d2v": lambda: run(ours),
            "eager": lambda: run(eager),
            "compile": lambda: run(quick),
            **floors(inputs, lambda: [torch.empty((n, t, c), dtype=dtype) for _ in range(4 if dropout else 3)]),
        }

    def amounts(results: tuple[Tensor, ...]) -> list[Tensor]:
        return [x.float().square().mean() for x in results[:3]]

    rows = n * t * c * dtype.itemsize
    compare: Callable[[Any], Sequence[Tensor]] = amounts if dropout > 0.0 else list
    # Read: branch, residual, gradient, total; written: normed, total, and one gradient or two.
    return Case("dropout_add_layer_norm", f"{name} N={n} T={t} C={c} dropout {dropout:g}", dtype,
                rows * (8 if dropout > 0.0 else 7), build, goals, tolerance=0.02 if dropout > 0.0 else 1e-3,
                compare=compare)  # fmt: skip
