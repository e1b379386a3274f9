"""Short forms of the endurance experiments (`make soak`): many ranks compute what one computes, and nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from soak import bombs, equality, faults, kills, namespaces

CASES = [
    ("vision", "fsdp", "accumulated"),
    ("speech", "ddp", "accumulated"),
    ("text", "fsdp", "whole"),
]


def test_two_ranks_have_the_losses_of_one_and_save_for_one(tmp_path: Path) -> None:
    differences = equality.compare_ranks(tmp_path, CASES, steps=4, small=True)
    assert len(differences) == 2 * len(CASES)


def test_a_comparison_can_fail() -> None:
    assert equality.largest_difference([1.0, 2.0 + 1e-4], [1.0, 2.0]) > equality.LIMIT
    with pytest.raises(AssertionError, match="expected 2 losses"):
        equality.largest_difference([1.0], [1.0, 2.0])
    for bad in (1.1 * equality.LIMIT, float("nan")):
        with pytest.raises(AssertionError, match="relative differences"):
            equality.check({"case": bad})


def test_kill_9_loses_nothing(tmp_path: Path) -> None:
    counts = kills.kill_and_resume(tmp_path, kills=2, steps=100, every=10, here=True)
    assert counts["tensors"] > 0 and counts["training"] + counts["writing"] == 2


def test_a_killed_rank_is_named_by_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "TIMEOUT", 10)
    assert faults.lost_rank(tmp_path, resume=False)["seconds"] > 0.0


@pytest.mark.skipif(namespaces.why_not() is not None, reason=f"namespaces: {namespaces.why_not()}")
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    assert faults.full_disk(tmp_path, free_kilobytes=(40,), resume=False)["step kept with 40 kB free"] >= 10


def test_no_pickle_in_a_run_folder_is_executed(tmp_path: Path) -> None:
    counts = bombs.plant_everywhere(tmp_path, thorough=False)
    assert min(counts.values()) > 0
