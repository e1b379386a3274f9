"""A few of the damaged run folders of `make soak`."""

from __future__ import annotations

from pathlib import Path

from soak import damage


def test_damaged_folders_resume_equal_or_are_refused(tmp_path: Path) -> None:
    counts = damage.damage_and_resume(tmp_path, damages=20, seed=7)
    assert sum(counts.values()) == 20 and min(counts["refused"], counts["equal"]) > 2, counts
