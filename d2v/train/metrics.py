"""What a run writes about itself: means between two lines, `metrics.jsonl`, TensorBoard.

Values stay on the device until a line is written. What is measured is in `d2v.train.monitors`.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from d2v.files import write_atomically
from d2v.runtime import span

Item = TypeVar("Item")
Reduce = Callable[[Tensor], object]
"""Sums a float64 tensor over all ranks, in place."""


class Window:
    """What happened between two lines: running sums of 0-D device tensors in float64, host counts, and the clock.

    Nothing is read from the device until `means`. With several ranks every rank adds its part of a value (its share of
    the loss, say), so that the sum over ranks is the value.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.updates = 0
        self._sums: Tensor | None = None
        self._counts: dict[str, float] = {}
        self._timed_updates = 0
        self._seconds = self._waited = 0.0
        self._running_since: float | None = None

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds the values of one update; the names are the same at every update."""
        row = torch.stack([v.detach().double() for v in values.values()])
        if self._sums is None or not self.updates:
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
        if self._sums is None or not self.updates:
            return {}
        sums = self._sums.clone()
        if reduce is not None:
            reduce(sums)
        return dict(zip(self.names, (sums / self.updates).tolist(), strict=True))

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
        if self._running_since is not None:
            self._seconds += time.perf_counter() - self._running_since
        self._running_since = None

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
                try:
                    item = next(source)
                except StopIteration:
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

    def reset(self) -> None:
        """Starts a new window."""
        self.updates = self._timed_updates = 0
        self._counts = {}
        self._seconds = self._waited = 0.0
        if self._running_since is not None:
            self._running_since = time.perf_counter()

    def tensors(self, reduce: Reduce | None = None) -> dict[str, Tensor]:
        """State for a checkpoint, with `state`. reduce: as in `means`, for the sums of all ranks."""
        if self._sums is None or not self.updates:
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
        self.names, self.updates = list(state["names"]), int(state["updates"])
        self._sums = None
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
        self._file.write(json.dumps({k: finite_or_none(v) for k, v in line.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`; a last line cut off by a kill is left out."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


class Board:
    """TensorBoard scalars in `folder`; entries after update `after` of an earlier try are hidden."""

    def __init__(self, folder: Path, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes every finite number of a line under its key."""
        for key, value in line.items():
            if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(key, value, line["step"])

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()
