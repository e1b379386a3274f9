"""`make soak`: the endurance experiments in full, with a table of what was tried how often and how it ended.

    python scripts/soak.py [--output runs/soak] [--only TEXT] [--list] [--fresh]

Each experiment is a line of OUTPUT/results.jsonl; those that passed are not repeated by the next start (--fresh: they
are). Folders of experiments that failed stay under OUTPUT. Needs Linux; the experiments with a disk or a second host of
their own need `unshare` (util-linux) without privileges, and say so where they cannot run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from soak import bombs, damage, equality, faults, kills, memory, namespaces, network, slurm  # noqa: E402

Experiment = Callable[[Path], dict[str, Any]]


def run_tests(_folder: Path) -> dict[str, Any]:
    """The tests of the suite that are marked as endurance tests."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "soak"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (0, 5), done.stdout[-3000:]  # 5: there are none
    return {"pytest": done.stdout.strip().splitlines()[-1].strip("= ")}


def compare(modality: str) -> Experiment:
    """Two ranks against one, for one modality."""
    return lambda folder: equality.compare_ranks(folder, [c for c in equality.ALL_CASES if c[0] == modality])


def kill(ranks: int, parallel: str, *more: str, seed: int, modality: str = "vision") -> Experiment:
    """Twenty kills."""
    return lambda folder: kills.kill_and_resume(
        folder, ranks=ranks, kills=20, parallel=parallel, seed=seed, more=more, modality=modality
    )


def experiments() -> dict[str, tuple[Experiment, bool]]:
    """Name -> (experiment, whether it needs namespaces), quick ones first."""
    found: dict[str, tuple[Experiment, bool]] = {}
    for modality in ("vision", "speech", "text"):
        found[f"equality: two ranks as one, 30 updates, {modality}-tiny"] = compare(modality), False
    found["resharding: 2 ranks to 1 and 4, ddp and fsdp"] = equality.reshard, False
    found["8 and 16 ranks as one, 8 to 3; ddp, fsdp, hybrid"] = equality.many_ranks, False
    for modality in ("vision", "text"):
        found[f"pickle bomb in every file, {modality}"] = (lambda f, m=modality: bombs.plant_everywhere(f, m)), False
    for part in range(5):
        found[f"40 of 200 damaged run folders, part {part + 1}"] = (
            lambda f, p=part: damage.damage_and_resume(f, damages=40, seed=p),
            False,
        )
    found["signals: SIGTERM, SIGUSR1, SIGINT to one of 2 ranks"] = faults.stop_signals, False
    found["slurm: 3 pre-emptions of 2 ranks"] = slurm.preempt_and_requeue, False
    for ranks in (1, 2):
        found[f"disk full in mid-run, {ranks} rank(s)"] = (lambda f, r=ranks: faults.full_disk(f, ranks=r)), True
        found[f"loader worker killed, {ranks} rank(s)"] = (lambda f, r=ranks: faults.dead_worker(f, ranks=r)), False
    found["file size limit"] = faults.file_size_limit, False
    found["run folder read-only"] = faults.read_only, True
    for harm in ("vanished", "overwritten"):
        found[f"shard {harm} before a resume"] = (lambda f, h=harm: faults.lost_shard(f, harm=h)), False
        found[f"shard {harm} in mid-run"] = (lambda f, h=harm: faults.spoilt_shard(f, harm=h)), False
    for how in ("killed", "frozen"):
        for parallel in ("ddp", "fsdp"):
            for victim in (0, 1):
                found[f"rank {victim} of 2 {how}, {parallel}"] = (
                    lambda f, h=how, p=parallel, v=victim: faults.lost_rank(f, how=h, parallel=p, victim=v),
                    False,
                )
    found["rank 1 of 2 killed under torchrun"] = faults.lost_rank_under_torchrun, False
    for launcher in ("none", "torchrun"):
        for parallel in ("ddp", "fsdp"):
            found[f"link between two hosts cut, {parallel}, launcher {launcher}"] = (
                lambda f, n=launcher, p=parallel: network.cut_link(f, launcher=n, parallel=p),
                True,
            )
    found["kill -9, 20 times, 1 rank"] = kill(1, "ddp", seed=1), False
    found["kill -9, 20 times, 1 rank, no asynchronous checkpoints"] = (
        kill(1, "ddp", "--run.no-async-checkpoint", seed=2),
        False,
    )
    found["kill -9, 20 times, 2 ranks, ddp"] = kill(2, "ddp", seed=3), False
    found["kill -9, 20 times, 2 ranks, fsdp"] = kill(2, "fsdp", seed=4), False
    found["kill -9 of a rank, 20 times under one torchrun --max-restarts"] = kills.restart_by_launcher, False
    found["kill -9 of a rank, 5 times, from local checkpoints"] = kills.restart_from_local, False
    for number, modality in enumerate(("speech", "text")):
        bf16 = ("--run.precision", "bf16")
        name = f"kill -9, 20 times, 2 ranks, ddp, {modality}, bf16"
        found[name] = kill(2, "ddp", *bf16, seed=5 + number, modality=modality), False
        found[f"kill -9 of 10 first starts, {modality}"] = (
            lambda f, m=modality: kills.kill_first_starts(f, modality=m),
            False,
        )
    found["memory over 2000 updates"] = memory.grow, False
    found["the suite's endurance tests"] = run_tests, False
    return found


