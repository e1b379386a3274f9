"""Error tables of every operator and dtype against float64, beside a careful float32 computation.

    python -m benchmarks.errors [--markdown FILE]

The calls are those of `python -m d2v_kernels.bench`. "truth" is the operator's definition (the reference backend) in
float64 on the same, already rounded, inputs. "careful" is that definition in float32 with two-pass statistics, rounded
once to the result's dtype. Errors are the largest absolute error over the largest magnitude of the truth, in units of
the result dtype's rounding (half its spacing at 1), so that 1 is what one rounding of the result costs. The inputs have
an ordinary channel mix, one channel with a mean a thousand times its deviation, and one constant channel; averages are
reported for each on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import d2v_kernels as dk
from d2v_kernels.bench import blocks, cases
from d2v_kernels.bench.case import F32, Case, Place

from .harness.record import parse
from .harness.report import markdown

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTLIER, CONSTANT = 0, 1
"""Channels with mean 1000 and deviation 1, and with the value 5.3."""
Result = dict[str, Tensor]


class Row(NamedTuple):
    """One line of the table: an operator, what of it, the result's dtype, errors in rounding units."""

    op: str
    what: str
    inputs: torch.dtype
    result: torch.dtype
    ours: float
    careful: float


class HardPlace(Place):
    """A CPU whose inputs have an outlier and a constant channel."""

    def inputs(self, seed: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        x = self.normal(seed, *shape).float()
        x[..., 2:] *= 0.5 + (seed + 4) % 8
        x[..., OUTLIER] += 1000.0
        x[..., CONSTANT] = 5.3
        return x.to(dtype).to(self.kind(dtype))


class OrdinaryPlace(HardPlace):
    """Without the outlier, which would be in all channels of a convolution's group."""

    def inputs(self, seed: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        x = self.normal(seed, *shape)
        return x.to(dtype).to(self.kind(dtype))


class ZeroBranch(HardPlace):
    """A residual branch of zeros, so that the sum, which the operator gives back rounded, is exact."""

    def inputs(self, seed: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        x = super().inputs(seed, *shape, dtype=dtype)
        return x if seed else torch.zeros_like(x)


def rounding_unit(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2.0


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute error over the largest magnitude of the truth."""
    size = float(truth.abs().max())
    worst = float((actual.double() - truth.double()).abs().max())
    return worst / size if size else worst


class Check(NamedTuple):
    """A case and how its results are reported."""

    case: Case
    results: tuple[str, ...]
    """Names of the tensors that a call returns, in their order."""
    steps: int = 1
    view: Callable[[str, Tensor], Result] = lambda name, t: {name: t}
    """Parts of a result, by name."""
    place: type[Place] = HardPlace


def channels(name: str, y: Tensor) -> Result:
    """The kinds of channels apart; a constant one has no instance or batch norm."""
    parts = {"ordinary channels": y[..., 2:], "outlier channel": y[..., OUTLIER]}
    parts |= {"constant channel": y[..., CONSTANT]} if name.startswith("layer") else {}
    return {f"{name}: {what}": part for what, part in parts.items()}


def tail(dtype: torch.dtype) -> Callable[[str, Tensor], Result]:
    """Ordinary channels of GELU; below -3, where 1 + erf cancels, on its own."""
    below = HardPlace(torch.device("cpu")).inputs(0, 2000, 96, dtype=dtype) < -3.0

    def view(name: str, y: Tensor) -> Result:
        return {name: y[..., 2:], **({"below -3": y[below]} if name == "result" else {})}

    return view


def checks(dtype: torch.dtype) -> Iterator[Check]:
    """Every operator; matrices and layers in this dtype, vectors and averages in float32."""
    given: dict[str, Any] = {"dtype": dtype, "goals": {}}
    for norm, out_norm in (("instance", "none"), ("layer", "none"), ("instance", "layer"), ("batch", "none")):
        case = cases.average("", 8, 2, 499, 96, norm=norm, out_norm=out_norm, **given)
        yield Check(case, (f"{norm}, {out_norm}",), view=channels)
    for steps in (1, 100):
        case, kinds = cases.ema("", 20, 1, copies=True, **given), ("average", "copy")
        names = tuple(f"{steps} steps: {kind}" for kind in kinds for _ in cases.parameter_shapes(20, 1))
        yield Check(case, names, steps=steps)
    yield Check(cases.gather_backward("", 2, 50, 64, 8, 20, **given), ("gradient",))
    yield Check(cases.restore_backward("", 16, 50, 20, 64, **given), ("", "gradient of the mask token"))
    yield Check(cases.restore("", 16, 50, 20, 64, std=1.0, **given), ("noise",))
    for beta in (0.0, 1.0):
        names = ("gradient", "loss", "prediction_std", "target_std")
        case = cases.loss("", 3000, 3000, 96, beta=beta, **given)
        yield Check(case, tuple(f"beta {beta:g}: {name}" for name in names))
    names = ("result", "gradient of x", "gradient of w", "gradient of b")
    yield Check(blocks.norm_gelu("", 2000, 96, **given), names)
    # In 16 bits the bias has the error of what is normalised, which is rounded; its own result is not.
    of_convolution = names if dtype == torch.float32 else names[:3]
    yield Check(blocks.convolution("", 2, 199, 96, 96, 4, 7, **given), of_convolution, place=OrdinaryPlace)
    yield Check(blocks.gelu("", 2000, 96, **given), ("result", "gradient"), view=tail(dtype))
    names = ("result", "gradient of the branch", "gradient of the residual", *names[2:])
    yield Check(blocks.norm("", 4, 500, 96, **given), names, place=ZeroBranch)
    names = ("result", "gradient of query, key and value", "gradient of the scale")
    yield Check(blocks.attention("", 2, 199, 4, 64, dropout=0.1, **given), names)


def run(check: Check, backend: str, to: torch.dtype | None) -> Result:
    """Results with all inputs cast, or (None) as they are; parts of one name are joined, nameless ones left out."""
    found: dict[str, list[Tensor]] = {}
    with dk.use_backend(backend):
        call = check.case.make(check.place(torch.device("cpu"), to=to), 0)["d2v"]
        for _ in range(check.steps):
            result = call()
    for name, t in zip(check.results, tree_leaves(result), strict=False):
        for what, part in check.view(name, t.detach()).items() if name else ():
            found.setdefault(what, []).append(part.flatten())
    return {what: torch.cat(parts) for what, parts in found.items()}


def compare(check: Check, backend: str) -> Iterator[Row]:
    """Rows of one check."""
    ours = run(check, backend, None)
    careful, truth = (run(check, "reference", to) for to in (torch.float32, torch.float64))
    for what, actual in ours.items():
        unit, rounded = rounding_unit(actual.dtype), careful[what].to(actual.dtype)
        errors = (relative_error(t, truth[what]) / unit for t in (actual, rounded))
        op = check.case.op.split()[0]
        yield Row(op, what, check.case.dtype, actual.dtype, *errors)


def collect_rows(backend: str) -> list[Row]:
    """All rows of a backend; cases it does not take are left out."""
    rows: list[Row] = []
    for dtype in DTYPES:
        for check in checks(dtype):
            try:
                rows += compare(check, backend)
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
