"""What holds of every operator under the compiler's meaning: NaN in means NaN out, and results are rounded, not cut.

The interpreter computes here as generated code does (`support.interpreter`; `test_machine_code.py` reads the same rules
in PTX). Wrong guesses are planted, and must be found.

Not shown: instructions that PTX's assembler makes of these; a NaN that a race would lose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from support import reference
from support.accuracy import assert_rounded
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter

from d2v_kernels import registry, use_backend
from d2v_kernels.triton import runtime

ops = torch.ops.d2v
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOKENS = 70  # more than one block of queries and of keys


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


# ---- arguments of every operator -----------------------------------------------------------------------------------


def arguments(op: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Random arguments; results have the dtype where the operator allows it."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(kind)

    keys, index = torch.tensor([1, 2]), torch.tensor([[0, 2, 1, 2], [1, 0, 2, 5]])
    rows, wide = normal(12, 40), normal(40, kind=F32)
    half, last = BF16 if dtype == F32 else dtype, (wide, keys, 0.5, 1e-5)
    # Whole numbers, whose sums are exact in every dtype: the norm is that of the rounded sum, the definition's is not.
    branch, residual = ((4.0 * normal(2, 6, 40, kind=F32)).round().to(dtype) for _ in range(2))
    affine, tall = (wide, normal(40), *last[1:]), lambda: normal(2, 6, 40, kind=F32)
    return {
        "average_layers": lambda: ([normal(2, 6, 40) for _ in range(3)], "instance", "layer", None, 1e-5, dtype),
        "update_ema_": lambda: ([normal(300)], [normal(300)], [normal(300)], 0.3, None),
        "gather_tokens": lambda: (normal(2, 6, 40), index, 1),
        "gather_tokens_backward": lambda: (normal(2, 4, 100), index % 2, 1, 6),
        "restore_tokens": lambda: (normal(2, 2, 100), index, None, keys, 0.1),
        "restore_tokens_backward": lambda: (normal(2, 4, 100), index, 2, -1),
        "masked_regression_loss": lambda: (rows, normal(12, 40), None, None, 0.5, 0.3),
        "masked_regression_loss_backward": lambda: (wide[0], rows, normal(12, 40), None, None, 0.0, 0.3),
        "layer_norm_gelu": lambda: (rows, wide, normal(40), 1e-5),
        "layer_norm_gelu_backward": lambda: (normal(12, 40), rows, normal(40), normal(40), 1e-5),
        "dropout_add_layer_norm": lambda: (branch, residual, *affine),
        "dropout_add_layer_norm_backward": lambda: (*(normal(2, 6, 40) for _ in range(3)), *last),
        "dropout_add_layer_norm_mixed": lambda: (branch.to(half), residual.float(), *affine, True, True),
        "dropout_add_layer_norm_mixed_backward": lambda: (
            tall(),
            normal(2, 6, 40, kind=half),
            tall(),
            tall(),
            *last,
            half,
        ),
        "conv_layer_norm_gelu": lambda: (normal(2, 6, 40), normal(40, 10, 3), wide, True, 1e-5),
        "conv_layer_norm_gelu_backward": lambda: (
            *(normal(2, 6, 40) for _ in range(3)),
            normal(40, 10, 3),
            wide,
            True,
            1e-5,
        ),
        "gelu": lambda: (rows,),
        "gelu_backward": lambda: (normal(12, 40), rows),
        "gelu_backward_": lambda: (normal(12, 40), rows),
        "attention": lambda: (*(normal(1, TOKENS, 1, 16) for _ in range(3)), *rest(generator)),
        "attention_backward": lambda: attention_backward([normal(1, TOKENS, 1, 16) for _ in range(4)], rest(generator)),
    }[op]()


def rest(generator: torch.Generator) -> tuple[Any, ...]:
    slopes = 0.01 * torch.rand(1, generator=generator)
    return (slopes, torch.arange(TOKENS).int()[None], None, None, None, 0.0, 0.25)


def attention_backward(inputs: list[Tensor], more: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with the result and log-sum-exp of a forward."""
    out, log_sum = reference.attention(*(x.double() for x in inputs[1:]), more[0].double(), *more[1:])
    return (*inputs, out.to(inputs[0].dtype), log_sum.float(), *more)


TRITON = next(b for b in registry.backends() if b.name == "triton")
OPERATORS = sorted(TRITON.implementations)


def converted(value: Any, kind: torch.dtype | None) -> Any:
    """Copies of tensors, floating ones and dtypes as `kind`."""
    if isinstance(value, list | tuple):
        return type(value)(converted(v, kind) for v in value)
    if isinstance(value, torch.dtype):
        return kind or value
    if not isinstance(value, Tensor):
        return value
    return value.to(kind) if kind and value.is_floating_point() else value.clone()


def results(op: str, given: tuple[Any, ...], call: Callable[..., Any]) -> list[Tensor]:
    """What the operator returns, and what it writes in place."""
    out = call(*given)
    found = [] if out is None else [out] if isinstance(out, Tensor) else list(out)
    if op == "update_ema_":
        found += [*given[0], *given[2]]
    return found + ([given[0]] if op == "gelu_backward_" else [])


