"""`d2v plan`: whether a run fits on so many GPUs, how long it takes and what it moves; and which settings change with
the batch. Every figure is an estimate, by `d2v.tools.cluster`."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2v.config import Config
from d2v.data import make_modality
from d2v.files import write_atomically
from d2v.folder import latest_checkpoint, load_json
from d2v.tools.cluster import (
    Cluster,
    Estimate,
    Parallel,
    calibrate,
    efficiency,
    estimate,
    find_machine,
    largest_micro,
    volumes,
)
from d2v.tools.paper import count_sizes, length_of
from d2v.train.checkpoint import STATE, check_state
from d2v.train.logging import median_seconds, read_metrics
from d2v.train.run_dir import read_run

HEAD = ("recipe", "parallel", "GPUs", "batch", "micro × forwards", "GB a GPU", "ms an update", "exposed ms",
        "efficiency", "a second", "hours", "limits")  # fmt: skip
SHORT_OF = 0.8
"""Efficiency below which a row is marked."""
LARGEST_KAPPA = 4
"""Above it the rules for a larger batch leave nothing of Adam's first moment."""
LINE = 2_000
"""Bytes of a line of metrics, with what TensorBoard takes for it; 1,300 without held-out data and probes."""
UNCOUNTED = ("run.activation_checkpointing", "run.compile", "run.teacher_graph", "ema.freeze_after", "target.cache",
             "data.batch_seconds", "data.valid", "probe.train")  # fmt: skip
"""Settings that change time or memory, but not the estimate."""


def plan(
    config: Config, base: Config, machine: str | Mapping[str, Any], *, gpus: Sequence[int], hours: float | None = None,
    mfu: float | None = None, network: float | None = None, failures: float | None = None,
    measured: float | None = None, measured_gpus: int | None = None, run_folder: Path | None = None,
    output: Path | None = None, given: Collection[str] = (),
) -> str:  # fmt: skip
    """A text, every line of which begins with ESTIMATE: a row for each number of GPUs and each way to use them and, of
    one number, all the rest.

    Args:
        config: what is to be run; base: the recipe that it came from.
        machine: as `d2v.tools.cluster.find_machine` takes it.
        gpus: numbers of GPUs.
        hours: that there are.
        mfu, network: in place of the machine's.
        failures: of a GPU in an hour.
        measured: seconds that an update of `config` took on measured_gpus (None: the first of `gpus`).
        run_folder: of a run on such a machine, whose seconds count.
        output: file for the figures as JSON, for --run.plan.
        given: options that keep their values where the batch changes.

    Raises:
        ValueError: values that do not go together, or a run without metrics.
    """
    if not gpus or min(gpus) < 1:
        raise ValueError(f"gpus: expected numbers of 1 or more, got {list(gpus)}")
    if len(gpus) > 1 and any(value is not None for value in (output, hours, failures)):
        raise ValueError(f"gpus: expected one number with --output, --hours or --failures, got {list(gpus)}")
    if sum(value is not None for value in (mfu, measured, run_folder)) > 1:
        raise ValueError("measured: expected one of --mfu, --measured and --run, got several")
    if measured is None and measured_gpus is not None:
        raise ValueError(f"measured_gpus: expected --measured with it, got {measured_gpus} alone")
    cluster = find_machine(machine)
    cluster = dataclasses.replace(cluster, mfu=mfu or cluster.mfu, network=network or cluster.network)
    parallel, notes = parallel_of(config, cluster), [assumptions(cluster)]
    if run_folder is not None:
        cluster, note = _calibrate_by_run(run_folder, cluster)
        notes.append(note)
    elif measured is not None:
        count = measured_gpus or gpus[0]
        cluster = calibrate(config, count, parallel, measured, cluster)
        notes.append(_describe_measured(measured, count, cluster))
    if "run.steps" not in given:  # the same number of samples
        steps = base.run.steps * base.data.global_batch / config.data.global_batch
        config = config.change(run={"steps": round(steps)})
    lines = [f"assumed    {note}" for note in [*notes, *_uncounted(config)]]
    ways: dict[Parallel, int] = {"ddp": 1, "fsdp": 2, "hybrid": cluster.node + 1}
    rows = [estimate(config, n, way, cluster) for n in gpus for way, least in ways.items() if n >= least]
    lines += _align([HEAD[1:], *(cells(row, cluster)[1:] for row in rows)])
    if len(gpus) == 1:
        found = estimate(config, gpus[0], parallel, cluster)
        figures = measure(found, cluster, failures) | {"machine": machine if isinstance(machine, str) else "own"}
        lines += [*describe(found, cluster, figures, hours), *_describe_batch(found, base, given)]
        if output is not None:
            write_atomically(output, json.dumps({"estimate": True, **figures}, indent=1))
    return "\n".join(f"ESTIMATE  {line}" for line in lines)


