"""`scripts/slurm.sbatch` against a fake Slurm and a fake trainer: what it starts, and when it queues itself again."""

from __future__ import annotations

import datetime
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from soak.jobs import ROOT, Job, find_port, rank_environment
from soak.slurm import SCRIPT, FakeSlurm

from d2v.recipes import RECIPES
from d2v.train.distributed import meet

# Stands for Python with torchrun: a launcher with one rank. The rank saves on SIGUSR1, which takes longer than it takes
# the launcher to leave on a SIGTERM; the launcher hides the rank's exit code, as torchrun does.
LAUNCHER = """#!/usr/bin/env bash
echo "launcher: $*"
exec 3>&1
bash -c 'trap "sleep 0.3; echo saved >&3; $ON_SIGNAL exit 75" USR1; echo ready >&3
         for i in $(seq $LIFE); do sleep 0.05; done; exit $CODE' &
trap "echo launcher was hit >&3; kill -9 $!; exit 143" TERM USR1
wait $! || exit 1
"""


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    fake = tmp_path / "python"
    fake.write_text(LAUNCHER)
    fake.chmod(0o755)
    made = FakeSlurm(tmp_path / "slurm", python=str(fake), ranks=1)
    run = tmp_path / "run"
    run.mkdir()
    made.environment |= {"ON_SIGNAL": f"touch {run}/requeue;", "LIFE": "400", "CODE": "0"}
    return made


def wait_for_rank(job: Job) -> None:
    deadline = time.monotonic() + 20
    while "ready" not in job.text():
        assert job.is_running() and time.monotonic() < deadline, job.tail()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_and_requeues(slurm: FakeSlurm, tmp_path: Path, number: int) -> None:
    job = slurm.start(["vision-tiny", "--data.path", "x y", "--run.dir", str(tmp_path / "run")])
    try:
        wait_for_rank(job)
        os.kill(job.processes[0].pid, number)
        assert job.codes(20) == [0], job.tail()
    finally:
        job.kill()
    assert "saved" in job.text() and "launcher was hit" not in job.text()
    assert (slurm.folder / "requeued").read_text() == "4242\n"
    assert "--nnodes=1 --nproc-per-node=1" in job.text() and "--rdzv-backend=c10d" in job.text()
    assert f"-m d2v pretrain vision-tiny --data.path x y --run.dir {tmp_path}/run" in job.text()


@pytest.mark.parametrize("code", [0, 1])
def test_an_end_without_a_signal_is_not_requeued(slurm: FakeSlurm, tmp_path: Path, code: int) -> None:
    (tmp_path / "run" / "requeue").touch()  # of an earlier start
    job = slurm.start(["vision-tiny", f"--run.dir={tmp_path / 'run'}"], {"LIFE": "1", "CODE": str(code)})
    assert job.codes(20) == [code], job.tail()
    assert slurm.requeued() == 0


def test_a_signal_before_the_trainer_listens_requeues(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.environment["ON_SIGNAL"] = ""  # dies of the signal without a word
    job = slurm.start(["vision-tiny", "--run.dir", str(tmp_path / "run")])
    try:
        wait_for_rank(job)
        os.kill(job.processes[0].pid, signal.SIGUSR1)
        assert job.codes(20) == [0], job.tail()
    finally:
        job.kill()
    assert slurm.requeued() == 1


def test_a_cancelled_job_is_not_requeued(slurm: FakeSlurm, tmp_path: Path) -> None:
    (slurm.folder / "state").write_text("COMPLETING\n")
    job = slurm.start(["vision-tiny", "--run.dir", str(tmp_path / "run")])
    try:
        wait_for_rank(job)
        os.kill(job.processes[0].pid, signal.SIGTERM)
        job.codes(20)
    finally:
        job.kill()
    assert "saved" in job.text() and slurm.requeued() == 0


def test_no_run_folder_is_refused(slurm: FakeSlurm) -> None:
    job = slurm.start(["vision-tiny"])
    assert job.codes(20) == [2]
    assert "expected --run.dir" in job.text() and "launcher" not in job.text()


def test_the_script_is_valid() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    directives = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in directives and "#SBATCH --signal=B:USR1@300" in directives


def test_the_worked_table_follows_the_rules() -> None:
    """docs/distributed.md: every stock recipe at four times its batch."""
    text = (ROOT / "docs" / "distributed.md").read_text()
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `") and "→" in line}
    stock = [name for name in RECIPES if not name.endswith(("tiny", "small"))]
    assert sorted(rows) == sorted(stock)
    for name in stock:
        config, kappa = RECIPES[name](), 4
        optim, ema, steps = config.optim, config.ema, config.run.steps
        expected = [
            *(config.data.global_batch, kappa * config.data.global_batch, steps, steps / kappa),
            *(optim.learning_rate, optim.learning_rate * kappa**0.5),
            *(1 - kappa * (1 - beta) for beta in optim.betas),
            *(optim.eps / kappa**0.5, optim.weight_decay * kappa**0.5, optim.warmup_steps, optim.warmup_steps / kappa),
            *(ema.start**kappa, ema.end**kappa, (ema.anneal_steps or steps) / kappa),
        ]
        numbers = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", rows[name].split("`")[2])
        assert [float(n.replace(",", "")) for n in numbers] == pytest.approx(expected, rel=1e-3), name


def test_a_restarted_job_does_not_meet_the_keys_of_the_attempt_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rank_environment(0, 1, find_port()).items():
        monkeypatch.setenv(name, value)
    second = datetime.timedelta(seconds=1)
    first, rank, size = meet(second)
    assert (rank, size) == (0, 1)
    first.set("address", "of a process that is gone")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert meet(second)[0].check(["address"])  # the same server
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not meet(second)[0].check(["address"])
