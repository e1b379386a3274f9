"""Storage of torch.distributed.checkpoint without pickle: JSON metadata, safetensors shards, one atomic rename.

The stock file format unpickles its metadata; this one does not, so nothing in a run folder can execute. Every rank
writes `shard-00000.safetensors` (its number) into a hidden folder beside the checkpoint's place; when all have, the
coordinator adds `metadata.json` and its JSON files and renames the folder. A kill at any moment leaves the checkpoint
before it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from d2v.files import PARTIAL, flush
from d2v.folder import FORMAT, METADATA, read_index, read_piece


class SafetensorsWriter(StorageWriter):
    """Writes a checkpoint to `final`, a folder that does not exist yet."""

    def __init__(self, final: Path, rank: int, texts: Mapping[str, str], after: Callable[[], None]) -> None:
        """
        Args:
            final: the checkpoint's folder.
            rank: number of this process, which names its shard.
            texts: further files, name -> content, written by the coordinator.
            after: called by the coordinator once the checkpoint stands.
        """
        self.final, self.rank, self.texts, self.after = final, rank, texts, after
        self.partial = final.with_name(f"{PARTIAL}{final.name}")

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to forget: one writer, one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Makes the hidden folder; the others write only after all have planned."""
        if is_coordinator:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As planned."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One safetensors file with this rank's tensors and pieces of tensors."""
        file = f"shard-{self.rank:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        results: list[WriteResult] = []
        for item in plan.items:
            value = planner.resolve_data(item)
            if not isinstance(value, Tensor):
                raise TypeError(f"checkpoint: expected tensors only, got {type(value).__name__} at {item.index.fqn!r}")
            value = value.detach().cpu().contiguous()
            offset = list(item.index.offset or ())
            name = f"{item.index.fqn}@{','.join(map(str, offset))}" if any(offset) else item.index.fqn
            tensors[name] = value.clone() if _shares_storage(value) else value
            place = {"file": file, "name": name}
            results.append(WriteResult(item.index, value.numel() * value.element_size(), place))
        if tensors:
            save_file(tensors, self.partial / file)
            flush(self.partial / file)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Coordinator: metadata, JSON files, rename."""
        places = {result.index: result.storage_data for listed in results for result in listed}
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            chunks = [
                {"offset": list(c.offsets), "shape": list(c.sizes), **places[MetadataIndex(name, c.offsets)]}
                for c in entry.chunks
            ]
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": chunks}
        written = {**self.texts, METADATA: json.dumps({"format": FORMAT, "tensors": tensors})}
        for name, text in written.items():
            (self.partial / name).write_text(text, encoding="utf-8")
            flush(self.partial / name)
        flush(self.partial)
        self.partial.rename(self.final)
        flush(self.final.parent)
        self.after()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by a path: always passed."""
        return False


def _shares_storage(value: Tensor) -> bool:
    """Whether a tensor is a part of a larger storage, all of which safetensors would refuse to write."""
    return value.untyped_storage().nbytes() != value.numel() * value.element_size()


class SafetensorsReader(StorageReader):
    """Reads what `SafetensorsWriter` wrote; on any number of ranks, each reads only the pieces that it needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to forget: one reader, one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in the terms of torch.distributed.checkpoint."""
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, Any] = {}
        for name, entry in self.index.items():
            chunks = []
            for chunk in entry["chunks"]:
                offset = torch.Size(chunk["offset"])
                chunks.append(ChunkStorageMetadata(offsets=offset, sizes=torch.Size(chunk["shape"])))
                places[MetadataIndex(name, offset)] = chunk
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return Metadata(state_dict_metadata=tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Keeps where the pieces are."""
        self.places: dict[MetadataIndex, Any] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies every planned piece into its place."""
        for item in plan.items:
            place = self.places[item.storage_index]
            spans = zip(item.storage_offsets, item.lengths, strict=True)
            piece = read_piece(self.folder, place, tuple(slice(o, o + n) for o, n in spans))
            target = planner.resolve_tensor(item).detach()
            target.copy_(piece)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by a path: always passed."""
        return False
