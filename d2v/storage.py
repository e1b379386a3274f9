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
from safetensors import SafetensorError, safe_open
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

METADATA = "metadata.json"
FORMAT = "d2v-checkpoint-1"


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


def read_index(folder: Path) -> dict[str, Any]:
    """Name -> {dtype, shape, chunks} of a checkpoint; `ValueError` names a missing or damaged file."""
    path = folder / METADATA
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        tensors = value["tensors"]
        if value["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT!r}, got {value['format']!r}")
        for name, entry in tensors.items():
            _check_entry(name, entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint: cannot read {str(path)!r}: {error}") from None
    return dict(tensors)


def _check_entry(name: str, entry: Any) -> None:
    """What a file says is not trusted: dtypes are of torch, files lie in the checkpoint's own folder."""
    if not isinstance(getattr(torch, entry["dtype"], None), torch.dtype):
        raise ValueError(f"{name}: expected the name of a dtype, got {entry['dtype']!r}")
    for chunk in entry["chunks"]:
        if Path(chunk["file"]).name != chunk["file"]:
            raise ValueError(f"{name}: expected the name of a file, got {chunk['file']!r}")
        numbers = [*entry["shape"], *chunk["offset"], *chunk["shape"]]
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{name}: expected sizes of 0 or more, got {numbers}")


def read_piece(folder: Path, place: Mapping[str, Any], spans: tuple[slice, ...]) -> Tensor:
    """Part of a stored piece, on the host; `ValueError` names a missing or damaged file."""
    path = folder / place["file"]
    try:
        with safe_open(path, framework="pt") as file:
            if not spans:
                whole: Tensor = file.get_tensor(place["name"])
                return whole
            piece: Tensor = file.get_slice(place["name"])[spans]
            return piece
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: cannot read {str(path)!r}: {error}") from None


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors whose name begins with `prefix`, whole, on the host, without the prefix."""
    result: dict[str, Tensor] = {}
    for name, entry in read_index(folder).items():
        if not name.startswith(prefix):
            continue
        chunks = entry["chunks"]
        if len(chunks) == 1 and chunks[0]["shape"] == entry["shape"]:
            value = read_piece(folder, chunks[0], ())
        else:
            value = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
            for chunk in chunks:
                spans = zip(chunk["offset"], chunk["shape"], strict=True)
                value[tuple(slice(o, o + n) for o, n in spans)] = read_piece(folder, chunk, ())
        if list(value.shape) != entry["shape"]:
            raise ValueError(f"checkpoint: {name}: expected shape {entry['shape']}, got {list(value.shape)}")
        result[name.removeprefix(prefix)] = value
    return result