def parallel_of(config: Config, cluster: Cluster) -> Parallel:
    """How the run uses its GPUs; `ValueError` for shards that are neither of all GPUs nor of a node."""
    if config.run.parallel == "ddp" or config.run.shard_ranks is None:
        return config.run.parallel
    if config.run.shard_ranks != cluster.node:
        raise ValueError(f"run.shard_ranks: expected the {cluster.node} GPUs of a node, got {config.run.shard_ranks}")
    return "hybrid"


def _calibrate_by_run(folder: Path, cluster: Cluster) -> tuple[Cluster, str]:
    seconds, checkpoint = median_seconds(read_metrics(folder / "metrics.jsonl")), latest_checkpoint(folder)
    if not seconds or checkpoint is None:
        raise ValueError(f"run: expected a run with metrics and a checkpoint, found none at {str(folder)!r}")
    config, state = read_run(str(folder)), load_json(checkpoint / STATE)
    check_state(state, checkpoint)
    cluster = calibrate(config, state["ranks"], parallel_of(config, cluster), seconds, cluster)
    return cluster, _describe_measured(seconds, state["ranks"], cluster)


def _describe_measured(seconds: float, gpus: int, cluster: Cluster) -> str:
    """The share also tells of a time that was measured on another machine."""
    share = f"{cluster.mfu:.3g} of the peak, in place of the share above and of the host's time"
    return f"an update took {seconds:.3g} s on {gpus} GPU{'s' * (gpus > 1)}, as measured: {share}"


def _uncounted(config: Config) -> Iterator[str]:
    names = [n.replace("_", "-") for n in UNCOUNTED if operator.attrgetter(n)(config) not in (None, False)]
    if names:
        yield f"without what these change: {', '.join(names)}"
    if config.run.precision == "fp32":
        yield "products in bfloat16 (--run.precision bf16), not in fp32 as configured"


# ---- rows


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


def cells(found: Estimate, cluster: Cluster) -> tuple[str, ...]:
    """One line of the table, for `HEAD`."""
    config, length = found.config, length_of(found.config)
    seconds = "s of audio" if config.stem.modality == "speech" else "s"
    unit = "tokens" if "ids" in config.traits else seconds if length else make_modality(config).noun
    return (
        f"`{config.recipe}`", found.parallel, str(found.gpus), str(found.batch),
        f"{found.micro} × {found.forwards}", f"{found.memory / 1e9:.1f}", f"{found.seconds * 1e3:.1f}",
        f"{found.exposed * 1e3:.1f}", f"{efficiency(found, cluster):.0%}",
        f"{found.samples_per_second * (length or 1.0):,.0f} {unit}", f"{found.hours:.1f}",
        "; ".join(limits(found, cluster)),
    )  # fmt: skip


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{text:{w}}" for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]


# ---- all the rest of one row


