"""`d2v sweep`: all combinations, in folders of their own; what is finished is skipped, what failed is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from d2v import sweep
from d2v.cli import main
from d2v.config import Config
from d2v.sweep import plan, split_values

from .conftest import tiny_options
from .test_cli import ROOT, refused


@pytest.fixture
def command(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(ROOT)  # where the processes of the runs find the package
    return ["sweep", "vision-tiny", *tiny_options(), "--data.path", str(images), "--run.dir", str(tmp_path / "sweep")]


def states(folder: Path) -> dict[str, str]:
    return {run["name"]: run["state"] for run in json.loads((folder / "sweep.json").read_text())["runs"]}


def test_options_with_several_values() -> None:
    shared, axes = split_values([
        "--run.seed", "0", "1", "1", "--optim.betas", "0.8", "0.9", "--run.dir", "x", "--data.crop_scale", "0.2", "1",
        "0.5", "1", "--published", "loss-on-padding", "equal-mask-counts", "--data.flip", "True", "false", "--slurm",
        "--optim.weight-decay", "-1", "-2", "--run.threads", "1", "2", "--run.threads", "3",
        "--run.steps=3", "--data.no-rotate", "--dry-run",
    ])  # fmt: skip
    assert shared == [
        "--optim.betas", "0.8", "0.9", "--published", "loss-on-padding", "equal-mask-counts", "--run.threads", "3",
        "--run.steps=3", "--data.no-rotate",
    ]  # fmt: skip
    assert axes == {
        "run.seed": [["--run.seed", "0"], ["--run.seed", "1"]],
        "data.crop-scale": [["--data.crop-scale", "0.2", "1"], ["--data.crop-scale", "0.5", "1"]],
        "data.flip": [["--data.flip"], ["--data.no-flip"]],
        "optim.weight-decay": [["--optim.weight-decay", "-1"], ["--optim.weight-decay", "-2"]],
    }


def test_the_product_of_the_values() -> None:
    options = ["--optim.learning-rate", "1e-3", "3e-3", "--data.flip", "True", "False", "--run.seed", "0", "1"]
    members = plan("vision-tiny", [*options, "--run.steps", "7"], "folder")
    assert len(members) == 8
    assert members[3].name == "learning-rate=1e-3,flip=False,seed=1"
    assert members[3].values == {"optim.learning-rate": "1e-3", "data.flip": "False", "run.seed": "1"}
    found = {(m.config.optim.learning_rate, m.config.data.flip, m.config.run.seed) for m in members}
    assert found == {(rate, flip, seed) for rate in (1e-3, 3e-3) for flip in (True, False) for seed in (0, 1)}
    assert {m.config.run.steps for m in members} == {7}
    assert [m.config.run.dir for m in members] == [f"folder/{m.name}" for m in members]
    both = plan("vision-tiny", ["--stem.dropout", "0.1", "0", "--encoder.dropout", "0", "0.1"], "x")[:2]
    assert both[-1].name == "stem.dropout=0.1,encoder.dropout=0.1"
    (first, second) = plan("", ["--recipe", "vision-tiny", "vision1-tiny"], "x")
    assert (first.config.version, second.config.version) == (2, 1)
    # No value leads out of the folder.
    assert plan("vision-tiny", ["--data.path", "../a/b", ".."], "x")[0].name == "path=.._a_b"
    assert plan("vision-tiny", ["--data.path", "", "a"], "x")[0].name == "path="


def test_runs_are_skipped_resumed_and_told_of(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_run_one", main)  # a process each takes seconds
    folder, missing = tmp_path / "sweep", str(tmp_path / "missing")
    data = command[command.index("--data.path") + 1]
    command[command.index(data)] = missing
    command.insert(command.index(missing) + 1, data)  # the first of the two values fails
    assert main([*command, "--run.seed", "0", "1", "--run.steps", "3"]) == 1
    names = list(states(folder))
    assert names[0] == f"path={missing.replace('/', '_')},seed=0"
    assert list(states(folder).values()) == ["failed with exit code 2"] * 2 + ["finished"] * 2
    out, err = capsys.readouterr()
    assert f"found nothing at '{missing}'" in err and "; the others go on" in err
    assert out.splitlines()[-1] == f"{names[3]}: finished"
    del command[command.index(missing)]
    # One run loses its last checkpoint, as after a kill.
    assert main([*command, "--run.seed", "0", "1"]) == 0
    assert list(states(folder)) == ["seed=0", "seed=1"]
    shutil.rmtree(folder / "seed=1" / "checkpoints" / "step-00000006")
    kept = (folder / "seed=0" / "metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert main([*command, "--run.seed", "0", "1", "2"]) == 0
    out, err = capsys.readouterr()
    assert "run 1 of" not in err and "run 2 of 3: seed=1" in err and "run 3 of 3: seed=2" in err
    assert f"resuming {folder}/seed=1 after update 3 of 6" in err
    assert (folder / "seed=0" / "metrics.jsonl").stat().st_mtime_ns == kept
    assert states(folder) == dict.fromkeys(["seed=0", "seed=1", "seed=2"], "finished")
    stored = [Config.from_json((folder / f"seed={i}" / "config.json").read_text()) for i in range(3)]
    assert [c.run.seed for c in stored] == [0, 1, 2]
    # A finished run with other settings is not taken for this one.
    assert main([*command, "--run.seed", "0", "1", "--optim.weight-decay", "0.5"]) == 1
    assert "failed: run.dir: " in states(folder)["seed=0"] and "weight_decay" in states(folder)["seed=0"]


def test_a_signal_stops_the_run_and_the_sweep(command: list[str], tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "d2v", *command, "--run.seed", "0", "1", "--run.steps", "100000"]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        metrics, end = tmp_path / "sweep" / "seed=0" / "metrics.jsonl", time.monotonic() + 60
        while not metrics.is_file() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, text
    assert "SIGTERM: stopping; the same command goes on\n" in text
    assert states(tmp_path / "sweep") == {"seed=0": "stopped", "seed=1": "not begun"}
    assert (tmp_path / "sweep" / "seed=0" / "requeue").is_file()  # the run saved
    assert main([*command, "--run.seed", "0", "1", "--run.steps", "100000", "--dry-run"]) == 0


def test_a_killed_run_does_not_take_the_others_along(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, real = iter([-9, 1, 0, 75, 0]), sweep._run_one
    assert real(["info", "--nonsense"]) == 2
    monkeypatch.setattr(sweep, "_run_one", lambda _: next(ends))
    assert main([*command, "--run.seed", "0", "1", "2", "3", "4"]) == 75
    assert list(states(tmp_path / "sweep").values()) == [
        "failed with exit code -9", "failed with exit code 1", "finished", "stopped", "not begun",
    ]  # fmt: skip


FAKES = {
    "srun": '"$@"',
    "python": 'printf "%s|" "$@"; exit "$CODE"',
    "squeue": 'echo "$STATE"',
    "scontrol": 'echo "$@" > "$REQUEUED"',
}


def test_an_array_of_slurm(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = ["--run.seed", "0", "1", "--data.valid", "a b", "c'd"]
    assert main([*command, *values, "--slurm"]) == 0
    script = tmp_path / "sweep" / "sweep.sbatch"
    assert capsys.readouterr().out == f"sbatch {script}\n"
    assert set(states(tmp_path / "sweep").values()) == {"not begun"}
    assert sorted(p.name for p in script.parent.iterdir()) == ["sweep.json", "sweep.sbatch"]
    assert "#SBATCH --array=0-3\n" in script.read_text()
    # A name with a line break ends no comment.
    assert main([*command, *values, "--slurm", "--run.dir", str(tmp_path / "a\nexit 3")]) == 0
    assert "\nexit 3" not in (tmp_path / "a\nexit 3" / "sweep.sbatch").read_text().partition("case ")[0]
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    runs = json.loads((script.parent / "sweep.json").read_text())["runs"]

    def submit(task: int, code: int, state: str = "RUNNING") -> tuple[int, list[str], bool]:
        requeued = tmp_path / "requeued"
        requeued.unlink(missing_ok=True)
        more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "42"}
        more |= {"CODE": str(code), "STATE": state, "REQUEUED": str(requeued), "PYTHON": "python"}
        done = subprocess.run(["bash", str(script)], env={**os.environ, **more}, capture_output=True, text=True)
        return done.returncode, done.stdout.split("|")[:-1], requeued.exists()

    for task, run in enumerate(runs):
        assert submit(task, 0) == (0, ["-m", "d2v", *run["command"]], False)
    assert runs[3]["command"][-6:] == [
        "--run.seed", "1", "--data.valid", "c'd", "--run.dir", f"{script.parent}/seed=1,valid=c_d",
    ]  # fmt: skip
    assert submit(1, 75)[::2] == (0, True)
    assert submit(1, 75, "COMPLETING")[::2] == (75, False)
    assert submit(1, 1)[::2] == (1, False)


def test_sweeps_that_cannot_be_made(
    command: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: dict[tuple[str, ...], str] = {
        (): "sweep: expected an option with several values",
        ("--run.seed", "0", "x"): "--run.seed",
        ("--run.sed", "0", "1"): "did you mean '--run.seed'?",
        ("--run.steps", "3", "-1"): "run.steps: expected 0 or more, got -1",
        ("--encoder.heads", "2", "7"): "encoder.width: expected a multiple of encoder.heads",
        ("--optim.betas", "0.9", "0.9", "0.8"): "optim.betas: expected 2 numbers for each value, got 0.9 0.9 0.8",
        ("--data.flip", "yes", "no"): "data.flip: expected True or False, got 'yes'",
        ("--data.valid", "a/b", "a:b"): "expected values with folders of their own, got two for 'valid=a_b'",
        ("--run.seed", "0", "1", "--run.dir", str(images)): "expected an empty folder or an earlier sweep",
        ("--run.seed", "0", "1", "--run.dir="): "run.dir: expected a folder for the runs, got nothing",
        ("--run.seed", "0", "1", "--run.dir", "a", "b"): "run.dir: expected one folder for the runs, got a b",
        ("--run.seed", "0", "1", "--slurm", "False"): "slurm: expected no value, got False",
        ("--data.valid", "a", 256 * "b"): "the name of a folder, 255 bytes, got 'valid=bbb",
    }
    for more, text in cases.items():
        assert text in refused(capsys, *command, *more), more
    assert "did you mean 'vision-tiny'?" in refused(capsys, "sweep", "vision-tyny", "--run.seed", "0", "1")
    assert not (tmp_path / "sweep").exists()
    assert main([*command, "--run.seed", "0", "1", "--dry-run"]) == 0
    assert not (tmp_path / "sweep").exists()


def test_the_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "vision-tiny", "--help"])
    text: Any = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--slurm" in text and "--optim.learning-rate" in text
