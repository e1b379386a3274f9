"""A Slurm of one node, made of scripts on PATH: what `scripts/slurm.sbatch` does when a job is pre-empted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from soak.cases import RANDOM, make_data, options
from soak.jobs import ROOT, Job, assert_same_weights, base_environment, finish, has_reached, last_step, wait_until

SCRIPT = ROOT / "scripts" / "slurm.sbatch"
COMMANDS = {
    # The step's task; the real one passes signals on to tasks too.
    "srun": """
        while [ "${1#--}" != "$1" ]; do shift; done
        "$@" &
        task=$!
        trap 'kill -USR1 "$task"' USR1
        while :; do wait "$task"; code=$?; kill -0 "$task" 2>/dev/null || exit "$code"; done
    """,
    "squeue": """
        cat "$FAKE_SLURM/state"
    """,
    "scontrol": """
        case $1 in
            show) echo localhost ;;
            requeue) echo "$2" >> "$FAKE_SLURM/requeued" ;;
            *) exit 64 ;;
        esac
    """,
}


class FakeSlurm:
    """Runs the batch script as Slurm would: with its variables, at most one job, again after `scontrol requeue`."""

    def __init__(self, folder: Path, python: str = sys.executable, ranks: int = 2) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "bin").mkdir(parents=True)
        for name, text in COMMANDS.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (folder / "bin" / name).chmod(0o755)
        (folder / "state").write_text("RUNNING\n")
        self.starts = 0
        self.mark = f"slurm-{os.getpid()}-{folder.name}"
        self.environment = {
            **base_environment(self.mark), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(folder),
            "SLURM_JOB_ID": "4242", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "PYTHON": python,
            "RANKS_PER_NODE": str(ranks), "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def start(self, arguments: Sequence[str], more: Mapping[str, str] | None = None) -> Job:
        """One start of the job."""
        log = self.folder / f"start-{self.starts}.log"
        environment = {**self.environment, "SLURM_RESTART_COUNT": str(self.starts), **(more or {})}
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", str(SCRIPT), *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip
        self.starts += 1
        return Job(self.mark, [process], [log])

    def requeued(self) -> int:
        """How often the job asked to be queued again."""
        path = self.folder / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0


def preempt(slurm: FakeSlurm, arguments: Sequence[str], moment: Callable[[], bool], number: int) -> Job:
    """Starts the job and sends it a signal once `moment` is true; waits for its end."""
    job = slurm.start(arguments)
    try:
        wait_until(moment, job, "the moment of pre-emption")
        os.kill(job.processes[0].pid, number)
        assert job.codes(90) == [0], job.tail()
    finally:
        job.kill()
    return job


def preempt_and_requeue(folder: Path, *, steps: int = 200, preemptions: int = 3) -> dict[str, int]:
    """Two ranks under the batch script, pre-empted by SIGUSR1 and SIGTERM in turn; every time it saves, queues itself
    again and resumes, until the run is finished; the weights are those of an uninterrupted run, bit by bit."""
    data, run = make_data("vision", folder / "data"), folder / "run"

    def command(where: Path) -> list[str]:
        return options("vision", data, where, steps, *RANDOM, every=steps, small=True)

    finish(command(folder / "uninterrupted"), folder / "uninterrupted.log", ranks=2)
    slurm, reached = FakeSlurm(folder / "slurm"), 0
    for count in range(preemptions):
        moment = has_reached(run, reached + 10)
        job = preempt(slurm, command(run), moment, (signal.SIGUSR1, signal.SIGTERM)[count % 2])
        assert slurm.requeued() == count + 1, job.tail()
        assert reached < last_step(run) < steps
        reached = last_step(run)
    job = slurm.start(command(run))
    try:
        assert job.codes(120) == [0], job.tail()
    finally:
        job.kill()
    assert slurm.requeued() == preemptions, "a finished run must not be queued again"
    tensors = assert_same_weights(run, folder / "uninterrupted")
    return {"starts": slurm.starts, "tensors": tensors}
