"""Monitors of a run: what is logged, how it is measured, and when it means collapse.

The published monitor `target_std` is pinned near 1 wherever targets are instance- or batch-normed and layer-normed, so
it says little there; `content_spread` and `explained_variance` stand beside it. Values stay on the device until a line
is written.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v.checkpoint import write_atomically
from d2v.config import Run

_EPS = 1e-6


def measure_content_spread(targets: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Standard deviation over samples at a fixed position, averaged over positions and channels.

    What the position alone does not explain; 0 when every sample has the same target. targets (B,T,C) -> 0-D; NaN for
    fewer than 2 samples. lengths (B,): tokens of a row before its padding, which does not count; positions that fewer
    than 2 rows have are left out.
    """
    if len(targets) < 2:
        return torch.full((), math.nan, device=targets.device)
    values = targets.float()
    if lengths is None:
        return (values.var(dim=0, unbiased=True) + _EPS).sqrt().mean()
    places = torch.arange(values.shape[1], device=values.device)
    valid = (places < lengths.to(values.device)[:, None])[..., None]
    count = valid.sum(dim=0)
    mean = (values * valid).sum(dim=0) / count.clamp_min(1)
    variance = ((values - mean).square() * valid).sum(dim=0) / (count - 1).clamp_min(1)
    return (variance + _EPS).sqrt()[count[:, 0] >= 2].mean()


def measure_explained_variance(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - mean squared error / variance of the target over rows; both (P,C) -> 0-D. 0: no better than the mean."""
    error = (prediction.float() - target.float()).square().mean()
    variance = target.float().var(dim=0, unbiased=False).mean()
    return 1.0 - error / (variance + _EPS)


class Window:
    """Running sums of 0-D device tensors between two lines, in float64; nothing is read until `means`."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.updates = 0
        self._sums: Tensor | None = None
        self._timed_updates = 0
        self._seconds = 0.0
        self._running_since: float | None = None

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds the values of one update; the names are the same at every update."""
        row = torch.stack([v.detach().double() for v in values.values()])
        if self._sums is None or not self.updates:
            self.names, self._sums = list(values), torch.zeros_like(row)
        self._sums += row
        self.updates += 1
        self._timed_updates += 1

    def means(self) -> dict[str, float]:
        """Mean of each value over the updates since the last reset; waits for the device."""
        if self._sums is None or not self.updates:
            return {}
        return dict(zip(self.names, (self._sums / self.updates).tolist(), strict=True))

    def resume_clock(self) -> None:
        """Counts time from here."""
        self._running_since = time.perf_counter()

    def pause_clock(self) -> None:
        """Stops counting, for work that is not training."""
        if self._running_since is not None:
            self._seconds += time.perf_counter() - self._running_since
        self._running_since = None

    def step_seconds(self) -> float:
        """Seconds per update of this process since the last reset."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return (self._seconds + running) / max(self._timed_updates, 1)

    def reset(self) -> None:
        """Starts a new window."""
        self.updates = self._timed_updates = 0
        self._seconds = 0.0
        if self._running_since is not None:
            self._running_since = time.perf_counter()

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint, with `state`."""
        return {} if self._sums is None or not self.updates else {"metrics.sums": self._sums}

    def state(self) -> dict[str, Any]:
        """Names and count for a checkpoint (JSON)."""
        return {"names": self.names, "updates": self.updates}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Continues a window; its time starts anew."""
        self.names, self.updates = list(state["names"]), int(state["updates"])
        self._sums = tensors["metrics.sums"].to(device).clone() if self.updates else None


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


def find_failure(line: Mapping[str, Any], run: Run, samples: int) -> str | None:
    """Why a run must stop after this line of metrics, or None. `samples`: rows that content_spread was taken over.

    Comparisons are written so that NaN raises the alarm.
    """
    broken = {k: line[k] for k in ("loss", "grad_norm") if k in line and not math.isfinite(line[k])}
    if broken:
        return f"not finite: {', '.join(f'{k} {v}' for k, v in broken.items())}"
    limits = {"prediction_std": run.collapse_prediction_std, "content_spread": run.collapse_content_spread}
    if line["step"] <= run.collapse_after or min(limits.values()) <= 0.0 or samples < 2:
        return None
    if any(line[name] >= limit for name, limit in limits.items()):
        return None
    found = ", ".join(f"{name} {line[name]:.2g} (limit {limit:g})" for name, limit in limits.items())
    return f"collapse: {found}"
