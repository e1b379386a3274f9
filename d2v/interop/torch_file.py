"""Reads `torch.save` files of other programs without running anything in them.

PyTorch's weights-only loader refuses every class it does not know, and published data2vec files hold configuration
objects (OmegaConf, argparse, enums). Each unknown name is therefore replaced by an inert record, which keeps what the
file says about the object and does nothing.
"""

from __future__ import annotations

import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

MOST_NODES = 1_000_000
"""Values a file may hold; shared references can make a small file unfold into more than memory holds."""


class Record:
    """An object of a class that is not loaded: its name, what it was called with, its state."""

    kind = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def _stand_in(kind: str) -> Any:
    if kind == "collections.defaultdict":
        return lambda *_: {}  # its factory is not needed to read what is in it
    return type(kind.rsplit(".", 1)[-1], (Record,), {"kind": kind, "__init__": Record.__init__})


def read_torch_file(path: str | Path) -> Any:
    """The object of a `torch.save` file, tensors on the CPU (mapped, not read), unknown objects as `Record`.

    Raises:
        ValueError: not such a file, a truncated one, or one whose pickle does what a checkpoint has no need of.
    """
    path = Path(path)
    check_whole(path)
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        stand_ins: list[Any] = [(_stand_in(name), name) for name in unknown]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # the loader raises many kinds for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            "checkpoint: expected a file written by torch.save (zip format, torch 1.6 or newer) with plain contents, "
            f"got {str(path)!r}: {reason[:300]}"
        ) from None


def check_whole(path: Path) -> None:
    """`ValueError` says what a file is that cannot be a checkpoint: absent, a Git LFS pointer, or cut off."""
    if not path.is_file():
        raise ValueError(f"checkpoint: expected a file, got {str(path)!r}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"checkpoint: expected a file of weights, got {str(path)!r}, a Git LFS pointer that only names it: run "
            "`git lfs pull` in its repository, or download the file itself"
        )
    needed = 0
    if path.suffix == ".safetensors" and size >= 8:  # 8 bytes with the length of the header, which gives every end
        needed = 8 + int.from_bytes(start[:8], "little")
        if needed <= min(size, 100_000_000):
            with path.open("rb") as file:
                header = re.findall(rb'"data_offsets": ?\[\d+, ?(\d+)\]', file.read(needed))
            needed += max(map(int, header), default=0)
    if (start.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path)) or size < needed:
        raise ValueError(
            f"checkpoint: expected a file of weights, got {str(path)!r}, which is cut off after {size:,} bytes: "
            "download or copy it again"
        )

    if start.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > size:
            raise ValueError(
                f"checkpoint: expected a file of torch.save, which does not compress, got {str(path)!r}: "
                f"{size:,} bytes that unpack to {unpacked:,}"
            )


def strip_wrappers(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors without what DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) add to their names."""
    plain = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): value for name, value in tensors.items()}
    if plain and all(name.startswith("module.") for name in plain):
        return strip_wrappers({name.removeprefix("module."): value for name, value in plain.items()})
    return {name: strip_wrappers(v) if isinstance(v, Mapping) else v for name, v in plain.items()}


def check_weights(tensor: torch.Tensor, name: str) -> None:
    """`ValueError` for weights that no model can have: other numbers than real ones, NaN, infinite."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected floating-point weights, got {tensor.dtype}")
    if bad := tensor.numel() - int(tensor.float().isfinite().sum()):
        raise ValueError(f"{name}: expected finite weights, got {bad} of {tensor.numel()} that are NaN or infinite")


def to_plain(value: Any) -> Any:
    """Configuration objects as plain dicts, lists, strings and numbers.

    OmegaConf containers become dicts and lists, their nodes values; a Namespace a dict; an enum member its value;
    anything else that is not plain its class name in angle brackets. Tensors stay.

    Raises:
        ValueError: more than `MOST_NODES` values.
    """
    return _Plain().convert(value)


class _Plain:
    def __init__(self) -> None:
        self.nodes = 0

    def convert(self, value: Any, depth: int = 0) -> Any:
        self.nodes += 1
        if self.nodes > MOST_NODES or depth > 200:
            raise ValueError(f"checkpoint: expected at most {MOST_NODES} values, nested at most 200 deep, got more")
        if isinstance(value, Record):
            return self.convert_record(value, depth)
        if isinstance(value, Mapping):
            return {self.convert(k, depth + 1): self.convert(v, depth + 1) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.convert(v, depth + 1) for v in value]
        if value is None or isinstance(value, (bool, int, float, str, torch.Tensor)):
            return value
        return f"<{value.__name__ if isinstance(value, type) else type(value).__name__}>"

    def convert_record(self, record: Record, depth: int) -> Any:
        state = record.state
        if isinstance(state, tuple) and state and isinstance(state[0], Mapping):
            state = state[0]  # (__dict__, slots)
        if isinstance(state, Mapping):
            for entry in ("_content", "_val"):  # OmegaConf: containers, nodes
                if entry in state:
                    return self.convert(state[entry], depth + 1)
            return self.convert(OrderedDict(state), depth + 1)
        if record.arguments:  # an enum member: Class(value), or getattr(Class, name)
            return self.convert(record.arguments[-1], depth + 1)
        return repr(record)