def attempt(number: int, name: str, experiment: Experiment, output: Path) -> dict[str, Any]:
    """Runs one experiment in a folder of its own; removes the folder unless the experiment failed."""
    folder, start = output / f"experiment-{number:02d}", time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row: dict[str, Any] = {"name": name, "result": "passed"}
    try:
        row["numbers"] = experiment(folder)
    except Exception as error:
        row |= {"result": "failed", "reason": f"{type(error).__name__}: {error}", "folder": str(folder)}
    else:
        shutil.rmtree(folder, ignore_errors=True)
    row["seconds"] = round(time.monotonic() - start, 1)
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(f"\n{'experiment':<62}{'result':<10}{'seconds':>8}  numbers")
    for row in rows:
        numbers = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["numbers"].items())
        print(f"{row['name']:<62}{row['result']:<10}{row['seconds']:>8.1f}  {numbers or row.get('reason', '')[:120]}")
    total = sum(row["seconds"] for row in rows)
    counts = {kind: sum(row["result"] == kind for row in rows) for kind in ("passed", "failed", "skipped")}
    print(f"\n{', '.join(f'{n} {kind}' for kind, n in counts.items())} in {total / 60:.1f} minutes")


def main() -> None:
    """Exit code 1 when an experiment failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/soak"), help="folder for everything")
    parser.add_argument("--only", default="", help="experiments whose name contains this text")
    parser.add_argument("--list", action="store_true", help="print the names and leave")
    parser.add_argument("--fresh", action="store_true", help="repeat what has passed before")
    options = parser.parse_args()
    chosen = {n: e for n, e in experiments().items() if options.only in n}
    if not chosen:
        parser.error(f"--only: expected a part of one of {list(experiments())}, got {options.only!r}")
    if options.list:
        print("\n".join(chosen))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: no run outlives this process
    results = options.output.resolve() / "results.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    earlier = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    passed = {row["name"]: row for row in earlier if row["result"] == "passed" and not options.fresh}
    reason, rows = namespaces.why_not(), []
    for number, (name, (experiment, isolated)) in enumerate(experiments().items()):
        if name not in chosen:
            continue
        if name in passed:
            rows.append(passed[name])
            continue
        print(f"[{len(rows) + 1}/{len(chosen)}] {name} ...", flush=True)
        if isolated and reason is not None:
            row: dict[str, Any] = {"name": name, "result": "skipped", "seconds": 0.0, "reason": reason}
        else:
            row = attempt(number, name, experiment, results.parent)
        row.setdefault("numbers", {})
        print(f"    {row['result']} in {row['seconds']} s  {row.get('reason') or row['numbers']}", flush=True)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
    show(rows)
    sys.exit(any(row["result"] == "failed" for row in rows))


if __name__ == "__main__":
    main()
