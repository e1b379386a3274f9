"""Checkpoints: folders of safetensors and JSON that appear whole or not at all, and never hold a pickle.

Layout: `checkpoints/step-00001000/{config.json, state.json, metadata.json, shard-00000.safetensors, ...}`; written and
read by torch.distributed.checkpoint through `d2v.storage`, so a run may go on with another number of ranks.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from d2v.config import Config
from d2v.config_run import Run
from d2v.dist import World
from d2v.files import PARTIAL
from d2v.storage import METADATA, SafetensorsReader, SafetensorsWriter, read_tensors

MODEL, STATE, CONFIG = "model.safetensors", "state.json", "config.json"
MODEL_PREFIX = "model."
"""Begins the names of the model's tensors in the checkpoint of a run; an exported folder has them in `MODEL`."""
_NAME = re.compile(r"step-(\d{8,})")
_REMOVED = ".removed-"
# One process is no mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


class Saver:
    """Writes the checkpoints of a run, one at a time, beside the training where `run.async_checkpoint` is on."""

    def __init__(self, folder: Path, world: World, run: Run) -> None:
        self.folder, self.world, self.run = folder, world, run
        self._pending: concurrent.futures.Future[Any] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
        """Begins checkpoint `step`, once the one before it stands; `OSError` where that or this one cannot be written.

        Args:
            step: completed updates.
            tensors: flat names; what all ranks hold alike is written once, sharded tensors by their owners.
            texts: JSON files, name -> content.
        """
        self.wait()
        final = self.folder / f"step-{step:08d}"
        if self.world.share(final.is_dir()):
            return  # the same step of the same run: the same state
        writer = SafetensorsWriter(final, self.world.rank, texts, self._prune)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        staged = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        result = dcp.async_save(
            staged, storage_writer=writer, planner=planner, async_stager=_AlreadyStaged(),
            process_group=self.world.storage, no_dist=not self.world.is_parallel,
        )  # fmt: skip
        assert isinstance(result, concurrent.futures.Future)
        self._pending = result
        if not self.run.async_checkpoint:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in writing could not be written; `wait` raises why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until the checkpoint in writing stands; `OSError` or `RuntimeError` where it does not."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except CheckpointException as error:
            clean_folder(self.folder)
            rank, (reason, _) = sorted(error.failures.items())[0]
            where = f" on rank {rank}" if self.world.size > 1 else ""
            kind = OSError if isinstance(reason, (OSError, SafetensorError)) else RuntimeError
            kept = latest_checkpoint(self.folder.parent)
            raise kind(f"checkpoint: cannot write to {str(self.folder)!r}{where}: {reason}; kept: {kept}") from None

    def _prune(self) -> None:
        """Removes what the rules of `run` do not keep."""
        found = list_checkpoints(self.folder)
        kept = set(found[-self.run.keep_checkpoints :])
        if self.run.keep_every is not None:
            kept |= {c for c in found if step_of(c) % self.run.keep_every == 0}
        if self.run.keep_best is not None and (best := find_best(found, self.run)):
            kept.add(best)
        for old in found:
            if old not in kept:
                _remove(old)


class _AlreadyStaged:
    """For tensors that are copies on the host already."""

    should_synchronize_after_execute = _synchronize_after_execute = False

    def stage(self, state_dict: Any) -> Any:
        return state_dict

    def synchronize_staging(self) -> None:
        pass

    def close(self) -> None:
        pass


def find_best(checkpoints: Sequence[Path], run: Run) -> Path | None:
    """The checkpoint with the best finite value of the metric `run.keep_best`, the earliest of equals; or None."""
    values: dict[Path, float] = {}
    for checkpoint in checkpoints:
        value = load_json(checkpoint / STATE).get("metrics", {}).get(run.keep_best)
        if isinstance(value, (int, float)) and math.isfinite(value):
            values[checkpoint] = -value if run.best == "highest" else value
    return min(values, key=lambda c: values[c], default=None)


def load_into(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Fills tensors, whole or sharded, with those of the same names in a checkpoint; each rank reads what it needs.

    `ValueError` names a damaged file.
    """
    try:
        dcp.load(
            tensors, storage_reader=SafetensorsReader(folder), process_group=world.control,
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=not world.is_parallel,
        )  # fmt: skip
    except CheckpointException as error:
        _, (reason, _) = sorted(error.failures.items())[0]
        raise ValueError(str(reason)) from None


def _remove(checkpoint: Path) -> None:
    """Renames first: a kill in the middle never leaves half a checkpoint under a valid name."""
    doomed = checkpoint.with_name(f"{_REMOVED}{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean_folder(folder: Path) -> None:
    """Removes what a killed run left half-written or half-removed."""
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.startswith((PARTIAL, _REMOVED)):
                shutil.rmtree(entry, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a `checkpoints` folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(m.group(1)), e) for e in folder.iterdir() if (m := _NAME.fullmatch(e.name)) and e.is_dir()]
    return [entry for _, entry in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """Completed updates of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def latest_checkpoint(run: Path) -> Path | None:
    """Newest checkpoint of a run folder, or None."""
    found = list_checkpoints(run / "checkpoints")
    return found[-1] if found else None


def find_checkpoint(path: str, option: str = "checkpoint") -> Path:
    """The folder with a configuration and weights that `path` means: of a run, a checkpoint or an export."""
    folder = Path(path)
    if not path or not folder.is_dir():
        raise ValueError(f"{option}: expected a run folder, a checkpoint or an exported folder, found none at {path!r}")
    if (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (MODEL, METADATA)):
        return folder
    newest = latest_checkpoint(folder)
    if newest is None:
        raise ValueError(f"{option}: expected a checkpoint in {path!r}, found neither {MODEL} nor checkpoints/step-*")
    return newest


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the host; for `MODEL` also from the shards of a run's checkpoint.

    `ValueError` names a missing or damaged file.
    """
    if name == MODEL and (folder / METADATA).is_file():
        return read_tensors(folder, MODEL_PREFIX)
    try:
        return load_file(folder / name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: cannot read {str(folder / name)!r}: {error}") from None


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object; `ValueError` names a missing or damaged file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint: cannot read {str(path)!r}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"checkpoint: expected a JSON object in {str(path)!r}, got {type(value).__name__}")
    return value


def load_config(folder: Path) -> Config:
    """The configuration stored in a checkpoint or run folder."""
    try:
        return Config.from_json((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"checkpoint: cannot read {str(folder / CONFIG)!r}: {error}") from None


def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str) -> None:
    """Copies tensors by name, in place; `ValueError` names the first missing, surplus or differently shaped one."""
    if problem := describe_mismatch(target, source):
        raise ValueError(f"{what}: {problem}")
    for name, tensor in target.items():
        tensor.detach().copy_(source[name])


def describe_mismatch(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> str | None:
    """One sentence on how two maps of tensors differ in names or shapes, or None."""
    if missing := [n for n in target if n not in source]:
        return f"expected a tensor {missing[0]!r}, found none ({len(missing)} missing)"
    if surplus := [n for n in source if n not in target]:
        return f"unexpected tensor {surplus[0]!r} ({len(surplus)} in all)"
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            return f"{name}: expected shape {tuple(tensor.shape)}, got {tuple(source[name].shape)}"
    return None
