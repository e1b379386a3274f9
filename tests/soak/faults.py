"""Broken disks, data and processes: a clear message, an intact last checkpoint, and a run that goes on after repair."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from soak.cases import RANDOM, make_data, make_shards, options
from soak.jobs import (
    LOST,
    SAVED,
    Job,
    assert_same_weights,
    finish,
    has_kept,
    has_reached,
    last_step,
    losses,
    running,
    wait_until,
)
from soak.namespaces import open_disk

STEPS, EVERY = 150, 5
TIMEOUT = 20
"""Seconds after which a silent rank ends the others (`run.timeout`) in these experiments."""


class Fault:
    """A run of the small vision recipe with dropout, its uninterrupted twin, and where they are."""

    def __init__(self, folder: Path, *, ranks: int = 1, steps: int = STEPS, data: Path | str | None = None,
                 more: Sequence[str] = ()) -> None:  # fmt: skip
        self.folder, self.ranks, self.steps = folder, ranks, steps
        self.data = data if data is not None else make_data("vision", folder / "data")
        self.more = [*RANDOM, "--run.timeout", str(TIMEOUT), *more]

    def command(self, run: Path, *more: str) -> list[str]:
        """Options of the run in `run`."""
        return options("vision", self.data, run, self.steps, *self.more, *more, every=EVERY, small=True)

    def log(self, name: str) -> Path:
        """File for the output of one start."""
        return self.folder / "logs" / f"{name}.log"

    def reference(self) -> Path:
        """The folder of the uninterrupted run."""
        run = self.folder / "uninterrupted"
        if last_step(run) < self.steps:
            finish(self.command(run), self.log("uninterrupted"), ranks=self.ranks)
        return run

    def resume(self, run: Path, **kwargs: object) -> None:
        """Resumes `run` to its end and compares its weights bit by bit with the uninterrupted run's."""
        before = last_step(run)
        assert before > 0, "expected a checkpoint from before the fault"
        job = finish(self.command(run), self.log(f"{run.name}-resumed"), ranks=self.ranks, **kwargs)  # type: ignore[arg-type]
        assert "resuming" in job.text()
        assert_same_weights(run, self.reference())


def expect_end(
    job: Job, codes: Sequence[int], words: Sequence[str], timeout: float, ranks: Sequence[int] = (0,)
) -> float:
    """Waits for the end of a job; its exit codes must be among `codes`, and each of `ranks` must have printed one
    sentence of d2v that holds all `words`. Returns the seconds that it took."""
    begun = time.monotonic()
    got = job.codes(timeout)
    assert all(got[r] in codes for r in ranks if r < len(got)), f"expected exit codes {codes}, got {got}:\n{job.tail()}"
    for rank in ranks:
        said = [line for line in job.text(rank).splitlines() if "d2v: " in line and all(w in line for w in words)]
        assert said, f"expected a sentence with {words} from rank {rank}:\n{job.tail(3000)}"
    return time.monotonic() - begun


def full_disk(
    folder: Path, *, ranks: int = 1, free_kilobytes: Sequence[int] = (0, 40, 200), resume: bool = True
) -> dict[str, int]:
    """The disk fills in mid-run, but for a few kilobytes; afterwards there is room again and the run goes on
    (`resume`). Returns the update of the checkpoint that was left."""
    fault = Fault(folder, ranks=ranks)
    sizes = {}
    for free in free_kilobytes:
        disk = folder / f"disk-{free}"
        run = disk / "run"
        with open_disk(disk, 16) as small:
            inside = small.outside(run)
            with running(fault.command(run), fault.log(f"full-{free}"), ranks=ranks, prefix=small.prefix) as job:
                wait_until(has_kept(inside, 10), job, "the checkpoint of update 10")
                fill(inside.parent / "filler", free)
                codes = (1, 2) if ranks > 1 else (2,)
                expect_end(job, codes, ["No space left on device"], 120)
            (inside.parent / "filler").unlink()
            sizes[f"step kept with {free} kB free"] = last_step(inside)
            assert last_step(inside) >= 10
            if resume:
                finish(fault.command(run), fault.log(f"full-{free}-resumed"), ranks=ranks, prefix=small.prefix)
                assert_same_weights(inside, fault.reference())
    return sizes


