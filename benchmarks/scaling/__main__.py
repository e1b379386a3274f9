"""What 8 to 512 GPUs should give: `python -m benchmarks.scaling [--gpus 8 512] [--recipe speech-base]`.

Rows of `d2v plan` for several recipes, what breaks first, and a picture: the tables of docs/scaling.md. Every figure is
an estimate from the assumptions of `d2v.tools.cluster.Cluster`; nothing here was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from d2v import recipes
from d2v.tools.cluster import Cluster, Estimate, efficiency, estimate, largest_micro
from d2v.tools.paper import count_sizes
from d2v.tools.plan import HEAD, assumptions, cells, limits

from ..harness.plots import figure
from ..harness.record import parse
from ..harness.report import markdown

RECIPES = ("vision-base", "vision-large", "speech-base", "speech-large", "text-base", "text-large")
GPUS = (8, 16, 32, 64, 128, 256, 512)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table, and what breaks first."""
    options = parse(
        "scaling", __doc__, arguments, native=False,
        gpus=(list(GPUS), "numbers of GPUs"),
        recipe=(list(RECIPES), "recipes"),
        parallel=(["ddp"], "some of ddp, fsdp, hybrid"),
        network=(Cluster.network, "Gbit/s and direction of a node"),
        mfu=(Cluster.mfu, "share of the peak, 0 to 1"),
        bandwidth=(Cluster.bandwidth, "share of the links' rates"),
        plot=(None, "draw the recipes into this file"),
    )  # fmt: skip
    for name in ("network", "mfu", "bandwidth"):
        if getattr(options, name) <= 0.0:
            raise SystemExit(f"--{name}: expected more than 0, got {getattr(options, name):g}")
    if any(gpus < 1 for gpus in options.gpus):
        raise SystemExit(f"--gpus: expected numbers of 1 or more, got {options.gpus}")
    if not set(options.parallel) <= {"ddp", "fsdp", "hybrid"}:
        raise SystemExit(f"--parallel: expected some of ddp, fsdp, hybrid; got {options.parallel}")
    cluster = Cluster(network=options.network, mfu=options.mfu, bandwidth=options.bandwidth)
    configs = [recipes.get(name) for name in options.recipe]
    found = [estimate(c, n, p, cluster) for c in configs for p in options.parallel for n in options.gpus]
    print("\n".join([assumptions(cluster), "", markdown(HEAD, (cells(one, cluster) for one in found)), ""]))
    for name in options.recipe:
        print(f"- {first_limit(name, cluster, options.gpus)}")
    if options.plot is not None:
        draw(options.recipe, options.gpus, cluster, Path(options.plot))


def first_limit(recipe: str, cluster: Cluster, gpus: Sequence[int]) -> str:
    """What a recipe runs into first as GPUs are added, under DDP."""
    config = recipes.get(recipe)
    words = [f"{recipe}: {config.data.global_batch} samples an update, so as many GPUs at most"]
    found = [(n, limits(estimate(config, n, "ddp", cluster), cluster)) for n in sorted(gpus)]
    first = next(((n, what) for n, what in found if what), None)
    words.append(f"first limit at {first[0]} GPUs: {', '.join(first[1])}" if first else "no limit in this range")
    most = largest_micro(config, "ddp", 8, cluster)
    words.append(f"largest micro-batch that fits with DDP {most} (recipe: {config.data.micro_batch})")
    return "; ".join(words)


def draw(names: Sequence[str], gpus: Sequence[int], cluster: Cluster, path: Path) -> None:
    """Efficiency, hours and exposed communication over GPUs; hollow where the batch had to grow."""
    note = f"{cluster.mfu:.0%} of {cluster.peak / 1e12:.0f} TFLOP/s, {cluster.network:.0f} Gbit/s a node"
    title = f"Estimates, no measurement: {note}. Hollow: batch larger than the recipe's"
    xs, configs = sorted(gpus), [recipes.get(name) for name in names]
    with figure(path, title, (15, 4.2), 1, 3, dpi=70) as (axes,):
        for i, config in enumerate(configs):
            rows: list[Estimate] = [estimate(config, n, "ddp", cluster) for n in xs]
            for axis, ys in zip(axes, ([efficiency(r, cluster) for r in rows], [r.hours for r in rows]), strict=False):
                axis.plot(xs, ys, "-", color=f"C{i}", label=config.recipe)
                colours = ["white" if row.kappa > 1 else f"C{i}" for row in rows]
                axis.scatter(xs, ys, s=25, c=colours, edgecolors=f"C{i}", zorder=3)
        config = max(configs, key=lambda config: count_sizes(config).trained)
        for parallel, style in (("ddp", "-"), ("fsdp", "--"), ("hybrid", ":")):
            ys = [1e3 * estimate(config, n, parallel, cluster).exposed for n in xs]  # type: ignore[arg-type]
            axes[2].plot(xs, ys, f"o{style}", color="C0", markersize=4, label=parallel)
        axes[0].set(ylabel="efficiency, DDP", ylim=(0.0, 1.05))
        axes[1].set(ylabel="hours for the published samples, DDP", yscale="log")
        axes[2].set(ylabel=f"exposed communication, ms, {config.recipe}")
        for axis in axes:
            axis.set(xscale="log", xlabel="GPUs")
            axis.set_xticks(xs, [str(n) for n in xs])
            axis.minorticks_off()
            axis.grid(True, alpha=0.3)
            axis.legend(fontsize=7)


if __name__ == "__main__":
    main()
