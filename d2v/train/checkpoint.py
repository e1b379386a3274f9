"""Checkpoints: folders of safetensors and JSON that appear whole or not at all, and never hold a pickle.

Layout: `checkpoints/step-00001000/{config.json, state.json, metadata.json, shard-00000.safetensors, ...}`; written and
read by torch.distributed.checkpoint through `d2v.train.storage`, so a run may go on with another number of ranks.
"""

from __future__ import annotations

import concurrent.futures
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from d2v.config import Run
from d2v.folder import REMOVED, STATE, clean_folder, latest_checkpoint, list_checkpoints, load_json, step_of
from d2v.train.distributed import World
from d2v.train.storage import SafetensorsReader, SafetensorsWriter

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
    doomed = checkpoint.with_name(f"{REMOVED}{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