def fill(path: Path, free_kilobytes: int) -> None:
    """Writes zeros until the disk of `path` is full, then gives `free_kilobytes` back."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(max(file.tell() - 1024 * free_kilobytes, 0))


def file_size_limit(folder: Path) -> dict[str, int]:
    """No file may grow beyond 20 kB, as under a quota: the first checkpoint fails; without the limit all goes well."""
    fault = Fault(folder)
    run = folder / "run"
    limit = f"resource.setrlimit({resource.RLIMIT_FSIZE}, (20_000, 20_000))"
    script = f"import os, resource, sys; {limit}; os.execv(sys.argv[1], sys.argv[1:])"
    with running(fault.command(run), fault.log("limit"), prefix=[sys.executable, "-c", script]) as job:
        expect_end(job, [2], ["File too large"], 120)
    assert last_step(run) == 0
    finish(fault.command(run), fault.log("unlimited"))
    return {"tensors": assert_same_weights(run, fault.reference())}


def read_only(folder: Path) -> dict[str, int]:
    """The run folder's disk becomes read-only in mid-run, and was so before the start."""
    fault = Fault(folder)
    fault.reference()
    disk = folder / "disk"
    run = disk / "run"
    with open_disk(disk, 64) as small:
        inside, prefix = small.outside(run), small.prefix
        with running(fault.command(run), fault.log("read-only"), prefix=prefix) as job:
            wait_until(has_reached(inside, 12), job, "update 12")
            # Not by a remount, which waits for files that are open: the folder of the checkpoints is covered.
            small.run("mount", "--bind", str(run / "checkpoints"), str(run / "checkpoints"))
            small.run("mount", "-o", "remount,ro,bind", str(run / "checkpoints"))
            expect_end(job, [2], ["Read-only file system"], 120)
        kept = last_step(inside)
        with running(fault.command(run), fault.log("read-only-start"), prefix=prefix) as job:
            expect_end(job, [2], ["Read-only file system"], 120)
        small.run("umount", str(run / "checkpoints"))
        finish(fault.command(run), fault.log("writable"), prefix=prefix)
        assert_same_weights(inside, fault.reference())
    return {"step kept": kept}


def stop_at(fault: Fault, run: Path, step: int, name: str, number: int = signal.SIGTERM) -> None:
    """Starts a run and stops it by a signal to its first rank once it has logged `step`."""
    with running(fault.command(run), fault.log(name), ranks=fault.ranks, launcher="none") as job:
        wait_until(has_reached(run, step), job, f"update {step}")
        os.kill(job.trainers()[0], number)
        codes = job.codes(60)
        expected = SAVED if number != signal.SIGINT else 130
        assert set(codes) == {expected}, f"expected exit code {expected}, got {codes}:\n{job.tail()}"


def stop_signals(folder: Path, *, ranks: int = 2) -> dict[str, int]:
    """SIGTERM, SIGUSR1 and SIGINT to one rank only: all ranks save and leave; the next start goes on."""
    fault = Fault(folder, ranks=ranks, steps=200)
    steps = {}
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        run = folder / number.name
        stop_at(fault, run, 12, number.name, number)
        assert (run / "requeue").exists() == (number != signal.SIGINT)
        steps[number.name] = last_step(run)
        fault.resume(run)
        assert not (run / "requeue").exists()
    return steps


def lost_shard(folder: Path, *, harm: str = "vanished") -> dict[str, int]:
    """A shard of the data is gone, or overwritten, when the run is taken up again; then it is repaired."""
    shards = make_shards(folder / "shards")
    fault = Fault(folder, data=str(folder / "shards" / "*.tar"), steps=200)
    fault.reference()
    run, kept = folder / "run", folder / "kept.tar"
    stop_at(fault, run, 12, "stopped")
    before = last_step(run)
    shutil.copy(shards[1], kept)
    if harm == "vanished":
        shards[1].unlink()
    else:
        shards[1].write_bytes(bytes(len(kept.read_bytes())))
    with running(fault.command(run), fault.log(harm)) as job:
        expect_end(job, [2], ["d2v: data."], 120)
    assert last_step(run) == before
    shutil.copy(kept, shards[1])
    fault.resume(run)
    return {"step kept": before}


