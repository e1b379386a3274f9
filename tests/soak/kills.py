"""kill -9 at random moments, and the certainty that nothing is lost: the resumed run ends with the same bits."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

from d2v.folder import list_checkpoints, step_of
from soak.cases import RANDOM, make_data, options
from soak.jobs import Job, assert_same_weights, finish, finish_here, last_step, read_metrics, running, wait_until

WHOLE = re.compile(r"step-\d{8,}")


def is_writing(run: Path) -> bool:
    """Whether a checkpoint is being written: its folder holds something under another name than a whole one's."""
    folder = run / "checkpoints"
    try:
        return any(not WHOLE.fullmatch(entry.name) for entry in folder.iterdir())
    except FileNotFoundError:
        return False


def wait_and_kill(job: Job, run: Path, moment: str, rng: random.Random) -> str:
    """Kills everything, "training": a random time after the first update of this start; "writing": a random time
    after a checkpoint began to be written. Returns what the kill hit: "training", "writing", or "end": nothing."""
    begun = time.time()

    def has_moved() -> bool:
        path = run / "metrics.jsonl"
        return path.is_file() and path.stat().st_mtime >= begun and bool(read_metrics(run))

    def is_due() -> bool:
        return not job.is_running() or (is_writing(run) if moment == "writing" else has_moved())

    wait_until(is_due, job, f"a moment of {moment}")
    time.sleep(rng.uniform(0.0, 0.006 if moment == "writing" else 0.6))
    if not job.is_running():
        return "end"
    job.kill()
    return "writing" if is_writing(run) else "training"


