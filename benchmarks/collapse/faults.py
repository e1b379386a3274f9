"""What is planted, and a run that notes the monitors until the product stops it."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2v import recipes
from d2v.config import Config
from d2v.data.dataset import Batch
from d2v.train.distributed import open_ranks
from d2v.train.monitors import check_teacher
from d2v.train.pretraining import Pretraining, open_data
from d2v.train.run_dir import RunFolder
from d2v.train.trainer import RunStopped, train

from ..training.cases import change

Row = dict[str, Any]
Job = tuple[str, str, int, int, Path]
"""Recipe, fault, seed, updates, output."""
SAMPLES = 8
"""Of an update: fewer than the recipes have, so that a run takes seconds."""
EVERY = 10
"""Updates between lines, `--run.log-every`; the recipes have 50."""
MONITORS = ("loss", "target_std", "prediction_std", "explained_variance", "content_spread", "target_rank", "stem_rank",
            "grad_norm")  # fmt: skip


def _hook(model: Any, alter: Callable[[Tensor], Tensor], before_positions: bool = False) -> None:
    """Alters what the stems of student and teacher give; before_positions: of text, what its tokens are looked up as,
    to which the stem itself adds positions."""
    for stem in dict.fromkeys([model.stem, getattr(model.teacher, "stem", model.stem)]):
        part: nn.Module = getattr(stem, "embed_tokens", stem) if before_positions else stem
        part.register_forward_hook(lambda module, inputs, output: alter(output))


def _constant_stem(model: Any) -> None:
    _hook(model, lambda x: 0.0 * x + 1.0)


def _positions_only(model: Any) -> None:
    _hook(model, lambda x: 1e-6 * x, before_positions=True)


def _one_direction(model: Any) -> None:
    def project(x: Tensor) -> Tensor:
        direction = torch.linspace(-1.0, 1.0, x.shape[-1])
        direction = direction / direction.norm()
        return (x @ direction)[..., None] * direction

    _hook(model, project)


def _one_target(model: Any) -> None:
    make = model._compute_targets

    def project(*inputs: Any) -> Tensor:
        targets: Tensor = make(*inputs)
        return targets[..., :1].sign() * torch.linspace(-1.5, 1.5, targets.shape[-1])

    model._compute_targets = project


def _dead_teacher(model: Any) -> None:
    for parameter in model.teacher.parameters():
        parameter.zero_()
    model.teacher.update = lambda decay: None


PLANTED: dict[str, Callable[[Any], None]] = {
    "constant stem": _constant_stem,
    "positions only": _positions_only,
    "one direction": _one_direction,
    "one target": _one_target,
    "dead teacher": _dead_teacher,
}
"""What is done to a new model."""
SETTINGS: dict[str, Callable[[Config], Config]] = {
    "decay 1": lambda config: change(config, ema={"start": 1.0, "end": 1.0}),
    "rate x 300": lambda config: change(
        config, optim={"learning_rate": 300 * config.optim.learning_rate, "warmup_steps": 1, "clip": None}
    ),
}
"""What is done to a configuration."""
FAULTS = (*PLANTED, *SETTINGS)


class Watched(Pretraining):
    """Notes the lines, and ends after as many updates as are wanted, whatever the run's length."""

    def __init__(self, *given: Any, fault: str, updates: int) -> None:
        """fault: of `FAULTS`, or "" for none."""
        super().__init__(*given)
        self.updates_wanted = updates
        self.lines: list[Row] = []
        self.verdict: str | None = None
        with torch.no_grad():
            PLANTED.get(fault, lambda model: None)(self.model)

    def find_failure(self, line: Mapping[str, Any], batch: Batch | None) -> str | None:
        """The rule's verdict; or what ends a run that has been seen for long enough."""
        self.lines.append({name: float(f"{line[name]:.4g}") for name in ("step", *MONITORS)})
        self.verdict = super().find_failure(line, batch)
        return self.verdict or ("seen" if line["step"] >= self.updates_wanted else None)


def run(recipe: str, fault: str, seed: int, updates: int, data: Path, folder: Path) -> Row:
    """Trains a recipe with a fault until the product stops it or for so many updates.

    Returns recipe, fault, seed; stop: update, or None; text: the product's sentence; lines: the monitors at every
    `EVERY`-th update; cpu_seconds: of the training.
    """
    config = recipes.get(recipe)
    settings = {"dir": str(folder), "seed": seed, "log_every": EVERY, "device": "cpu", "threads": 1,
                "checkpoint_every": 10**6, "track": ("none",)}  # fmt: skip
    config = change(config, run=settings, data={"path": str(data), "workers": 0, "global_batch": SAMPLES})
    config = SETTINGS.get(fault, lambda c: c)(config)
    row: Row = {"recipe": recipe, "fault": fault, "seed": seed, "stop": None, "text": None, "lines": []}
    begin = time.process_time()
    try:
        check_teacher(config)  # as `pretrain` begins
    except ValueError as error:
        return {**row, "stop": 0, "text": str(error), "cpu_seconds": 0.0}
    with open_ranks(config.run) as ranks:
        objective = Watched(config, *open_data(config), ranks.device, fault=fault, updates=updates)
        with contextlib.suppress(RunStopped):
            train(objective, ranks, RunFolder(config, ranks))
    row |= {"lines": objective.lines, "cpu_seconds": round(time.process_time() - begin, 1)}
    if objective.verdict:
        row |= {"stop": objective.lines[-1]["step"], "text": objective.verdict}
    return row


def run_job(job: Job) -> Row:
    """The result of a run, stored or new; the data are there."""
    recipe, fault, seed, updates, output = job
    kind = recipes.get(recipe).stem.modality
    data = output / "data" / kind / ("pretrain" if kind == "vision" else "")
    folder = output / f"{recipe}-{fault.replace(' ', '-') or 'healthy'}-{seed}"
    result = folder.with_suffix(".json")
    if not result.is_file():
        shutil.rmtree(folder, ignore_errors=True)  # of a command that was cut off: it would go on there
        with folder.with_suffix(".log").open("w") as log, contextlib.redirect_stderr(log):
            row = run(recipe, fault, seed, updates, data, folder)
        result.write_text(json.dumps(row))
    stored: Row = json.loads(result.read_text())
    return stored