def of_kernel(op: str, given: tuple[Any, ...]) -> list[Tensor]:
    return results(op, converted(given, None), getattr(ops, op))


def of_definition(op: str, given: tuple[Any, ...]) -> list[Tensor]:
    return results(op, converted(given, torch.float64), getattr(reference, op))


# ---- NaN -----------------------------------------------------------------------------------------------------------


def floats_in(value: Any) -> list[Tensor]:
    """All floating tensors among the arguments."""
    if isinstance(value, list | tuple):
        return [t for v in value for t in floats_in(v)]
    return [value] if isinstance(value, Tensor) and value.is_floating_point() else []


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("op", OPERATORS)
def test_nan_in_means_nan_out(op: str, dtype: torch.dtype) -> None:
    """Of every input, in its first, a middle and its last place: NaN where the definition has it, nowhere else."""
    for number in range(len(floats_in(arguments(op, dtype)))):
        for share in (0.0, 1.0) if op == "attention_backward" else (0.0, 0.5, 1.0):
            given = arguments(op, dtype)
            flat = floats_in(given)[number].view(-1)
            flat[int(share * (len(flat) - 1))] = math.nan
            for got, truth in zip(of_kernel(op, given), of_definition(op, given), strict=True):
                found = got.isnan()
                if (op, number) == ("conv_layer_norm_gelu_backward", 3):
                    found &= truth.isnan()  # times the zeros outside the grid, which the definition leaves out there
                assert torch.equal(found, truth.isnan()), (op, number, share)


@triton.jit
def clamped_slope_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    d = tl.load(x + i)
    tl.store(out + i, tl.minimum(tl.maximum(d, -1.0), 1.0))
    tl.store(out + BLOCK, tl.max(d, 0))


def test_extrema_drop_nan_as_in_generated_code() -> None:
    """The smooth loss's slope as one would write it first: -1 for NaN."""
    x, out = torch.tensor([0.5, math.nan, 3.0, -3.0]), torch.zeros(5)
    clamped_slope_kernel[(1,)](x, out, BLOCK=4)
    assert out.tolist() == [0.5, -1.0, 1.0, -1.0, 3.0]


# ---- rounding ------------------------------------------------------------------------------------------------------

COPIES = {"gather_tokens"}
FLOAT32 = {"masked_regression_loss"}


@pytest.fixture
def truncating(monkeypatch) -> None:
    """Takes the correction of the interpreter's cast away: the last cast of every kernel cuts bits off."""
    monkeypatch.setattr(runtime, "INTERPRETED", tl.constexpr(False))
    convert = triton_interpreter._convert_float
    monkeypatch.setattr(triton_interpreter, "_convert_float", convert.__wrapped__)


@pytest.mark.parametrize("op", sorted(set(OPERATORS) - COPIES - FLOAT32))
class TestRounding:
    def check(self, op: str, dtype: torch.dtype) -> int:
        """How many results have the dtype."""
        given = arguments(op, dtype)
        pairs = [*zip(of_kernel(op, given), of_definition(op, given), strict=True)]
        failures = 0
        for got, truth in pairs:
            try:
                assert_rounded(got, truth)
            except AssertionError:
                failures += 1
        return failures

    @pytest.mark.parametrize("dtype", [BF16, F16])
    def test_results_are_rounded(self, op: str, dtype: torch.dtype) -> None:
        assert self.check(op, dtype) == 0

    def test_cut_results_are_found(self, op: str, truncating: None) -> None:
        assert self.check(op, BF16) >= 1


# ---- wrong guesses ---------------------------------------------------------------------------------------------------


@triton.jit
def wrong_kernel(x, out, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x_i = tl.load(x + i)
    if KIND == "cast":
        tl.store(out + i, (x_i.to(tl.float32) / 3.0).to(tl.bfloat16))
    elif KIND == "store":
        tl.store(out + i, x_i.to(tl.float32) / 3.0)
    elif KIND == "arithmetic":
        tl.store(out + i, x_i + x_i)
    elif KIND == "reduction":
        tl.store(out, tl.sum(x_i, 0))
    elif KIND == "dot":
        square = tl.load(x + i[:, None] * BLOCK + i[None, :])
        tl.store(out, tl.sum(tl.sum(tl.dot(square, square), 1), 0))
    else:
        tl.store(out + i, runtime.rounded(x_i.to(tl.float32) / 3.0, tl.bfloat16))


@pytest.mark.parametrize("kind", ["cast", "store", "arithmetic", "reduction", "dot"])
def test_what_the_interpreter_does_wrongly_is_an_error(kind: str) -> None:
    x, out = torch.full((16, 16), 1.25, dtype=BF16), torch.zeros(16, dtype=BF16)
    with pytest.raises(Exception, match="Differs"):
        wrong_kernel[(1,)](x, out, KIND=kind, BLOCK=16)
    wrong_kernel[(1,)](x, out, KIND="right", BLOCK=16)
    assert torch.equal(out, (x[0].float() / 3.0).to(BF16))
