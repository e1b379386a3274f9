"""Linear layers of float32 rows on CPUs, by the quicker one of the two libraries that PyTorch brings.

PyTorch multiplies float32 matrices by MKL, whose code for AMD's processors ends at AVX2: on one core of a Zen 5 it does
108 GFLOP/s where oneDNN, which PyTorch uses for convolutions and bfloat16, does 200 to 250.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHOICES = ("auto", "library", "onednn")
_ZEN5 = 26  # family of the first AMD processors that add and multiply 512 bits at once
_choice = "auto"


def choose_products(choice: str) -> None:
    """Who multiplies float32 matrices on CPUs from now on in `linear`, `gelu_linear` and `multiply_into`.

    Args:
        choice: "library": PyTorch's own way; "onednn": oneDNN; "auto": oneDNN where it was measured to be twice as
            quick, AMD's processors with AVX-512 from family 26 on.

    Raises:
        ValueError: another choice, or oneDNN where this PyTorch has none.

    Example:
        >>> choose_products("library")
        >>> choose_products("auto")
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"choose_products: expected one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "onednn" and not torch.backends.mkldnn.is_available():
        raise ValueError("choose_products: expected auto or library, as this PyTorch has no oneDNN; got 'onednn'")
    _choice = choice


@functools.cache
def _onednn_is_quicker() -> bool:
    """By the processor and not by a race: no bit of a resumed run may hang on a timing."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    found = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in found.items()}
    family = fields.get("cpu family", "")
    return fields.get("vendor_id") == "AuthenticAMD" and family.isdigit() and int(family) >= _ZEN5


def takes_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies these rows, which are not under autocast."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or _choice == "library" or torch.compiler.is_compiling():
        return False
    return _choice == "onednn" or _onednn_is_quicker()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (M,K) times b (K,N), plus bias (N,), any strides; no gradient where oneDNN multiplies."""
    return product_by("onednn" if takes_onednn(a) else "library", a, b, bias)


def product_by(library: str, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` by one of `CHOICES` but "auto"."""
    if library == "onednn" and min(*a.shape, b.shape[1]) > 0:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b.t()), bias, "none", [], "")
        return out
    return a @ b if bias is None else torch.addmm(bias, a, b)


def multiply_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *, add: bool = False) -> None:
    """out = a b + bias, or out += a b, without gradient; who multiplies, `choose_products` says.

    Args:
        out: (M,N), any strides whose elements do not overlap.
        a, b: (M,K) and (K,N) in the dtype of out.
        bias: (N,), not with `add`.
        add: keep what is in `out`.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.

    Example:
        >>> sums = torch.zeros(2, 4)
        >>> multiply_into(sums, torch.ones(2, 3), torch.ones(3, 4), add=True)
        >>> sums[0]
        tensor([3., 3., 3., 3.])
    """
    if takes_onednn(a):
        made = product(a, b, bias)
        out.add_(made) if add else out.copy_(made)
    elif add:
        out.addmm_(a, b)
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _dense(x: Tensor) -> Tensor:
    """x (M,N), its rows or its columns side by side: with gaps oneDNN takes a hundred times as long."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as `torch.nn.functional.linear`; who multiplies, `choose_products` says.

    Args:
        x: (..., C) floating.
        weight: (D, C) in the dtype of x but under autocast.
        bias: (D,) in that of weight, or None.

    Returns:
        (..., D). Differentiable once in all three where oneDNN multiplies, else as often as PyTorch's.

    Raises:
        ValueError, RuntimeError: shapes or dtypes that do not fit.

    Example:
        >>> linear(torch.randn(2, 10, 48), torch.randn(96, 48)).shape
        torch.Size([2, 10, 96])
    """
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1] and weight.dtype == torch.float32
    if not (fits and takes_onednn(x)) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Linear.apply(rows, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, (of_x, of_weight, of_bias) = gradients[0], ctx.needs_input_grad
        return (
            product(grad, weight) if of_x else None,
            product(grad.t(), x) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )
