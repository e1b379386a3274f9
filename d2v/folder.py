"""What lies in folders of runs, checkpoints and exported models: names, the newest checkpoint, tensors read back.

Nothing that is read here can execute: JSON and safetensors only.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from d2v.files import PARTIAL, parse_json

if TYPE_CHECKING:
    from d2v.config import Config

Model = TypeVar("Model", bound=nn.Module)

METADATA = "metadata.json"
FORMAT = "d2v-checkpoint-1"
BEST = "best"
"""Folder, in that of a fine-tuning run, with the model that was chosen."""
MODEL, STATE, CONFIG = "model.safetensors", "state.json", "config.json"
MODEL_PREFIX = "model."
"""Begins the names of the model's tensors in the checkpoint of a run; an exported folder has them in `MODEL`."""
_NAME = re.compile(r"step-(\d{8,})")
REMOVED = ".removed-"


def clean_folder(folder: Path) -> None:
    """Removes what a killed run left half-written or half-removed."""
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.startswith((PARTIAL, REMOVED)):
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


def find_model(path: str, option: str = "checkpoint") -> Path:
    """As `find_checkpoint`; of the folder of a fine-tuning run the model that it chose on held-out data."""
    best = Path(path) / BEST
    return best if (best / CONFIG).is_file() else find_checkpoint(path, option)


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
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint: cannot read {str(path)!r}: {error}") from None


def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str) -> None:
    """Copies tensors by name, in place; `ValueError` names the first missing, surplus or differently shaped one."""
    if problem := describe_mismatch(target, source):
        raise ValueError(f"{what}: {problem}")
    for name, tensor in target.items():
        tensor.detach().copy_(source[name])


def build_filled(build: Callable[[], Model], config: Config, tensors: Mapping[str, Tensor], what: str) -> Model:
    """The model that `build` makes of a configuration, with a file's tensors.

    A configuration is not trusted: what it asks for is compared with the tensors before anything of its size is made.
    `ValueError`, beginning with `what`, names the first that does not fit.
    """
    check_layers(config, len(tensors), what)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            planned = build().state_dict()
    except (RuntimeError, ArithmeticError, TypeError, MemoryError) as error:
        raise ValueError(f"{what}: its configuration makes no model: {str(error).splitlines()[0]}") from None
    if problem := describe_mismatch(planned, tensors):
        raise ValueError(f"{what}: {problem}")
    model = build()
    copy_into(model.state_dict(), tensors, what)
    return model


def check_layers(config: Config, tensors: int, what: str) -> None:
    """`ValueError` for more layers than a file of so many tensors can hold; each would take memory before its weights
    are looked at."""
    stem, encoder, decoder = config.stem, config.encoder, config.decoder
    counts = {
        "encoder.depth": encoder.depth, "encoder.prenet_depth": encoder.prenet_depth, "decoder.layers": decoder.layers,
        "decoder.projection_layers": decoder.projection_layers, "head.layers": config.head.layers,
        "stem.position_layers": stem.position_layers, "stem.convolutions": len(stem.convolutions),
    }  # fmt: skip
    for name, count in counts.items():
        if count > max(tensors, 64):
            raise ValueError(f"{what}: expected layers for {tensors} tensors, got {name} of {count}")


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