def spoilt_shard(folder: Path, *, harm: str = "overwritten") -> dict[str, str]:
    """A shard vanishes, or is overwritten, while the run reads it: either its open file serves on, or the run stops
    with the share of bad samples; after the repair the run goes on to its end."""
    shards = make_shards(folder / "shards")
    more = ["--data.workers", "1"]
    fault = Fault(folder, data=str(folder / "shards" / "*.tar"), steps=400, more=more)
    run, kept = folder / "run", folder / "kept.tar"
    with running(fault.command(run), fault.log(harm)) as job:
        wait_until(has_reached(run, 12), job, "update 12")
        shutil.copy(shards[1], kept)
        if harm == "vanished":
            shards[1].unlink()
        else:
            with shards[1].open("r+b") as file:
                file.write(bytes(len(kept.read_bytes())))
        code = job.codes(240)[0]
        text = job.text()
    outcome = "served on by its open file"
    if code:
        assert code == 2 and "d2v: data." in text and "part-1.tar" in text, text[-2000:]
        outcome = "stopped with the share of bad samples"
        assert 0 < last_step(run) < fault.steps
    shutil.copy(kept, shards[1])
    finish(fault.command(run), fault.log("repaired"))
    assert last_step(run) == fault.steps and len(losses(run)) == fault.steps
    return {"outcome": outcome}


def dead_worker(folder: Path, *, ranks: int = 1) -> dict[str, float]:
    """kill -9 of a loader worker."""
    fault = Fault(folder, ranks=ranks, steps=200, more=["--data.workers", "1"])
    run = folder / "run"
    with running(fault.command(run), fault.log("worker"), ranks=ranks, launcher="none") as job:
        wait_until(has_reached(run, 12), job, "update 12")
        os.kill(job.loader_workers()[0], signal.SIGKILL)
        codes = job.codes(TIMEOUT + 60)
        assert all(codes), f"expected exit codes other than 0, got {codes}"
        said = [line for r in range(ranks) for line in job.text(r).splitlines() if "worker" in line and "d2v:" in line]
        assert said, f"expected a line that begins with d2v and names the worker:\n{job.tail(3000)}"
    fault.resume(run)
    return {"exit code": codes[0]}


def lost_rank(
    folder: Path, *, victim: int = 1, how: str = "killed", parallel: str = "ddp", resume: bool = True
) -> dict[str, float]:
    """One of two ranks is killed (kill -9) or frozen (SIGSTOP), without a launcher that would stop the other: that one
    ends in time with exit code 76 and names the lost one; the run goes on."""
    fault = Fault(folder, ranks=2, steps=150, more=["--run.parallel", parallel])
    run = folder / "run"
    with running(fault.command(run), fault.log("lost"), ranks=2, launcher="none") as job:
        wait_until(has_reached(run, 12), job, "update 12")
        wait_until(has_kept(run, 10), job, "a checkpoint")
        begun = time.monotonic()
        os.kill(job.trainers()[victim], signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        seconds = wait_for_survivor(job, 1 - victim, [f"rank {victim}", socket.gethostname()], begun)
        assert job.processes[1 - victim].wait(10) == LOST, job.tail(3000)
    assert last_step(run) >= 10
    if resume:
        fault.resume(run)
    return {"seconds": round(seconds, 1)}


def lost_rank_under_torchrun(folder: Path) -> dict[str, float]:
    """kill -9 of one of two ranks: torchrun stops the other one, names the lost one and fails; the run goes on."""
    fault = Fault(folder, ranks=2, steps=150)
    run = folder / "run"
    with running(fault.command(run), fault.log("lost"), ranks=2) as job:
        wait_until(has_reached(run, 12), job, "update 12")
        begun = time.monotonic()
        os.kill(job.trainers()[1], signal.SIGKILL)
        assert job.codes(TIMEOUT + 40) != [0]
        seconds, words = time.monotonic() - begun, job.text().partition("Root Cause")[2].split()
        assert " ".join(words).find("rank : 1") > 0 and "-9" in words, job.tail(3000)
    fault.resume(run)
    return {"seconds": round(seconds, 1)}


def wait_for_survivor(job: Job, rank: int, words: Sequence[str], begun: float, slack: float = 25) -> float:
    """Waits until trainer `rank` of a job has ended; it must have printed a sentence of d2v that holds all `words`.
    Returns the seconds since `begun`; `AssertionError` where they are more than `TIMEOUT` and some slack."""
    while rank in job.trainers():
        late = time.monotonic() > begun + TIMEOUT + slack
        assert not late, f"expected an end within {TIMEOUT} + {slack} s:\n{job.tail(3000)}"
        time.sleep(0.1)
    seconds = time.monotonic() - begun
    said = [line for line in job.text(rank).splitlines() if "d2v: " in line and all(w in line for w in words)]
    assert said, f"expected a sentence with {words} from rank {rank}:\n{job.tail(3000)}"
    return seconds
