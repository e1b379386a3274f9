"""`d2v watch`: what a folder says of its run, and what it cannot say itself."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2v.cli import main
from d2v.config import Config
from d2v.files import SWEEP
from d2v.folder import LOST, STATUS
from d2v.tools.watch import look
from d2v.train.pretraining import pretrain
from d2v.train.trainer import RunStopped, Trainer

Make = Callable[..., Config]


def write(run: Path, **entries: Any) -> Path:
    run.mkdir(exist_ok=True)
    status = {
        "state": "running", "reason": "", "step": 50, "last_step": 100, "seconds_left": 100.0, "time": time.time(),
        "host": socket.gethostname(), "pid": os.getpid(),
        "metrics": {"step": 50, "loss": 2.5, "step_seconds": 2.0, "stem_rank": 5.0, "target_rank": 4.0},
    }  # fmt: skip
    (run / STATUS).write_text(json.dumps(status | entries))
    (run / "metrics.jsonl").write_text('{"step": 40}\n{"step": 50}\n')
    return run


def test_a_run_writes_how_it_goes_and_how_it_ended(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pretrain(make_config(run={"log_every": 1}))
    status = json.loads((folder / STATUS).read_text())
    assert (status["state"], status["step"], status["last_step"], status["seconds_left"]) == ("finished", 6, 6, 0.0)
    assert status["pid"] == os.getpid() and status["metrics"]["loss"] > 0.0
    seen = []
    update = Trainer.run_update

    def spy(self: Any, batches: Any) -> Any:
        seen.append(look(folder).state)
        if self.update == 8:
            raise RunStopped("training stopped at update 9: loss nan")
        return update(self, batches)

    monkeypatch.setattr(Trainer, "run_update", spy)
    with pytest.raises(RunStopped):
        pretrain(make_config(run={"log_every": 1, "extend": 6}))
    assert seen == ["running"] * 3
    sight = look(folder)
    assert sight.state == "failed" and "update 8/12" in sight.text and "loss nan" in sight.alerts["failed"]


def test_the_folder_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "one", state="finished")
    states = {"one": "finished", "two": "failed with exit code 2", "three": "not begun"}
    (tmp_path / SWEEP).write_text(json.dumps({"runs": [{"name": n, "state": s} for n, s in states.items()]}))
    assert main(["watch", str(tmp_path), "--once"]) == 1
    said = capsys.readouterr()
    assert [line.split()[1] for line in said.out.splitlines()] == ["finished", "failed", "new"]
    assert "alert: " in said.err and "two: failed with exit code 2" in said.err
    (tmp_path / SWEEP).write_text('{"runs": [{"name": 3}]}')
    assert main(["watch", str(tmp_path), "--once"]) == 2
    assert f"{SWEEP}: expected runs, each with name and state" in capsys.readouterr().err


def test_what_a_folder_cannot_say_itself(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    assert look(run).state == "running" and "1:40 left" in look(run).text and not look(run).alerts
    # Lines come every 10 updates of 2 s: five times that is 100 s.
    assert look(run, now=time.time() + 95).state == "running"
    assert look(run, now=time.time() + 110).state == "stalled"
    assert look(run, now=time.time() + 20, stall=10).state == "stalled"
    assert look(write(run, pid=2**22 + 5)).state == "dead"
    assert look(write(run, pid=2**22 + 5, host="elsewhere")).state == "running"
    (run / LOST).write_text("rank 5 on node-1 has died or cannot be reached")
    assert look(run).alerts == {"lost": "lost: rank 5 on node-1 has died or cannot be reached"}
    assert look(write(run, state="finished")).state == "finished"
    (run / STATUS).unlink()
    assert look(run).state == "unknown"
    (run / "metrics.jsonl").unlink()
    assert look(run).state == "new"


def test_the_command_shows_alerts_once_and_ends_with_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good", state="finished", step=100)
    assert main(["watch", str(good)]) == 0
    assert capfd.readouterr().out.split()[1] == "finished"
    bad = write(tmp_path / "bad", state="failed", reason="loss nan at update 50")
    low = write(tmp_path / "low", metrics={"step": 50, "loss": 1.0, "stem_rank": 1.0, "step_seconds": 9.0})
    command = f"{shlex.quote(sys.executable)} -c 'import sys; print(\"ALERT\", sys.argv[1:])'"
    runs = [str(good), str(bad), str(low)]
    assert main(["watch", *runs, "--once", "--on-alert", command]) == 1
    out, err = capfd.readouterr()
    assert f"ALERT ['{bad}', 'failed: loss nan at update 50']" in out and out.count("ALERT") == 2
    assert f"alert: {low}: stem_rank" in err
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert "expected run folders, found none" in capfd.readouterr().err
    assert main(["watch", str(bad), "--on-alert", "/no/such/program"]) == 1
    assert "cannot run" in capfd.readouterr().err


def test_a_damaged_status_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run")
    (run / STATUS).write_text("[1")
    assert main(["watch", str(run), "--once"]) == 2
    assert STATUS in capfd.readouterr().err


def test_prometheus_gets_the_last_line(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    folder = pretrain(make_config(run={"track": ("prometheus",)}))
    found = {
        sample.name: sample.value
        for family in parser.text_string_to_metric_families((folder / "metrics.prom").read_text())
        for sample in family.samples
    }
    line = [json.loads(text) for text in (folder / "metrics.jsonl").open()][-1]
    assert found["d2v_step"] == 6 and found["d2v_loss"] == pytest.approx(line["loss"])
