"""What a run writes about itself: means between two lines, `metrics.jsonl`, trackers, the console, `data.json`.

Values stay on the device until a line is written. What is measured is in `d2v.train.monitors`. Rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from d2v.config.fields import shorten
from d2v.data.loader import BadSamples
from d2v.files import parse_json, write_atomically
from d2v.folder import PLAN, STATUS, load_plan
from d2v.runtime import format_seconds, span
from d2v.train.monitors import find_low_ranks
from d2v.train.trackers import Tracker, Trackers

Item = TypeVar("Item")
DIGESTS = "digests.jsonl"
"""In the run folder: what `d2v.train.digests` writes."""
Reduce = Callable[[Tensor], object]
"""Sums a float64 tensor over all ranks, in place."""


class MetricWindow:
    """What happened between two lines: running sums of 0-D device tensors in float64, host counts, and the clock.

    Nothing is read from the device until `means`. With several ranks every rank adds its part of a value (its share of
    the loss, say), so that the sum over ranks is the value.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._running_since: float | None = None
        self.reset()

    def reset(self) -> None:
        """Starts a new window."""
        self.updates = self._timed_updates = 0
        self._sums: Tensor | None = None
        self._counts: dict[str, float] = {}
        self._seconds = self._waited = 0.0
        if self._running_since is not None:
            self._running_since = time.perf_counter()

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds the values of one update; the names are the same at every update."""
        row = torch.stack([v.detach().double() for v in values.values()])
        if self._sums is None:
            self.names, self._sums = list(values), torch.zeros_like(row)
        self._sums += row
        self.updates += 1
        self._timed_updates += 1

    def count(self, **amounts: float) -> None:
        """Adds host numbers that are known without the device, tokens or FLOPs of this rank, for `rates`."""
        for name, amount in amounts.items():
            self._counts[name] = self._counts.get(name, 0.0) + amount

    def means(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Mean of each value over the updates since the last reset; waits for the device.

        reduce: sums a float64 device tensor over ranks in place; every rank calls then. The window goes on unchanged.
        """
        sums = self.tensors(reduce).get("metrics.sums")
        return {} if sums is None else dict(zip(self.names, (sums / self.updates).tolist(), strict=True))

    def rates(self, reduce: Reduce | None = None, device: torch.device | None = None) -> dict[str, float]:
        """Each count per second since the last reset, by the clock of this rank.

        reduce: as in `means`; device: where it wants its tensor.
        """
        if not self._counts:
            return {}
        totals = torch.tensor(list(self._counts.values()), dtype=torch.float64, device=device)
        if reduce is not None:
            reduce(totals)
        seconds = self.seconds()
        return {k: v / seconds if seconds else math.nan for k, v in zip(self._counts, totals.tolist(), strict=True)}

    # ---- the clock --------------------------------------------------------------------------------------------

    def resume_clock(self) -> None:
        """Counts time from here."""
        self._running_since = time.perf_counter()

    def pause_clock(self) -> None:
        """Stops counting, for work that is not training."""
        self._seconds, self._running_since = self.seconds(), None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is time blocked on the loader."""
        start = time.perf_counter()
        try:
            with span("data"):
                yield
        finally:
            if self._running_since is not None:
                self._waited += time.perf_counter() - start

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; the time until each comes counts as `waiting`."""
        source = iter(items)
        while True:
            with self.waiting():
                item = next(source, None)
            if item is None:
                return
            yield item

    def seconds(self) -> float:
        """Seconds that the clock counted since the last reset."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self._seconds + running

    def step_seconds(self) -> float:
        """Seconds per update of this process since the last reset."""
        return self.seconds() / max(self._timed_updates, 1)

    def data_wait(self) -> float:
        """Share of that time this process was blocked on the loader, 0 to 1."""
        seconds = self.seconds()
        return min(self._waited / seconds, 1.0) if seconds else 0.0

    # ---- state ------------------------------------------------------------------------------------------------

    def tensors(self, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """State for a checkpoint, with `state`. reduce: as in `means`, for the sums of all ranks."""
        if self._sums is None:
            return {}
        sums = self._sums.clone()
        if reduce is not None:
            reduce(sums)
        return {"metrics.sums": sums}

    def state(self) -> dict[str, Any]:
        """Names and count for a checkpoint (JSON)."""
        return {"names": self.names, "updates": self.updates}

    def restore(
        self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device, main: bool = True
    ) -> None:
        """Continues a window; its time and counts start anew. main: one rank takes the sums, the others begin at 0."""
        self.names, self.updates, self._sums = list(state["names"]), int(state["updates"]), None
        if self.updates:
            sums = tensors["metrics.sums"].to(device).clone()
            self._sums = sums if main else torch.zeros_like(sums)


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, flushed at once; NaN and infinity are written as null."""

    def __init__(self, path: Path, after: int) -> None:
        """Keeps the lines of updates up to `after`, drops later ones (of a run killed after its checkpoint)."""
        kept = [line for line in read_metrics(path) if line["step"] <= after] if after else []
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`; a last line cut off by a kill is left out, as is all from a damaged one on."""
    lines: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    with contextlib.suppress(ValueError):
        for text in texts:
            line = parse_json(text)
            if type(line.get("step")) is not int:
                break
            lines.append(line)
    return lines


def in_notebook() -> bool:
    """Whether the kernel of a notebook runs this process."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


def median_seconds(lines: Iterable[Mapping[str, Any]]) -> float:
    """Of an update, over lines of metrics; 0: none has it."""
    found = [seconds for line in lines if isinstance(seconds := line.get("step_seconds"), float)]
    return statistics.median(found) if found else 0.0


class Progress:
    """Rate, time left, loss, content spread and share of time spent waiting for data, on standard error: a bar on a
    terminal and in a notebook, a line per log interval elsewhere."""

    def __init__(self, update: int, steps: int) -> None:
        self.steps = steps
        self._said: set[str] = set()
        self._bar: Any = None
        if in_notebook():
            from tqdm.auto import tqdm  # a widget where ipywidgets is installed

            self._bar = tqdm(total=steps, initial=update, unit="update")
        elif sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=update, unit="update", dynamic_ncols=True, file=sys.stderr)

    def advance(self) -> None:
        """One update is done."""
        if self._bar is not None:
            self._bar.update()

    def show(self, line: Mapping[str, Any]) -> None:
        """Shows a line of metrics; says once that an effective rank has collapsed."""
        values = describe_line(line)
        if self._bar is not None:
            self._bar.set_postfix_str(values, refresh=False)
        else:
            left = (self.steps - line["step"]) * line["step_seconds"]
            self.say(f"update {line['step']}/{self.steps}: {values}, {format_seconds(left)} left")

        for name, text in find_low_ranks(line).items():
            if name not in self._said:
                self.say(f"note: {text}")
            self._said.add(name)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def describe_line(line: Mapping[str, Any]) -> str:
    """Loss, spread, rate and data wait of a line of metrics in a few words; what the line lacks is left out."""
    words = {
        "loss": "loss {:.4f}", "valid_loss": "valid {:.4f}", "probe_linear": "probe {:.1%}", "probe_knn": "kNN {:.1%}",
        "content_spread": "spread {:.3f}",
        "samples_per_second": "{:.0f} samples/s", "data_wait": "data wait {:.0%}",
    }  # fmt: skip
    return ", ".join(text.format(line[name]) for name, text in words.items() if name in line)


class Report:
    """Lines of metrics and notes of a run, wherever they go; on other ranks than the first it is silent."""

    def __init__(
        self, folder: Path, update: int, steps: int, active: bool, trackers: Mapping[str, Tracker] | None = None
    ) -> None:
        self.folder, self.update, self.steps, self.active = folder, update, steps, active
        if active:
            self._file = MetricsFile(folder / "metrics.jsonl", update)
            self._line: dict[str, Any] = {"step": update}
            self._digests: MetricsFile | None = None
            self._progress = Progress(update, steps)
            self._trackers = Trackers(trackers or {} if update < steps else {}, self.say)

    def begin(self, config: Any, bad: BadSamples) -> None:
        """Begins the trackers; says what is worth knowing before the first update."""
        if self.active:
            self._write_status("running")
            self._trackers.start(config, self.folder, self.update)
        if self.update < self.steps and config.optim.warmup_steps >= self.steps:
            warmup = f"--optim.warmup-steps {config.optim.warmup_steps} covers all {self.steps} updates"
            self.say([f"{warmup}: the learning rate rises to the end"])
        source = bad.source
        self.say(f"left out {count} {reason}" for reason, count in source.left_out.items())
        if source.rejected:
            self.say([f"{len(source.rejected)} of {source.indexed} cannot be used; {bad.examples()}"])

    def say(self, notes: Iterable[str]) -> None:
        """Notes, a line each."""
        for note in notes if self.active else ():
            self._progress.say(f"note: {note}")

    def advance(self) -> None:
        """One update is done."""
        if self.active:
            self._progress.advance()

    def write(self, line: Mapping[str, Any]) -> None:
        """A line of metrics."""
        if self.active:
            self._file.write(line)
            self._line = dict(line)
            self._write_status("running")
            self._trackers.log(line)
            self._progress.show(line)

    def _write_status(self, state: str, reason: str = "") -> None:
        """`STATUS`: the last line of metrics, how far the run is, and since when this is known."""
        line, numbers = self._line, (int, float)
        left = (self.steps - line["step"]) * line["step_seconds"] if "step_seconds" in line else None
        entries = {
            "state": state, "reason": reason, "step": line["step"], "last_step": self.steps, "seconds_left": left,
            "time": time.time(), "host": socket.gethostname(), "pid": os.getpid(),
            "metrics": {k: v for k, v in line.items() if isinstance(v, numbers) and math.isfinite(v)},
        }  # fmt: skip
        with contextlib.suppress(OSError):  # a full disk shows elsewhere
            write_atomically(self.folder / STATUS, json.dumps(entries, indent=1))

    def write_digests(self, line: Mapping[str, Any]) -> None:
        """A line of `DIGESTS`."""
        if self.active:
            self._digests = self._digests or MetricsFile(self.folder / DIGESTS, self.update)
            self._digests.write(line)

    def write_counts(self, bad: BadSamples) -> None:
        """`data.json`: how many samples there are, how many were bad, what was converted and what was left out."""
        if self.active:
            counts: dict[str, Any] = {
                "samples": len(bad.source), "bad": len(bad.entries), "converted": bad.converted,
                "left_out": bad.source.left_out,
            }  # fmt: skip
            write_atomically(self.folder / "data.json", json.dumps(counts, indent=1))

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Closes the files, and tells the trackers how the run has ended."""
        if self.active:
            stopped = kind is not None and issubclass(kind, (SystemExit, KeyboardInterrupt))
            state = "finished" if kind is None else "stopped" if stopped else "failed"
            self._write_status(state, " ".join(str(error).split()) if state == "failed" else "")
            self._trackers.finish(state)
            self._file.close()
            if self._digests is not None:
                self._digests.close()
            self._progress.close()

    def summarise(self, update: int, bad: BadSamples) -> None:
        """The last words of a run that reached its end."""
        if not self.active:
            return
        text = f"finished {update} updates in {self.folder}"
        if bad.converted:
            text += "; converted: " + ", ".join(f"{n} ({kind})" for kind, n in sorted(bad.converted.items()))
        if left_out := bad.source.left_out:
            text += "; left out: " + ", ".join(f"{n} {reason}" for reason, n in left_out.items())
        if bad.entries:
            text += f"; {len(bad.entries)} samples could not be decoded, {bad.examples()}"
        print(text, file=sys.stderr)
        if (self.folder / PLAN).is_file():
            print(compare_plan(self.folder), file=sys.stderr)


def compare_plan(folder: Path) -> str:
    """What the `PLAN` of a run says beside what its metrics say."""
    try:
        plan = load_plan(folder / PLAN)
    except ValueError as error:  # the run has reached its end all the same
        return f"note: {error}"
    lines = read_metrics(folder / "metrics.jsonl")
    memory = max((size for line in lines if isinstance(size := line.get("memory_bytes"), int)), default=0)
    return (
        f"planned {plan['step_seconds']:.3g} s a step, {plan['memory_bytes'] / 1e9:.1f} GB a GPU (ESTIMATE for "
        f"{plan['gpus']} x {shorten(plan['machine'])}); measured {median_seconds(lines):.3g} s, "
        f"{memory / 1e9:.1f} GB on the first rank"
    )
