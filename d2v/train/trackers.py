"""Programs that keep the curves of runs - TensorBoard, W&B, MLflow, Trackio, functions of users - behind three methods.

`metrics.jsonl` is written whatever they do. Nothing goes over a network unless the user's environment says so: then
WANDB_MODE, MLFLOW_TRACKING_URI or TRACKIO_SPACE_ID are set.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from d2v.config.fields import flatten_config
from d2v.files import parse_json, write_atomically
from d2v.runtime import keep_random_state

PROJECT = "d2v"
"""Project of W&B and Trackio, experiment of MLflow, where the environment names none."""


class Tracker(Protocol):
    """What takes the lines of metrics of a run, on rank 0."""

    def start(self, config: dict[str, Any], folder: Path, resumed: int) -> None:
        """Before the first line. config: the run's, as in its config.json; resumed: update that it goes on after, 0 for
        a new run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The finite numbers of a line of metrics, of update `step`."""

    def finish(self, status: str) -> None:
        """The run has "finished", was "stopped" by a signal, or has "failed"."""


class TensorBoard:
    """Scalars in RUN/tensorboard; those after the update that a run goes on after are hidden."""

    def start(self, config: dict[str, Any], folder: Path, resumed: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def finish(self, status: str) -> None:
        self._writer.close()


class _Continued:
    """A tracker with an id for each run: RUN/<name>.json keeps it with the last update that was logged, so that a run
    that goes on has the same, and no update twice."""

    name: str
    _run: Any

    def start(self, config: dict[str, Any], folder: Path, resumed: int) -> None:
        self._file = folder / f"{self.name}.json"
        known: dict[str, Any] = {}
        if resumed and self._file.is_file():
            known = parse_json(self._file.read_text(encoding="utf-8"))
        self._last = known["step"] if type(known.get("step")) is int else 0
        given = known.get("id")
        # It becomes part of paths.
        self._id = given if isinstance(given, str) and re.fullmatch(r"[\w-]{1,200}", given) else ""
        self._id = self.open(config, folder.resolve(), self._id)
        self._remember(self._last)

    def open(self, config: dict[str, Any], folder: Path, known: str) -> str:
        """Begins a run, or goes on with the one of the id `known`; returns its id."""
        raise NotImplementedError

    def _remember(self, step: int) -> None:
        self._last = step
        write_atomically(self._file, json.dumps({"id": self._id, "step": step}))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._last:
            self.write(step, values)
            self._remember(step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A line that was not logged yet."""
        self._run.log(dict(values), step=step)

    def finish(self, status: str) -> None:
        self._run.finish()


class Wandb(_Continued):
    """W&B, offline in RUN/wandb unless WANDB_MODE says otherwise."""

    name = "wandb"

    def open(self, config: dict[str, Any], folder: Path, known: str) -> str:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=folder.name, id=known or uuid.uuid4().hex[:12],
            resume="allow", dir=str(folder), mode=os.environ.get("WANDB_MODE", "offline"), config=config,
            settings={"console": "off"},
        )  # fmt: skip
        return str(self._run.id)

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=int(status == "failed"))


class MLflow(_Continued):
    """MLflow, in RUN/mlflow.db unless MLFLOW_TRACKING_URI names a place."""

    name = "mlflow"

    def open(self, config: dict[str, Any], folder: Path, known: str) -> str:
        mlflow: Any = importlib.import_module("mlflow")
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = mlflow.MlflowClient(tracking_uri=place)
        if known:
            self._client.update_run(known, status="RUNNING")
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        number = found.experiment_id if found is not None else self._client.create_experiment(name)
        number = str(self._client.create_run(number, run_name=folder.name).info.run_id)
        params = [mlflow.entities.Param(key, str(value)[:500]) for key, value in flatten_config(config).items()]
        for first in range(0, len(params), 100):  # as many as a call takes
            self._client.log_batch(number, params=params[first : first + 100])
        return number

    def write(self, step: int, values: Mapping[str, float]) -> None:
        metric, now = importlib.import_module("mlflow").entities.Metric, int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[metric(key, value, now, step) for key, value in values.items()])

    def finish(self, status: str) -> None:
        self._client.set_terminated(self._id, {"finished": "FINISHED", "stopped": "KILLED"}.get(status, "FAILED"))


class Trackio(_Continued):
    """Trackio, in its own folder on this machine (TRACKIO_DIR)."""

    name = "trackio"

    def open(self, config: dict[str, Any], folder: Path, known: str) -> str:
        trackio: Any = importlib.import_module("trackio")
        name = known or f"{re.sub(r'[^a-zA-Z0-9_-]', '-', folder.name)[:100]}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(project=PROJECT, name=name, config=config, resume="allow", embed=False)
        return name


