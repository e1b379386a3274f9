"""Folders of many files: what a walk has found is kept, and counts while no folder has changed."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from d2v.data.cache import IndexCache, NameTable, name_index, stamps_of
from d2v.data.sources import Kind, ending_of, walk_files

KEPT_FROM = 20_000
"""Folders of fewer files are walked at every start. Of more, so many files, chosen at random, are compared with what is
known of them."""
SETTLED_SECONDS = 2
"""What changed so short a time before the walk may change again within the resolution of its time."""


class Tree(NamedTuple):
    """What is under a folder, by a kind of data."""

    names: NameTable
    """Files of the kind, sorted."""
    stamps: np.ndarray
    """(files,2) int64: size and time of change of each."""
    beside: list[str]
    """Files that were asked for by name, sorted."""
    left: Counter[str]
    """Other files, by ending, and what is passed over, by reason."""


def walk_tree(root: Path, kind: Kind, beside: tuple[str, ...], cache: IndexCache | None) -> Tree:
    """The files of a kind at any depth under `root`, and those whose paths behind a "/" end in `beside`."""
    name = name_index("folder", [root.absolute(), *sorted(kind.suffixes), *sorted(kind.beside), *beside])
    if cache is not None and (arrays := cache.read(name)) and (known := _take_known(root, arrays)) is not None:
        return known
    left, folders, start = Counter[str](), dict[str, tuple[int, int]](), time.time()
    found, asked = list[str](), list[str]()
    for path in walk_files(root, left, folders):
        if f"{os.sep}{path}".endswith(beside):
            asked.append(path)
        elif (ending := ending_of(path)) in kind.suffixes:
            found.append(path)
        elif ending not in kind.beside:
            left[ending] += 1
    found.sort()
    prefix = os.path.join(root, "")  # noqa: PTH118
    tree = Tree(NameTable(found), stamps_of([prefix + path for path in found]), sorted(asked), +left)
    if cache is not None and len(found) > KEPT_FROM:
        changed = np.array(list(folders.values()), dtype=np.int64).reshape(-1, 2)
        if changed[:, 1].max() < (start - SETTLED_SECONDS) * 1e9:
            more = np.frombuffer(json.dumps([tree.beside, tree.left]).encode(), np.uint8)
            parts = tree.names.arrays("names") | NameTable(folders).arrays("folders")
            cache.keep(name, {**parts, "stamps": tree.stamps, "changed": changed, "more": more})
    return tree


def _take_known(root: Path, arrays: dict[str, np.ndarray]) -> Tree | None:
    """What an earlier walk found; None where a folder, or one of the files that are looked at, has changed, and where
    names lead out of the folder: the file may be of somebody else's run."""
    beside, left = json.loads(arrays["more"].tobytes())
    letters, ends = arrays["names"], arrays["names_ends"]
    if b"../" in letters.tobytes() or (letters[np.append(0, ends[:-1])] == ord("/")).any():
        return None
    if any(name.startswith("/") or "../" in name for name in beside):
        return None
    for folder, (number, changed) in zip(NameTable.taken(arrays, "folders"), arrays["changed"].tolist(), strict=True):
        try:
            status = os.stat(os.path.join(root, folder))  # noqa: PTH116, PTH118
        except OSError:
            return None
        if (status.st_ino, status.st_mtime_ns) != (number, changed):
            return None
    names, stamps = NameTable.taken(arrays, "names"), arrays["stamps"]
    rows = np.random.default_rng().choice(len(names), KEPT_FROM, replace=False)
    if not np.array_equal(stamps_of([os.path.join(root, names[row]) for row in rows.tolist()]), stamps[rows]):  # noqa: PTH118
        return None
    return Tree(names, stamps, beside, Counter(left))
