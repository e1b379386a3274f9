"""Checkpoints: folders of safetensors and JSON that appear whole or not at all, and never hold a pickle.

A checkpoint is written into a temporary folder, flushed to the disk and renamed; a kill at any moment leaves the one
before it. Layout: `checkpoints/step-00001000/{config.json, state.json, model.safetensors, trainer.safetensors}`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2v.config import Config

MODEL, TRAINER, STATE, CONFIG = "model.safetensors", "trainer.safetensors", "state.json", "config.json"
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial-"
_REMOVED = ".removed-"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file (text as UTF-8) beside its place, flushes it and renames it."""
    temporary = path.with_name(f"{_PARTIAL}{path.name}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    _flush(temporary)
    temporary.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    config: Config,
    model: Mapping[str, Tensor],
    trainer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes checkpoint `step` under `folder` and removes all but the newest `keep`.

    `model` and `trainer` are flat name -> tensor maps, `state` is plain JSON. Returns the checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    if final.is_dir():
        return final  # the same step of the same run: the same state
    temporary = folder / f"{_PARTIAL}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file(_separate(model), temporary / MODEL)
        save_file(_separate(trainer), temporary / TRAINER)
        (temporary / CONFIG).write_text(config.to_json(), encoding="utf-8")
        (temporary / STATE).write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(final)
    _flush(folder)
    for old in list_checkpoints(folder)[: -max(keep, 1)]:
        _remove(old)
    return final


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous host copies where tensors share memory or have gaps, which safetensors refuses."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu()
        address = value.untyped_storage().data_ptr()
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        result[name] = value if whole and address not in seen else value.contiguous().clone()
        seen.add(address)
    return result


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
            if entry.name.startswith((_PARTIAL, _REMOVED)):
                shutil.rmtree(entry, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a `checkpoints` folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(m.group(1)), e) for e in folder.iterdir() if (m := _NAME.fullmatch(e.name)) and e.is_dir()]
    return [entry for _, entry in sorted(found)]


def latest_checkpoint(run: Path) -> Path | None:
    """Newest checkpoint of a run folder, or None."""
    found = list_checkpoints(run / "checkpoints")
    return found[-1] if found else None


def find_checkpoint(path: str, option: str = "checkpoint") -> Path:
    """The folder with `config.json` and `model.safetensors` that `path` means: of a run, a checkpoint or an export."""
    folder = Path(path)
    if not path or not folder.is_dir():
        raise ValueError(f"{option}: expected a run folder, a checkpoint or an exported folder, found none at {path!r}")
    if (folder / MODEL).is_file() and (folder / CONFIG).is_file():
        return folder
    newest = latest_checkpoint(folder)
    if newest is None:
        raise ValueError(f"{option}: expected a checkpoint in {path!r}, found neither {MODEL} nor checkpoints/step-*")
    return newest


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """A safetensors file of a checkpoint, on the host. `ValueError` names a missing or damaged file."""
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
