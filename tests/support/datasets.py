"""Folders of real data that lie beside the repository, where they do."""

from __future__ import annotations

from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (_ROOT / "shared" / "data", _ROOT.parent / "shared" / "data")


def find_dataset(name: str) -> Path:
    """The folder of a data set; the test that asks for one that is in no folder is skipped."""
    for folder in FOLDERS:
        if (folder / name).is_dir():
            return folder / name
    pytest.skip(f"data {name}: expected in one of {', '.join(map(str, FOLDERS))}, found in none")
