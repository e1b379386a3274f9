"""How much of the reduction of gradients hides behind the backward pass: `python -m benchmarks.scaling.overlap`.

Trains a recipe for images on gloo ranks of this machine (DistributedDataParallel), traces a few updates with
torch.profiler, and reads from the trace of rank 0 what was reduced, in how many buckets, and when. The backward pass
ends with its last gradient: what is sent later is waited for.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch._C._profiler import _ExperimentalConfig
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.profiler import ProfilerActivity, profile, record_function

from d2v import Config, recipes
from d2v.train import trainer
from d2v.train.pretraining import pretrain

from ..harness.record import parse
from ..harness.report import markdown

WARM_UP = 3
"""Updates before the trace: after the first one DistributedDataParallel makes its buckets anew."""
HEAD = [
    "reduction",
    "forwards",
    "buckets",
    "MB reduced",
    "of 4 bytes a parameter",
    "MB sent a rank",
    "comm. ms",
    "hidden",
]
_SIZES = {"float": 4, "c10::BFloat16": 2}
Event = Mapping[str, Any]


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    """Prints a row for each reduction and number of forwards; returns them."""
    options = parse(
        "scaling.overlap", __doc__, arguments, native=False,
        recipe=("vision-tiny", "recipe for images"),
        ranks=(2, "gloo ranks"),
        updates=(3, "updates that are traced"),
        samples=(4, "samples of a forward on a rank"),
        reductions=(["fp32", "bf16"], "run.reduce-precision"),
        forwards=([1, 2], "forwards of a rank in an update"),
        set=([], "further settings as NAME=JSON, e.g. encoder.depth=2"),
    )  # fmt: skip
    changes = {name: json.loads(value) for name, _, value in (text.partition("=") for text in options.set)}
    rows = [
        measure(options.recipe, options.ranks, options.updates, options.samples, reduction, forwards, changes)
        for reduction in options.reductions
        for forwards in options.forwards
    ]
    print(markdown(HEAD, ([str(value) for value in row.values()] for row in rows)))
    return rows


def measure(
    recipe: str, ranks: int, updates: int, samples: int, reduction: str, forwards: int, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """A row of the table, a mean over the traced updates."""
    batch = samples * forwards * ranks
    settings = {
        "run.reduce_precision": reduction, "run.steps": WARM_UP + updates, "run.threads": 1, "run.device": "cpu",
        "data.global_batch": batch, "data.micro_batch": samples, "data.workers": 0, "optim.warmup_steps": 1,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for number in range(2 * batch):
            Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(Path(folder, f"{number}.png"))
        places = {"data.path": folder, "run.dir": str(Path(folder, "run"))}
        config = recipes.get(recipe).replace({**settings, **changes, **places})
        launch = LaunchConfig(1, 1, ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="overlap")
        parameters = elastic_launch(launch, trace_run)(config, str(Path(folder, "trace.json")))[0]
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return {"reduction": reduction, "forwards": forwards, **read_trace(events, parameters, ranks, updates)}


def trace_run(config: Config, file: str) -> int:
    """On each rank: a run whose last updates rank 0 traces into a file; returns the number of trained parameters."""
    torch.set_num_threads(1)
    run_update, counts = trainer.Trainer.run_update, set()
    # Reductions in bfloat16 have a thread of their own.
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    tracer = profile(activities=[ProfilerActivity.CPU], record_shapes=True, experimental_config=everywhere)

    def traced(self: trainer.Trainer, batches: Any) -> Any:
        counts.add(sum(p.numel() for p in self.parameters))
        if self.ranks.is_first and self.update == WARM_UP:
            tracer.start()
        step = run_update(self, batches)
        if self.ranks.is_first and self.update == config.run.last:
            tracer.stop()
            tracer.export_chrome_trace(file)
        return step

    trainer.Trainer.run_update = traced  # type: ignore[method-assign]
    trainer.span = lambda name: record_function(f"d2v/{name}")
    pretrain(config)
    return counts.pop()


def read_trace(events: Sequence[Event], parameters: int, ranks: int, updates: int) -> dict[str, Any]:
    """Of one update: buckets, megabytes reduced and their share of 4 bytes a parameter, megabytes that a rank sends,
    milliseconds of communication, and the share of those that lies before the last gradient is computed."""
    spans = sorted(_interval(e) for e in events if e.get("name") == "d2v/backward")
    # Without the hooks of AccumulateGrad, which begin the reductions.
    computed = [
        _interval(e) for e in events
        if str(e.get("name")).startswith("autograd::engine::evaluate_function") and "Accumulate" not in e["name"]
    ]  # fmt: skip
    # A backward pass ends with its last gradient, not when it returns: it waits for the reductions.
    backwards = [(a, max(end for start, end in computed if a <= start <= b)) for a, b in spans]
    sent, reduced, buckets, total, hidden = 0.0, 0, 0, 0.0, 0.0
    for event in events:
        kind, values = str(event.get("name")).removeprefix("gloo:"), event.get("args", {})
        size = _SIZES.get((values.get("Input type") or [""])[0], 0) * int(
            np.prod((values.get("Input Dims") or [[0]])[0])
        )
        if kind not in ("all_reduce", "all_to_all", "all_gather") or kind == event.get("name") or size <= 4:
            continue  # of other kinds, or one number
        start, end = _interval(event)
        total += end - start
        hidden += sum(max(0.0, min(end, b) - max(start, a)) for a, b in backwards)
        others = (ranks - 1) / ranks
        sent += size * {"all_reduce": 2 * others, "all_to_all": others, "all_gather": ranks - 1}[kind]
        if kind != "all_gather":
            buckets, reduced = buckets + 1, reduced + size
    return {
        "buckets": round(buckets / updates, 2),
        "reduced": round(reduced / updates / 1e6, 3),
        "share": round(reduced / updates / (4 * parameters), 4),
        "sent": round(sent / updates / 1e6, 3),
        "milliseconds": round(total / updates / 1e3, 2),
        "hidden": round(hidden / total, 3),
    }


def _interval(event: Event) -> tuple[float, float]:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


if __name__ == "__main__":
    main()