def measure(found: Estimate, cluster: Cluster, failures: float | None = None) -> dict[str, Any]:
    """The figures of a plan, in seconds, hours and bytes; they are what --run.plan takes."""
    config, sizes, run = found.config, count_sizes(found.config), found.config.run
    sent = volumes(sizes, found.parallel, found.gpus, found.forwards, cluster)
    updates = round(found.updates)
    # Weights and two moments of what is trained, and the averages, all float32.
    checkpoint = 12.0 * sizes.trained + 4.0 * sizes.averaged
    written = math.ceil(updates / run.checkpoint_every)
    kept = run.keep_checkpoints + (updates // run.keep_every if run.keep_every else 0) + (run.keep_best is not None)
    figures = {
        "recipe": config.recipe, "gpus": found.gpus, "parallel": found.parallel, "global_batch": found.batch,
        "micro_batch": found.micro, "forwards": found.forwards, "fits": found.memory <= cluster.memory,
        "memory_bytes": found.memory, "step_seconds": found.seconds, "updates": updates, "hours": found.hours,
        "gpu_hours": found.hours * found.gpus, "sent_bytes": sent, "checkpoint_bytes": checkpoint,
        "checkpoints_written": written, "checkpoints_kept": min(kept, written),
        "disk_bytes": min(kept + 1, written) * checkpoint, "metrics_bytes": math.ceil(updates / run.log_every) * LINE,
    }  # fmt: skip
    if failures is not None:
        # A failure comes anywhere between two checkpoints.
        lost, restarts = run.checkpoint_every / 2.0 * found.seconds / 3600.0, failures * found.gpus * found.hours
        figures |= {"restarts": restarts, "lost_hours": restarts * lost}
    return figures


def describe(found: Estimate, cluster: Cluster, figures: Mapping[str, Any], hours: float | None) -> Iterator[str]:
    """Memory, time, network, disk and failures of a plan."""
    most, every = largest_micro(found.config, found.parallel, found.gpus, cluster), found.config.run.checkpoint_every
    fits = "fits" if figures["fits"] else "does NOT fit"
    yield (
        f"memory     {found.memory / 1e9:.1f} of {cluster.memory / 1e9:.0f} GB a GPU: {fits}, {found.parallel}, "
        f"--data.micro-batch {found.micro} × {found.forwards} forwards; largest micro-batch that fits: {most}"
    )
    yield (
        f"time       {found.seconds:.3g} s an update, {figures['updates']:,} updates of {found.batch}: "
        f"{found.hours:.1f} hours, {figures['gpu_hours']:.1f} GPU-hours"
    )
    if hours is not None:
        fit = int(hours * 3600.0 / found.seconds)
        share, needed = min(fit / found.updates, 1.0), _describe_needed(found, hours, cluster)
        yield f"budget     {hours:g} hours: {fit:,} updates, {share:.0%} of them; {needed}"
    sent = figures["sent_bytes"]
    yield (
        f"network    {sum(sent.values()) / 1e9:.2f} GB a GPU sends an update "
        f"({', '.join(f'{name} {size / 1e9:.2f}' for name, size in sent.items())}), "
        f"{sum(sent.values()) * figures['updates'] / 1e12:.1f} TB in all"
    )
    yield (
        f"disk       {figures['disk_bytes'] / 1e9:.1f} GB: checkpoints of {figures['checkpoint_bytes'] / 1e9:.2f} GB "
        f"every {every:,} updates, {figures['checkpoints_written']:,} written, {figures['checkpoints_kept']:,} kept "
        f"and one being written; metrics {figures['metrics_bytes'] / 1e6:.0f} MB besides"
    )
    if "restarts" in figures:
        yield (
            f"failures   {figures['restarts']:.2g} restarts, which lose {figures['lost_hours']:.2g} hours together "
            "(each half of what lies between two checkpoints), besides the time to notice and to start again"
        )


def _describe_needed(found: Estimate, hours: float, cluster: Cluster) -> str:
    """The least number of GPUs, up to a node or of whole nodes, with which the schedule takes no longer."""
    node, batch = cluster.node, found.config.data.global_batch
    counts = [1 << i for i in range(20)]
    counts = [n for n in (*(n for n in counts if n < node), *(n * node for n in counts)) if n <= LARGEST_KAPPA * batch]
    rows = [estimate(found.config, n, found.parallel, cluster) for n in counts]
    rows = [row for row in rows if row.memory <= cluster.memory]
    enough = next((row for row in rows if row.hours <= hours), None)
    if enough is None:
        best = min(rows, key=lambda row: row.hours, default=None)
        return "no number of GPUs fits them all" + (f", {best.gpus} take {best.hours:.1f} hours" if best else "")
    larger = f" (batch × {enough.kappa:.3g})" if enough.kappa > 1 else ""
    return f"all of them need {enough.gpus} GPUs{larger}: {enough.hours:.1f} hours"


# ---- a change of the batch


def scale(config: Config, kappa: float) -> dict[str, Any]:
    """Settings of the same training with a batch of `kappa` times as many samples.

    Square-root rule for Adam: Malladi et al. 2022, arXiv:2205.10287; decay of the average: Busbridge et al. 2023,
    arXiv:2307.13813; see docs/distributed.md, "When the batch must change". `ValueError` where nothing of a moment is
    left.
    """
    optim, ema, root = config.optim, config.ema, math.sqrt(kappa)
    betas = tuple(1.0 - kappa * (1.0 - beta) for beta in optim.betas)
    if min(betas) <= 0.0:
        raise ValueError(f"expected a batch of less than × {1.0 / (1.0 - min(optim.betas)):.3g}, got × {kappa:.3g}")
    return {
        "data.global_batch": round(config.data.global_batch * kappa), "run.steps": round(config.run.steps / kappa),
        "optim.learning_rate": optim.learning_rate * root, "optim.betas": betas, "optim.eps": optim.eps / root,
        "optim.weight_decay": optim.weight_decay * root, "optim.warmup_steps": round(optim.warmup_steps / kappa),
        **({"optim.hold_steps": round(optim.hold_steps / kappa)} if optim.hold_steps else {}),
        "ema.start": ema.start**kappa, "ema.end": ema.end**kappa,
        **({"ema.anneal_steps": round(ema.anneal_steps / kappa)} if ema.anneal_steps is not None else {}),
    }  # fmt: skip


def _describe_batch(found: Estimate, base: Config, given: Collection[str]) -> Iterator[str]:
    """The settings that go with another batch, as options, but for those that were given."""
    kappa = found.batch / base.data.global_batch
    if kappa == 1.0:
        return
    yield f"batch      × {kappa:.3g}{': beyond the rules' if kappa > LARGEST_KAPPA else ''}; settings that go with it:"
    try:
        values = scale(base, kappa) | {"run.steps": round(found.updates)}
    except ValueError as error:
        yield f"options    none: {error}"
        return
    options = {name.replace("_", "-"): value for name, value in values.items()}
    kept = set(given) - {"data.global-batch", "run.steps"}
    yield f"options    {' '.join(f'--{name} {_show(value)}' for name, value in options.items() if name not in kept)}"


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_show, value))
    return f"{value:.8g}" if isinstance(value, float) else str(value)
