"""Error tables of every operator and dtype against float64, beside a careful float32 computation.

    python -m benchmarks.errors [--markdown FILE]

"truth" is the operator's definition (the reference backend) in float64 on the same, already rounded, inputs. "careful"
is that definition in float32 with two-pass statistics, rounded once to the result's dtype. Errors are the largest
absolute error over the largest magnitude of the truth, in units of the result dtype's rounding (half its spacing at
1), so that 1 is what one rounding of the result costs. The inputs have an ordinary channel mix, one channel with a mean
a thousand times its deviation, and one constant channel, each reported on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import d2v_kernels as dk

from .harness.record import parse
from .harness.report import markdown

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTLIER, CONSTANT = 0, 1
"""Channels of `make_layers` with mean 1000 and deviation 1, and with the value 5.3."""
Result = dict[str, Tensor]


class Row(NamedTuple):
    """One line of the table: an operator, what of it, the result's dtype, errors in rounding units."""

    op: str
    what: str
    inputs: torch.dtype
    result: torch.dtype
    ours: float
    careful: float


def make_layers(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> list[Tensor]:
    """`count` float64 tensors (B,T,C) with an outlier and a constant channel."""
    layers = []
    for i in range(count):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * (0.5 + i)
        x[..., OUTLIER] = 1000.0 + torch.randn(shape[:2], generator=generator, dtype=torch.float64)
        x[..., CONSTANT] = 5.3
        layers.append(x)
    return layers


def rounding_unit(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2.0


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute error over the largest magnitude of the truth."""
    size = float(truth.abs().max())
    worst = float((actual.double() - truth.double()).abs().max())
    return worst / size if size else worst


def compare(op: str, inputs: torch.dtype, run: Callable[[torch.dtype | None], Result], backend: str) -> Iterator[Row]:
    """Rows of one case. `run(None)` computes with the tensors as they are, `run(dtype)` with all of them cast."""
    with dk.use_backend(backend):
        ours = run(None)
    with dk.use_backend("reference"):
        careful, truth = run(torch.float32), run(torch.float64)
    for what, actual in ours.items():
        unit = rounding_unit(actual.dtype)
        rounded = careful[what].to(actual.dtype)
        errors = (relative_error(t, truth[what]) / unit for t in (actual, rounded))
        yield Row(op, what, inputs, actual.dtype, *errors)


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy of `x` in `dtype`, or as it is."""
    return x.to(x.dtype if dtype is None else dtype, copy=True)


def differentiate(function: Callable[..., Tensor], leaves: Iterable[Tensor], grad: Tensor, names: Iterable[str],
                  to: torch.dtype | None) -> Result:  # fmt: skip
    """The result and the gradients of the leaves, which are cast first."""
    leaves = [cast(t, to).detach().requires_grad_() for t in leaves]
    y = function(*leaves)
    gradients = torch.autograd.grad(y, leaves, cast(grad, to))
    return {"result": y.detach(), **{f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}}


def layer_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Callable[..., Result]]]:
    """average_layers with each norm; channels apart."""
    layers = [x.to(dtype) for x in make_layers(8, (2, 499, 96), generator)]
    for norm, out_norm in (("instance", "none"), ("layer", "none"), ("instance", "layer"), ("batch", "none")):

        def run(to: torch.dtype | None, norm: str = norm, out_norm: str = out_norm) -> Result:
            y = dk.average_layers([cast(x, to) for x in layers], norm=norm, out_norm=out_norm)
            parts = {"ordinary channels": y[..., 2:], "outlier channel": y[..., OUTLIER]}
            if norm == "layer":
                parts["constant channel"] = y[..., CONSTANT]
            return {f"{norm}, {out_norm}: {name}": part for name, part in parts.items()}

        yield "average_layers", run


def ema_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Callable[..., Result]]]:
    """update_ema_: one and a hundred steps into a float32 average, with and without a copy."""
    start = torch.randn(5000, generator=generator)
    sources = torch.randn(100, 5000, generator=generator).to(dtype)
    for steps in (1, 100):

        def run(to: torch.dtype | None, steps: int = steps) -> Result:
            average = cast(start, to)
            copies = [torch.empty_like(start, dtype=dtype)] if to is None and dtype != torch.float32 else None
            for source in sources[:steps]:
                dk.update_ema_([average], [cast(source, to)], 0.999, copies=copies)
            low = copies[0] if copies is not None else average
            return {f"{steps} steps: average": average, f"{steps} steps: copy": low}

        yield "update_ema_", run


def token_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Callable[..., Result]]]:
    """Gradients of gather_tokens (each row read by 8 masks) and restore_tokens (one mask token for many places), and
    the noise."""
    x = torch.randn(2, 50, 64, generator=generator).to(dtype)
    index = torch.stack([torch.randperm(50, generator=generator)[:20] for _ in range(16)])
    grad = torch.randn(16, 20, 64, generator=generator).to(dtype)
    kept, token = torch.randn(16, 20, 64, generator=generator).to(dtype), torch.randn(64, generator=generator).to(dtype)
    restore = torch.stack([torch.randperm(50, generator=generator) for _ in range(16)])
    grad_restored = torch.randn(16, 50, 64, generator=generator).to(dtype)

    def gather(to: torch.dtype | None) -> Result:
        found = differentiate(lambda a: dk.gather_tokens(a, index, clones=8), [x], grad, "x", to)
        return {"gradient": found["gradient of x"]}

    def refill(to: torch.dtype | None) -> Result:
        found = differentiate(
            lambda a, b: dk.restore_tokens(a, restore, fill=b), (kept, token), grad_restored, "xt", to
        )
        return {"gradient of the mask token": found["gradient of t"]}

    def noise(to: torch.dtype | None) -> Result:
        return {"noise": dk.restore_tokens(cast(kept, to), restore, fill=dk.Noise(1.0, torch.arange(16)))}

    yield "gather_tokens", gather
    yield "restore_tokens", refill
    yield "restore_tokens", noise


