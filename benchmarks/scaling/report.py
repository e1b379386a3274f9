"""Table and plot of `benchmarks.scaling`; both say that they hold estimates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..harness.plots import figure
from ..harness.report import markdown
from .estimate import Cluster, Estimate, count_sizes, efficiency, estimate, largest_micro, sample_of

HEAD = ("recipe", "parallel", "GPUs", "batch", "micro × forwards", "GB a GPU", "ms an update", "exposed ms",
        "efficiency", "a second", "hours", "limits")  # fmt: skip
SHORT_OF = 0.8
"""Efficiency below which a row is marked."""
LARGEST_KAPPA = 4
"""Above it the rules of docs/distributed.md for a larger batch leave nothing of Adam's first moment."""


def limits(found: Estimate, cluster: Cluster) -> list[str]:
    """What is wrong with a row, the worst first."""
    result = []
    if found.memory > cluster.memory:
        result.append("memory")
    if found.kappa > 1:
        result.append(f"batch × {found.kappa:.3g}{': beyond the rules' if found.kappa > LARGEST_KAPPA else ''}")
    if found.batch % found.gpus:
        result.append("uneven shares")
    if efficiency(found, cluster) < SHORT_OF:
        waiting = found.exposed > found.seconds * (1.0 - SHORT_OF)
        result.append("network" if waiting else "little work a GPU")
    if found.launch_bound:
        result.append("launches")
    return result


def assumptions(cluster: Cluster) -> str:
    """What every figure rests on, in one sentence."""
    return (
        f"Estimates, not measurements: {cluster.peak / 1e12:.0f} TFLOP/s a GPU at {cluster.mfu:.0%}, "
        f"{cluster.memory / 1e9:.0f} GB; inside a node of {cluster.node} {cluster.nvlink / 1e9:.0f} GB/s a GPU, "
        f"between nodes {cluster.network:.0f} Gbit/s a node, both at {cluster.bandwidth:.0%}; {cluster.overlap:.0%} of "
        f"computing can hide communication; {cluster.launch * 1e6:g} us of the host a kernel."
    )


def cells(found: Estimate, cluster: Cluster) -> tuple[object, ...]:
    """One line of the table."""
    unit, amount = sample_of(count_sizes(found.recipe).config)
    return (
        f"`{found.recipe}`", found.parallel, found.gpus, found.batch, f"{found.micro} × {found.forwards}",
        f"{found.memory / 1e9:.1f}", f"{found.seconds * 1e3:.1f}", f"{found.exposed * 1e3:.1f}",
        f"{efficiency(found, cluster):.0%}", f"{found.samples_per_second * amount:,.0f} {unit}", f"{found.hours:.1f}",
        "; ".join(limits(found, cluster)),
    )  # fmt: skip


def first_limit(recipe: str, cluster: Cluster, gpus: Sequence[int]) -> str:
    """What a recipe runs into first as GPUs are added, under DDP."""
    sizes = count_sizes(recipe)
    fits = largest_micro(recipe, "ddp", 8, cluster)
    published = sizes.config.data.micro_batch
    words = [f"{recipe}: {sizes.config.data.global_batch} samples an update, so as many GPUs at most"]
    found = [(n, limits(estimate(recipe, n, "ddp", cluster), cluster)) for n in sorted(gpus)]
    first = next(((n, what) for n, what in found if what), None)
    words.append(f"first limit at {first[0]} GPUs: {', '.join(first[1])}" if first else "no limit in this range")
    words.append(f"largest micro-batch that fits with DDP {fits} (recipe: {published})")
    return "; ".join(words)


def table(found: Sequence[Estimate], cluster: Cluster) -> str:
    """Markdown: assumptions, a row each, and what breaks first."""
    gpus = sorted({one.gpus for one in found})
    ends = [f"- {first_limit(recipe, cluster, gpus)}" for recipe in dict.fromkeys(one.recipe for one in found)]
    rows = markdown(HEAD, (cells(one, cluster) for one in found))
    return "\n".join([assumptions(cluster), "", rows, "", *ends])


def draw(recipes: Sequence[str], gpus: Sequence[int], cluster: Cluster, path: Path) -> None:
    """Efficiency, hours and exposed communication over GPUs; hollow where the batch had to grow."""
    note = f"{cluster.mfu:.0%} of {cluster.peak / 1e12:.0f} TFLOP/s, {cluster.network:.0f} Gbit/s a node"
    title = f"Estimates, no measurement: {note}. Hollow: batch larger than the recipe's"
    xs = sorted(gpus)
    with figure(path, title, (15, 4.2), 1, 3, dpi=70) as (axes,):
        for i, recipe in enumerate(recipes):
            rows = [estimate(recipe, n, "ddp", cluster) for n in xs]
            for axis, ys in zip(axes, ([efficiency(r, cluster) for r in rows], [r.hours for r in rows]), strict=False):
                axis.plot(xs, ys, "-", color=f"C{i}", label=recipe)
                colours = ["white" if row.kappa > 1 else f"C{i}" for row in rows]
                axis.scatter(xs, ys, s=25, c=colours, edgecolors=f"C{i}", zorder=3)
        recipe = max(recipes, key=lambda name: count_sizes(name).trained)
        for parallel, style in (("ddp", "-"), ("fsdp", "--"), ("hybrid", ":")):
            ys = [1e3 * estimate(recipe, n, parallel, cluster).exposed for n in xs]  # type: ignore[arg-type]
            axes[2].plot(xs, ys, f"o{style}", color="C0", markersize=4, label=parallel)
        axes[0].set(ylabel="efficiency, DDP", ylim=(0.0, 1.05))
        axes[1].set(ylabel="hours for the published samples, DDP", yscale="log")
        axes[2].set(ylabel=f"exposed communication, ms, {recipe}")
        for axis in axes:
            axis.set(xscale="log", xlabel="GPUs")
            axis.set_xticks(xs, [str(n) for n in xs])
            axis.minorticks_off()
            axis.grid(True, alpha=0.3)
            axis.legend(fontsize=7)