class Prometheus:
    """RUN/metrics.prom, the last line of metrics in the text format that node exporters collect."""

    def start(self, config: dict[str, Any], folder: Path, resumed: int) -> None:
        client: Any = importlib.import_module("prometheus_client")
        self._client, self._registry = client, client.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._file, self._labels = folder / "metrics.prom", {"run": folder.name, "recipe": str(config.get("recipe"))}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in {"step": step, **values}.items():
            if name not in self._gauges:
                gauge = self._client.Gauge(f"d2v_{name}", name, list(self._labels), registry=self._registry)
                self._gauges[name] = gauge.labels(**self._labels)
            self._gauges[name].set(value)
        self._client.write_to_textfile(str(self._file), self._registry)

    def finish(self, status: str) -> None:
        """The file stays."""


class _Function:
    """A user's function of (step, values)."""

    def __init__(self, function: Callable[[int, Mapping[str, float]], object]) -> None:
        self._function = function

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._function(step, values)

    def start(self, config: dict[str, Any], folder: Path, resumed: int) -> None:
        pass

    def finish(self, status: str) -> None:
        pass


_KINDS: dict[str, tuple[type, str]] = {
    "tensorboard": (TensorBoard, "torch.utils.tensorboard"), "wandb": (Wandb, "wandb"), "mlflow": (MLflow, "mlflow"),
    "trackio": (Trackio, "trackio"), "prometheus": (Prometheus, "prometheus_client"),
}  # fmt: skip
"""Trackers by their names in `run.track`, and the module that each needs."""
_SILENT = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
"""What keeps packages from reporting to their makers; counts where it is set before their import."""


def make_trackers(names: Sequence[str], more: Iterable[Any] = ()) -> dict[str, Tracker]:
    """The trackers of `run.track`, and a user's: objects with the methods of `Tracker`, classes of such, or functions
    of (step, values); by what they are called in messages.

    `ValueError` for a package that is not installed, and for what is none of these.
    """
    if "none" in names and len(names) > 1:
        raise ValueError(f"run.track: expected none alone, got {' '.join(names)}")
    found: dict[str, Tracker] = {}
    for name in names if "none" not in names else ():
        for variable, value in _SILENT.items():
            os.environ.setdefault(variable, value)
        kind, module = _KINDS[name]
        try:
            importlib.import_module(module)
        except ImportError as error:
            package = {"prometheus": "prometheus-client"}.get(name, name)
            raise ValueError(f"run.track: {name} cannot be imported ({error}): pip install {package}") from None
        found[name] = kind()
    for number, given in enumerate(more, start=1):
        one: Any = given() if isinstance(given, type) else given
        whole = all(callable(getattr(one, method, None)) for method in ("start", "log", "finish"))
        if not whole and not callable(one):
            raise ValueError(
                f"run.track: expected an object with start, log and finish, or a function, got {type(one).__name__}"
            )
        tracker: Tracker = one if whole else _Function(one)
        found[f"{getattr(given, '__name__', type(one).__name__)} ({number})"] = tracker
    return found


class Trackers:
    """The trackers of a run. One that fails is said once and left out from there on; the run goes on."""

    def __init__(self, trackers: Mapping[str, Tracker], say: Callable[[Iterable[str]], None]) -> None:
        self._active, self._say = dict(trackers), say

    def start(self, config: Any, folder: Path, resumed: int) -> None:
        """Before the first line; config: a `Config`."""
        self._each(lambda tracker: tracker.start(json.loads(config.to_json()), folder, resumed))

    def log(self, line: Mapping[str, Any]) -> None:
        """Every finite number of a line of metrics."""
        numbers = {k: float(v) for k, v in line.items() if k != "step" and isinstance(v, (int, float))}
        finite = {k: v for k, v in numbers.items() if math.isfinite(v)}
        self._each(lambda tracker: tracker.log(line["step"], dict(finite)))

    def finish(self, status: str) -> None:
        """After the last line."""
        self._each(lambda tracker: tracker.finish(status))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._active.items()):
            try:
                with keep_random_state(torch.device("cpu")):
                    call(tracker)
            except Exception as error:
                del self._active[name]
                text = f"{type(error).__name__}: {' '.join(str(error).split())}"
                self._say([f"run.track: {name} failed and gets nothing more, the run goes on: {text}"])
