"""What 8 to 512 GPUs should give: `python -m benchmarks.scaling [--gpus 8 512] [--recipe speech-base]`.

Every figure is an estimate from the assumptions of `Cluster`; nothing here was measured on a GPU. docs/scaling.md
explains the formulas and says what breaks first.
"""

from __future__ import annotations

from pathlib import Path

from ..harness.record import parse
from . import report
from .estimate import Cluster, estimate

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
    found = [estimate(r, n, p, cluster) for r in options.recipe for p in options.parallel for n in options.gpus]
    print(report.table(found, cluster))
    if options.plot is not None:
        report.draw(options.recipe, options.gpus, cluster, Path(options.plot))


if __name__ == "__main__":
    main()