def kill_and_resume(
    folder: Path, *, ranks: int = 1, kills: int = 20, parallel: str = "ddp", steps: int = 120, every: int = 3,
    seed: int = 0, modality: str = "vision", small: bool = True, more: tuple[str, ...] = (), here: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Kills a run with dropout and layer drop `kills` times, half of them while a checkpoint is written; each time
    the same command resumes it; a run that ends in between is compared and a new one begun.

    Returns how often each moment was hit, the number of finished runs, and of tensors compared bit by bit with those
    of an uninterrupted run. `here`: that one and the last start run in this process (one rank).
    """
    data, rng = make_data(modality, folder / "data"), random.Random(seed)
    extra = [*RANDOM, "--run.parallel", parallel, "--data.micro-batch", "2", "--data.workers", "1", *more]

    def command(run: Path) -> list[str]:
        return options(modality, data, run, steps, *extra, every=every, small=small)

    def end(run: Path) -> None:
        finish_here(command(run)) if here else finish(command(run), folder / "logs" / f"{run.name}.log", ranks=ranks)

    reference = folder / "uninterrupted"
    end(reference)
    assert last_step(reference) == steps
    counts = {"writing": 0, "training": 0, "runs": 0, "tensors": 0}
    number, done, run = 0, 0, folder / "killed-0"
    while done < kills:
        # A kill that was meant for a checkpoint may come after it: the next one is, too.
        moment = "writing" if counts["writing"] <= counts["training"] else "training"
        with running(command(run), folder / "logs" / f"{run.name}-{number}.log", ranks=ranks) as job:
            hit = wait_and_kill(job, run, moment, rng)
            number += 1
            if hit != "end":
                counts[hit] += 1
                done += 1
                continue
            codes = job.codes(60)
            assert not any(codes), f"expected exit code 0, got {codes}:\n{job.tail()}"
        counts["tensors"] += assert_same_weights(run, reference)
        counts["runs"] += 1
        run = folder / f"killed-{counts['runs']}"
    end(run)
    counts["tensors"] += assert_same_weights(run, reference)
    counts["runs"] += 1
    return counts


def kill_first_starts(folder: Path, *, kills: int = 10, seed: int = 0, modality: str = "text") -> dict[str, int]:
    """Kills the first start of `kills` runs a random time after their folder appeared; the same command given again
    must end with the bits of a run that was left alone. Returns what the kills left: "nothing" but a lock or a part of
    the configuration, the "configuration", or a "checkpoint"; "end": it came too late."""
    data, rng = make_data(modality, folder / "data"), random.Random(seed)

    def command(run: Path) -> list[str]:
        return options(modality, data, run, 6, *RANDOM, every=3, small=True)

    reference = folder / "uninterrupted"
    finish_here(command(reference))
    counts = {"nothing": 0, "configuration": 0, "checkpoint": 0, "end": 0}
    for number in range(kills):
        run = folder / f"first-{number}"
        with running(command(run), folder / "logs" / f"{run.name}.log") as job:
            wait_until(run.exists, job, "the run's folder")
            # Half of them at once, where the configuration may not be there yet.
            time.sleep(rng.uniform(0.0, 0.01 if number % 2 else 1.5))
            ended = not job.is_running()
            job.kill()
        left = "checkpoint" if last_step(run) else "configuration" if (run / "config.json").is_file() else "nothing"
        counts["end" if ended else left] += 1
        finish_here(command(run))
        assert_same_weights(run, reference)
    return counts


def restart_from_local(folder: Path, *, kills: int = 5, steps: int = 200) -> dict[str, int]:
    """As `restart_by_launcher`, with checkpoints on the node's own disk alone, every 5 updates, which go with the run's
    end. Returns also how many updates the kill lost that lost most."""
    place = folder / "memory"
    counts = restart_by_launcher(folder, kills=kills, steps=steps, every=steps, local=place)
    said = (folder / "logs" / "restarted.log").read_text()
    assert said.count(f"from {place}") == kills and not list(place.iterdir()), said[-2000:]
    reached = lost = 0
    for update, resumed in re.findall(r"update (\d+)/|after update (\d+) of", said):
        reached, lost = (int(update), lost) if update else (int(resumed), max(lost, reached - int(resumed)))
    return {**counts, "updates lost": lost}


def restart_by_launcher(
    folder: Path, *, kills: int = 20, steps: int = 400, every: int = 5, seed: int = 0, modality: str = "vision",
    local: Path | None = None,
) -> dict[str, int]:  # fmt: skip
    """kill -9 of one rank of two, `kills` times under one `torchrun --max-restarts`: nobody gives a command again, and
    the job ends by itself with the bits of one that was left alone. local: `run.local_checkpoint`. Returns how
    often each rank was killed, and the tensors compared."""
    data, rng = make_data(modality, folder / "data"), random.Random(seed)
    more = [] if local is None else ["--run.local-checkpoint", str(local), "--run.local-every", "5"]

    def command(run: Path) -> list[str]:
        return options(modality, data, run, steps, *RANDOM, *more, every=every, small=True)

    def saved() -> int:
        if local is None:
            return last_step(run)
        return max([step_of(c) for inner in local.glob("*") for c in list_checkpoints(inner)], default=0)

    reference, run = folder / "uninterrupted", folder / "restarted"
    finish(command(reference), folder / "logs" / "uninterrupted.log", ranks=2)
    counts = {"rank 0": 0, "rank 1": 0, "tensors": 0}
    launch = ("--standalone", f"--max-restarts={kills}")
    with running(command(run), folder / "logs" / "restarted.log", ranks=2, launch=launch) as job:
        for _ in range(kills):
            before = saved()

            def has_moved(before: int = before) -> bool:
                return saved() > before and len(job.trainers()) == 2

            wait_until(has_moved, job, "a checkpoint of the restarted job", 120)
            time.sleep(rng.uniform(0.0, 0.3))
            rank = rng.randrange(2)
            pid = job.trainers()[rank]
            os.kill(pid, signal.SIGKILL)
            counts[f"rank {rank}"] += 1
            wait_until(lambda pid=pid: pid not in job.trainers().values(), job, "the end of a killed rank", 60)
        codes = job.codes(300)
        assert not any(codes), f"expected exit code 0, got {codes}:\n{job.tail()}"
    counts["tensors"] = assert_same_weights(run, reference)
    return counts