def loss_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Callable[..., Result]]]:
    """masked_regression_loss: loss, monitors, gradient; a target channel with a large mean."""
    target = make_layers(1, (1, 3000, 96), generator)[0][0].float()
    prediction = (target.double() + torch.randn(3000, 96, generator=generator, dtype=torch.float64)).to(dtype)
    for beta in (0.0, 1.0):

        def run(to: torch.dtype | None, beta: float = beta) -> Result:
            p = cast(prediction, to).detach().requires_grad_()
            out = dk.masked_regression_loss(p, cast(target, to), beta=beta, scale=0.125)
            (gradient,) = torch.autograd.grad(out.loss, p)
            return {
                f"beta {beta:g}: loss": out.loss.detach(), f"beta {beta:g}: gradient": gradient,
                f"beta {beta:g}: prediction_std": out.prediction_std, f"beta {beta:g}: target_std": out.target_std,
            }  # fmt: skip

        yield "masked_regression_loss", run


def gelu_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Callable[..., Result]]]:
    """layer_norm_gelu and gelu: results and gradients; gelu also below 0 alone, where 1 + erf cancels."""
    x = make_layers(1, (1, 2000, 96), generator)[0][0].to(dtype)
    weight, bias = (torch.randn(96, generator=generator) for _ in range(2))
    grad = torch.randn(2000, 96, generator=generator).to(dtype)

    yield "layer_norm_gelu", partial(differentiate, dk.layer_norm_gelu, (x, weight, bias), grad, "xwb")
    line = torch.linspace(-7.0, 7.0, 20001, dtype=torch.float64).to(dtype)

    def alone(to: torch.dtype | None) -> Result:
        found = differentiate(dk.gelu, [line], torch.ones_like(line), "x", to)
        y = found["result"]
        return {"result": y, "below -3": y[line < -3.0], "gradient": found["gradient of x"]}

    yield "gelu", alone


def attention_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Callable[..., Result]]]:
    """attention with a bias by distance, and dropout: result and gradients."""
    qkv, grad = (torch.randn(2, 199, c, 4, 64, generator=generator).to(dtype) for c in (3, 1))
    slopes, places = 0.2 * torch.rand(4, generator=generator), torch.arange(199).expand(2, 199)
    keys = torch.tensor([3, 4])

    def attend(*leaves: Tensor) -> Tensor:
        return torch.ops.d2v.attention(*leaves, places, None, None, keys, 0.1, 0.125)[0]

    leaves, names = (*qkv.unbind(2), slopes), ("query", "key", "value", "the slopes")
    yield "attention", partial(differentiate, attend, leaves, grad[:, :, 0], names)


def norm_cases(dtype: torch.dtype, generator: torch.Generator) -> Iterator[tuple[str, Callable[..., Result]]]:
    """dropout_add_layer_norm of a branch of zeros, so that the sum, which it gives back rounded, is exact."""
    total = make_layers(1, (4, 500, 96), generator)[0].to(dtype)
    weight, bias = (torch.randn(96, generator=generator) for _ in range(2))
    grad = torch.randn(4, 500, 96, generator=generator).to(dtype)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dk.dropout_add_layer_norm(torch.zeros_like(x), x, weight, bias)[0]

    yield "dropout_add_layer_norm", partial(differentiate, norm, (total, weight, bias), grad, "xwb")


FAMILIES = (layer_cases, ema_cases, token_cases, loss_cases, gelu_cases, norm_cases, attention_cases)


def collect_rows(backend: str, seed: int = 0) -> list[Row]:
    """All rows of a backend; cases it does not take are left out."""
    rows: list[Row] = []
    for dtype in DTYPES:
        for family in FAMILIES:
            for op, run in family(dtype, torch.Generator().manual_seed(seed)):
                try:
                    rows += compare(op, dtype, run, backend)
                except NotImplementedError:
                    continue
    return rows


def format_table(rows: list[Row]) -> str:
    """Markdown table: a row per result, a column per dtype of the inputs, "this backend / careful float32"."""
    cells: dict[tuple[str, str], dict[torch.dtype, str]] = {}
    for row in rows:
        cells.setdefault((row.op, row.what), {})[row.inputs] = f"{row.ours:.2f} / {row.careful:.2f}"
    lines = ((f"`{op}`", what, *(values.get(d, "") for d in DTYPES)) for (op, what), values in cells.items())
    return markdown(("operator", "result", *(str(d).removeprefix("torch.") for d in DTYPES)), lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables."""
    options = parse(
        "errors", __doc__, arguments,
        backend=(("native", "reference", "triton"), "whose errors"),
        markdown=(None, "write the table there too"),
    )  # fmt: skip
    text = format_table(collect_rows(options.backend))
    print(text)
    if options.markdown is not None:
        Path(options.markdown).write_text(text + "\n")


if __name__ == "__main__":
    main()
