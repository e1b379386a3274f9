"""Checkpoints: folders of safetensors and JSON that appear whole or not at all, and never hold a pickle.

Layout: `checkpoints/step-00001000/{config.json, state.json, metadata.json, shard-00000.safetensors, ...}`. They are
written and read by torch.distributed.checkpoint, so a run may go on with another number of ranks. Its stock file format
unpickles its metadata; ours is JSON, so nothing in a run folder can execute. Every rank writes its shard into a hidden
folder beside the checkpoint's place; when all have, the coordinator adds `metadata.json` and its JSON files and renames
the folder. A kill at any moment leaves the checkpoint before it.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as layout
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from d2v.config import Run
from d2v.data.sources import Source
from d2v.files import PARTIAL, flush, naming_bytes
from d2v.folder import (
    CONFIG,
    METADATA,
    MODEL_PREFIX,
    REMOVED,
    STATE,
    checksum_of,
    clean_folder,
    damaged,
    describe_mismatch,
    latest_checkpoint,
    list_checkpoints,
    load_json,
    piece_name,
    read_index,
    read_piece,
    step_of,
    write_index,
)
from d2v.runtime import find_decoders
from d2v.train.distributed import Ranks
from d2v.train.logging import MetricWindow
from d2v.train.optim import PREFIX, make_state, optimiser_tensors

_RANK_SEEDS, _UPDATE_SEEDS = 0x9E3779B97F4A7C15, 0x9E3779B1
LOCAL_KEPT = 2
"""Checkpoints of `run.local_checkpoint`."""
_FLAT = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
# One process is no mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def mix_seed(seed: int, update: int, rank: int) -> int:
    """Seed of a rank's own random numbers from an update on. Ranks and updates differ also in the lower 32 bits, as
    torch's generator on the CPU drops the others."""
    return (seed * _RANK_SEEDS + update * _UPDATE_SEEDS + rank) % (1 << 63)


