"""Reading the index of a webdataset shard: an uncompressed .tar archive whose members of one key are one sample."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from d2v.data.index_cache import ShardIndex

MAX_LABEL_BYTES = 4096
MAX_TAR_HEADER_BYTES = 1 << 20


def split_name(name: str) -> tuple[str, str]:
    """Name of a member -> (key, extension): what comes before and after the first dot of its base name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension


def scan_shard(shard: Path, suffixes: frozenset[str], singular: str, *, labelled: bool, option: str) -> ShardIndex:
    """The samples of a shard by key: members of some suffixes, with their class (`key.cls`) and text (`key.txt`).

    Args:
        shard: the archive.
        suffixes: lower case, with the dot.
        singular: what a sample is called.
        labelled: read the classes.
        option: begins every error message.

    Raises:
        ValueError: the file is not an uncompressed archive, or a sample has no class.
    """
    found: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}
    texts: dict[str, tarfile.TarInfo] = {}
    rejected: list[tuple[str, str]] = []
    with shard.open("rb") as file:
        for member in _members(shard, file, option, rejected):
            key, extension = split_name(member.name)
            if f".{extension.lower()}" in suffixes:
                if key in found:
                    rejected.append((f"{shard}:{member.name}", f"second {singular} of key {key!r}"))
                else:
                    found[key] = member
            elif labelled and extension == "cls":
                labels[key] = _read_label(file, member)
            elif extension == "txt":
                texts[key] = member
    keys = sorted(found)
    if labelled and (missing := [key for key in keys if key not in labels]):
        count = f"{len(missing)} of {len(keys)} without a label"
        raise ValueError(f"{option}: expected {missing[0]}.cls in {str(shard)!r}, found none ({count})")
    places = [(found[key].offset_data, found[key].size) for key in keys]
    beside = [(texts[key].offset_data, texts[key].size) if key in texts else (-1, -1) for key in keys]
    return ShardIndex(
        [found[key].name for key in keys], np.asarray(places, dtype=np.int64).reshape(-1, 2),
        [labels.get(key, "") for key in keys], np.asarray(beside, dtype=np.int64).reshape(-1, 2), rejected,
    )  # fmt: skip


def _members(shard: Path, file: Any, option: str, rejected: list[tuple[str, str]]) -> Iterator[tarfile.TarInfo]:
    """Regular, whole, unpacked members; what is cut off or damaged goes to `rejected`."""
    total = os.fstat(file.fileno()).st_size
    try:
        archive = tarfile.open(fileobj=file, mode="r:", tarinfo=_Member)  # noqa: SIM115
    except tarfile.TarError as error:
        raise ValueError(f"{option}: expected an uncompressed tar archive, got {str(shard)!r} ({error})") from None
    while True:
        try:
            member = archive.next()
        except tarfile.TarError:
            break  # cut off inside the last member, which is rejected below by its size
        if member is None:
            break
        vars(archive)["members"] = []  # tarfile would keep every header of a large shard
        if not member.isreg() or member.sparse is not None:
            if not member.isdir():
                rejected.append((f"{shard}:{member.name}", "not a regular file"))
        elif member.offset_data + member.size > total:
            rejected.append((f"{shard}:{member.name}", "cut off: the shard ends inside this member"))
        else:
            yield member
    block = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
    if block.strip(b"\0"):
        rejected.append((str(shard), f"damaged from byte {archive.offset}: what follows is not read"))


def _read_label(file: Any, member: tarfile.TarInfo) -> str:
    data = os.pread(file.fileno(), min(member.size, MAX_LABEL_BYTES), member.offset_data)
    return data.decode("utf-8", errors="replace").strip()


class _Member(tarfile.TarInfo):
    """Refuses extended headers of absurd size, which tarfile would read into memory as a whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if not member.isfile() and not member.isdir() and member.size > MAX_TAR_HEADER_BYTES:
            raise tarfile.HeaderError(f"extended header of {member.size} bytes")
        return member
