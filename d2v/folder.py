"""What lies in folders of runs, checkpoints and exported models: names, the newest checkpoint, tensors read back.

Nothing that is read here can execute: JSON and safetensors only.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from d2v.files import PARTIAL, checksum, open_regular, parse_json

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
SUMS = "d2v.sums"
"""Entry of the header of an exported `MODEL` with the checksums of its tensors."""
_NAME = re.compile(r"step-(\d{8,})")
REMOVED = ".removed-"
STATUS = "status.json"
"""In a run folder: how the run goes, for `d2v watch` and other programs."""
PLAN = "plan.json"
"""In a run folder: what `d2v plan --output` wrote for it."""
LOST = "lost.txt"
"""In a run folder: which rank the others have lost."""


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
    path = folder / name
    try:
        with safe_open(path, framework="pt") as file:
            sums = parse_json((file.metadata() or {}).get(SUMS, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None
    for key, expected in sums.items():
        if key not in tensors or checksum_of(tensors[key]) != expected:
            raise damaged(path, f"{key} is not as it was written (its checksum differs)")
    return tensors


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object; `ValueError` names a missing or damaged file."""
    try:
        with open_regular(path) as file:
            return parse_json(file.read().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None


def load_plan(path: Path) -> dict[str, Any]:
    """A file of `d2v plan --output`; `ValueError` for another one."""
    try:
        with open_regular(path) as file:
            plan = parse_json(file.read().decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"run.plan: expected a file of d2v plan --output, got {str(path)!r}: {error}") from None
    kinds = {"step_seconds": float, "memory_bytes": float, "gpus": int, "machine": str}
    if wrong := [name for name, kind in kinds.items() if not isinstance(plan.get(name), kind)]:
        raise ValueError(f"run.plan: expected a file of d2v plan --output, got {str(path)!r} without {wrong[0]}")
    return plan


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
        if all(n.startswith(("decoder.", "head.")) for n in missing) and any(n.startswith("blocks.") for n in source):
            return "expected a model with what predicts in pre-training (decoder or head), got one without: it gives " \
                   "features and can be fine-tuned"  # fmt: skip
        return f"expected a tensor {missing[0]!r}, found none ({len(missing)} missing)"
    if surplus := [n for n in source if n not in target]:
        return f"unexpected tensor {surplus[0]!r} ({len(surplus)} in all)"
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            return f"{name}: expected shape {tuple(tensor.shape)}, got {tuple(source[name].shape)}"
    return None


def write_index(tensors: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    """Text of `METADATA`.

    Args:
        tensors: name -> {dtype, shape, chunks}, a chunk being {offset, shape, file, name, sum}.
        texts: the other text files of the checkpoint, name -> content.
    """
    sums = {name: checksum(text.encode()) for name, text in texts.items()}
    value = {"format": FORMAT, "tensors": tensors, "texts": sums}
    return json.dumps({**value, "sum": checksum(json.dumps(value).encode())})


def read_index(folder: Path) -> dict[str, Any]:
    """Name -> {dtype, shape, chunks} of a checkpoint, whose text files are compared with their checksums (older
    checkpoints have none); `ValueError` names a missing or damaged file."""
    path = folder / METADATA
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
        if (found := value["format"]) != FORMAT:
            raise ValueError(f"expected format {FORMAT!r}, got {found!r}")
        claimed: dict[str, int] = {}
        for name, entry in value["tensors"].items():
            _check_entry(name, entry)
            for chunk in entry["chunks"]:
                size = math.prod(chunk["shape"]) * getattr(torch, entry["dtype"]).itemsize
                claimed[chunk["file"]] = claimed.get(chunk["file"], 0) + size
        for name, size in claimed.items():
            if (held := (folder / name).stat().st_size) < size:
                path = folder / name
                raise ValueError(f"expected {size} bytes of tensors, got a file of {held}")
        own = value.pop("sum", None)
        if ("texts" in value) != (own is not None) or own not in (None, checksum(json.dumps(value).encode())):
            raise ValueError("it is not as it was written (its checksum differs)")
        for name, expected in value.get("texts", {}).items():
            path = folder / name
            if checksum(path.read_bytes()) != expected:
                raise ValueError("it is not as it was written (its checksum differs)")
    except KeyError as error:
        raise damaged(path, f"expected an entry {error}, found none") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, error) from None
    return dict(value["tensors"])


def damaged(path: Path, reason: object) -> ValueError:
    """The error for a file that cannot be used; of a run's checkpoint it names the one before."""
    text = str(reason)
    text = f"checkpoint: cannot read {str(path)!r}: {text if len(text) <= 300 else text[:297] + '...'}"
    if _NAME.fullmatch(path.parent.name):
        listed = list_checkpoints(path.parent.parent)
        older = [c for c in listed if step_of(c) < step_of(path.parent)]
        if older:
            text += (
                f"; the checkpoint before it is {str(older[-1])!r}: the run goes on there without {path.parent.name}"
            )
    return ValueError(text)


def _check_entry(name: str, entry: Any) -> None:
    """What a file says is not trusted: dtypes are of torch, files lie in the checkpoint's own folder, and pieces of the
    tensor's own name cover it once."""
    if not isinstance(getattr(torch, entry["dtype"], None), torch.dtype):
        raise ValueError(f"{name}: expected the name of a dtype, got {entry['dtype']!r}")
    whole, boxes = entry["shape"], []
    for chunk in entry["chunks"]:
        offset, shape = chunk["offset"], chunk["shape"]
        if Path(chunk["file"]).name != chunk["file"]:
            raise ValueError(f"{name}: expected the name of a file, got {chunk['file']!r}")
        numbers = [*whole, *offset, *shape]
        if not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
            raise ValueError(f"{name}: expected sizes of 0 or more, got {numbers}")
        if chunk["name"] != (expected := piece_name(name, offset)):
            raise ValueError(f"{name}: expected a piece {expected!r}, got {chunk['name']!r}")
        inside = len(whole) == len(offset) == len(shape) and all(
            map(int.__le__, map(int.__add__, offset, shape), whole)
        )
        if not inside:
            raise ValueError(f"{name}: expected pieces inside of {whole}, got one of {shape} at {offset}")
        boxes.append((offset, shape))
    boxes.sort()
    # Sorted pieces of one axis meet only their neighbours.
    one_axis = all(o[1:] == [0] * len(o[1:]) and s[1:] == whole[1:] for o, s in boxes)
    pairs = itertools.pairwise(boxes) if one_axis else itertools.combinations(boxes, 2)
    if not one_axis and len(boxes) > 1000:
        raise ValueError(f"{name}: expected at most 1000 pieces along several axes, got {len(boxes)}")
    twice = any(all(max(i, j) < min(i + n, j + m) for i, n, j, m in zip(*a, *b, strict=True)) for a, b in pairs)
    if twice or sum(math.prod(shape) for _, shape in boxes) != math.prod(whole):
        raise ValueError(f"{name}: expected pieces that cover {whole} once, got {boxes}")


def piece_name(name: str, offset: Sequence[int]) -> str:
    """Name of a piece of a tensor in a shard."""
    return f"{name}@{','.join(map(str, offset))}" if any(offset) else name


def checksum_of(tensor: Tensor) -> int:
    """Checksum of a tensor's bytes."""
    return checksum(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_piece(folder: Path, place: Mapping[str, Any], dtype: str) -> Tensor:
    """A stored piece, on the host, compared with its checksum; `ValueError` names a missing or damaged file."""
    path = folder / place["file"]
    try:
        with safe_open(path, framework="pt") as file:
            piece: Tensor = file.get_tensor(place["name"])
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None
    expected, got = (dtype, list(place["shape"])), (str(piece.dtype).removeprefix("torch."), list(piece.shape))
    if expected != got:
        raise damaged(path, f"{place['name']}: expected dtype and shape {expected}, got {got}")
    if place.get("sum", found := checksum_of(piece)) != found:
        raise damaged(path, f"{place['name']} is not as it was written (its checksum differs)")
    return piece


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors whose name begins with `prefix`, whole, on the host, without the prefix."""
    result: dict[str, Tensor] = {}
    for name, entry in read_index(folder).items():
        if not name.startswith(prefix):
            continue
        chunks = entry["chunks"]
        if len(chunks) == 1:
            value = read_piece(folder, chunks[0], entry["dtype"])
        else:
            value = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
            for chunk in chunks:
                spans = zip(chunk["offset"], chunk["shape"], strict=True)
                value[tuple(slice(o, o + n) for o, n in spans)] = read_piece(folder, chunk, entry["dtype"])
        result[name.removeprefix(prefix)] = value
    return result