class RunState:
    """Everything that a run carries from one update to the next, and a checkpoint holds."""

    def __init__(
        self, config: Any, model: nn.Module, optimiser: torch.optim.Optimizer, source: Source, ranks: Ranks
    ) -> None:
        self.config, self.model, self.optimiser, self.source, self.ranks = config, model, optimiser, source, ranks
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.run.precision == "fp16")
        self.window = MetricWindow()
        self.update = 0
        """Completed updates."""
        self.pending: dict[str, Any] = {}
        """Entries for the next line of metrics."""
        self.latest: dict[str, Any] = {}
        """The last line."""
        if ranks.rank:
            self._seed_rank()

    def _seed_rank(self) -> None:
        """Dropout has a stream for each rank; weights were drawn alike."""
        torch.manual_seed(mix_seed(self.config.run.seed, self.update, self.ranks.rank))

    def _model_tensors(self) -> dict[str, Tensor]:
        """The model's tensors, in place, by their names in a checkpoint."""
        return {f"{MODEL_PREFIX}{name}": value for name, value in self.model.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything of a checkpoint that is a tensor. Random states have a name for each rank."""
        tensors = self._model_tensors()
        tensors |= optimiser_tensors(self.model, self.optimiser) | self.window.tensors(self.ranks.sum_)
        tensors[f"rng.cpu.{self.ranks.rank}"] = torch.get_rng_state()
        if self.ranks.device.type == "cuda":
            tensors[f"rng.cuda.{self.ranks.rank}"] = torch.cuda.get_rng_state(self.ranks.device)
        return tensors

    def texts(self, bad: Mapping[str, Any]) -> dict[str, str]:
        """The JSON files of a checkpoint; `bad`: the account of bad samples."""
        metrics = {**self.latest, **self.pending}
        state = {
            "step": self.update,
            "ranks": self.ranks.size,
            "torch": torch.__version__,
            "decoders": find_decoders(),
            "metrics": {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and math.isfinite(v)},
            "window": self.window.state(),
            "pending": self.pending,
            "scaler": self.scaler.state_dict(),
            "bad": bad,
            "data": self.data_identity(),
        }
        return {CONFIG: self.config.to_json(), STATE: json.dumps(state, indent=1)}

    def data_identity(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        return {"samples": len(self.source), "names": self.source.digest()}

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Takes up a checkpoint, of any number of ranks; returns its state.

        `ValueError` where the data or the tensors do not fit.
        """
        state, index, found = load_json(checkpoint / STATE), read_index(checkpoint), self.data_identity()
        check_state(state, checkpoint)
        if (stored_data := state["data"]) != found:
            other = "other" if stored_data["samples"] == found["samples"] else ""
            raise ValueError(
                f"data.path: expected the {stored_data['samples']} samples that {str(checkpoint)!r} was trained on, "
                f"got {found['samples']} with {other} names"
            )
        model = self._model_tensors()
        stored = {n: torch.empty(e["shape"], device="meta") for n, e in index.items() if n.startswith(MODEL_PREFIX)}
        if problem := describe_mismatch(model, stored):
            raise ValueError(f"checkpoint {str(checkpoint)!r}: {problem}")
        moments = make_state(self.model, self.optimiser, [n for n in index if n.startswith(PREFIX)])
        cpu, cuda = (f"rng.{kind}.{self.ranks.rank}" for kind in ("cpu", "cuda"))
        host = {
            n: torch.empty(index[n]["shape"], dtype=getattr(torch, index[n]["dtype"]))
            for n in (cpu, cuda, "metrics.sums")
            if n in index
        }
        self._check_tensors(index, {**model, **moments}, host, state, checkpoint)
        load_into(checkpoint, {**model, **moments, **host}, self.ranks)
        self.update = int(state["step"])
        self.pending, self.latest = dict(state["pending"]), dict(state["metrics"])
        self.window.restore(state["window"], host, self.ranks.device, main=self.ranks.is_first)
        self.scaler.load_state_dict(state["scaler"])
        if cpu not in host:  # of a run with fewer ranks
            self._seed_rank()
            return state
        torch.set_rng_state(host[cpu])
        if self.ranks.device.type == "cuda" and cuda in host:
            torch.cuda.set_rng_state(host[cuda], self.ranks.device)
        return state

    def _check_tensors(
        self, index: Mapping[str, Any], tensors: Mapping[str, Tensor], host: Mapping[str, Tensor],
        state: Mapping[str, Any], checkpoint: Path,
    ) -> None:  # fmt: skip
        """`ValueError` for an index that another run, or nobody, has written: tensors that are missing or have another
        dtype; what is only listed there has been compared with the model before."""
        names = [*tensors, *(["metrics.sums"] if state["window"]["updates"] else [])]
        names += [f"rng.cpu.{self.ranks.rank}"] if self.ranks.rank < state["ranks"] else []
        if missing := [n for n in names if n not in index]:
            raise damaged(
                checkpoint / METADATA, f"expected a tensor {missing[0]!r}, found none ({len(missing)} missing)"
            )
        expected = {n: (str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in tensors.items()}
        rng, sums = torch.get_rng_state(), host.get("metrics.sums")
        expected |= {n: ("uint8", list(rng.shape)) for n in host if n.startswith("rng.cpu.")}
        if sums is not None and state["window"]["updates"]:
            expected["metrics.sums"] = ("float64", [len(state["window"]["names"])])
        for name, wanted in expected.items():
            if (got := (index[name]["dtype"], index[name]["shape"])) != wanted:
                raise damaged(checkpoint / METADATA, f"{name}: expected dtype and shape {wanted}, got {got}")


_STATE: dict[str, Any] = {
    "step": int, "ranks": int, "torch": str, "metrics": {}, "window": {"names": list, "updates": int}, "pending": {},
    "scaler": {}, "bad": {"entries": list, "converted": {}}, "data": {"samples": int, "names": str},
}  # fmt: skip
"""Types in `STATE`."""


def check_state(state: Mapping[str, Any], checkpoint: Path) -> None:
    """`ValueError` names an entry of a checkpoint's `STATE` that is missing or cannot be."""
    path = checkpoint / STATE

    def check(value: Any, wanted: Any, name: str) -> None:
        kind = dict if isinstance(wanted, dict) else wanted
        if type(value) is not kind:
            raise damaged(path, f"{name}: expected {kind.__name__}, got {type(value).__name__}")
        for key, inner in wanted.items() if kind is dict else ():
            if key not in value:
                raise damaged(path, f"{name}: expected an entry {key!r}, found none")
            check(value[key], inner, key)

    check(state, _STATE, "state")
    numbers = {"ranks": state["ranks"] - 1, "updates": state["window"]["updates"], "samples": state["data"]["samples"]}
    if negative := [name for name, value in numbers.items() if value < 0]:
        raise damaged(path, f"{negative[0]}: expected a count, got {numbers[negative[0]]}")
    if state["step"] != step_of(checkpoint):
        raise damaged(path, f"step: expected {step_of(checkpoint)} as in the folder's name, got {state['step']}")
    entries = state["bad"]["entries"]
    if not all(isinstance(e, dict) and {"id", "path", "reason"} <= set(e) for e in entries):
        raise damaged(path, "bad: expected entries with id, path and reason")


class Saver:
    """Writes the checkpoints of a run, one at a time, beside the training where `run.async_checkpoint` is on."""

    def __init__(self, folder: Path, ranks: Ranks, run: Run, *, local: bool = False) -> None:
        """local: each node writes to a folder of its own, of which the newest two are kept."""
        self.folder, self.ranks, self.run, self.local = folder, ranks, run, local
        self._group = ranks.node if local else ranks.storage
        self._own: set[int] = set()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "d2v-checkpoint")
        self._pending: concurrent.futures.Future[Any] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
        """Begins checkpoint `step`, once the one before it is complete; `OSError` where that or this one cannot be
        written.

        Args:
            step: completed updates.
            tensors: flat names; what all ranks hold alike is written once, sharded tensors by their owners.
            texts: JSON files, name -> content.
        """
        self.wait()
        final = self.folder / f"step-{step:08d}"
        if self.ranks.share(final.is_dir()):
            if step in self._own:
                return  # the same step of the same run: the same state
            raise OSError(f"checkpoint: {str(final)!r} is there already and is not of this run; nothing was saved")
        self._own.add(step)
        staged = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        self._pending = self._thread.submit(
            dcp.save, staged, storage_writer=SafetensorsWriter(final, self.ranks.rank, texts, self._prune),
            planner=DefaultSavePlanner(**_FLAT), process_group=self._group, no_dist=not self.ranks.is_parallel,
        )  # fmt: skip
        if not self.run.async_checkpoint:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in writing could not be written; `wait` raises why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until the checkpoint in writing is complete; `OSError` or `RuntimeError` where it cannot be."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except CheckpointException as error:
            clean_folder(self.folder)
            rank, (reason, _) = sorted(error.failures.items())[0]
            where = f" on rank {rank}" if self.ranks.size > 1 else ""
            kind = OSError if isinstance(reason, OSError) else RuntimeError
            kept = latest_checkpoint(self.folder.parent)
            raise kind(f"checkpoint: cannot write to {str(self.folder)!r}{where}: {reason}; kept: {kept}") from None

    def _prune(self) -> None:
        """Removes what the rules of `run` do not keep."""
        found = list_checkpoints(self.folder)
        kept = set(found[-(LOCAL_KEPT if self.local else self.run.keep_checkpoints) :])
        if self.run.keep_every is not None and not self.local:
            kept |= {c for c in found if step_of(c) % self.run.keep_every == 0}
        if self.run.keep_best is not None and not self.local and (best := find_best(found, self.run)):
            kept.add(best)
        for old in (c for c in found if c not in kept):
            # Renamed first: a kill in the middle never leaves half a checkpoint under a valid name.
            doomed = old.with_name(f"{REMOVED}{old.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            shutil.rmtree(old.rename(doomed), ignore_errors=True)


def find_best(checkpoints: Sequence[Path], run: Run) -> Path | None:
    """The checkpoint with the best finite value of the metric `run.keep_best`, the earliest of equals; or None."""
    values: dict[Path, float] = {}
    for checkpoint in checkpoints:
        value = load_json(checkpoint / STATE).get("metrics", {}).get(run.keep_best)
        if isinstance(value, (int, float)) and math.isfinite(value):
            values[checkpoint] = -value if run.best == "highest" else value
    return min(values, key=lambda c: values[c], default=None)


def load_into(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Fills tensors, whole or sharded, with those of the same names in a checkpoint; each rank reads what it needs.

    `ValueError` names a damaged file.
    """
    try:
        dcp.load(
            tensors, storage_reader=SafetensorsReader(folder), planner=DefaultLoadPlanner(**_FLAT),
            process_group=ranks.control, no_dist=not ranks.is_parallel,
        )  # fmt: skip
    except CheckpointException as error:
        _, (reason, _) = sorted(error.failures.items())[0]
        raise ValueError(str(reason)) from None


# ---- storage of torch.distributed.checkpoint --------------------------------------------------------------------


class SafetensorsWriter(dcp.FileSystemWriter):
    """Writes a checkpoint to `final`, a folder that does not exist yet."""

    def __init__(self, final: Path, rank: int, texts: Mapping[str, str], after: Callable[[], None]) -> None:
        """
        Args:
            final: the checkpoint's folder.
            rank: number of this process, which names its shard.
            texts: further files, name -> content, written by the coordinator.
            after: called by the coordinator once the checkpoint is complete.
        """
        self.partial = final.with_name(f"{PARTIAL}{final.name}")
        super().__init__(self.partial)
        self.final, self.file, self.texts, self.after = final, f"shard-{rank:05d}.safetensors", texts, after

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Makes the hidden folder; the others write only after all have planned."""
        if is_coordinator:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As planned."""
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One safetensors file with this rank's tensors and pieces of tensors."""
        tensors: dict[str, Tensor] = {}
        results: list[WriteResult] = []
        for item in plan.items:
            value = planner.resolve_data(item)
            if not isinstance(value, Tensor):
                raise TypeError(f"checkpoint: expected tensors only, got {type(value).__name__} at {item.index.fqn!r}")
            value = value.detach().cpu().contiguous()
            size = value.numel() * value.element_size()
            if value.untyped_storage().nbytes() != size:  # safetensors refuses a part of a larger storage
                value = value.clone()
            name = piece_name(item.index.fqn, list(item.index.offset or ()))
            tensors[name] = value
            results.append(WriteResult(item.index, size, {"file": self.file, "name": name}))
        if tensors:
            path, size = self.partial / self.file, sum(result.size_in_bytes for result in results)
            # Checksums are made while the disk is waited for.
            with naming_bytes(path, size, SafetensorError), concurrent.futures.ThreadPoolExecutor(1) as beside:
                sums = beside.submit(lambda: [checksum_of(value) for value in tensors.values()])
                save_file(tensors, path)
                flush(path)
                for result, found in zip(results, sums.result(), strict=True):
                    result.storage_data["sum"] = found
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: layout.Metadata, results: list[list[WriteResult]]) -> None:
        """Coordinator: metadata, JSON files, rename."""
        places = {result.index: result.storage_data for listed in results for result in listed}
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, layout.TensorStorageMetadata)
            chunks = [
                {"offset": list(c.offsets), "shape": list(c.sizes), **places[layout.MetadataIndex(name, c.offsets)]}
                for c in entry.chunks
            ]
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": chunks}
        for name, text in {**self.texts, METADATA: write_index(tensors, self.texts)}.items():
            with naming_bytes(self.partial / name, len(text)):
                (self.partial / name).write_text(text, encoding="utf-8")
                flush(self.partial / name)
        flush(self.partial)
        self.partial.rename(self.final)
        flush(self.final.parent)
        self.after()


class SafetensorsReader(dcp.FileSystemReader):
    """Reads what `SafetensorsWriter` wrote; on any number of ranks, each reads only the pieces that it needs."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> layout.Metadata:
        """The index in the terms of torch.distributed.checkpoint."""
        tensors: dict[str, Any] = {}
        for name, entry in read_index(Path(self.path)).items():
            chunks = [
                layout.ChunkStorageMetadata(torch.Size(c["offset"]), torch.Size(c["shape"])) for c in entry["chunks"]
            ]
            self.storage_data |= {
                layout.MetadataIndex(name, chunk.offsets): {**place, "dtype": entry["dtype"]}
                for chunk, place in zip(chunks, entry["chunks"], strict=True)
            }
            properties = layout.TensorProperties(dtype=getattr(torch, entry["dtype"]))
            tensors[name] = layout.TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return layout.Metadata(state_dict_metadata=tensors, storage_data=self.storage_data)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies every planned piece into its place."""
        for item in plan.items:
            spans = zip(item.storage_offsets, item.lengths, strict=True)
            place = self.storage_data[item.storage_index]
            piece = read_piece(Path(self.path), place, place["dtype"])[tuple(slice(o, o + n) for o, n in spans)]
            target = planner.resolve_tensor(item).detach()
            target.copy_(piece)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done
