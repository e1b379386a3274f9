"""The same losses on any number of ranks: from the start, and after a change of ranks in mid-run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from soak.cases import MODALITIES, NO_DROPOUT, make_data, options
from soak.jobs import largest_difference, last_step, losses
from soak.ranks import run_all

LIMIT = 1e-5
"""Largest relative difference of a loss."""
MICRO = {"whole": 4, "accumulated": 2}
"""Samples per forward for a global batch of 8: one forward on each of two ranks, or two."""


Case = tuple[str, str, str]
"""Modality, `run.parallel`, "whole" or "accumulated"."""
ALL_CASES: list[Case] = [(m, p, a) for m in MODALITIES for p in ("ddp", "fsdp") for a in MICRO]


def compare_ranks(
    folder: Path, cases: Sequence[Case] = ALL_CASES, *, steps: int = 30, small: bool = False
) -> dict[str, float]:
    """Losses of two ranks against one rank with the same global batch and micro-batches, without dropout; and of one
    rank that goes on from what two saved half-way, against the two.

    Returns case -> largest relative difference over `steps` updates. Raises `AssertionError` above `LIMIT`, or where
    the losses do not move (a comparison of nothing).
    """
    one: dict[str, list[str]] = {}
    two: dict[str, list[str]] = {}
    alone, half = {}, steps // 2
    for modality, parallel, micro in cases:
        data, name = make_data(modality, folder / "data"), f"{modality}-{micro}-{parallel}"
        more = ["--data.micro-batch", str(MICRO[micro]), *NO_DROPOUT, "--run.keep-checkpoints", "9"]
        alone[name] = f"{modality}-{micro}-1"  # serves both kinds of parallel
        one[alone[name]] = options(modality, data, folder / alone[name], steps, *more, every=half, small=small)
        more += ["--run.parallel", parallel]
        two[name] = options(modality, data, folder / name, steps, *more, every=half, small=small)
        one[f"{name}-2-to-1"] = options(
            modality, data, folder / f"{name}-2-to-1", steps, *more, every=half, small=small
        )
    run_all(list(two.values()), 2, folder / "logs")
    for name in two:
        rewind(folder / name, folder / f"{name}-2-to-1", half)
    run_all(list(one.values()), 1, folder / "logs")
    differences = {}
    for name in two:
        expected, got, after = (losses(folder / n) for n in (alone[name], name, f"{name}-2-to-1"))
        assert len(expected) == steps and len(set(expected)) == steps, f"{name}: expected {steps} different losses"
        differences[name] = largest_difference(got, expected)
        assert after[:half] == got[:half]
        differences[f"{name}-2-to-1"] = largest_difference(after[half:], got[half:])
    return check(differences)


MANY: dict[str, list[str]] = {
    "ddp": [], "ddp bf16": ["--run.reduce-precision", "bf16"], "fsdp": ["--run.parallel", "fsdp"],
    "hybrid": ["--run.parallel", "fsdp", "--run.shard-ranks", "4"],
}  # fmt: skip


def many_ranks(
    folder: Path, counts: Sequence[int] = (8, 16), kinds: Sequence[str] = ("ddp", "fsdp", "hybrid"), *,
    steps: int = 6, fewer: int = 3,
) -> dict[str, float]:  # fmt: skip
    """Losses of many ranks of a very small model against one rank; and of `fewer` ranks that go on from what the first
    number of ranks saved half-way. Returns case -> largest relative difference."""
    data, half, differences = make_data("vision", folder / "data"), steps // 2, {}
    more = ["--data.micro-batch", "1", *NO_DROPOUT, "--run.keep-checkpoints", "9", "--optim.clip", "1"]

    def command(name: str, kind: str = "ddp") -> list[str]:
        every, batch = [*more, *MANY[kind]], fewer * max(counts)
        return options("vision", data, folder / name, steps, *every, every=half, batch=batch, small=True)

    run_all([command("1")], 1, folder / "logs")
    expected = losses(folder / "1")
    for count in counts:
        run_all([command(f"{count}-{kind}", kind) for kind in kinds], count, folder / f"logs-{count}")
        for kind in kinds:
            differences[f"{kind} 1 to {count}"] = largest_difference(losses(folder / f"{count}-{kind}"), expected)
    for kind in (kind for kind in kinds if kind != "hybrid"):
        rewind(folder / f"{counts[0]}-{kind}", folder / f"fewer-{kind}", half)
    resumed = [kind for kind in kinds if kind != "hybrid"]
    run_all([command(f"fewer-{kind}", kind) for kind in resumed], fewer, folder / "logs-fewer")
    for kind in resumed:
        got = losses(folder / f"fewer-{kind}")
        differences[f"{kind} {counts[0]} to {fewer}"] = largest_difference(got[half:], expected[half:])
    return check(differences)


def rewind(run: Path, to: Path, step: int) -> None:
    """Copies a finished run to a folder where its checkpoint `step` is the newest."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to)
    for checkpoint in (to / "checkpoints").iterdir():
        if checkpoint.name != f"step-{step:08d}":
            shutil.rmtree(checkpoint)
    assert last_step(to) == step


def check(differences: dict[str, float]) -> dict[str, float]:
    """The differences, none of which may be above `LIMIT` or NaN."""
    too_far = {n: d for n, d in differences.items() if not d <= LIMIT}
    assert not too_far, f"expected relative differences of at most {LIMIT}, got {too_far}"
    return differences


def reshard(
    folder: Path, ranks: Sequence[int] = (1, 4), parallels: Sequence[str] = ("ddp", "fsdp"), *, steps: int = 30,
    modality: str = "vision", small: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Two ranks save in mid-run; other numbers of ranks go on from there as the two would have.

    Returns "parallel to ranks" -> largest relative difference of the losses after the change. Raises `AssertionError`
    above `LIMIT`.
    """
    data, half, differences = make_data(modality, folder / "data"), steps // 2, {}
    more = ["--data.micro-batch", "2", *NO_DROPOUT, "--run.keep-checkpoints", "9"]

    def command(run: Path, parallel: str) -> list[str]:
        return options(modality, data, run, steps, *more, "--run.parallel", parallel, every=half, small=small)

    whole = {parallel: folder / f"whole-{parallel}" for parallel in parallels}
    run_all([command(run, parallel) for parallel, run in whole.items()], 2, folder / "logs")
    for count in ranks:
        runs = {parallel: folder / f"{parallel}-{count}" for parallel in parallels}
        for parallel, run in runs.items():
            rewind(whole[parallel], run, half)
        run_all([command(run, parallel) for parallel, run in runs.items()], count, folder / f"logs-{count}")
        for parallel, run in runs.items():
            got, expected = losses(run), losses(whole[parallel])
            assert got[:half] == expected[:half]
            differences[f"{parallel} 2 to {count}"] = largest_difference(got[half:], expected[half:])
    return check(differences)
