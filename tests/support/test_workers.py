"""What pytest's workers share is made once, and again only where it failed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.workers import make_once


def test_the_first_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    calls: list[Path] = []

    def make() -> Path:
        calls.append(tmp_path)
        time.sleep(0.2)
        made = tmp_path / "library.so"
        made.write_text("whole")
        return made

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: make_once(tmp_path, "library", make).read_text(), range(3)))
    assert found == ["whole"] * 3 and len(calls) == 1


def test_after_a_failure_the_next_tries(tmp_path: Path) -> None:
    def fail() -> Path:
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        make_once(tmp_path, "library", fail)
    assert make_once(tmp_path, "library", lambda: tmp_path) == tmp_path


def test_every_worker_has_the_same_folder(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    own = tmp_path_factory.getbasetemp()
    assert shared_folder.is_dir() and own in {shared_folder.parent, *shared_folder.parent.iterdir()}
