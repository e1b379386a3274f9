"""Runs that become longer, that are taken up without a recipe, that begin with other weights or die at their start; and
checkpoints that are not as they were written."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.images import encode, make_image, write_tar
from support.sounds import write_text

from d2v import recipes
from d2v.cli import main
from d2v.config import Config, Optim
from d2v.config.model import architecture
from d2v.files import checksum, write_atomically
from d2v.folder import MODEL, latest_checkpoint, list_checkpoints, load_tensors
from d2v.model.data2vec import Data2Vec, build_model
from d2v.model.saving import write_folder
from d2v.train import checkpoint, pretraining
from d2v.train.checkpoint import Saver
from d2v.train.optim import learning_rate_at
from d2v.train.pretraining import pretrain
from d2v.train.run_dir import EXIT_REQUEUE, RunFolder, lock_folder

from .conftest import tiny_options
from .test_checkpoint import WORLD

Make = Callable[..., Config]
CONSTANT: dict[str, dict[str, Any]] = {"optim": {"final_rate": 1.0}, "ema": {"anneal_steps": 3}}


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(run)
    assert newest is not None
    return load_tensors(newest, MODEL)


def assert_equal(one: Path, other: Path) -> None:
    got, expected = weights(one), weights(other)
    assert all(torch.equal(got[n], expected[n]) for n in expected)


# ---- longer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "tri-stage"])
def test_a_run_becomes_longer_where_its_past_is_the_same(schedule: str, make_config: Make, tmp_path: Path) -> None:
    changes = dict(CONSTANT)
    if schedule == "tri-stage":
        changes["optim"] = {"schedule": "tri-stage", "final_rate": 0.1, "warmup_steps": 1, "hold_steps": 3}
    pretrain(make_config(**changes, run={"steps": 4}))
    pretrain(make_config(**changes, run={"steps": 6}))
    pretrain(make_config(**changes, run={"steps": 6, "dir": str(tmp_path / "whole")}))
    assert_equal(tmp_path / "run", tmp_path / "whole")


def test_other_schedules_need_an_extension(make_config: Make, tmp_path: Path) -> None:
    pretrain(make_config(run={"steps": 3}))
    for steps in (2, 6):
        with pytest.raises(ValueError, match=rf"run.steps \(stored 3, given {steps}\).*--run.extend N.*--model.init"):
            pretrain(make_config(run={"steps": steps}))
    pretrain(make_config(run={"steps": 3, "extend": 3, "log_every": 1}))
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step-00000006"
    # The same as planned so, and taken up in the middle.
    pretrain(make_config(run={"steps": 3, "extend": 3, "dir": str(tmp_path / "whole")}))
    assert_equal(tmp_path / "run", tmp_path / "whole")
    pretrain(make_config(run={"steps": 3, "extend": 3}))  # nothing is left to do
    for extend in (0, 5):
        with pytest.raises(ValueError, match=rf"run.extend \(stored 3, given {extend}\)"):
            pretrain(make_config(run={"steps": 3, "extend": extend}))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    config = make_config()
    rates = {line["step"]: line["learning_rate"] for line in lines}
    assert {s: r for s, r in rates.items() if s > 3} == {s: learning_rate_at(config.optim, s, 3, 3) for s in (4, 5, 6)}


def test_the_schedule_is_gone_through_once_more() -> None:
    optim = Optim(learning_rate=1.0, warmup_steps=10)
    assert [learning_rate_at(optim, u, 100, 50) for u in range(1, 101)] == [
        learning_rate_at(optim, u, 100) for u in range(1, 101)
    ]
    second = dataclasses.replace(optim, warmup_steps=5)
    assert [learning_rate_at(optim, 100 + u, 100, 50) for u in range(1, 51)] == [
        learning_rate_at(second, u, 50) for u in range(1, 51)
    ]


# ---- without a recipe, and with other weights ----------------------------------------------------------------------


def test_the_folder_alone_takes_a_run_up(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    start = ["pretrain", "vision-tiny", *tiny_options(), "--data.path", str(images)]
    for folder in (run, whole):
        assert main([*start, "--run.dir", str(folder), "--data.allow-commands"]) == 0
    newest = latest_checkpoint(run)
    assert newest is not None
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    moved = run.rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["pretrain", "--run.dir", str(moved), "--run.log-every", "1"]) == 0
    text = capsys.readouterr().err
    assert "changed run.log_every (stored 2, given 1)" in text
    assert "changed data.allow_commands (stored True, given False)" in text
    assert_equal(moved, whole)
    for arguments in (["--run.dir", str(tmp_path / "absent")], ["--run.steps", "3"], []):
        assert main(["pretrain", *arguments]) == 2
        assert "recipe: expected one of" in capsys.readouterr().err
    assert main(["pretrain", "--run.dir", str(moved), "--encoder.width", "32"]) == 2
    assert "encoder.width (stored 16, given 32)" in capsys.readouterr().err


def test_a_stored_command_is_not_run(make_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "ran"
    config = make_config(data={"path": f"pipe:touch {marker}", "allow_commands": True})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config.to_json())
    assert main(["pretrain", "--run.dir", str(tmp_path / "run")]) == 2
    assert "--data.allow-commands is not stored" in capsys.readouterr().err
    assert not marker.exists()


def test_weights_bring_their_architecture(
    make_config: Make, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = make_config(encoder={"width": 24, "heads": 3, "depth": 3}, stem={"image_size": 16})
    write_folder(build_model(stored), tmp_path / "weights")
    data = ["--data.path", str(images), "--run.steps", "1", "--data.global-batch", "2", "--data.workers", "0"]
    start = ["pretrain", "vision-tiny", *data, "--model.init", str(tmp_path / "weights")]
    assert main([*start, "--run.dir", str(tmp_path / "new")]) == 0
    config = Config.from_json((tmp_path / "new" / "config.json").read_text())
    assert architecture(config) == architecture(stored) and config.optim.learning_rate != stored.run.steps
    assert main([*start, "--run.dir", str(tmp_path / "other"), "--encoder.width", "48"]) == 2
    assert "expected encoder.width 24, got 48" in capsys.readouterr().err
    assert main(["pretrain", "speech-tiny", *start[2:], "--run.dir", str(tmp_path / "other")]) == 2
    assert "stem.modality: expected a recipe with vision, got one with speech" in capsys.readouterr().err
    assert main(["pretrain", "vision1-tiny", *start[2:], "--run.dir", str(tmp_path / "other")]) == 2
    assert "version: expected a recipe with 2, got one with 1" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


# ---- the folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left", [[".lock"], [".lock", ".partial-config.json"], ["config.json"], ["config.json", ".lock"]]
)
def test_a_first_start_that_died_can_be_given_again(left: list[str], make_config: Make, tmp_path: Path) -> None:
    config = make_config(run={"steps": 1})
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).write_text(config.to_json() if name == "config.json" else "")
    pretrain(config)
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1


def first_file(folder: Path) -> Path:
    return sorted(path for path in folder.rglob("*.*") if path.is_file())[0]


def test_a_resumed_run_says_what_changed(
    make_config: Make, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = shutil.copytree(images, tmp_path / "held-out")
    data = {"path": str(images), "valid": str(held_out)}
    pretrain(make_config(run={"steps": 6}, data=data))
    capsys.readouterr()
    pretrain(make_config(run={"steps": 6}, data=data))
    assert "changed" not in capsys.readouterr().err
    file = first_file(images)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    pretrain(make_config(run={"steps": 6}, data=data))
    count = sum(1 for path in images.rglob("*.*") if path.is_file())
    said = capsys.readouterr().err
    assert f"note: data.path: 1 of {count} files changed since the run began, for example {file} changed" in said
    assert "data.valid" not in said

    other = first_file(held_out)
    other.write_bytes(other.read_bytes() + b"\0")
    pretrain(make_config(run={"steps": 6}, data={**data, "bad_fraction": 0.5}))
    assert f"note: data.valid: 1 of {count} files changed since the run began, for example {other}" in (
        capsys.readouterr().err
    )
    file.write_bytes(file.read_bytes() + b"\0")
    refused = rf"^data.path: expected the files that the run in .* began with, got 1 of {count} of another size, for "
    with pytest.raises(ValueError, match=rf"{refused}example {re.escape(str(file))} changed since.*; put them back"):
        pretrain(make_config(run={"steps": 6}, data={**data, "bad_fraction": 0.0}))
    pretrain(make_config(run={"steps": 6, "dir": str(tmp_path / "other")}, data=data))  # a new run takes what is there


def test_a_resumed_run_names_other_decoders(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "find_decoders", lambda: {"pillow": "1.0", "no such package": "2.0"})
        pretrain(make_config(run={"steps": 4, "checkpoint_every": 4}))
    run = {"steps": 4, "checkpoint_every": 4}
    capsys.readouterr()
    pretrain(make_config(run=run))
    said = capsys.readouterr().err
    assert f"note: pillow 1.0 before, {version('pillow')} now: samples may have other bits" in said
    assert "no such" not in said


@pytest.mark.parametrize("kind", ["shards", "text"])
def test_other_kinds_of_data_that_changed(
    kind: str, images: Path, make_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "shards":
        for s in range(2):
            write_tar(tmp_path / f"{s}.tar", {f"{i}.png": encode(make_image(10 * s + i)) for i in range(6)})
        config, file = make_config(data={"path": str(tmp_path / "*.tar")}), tmp_path / "1.tar"
    else:
        file = write_text(tmp_path / "text" / "a.txt")
        base = recipes.text_tiny()
        small = {"stem": {"vocabulary": 512}, "data": {"path": str(file), "global_batch": 2, "workers": 0}}
        run = {"dir": str(tmp_path / "run"), "steps": 1, "device": "cpu"}
        config = base.change(**small, run=run)
    pretrain(config)
    data = file.read_bytes()
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    capsys.readouterr()
    pretrain(config)
    assert f"files changed since the run began, for example {file} changed since it was" in capsys.readouterr().err
    file.write_bytes(data + bytes(1024) if kind == "shards" else data.replace(b"a", b"aa"))
    with pytest.raises(ValueError, match=rf"^data.path: .*another size, for example {re.escape(str(file))} changed"):
        pretrain(config)


def test_without_a_record_of_files_a_run_goes_on(
    make_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(make_config(run={"steps": 3}))
    record = tmp_path / "run" / "data.path.files"
    for damage in (b"", b"x" * 80, record.read_bytes()[:-1]):
        record.write_bytes(damage)
        pretrain(make_config(run={"steps": 3}))
        assert f"note: {record} is damaged" in capsys.readouterr().err
    record.unlink()  # a run of an earlier version
    pretrain(make_config(run={"steps": 3}))
    assert "note" not in capsys.readouterr().err


def test_a_folder_that_changed_since_it_was_looked_at(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second command reads its data while the first one trains and ends."""
    first, second = make_config(run={"steps": 2}), make_config(run={"steps": 2}, optim={"learning_rate": 0.5})
    original = pretraining.open_data

    def meanwhile(config: Config, *ranks: Any) -> Any:
        if config == second:
            pretrain(first)
        return original(config)

    monkeypatch.setattr(pretraining, "open_data", meanwhile)
    with pytest.raises(
        ValueError, match=r"another process has trained in .*newest checkpoint is step-00000002, it was None"
    ):
        pretrain(second)
    run = Path(first.run.dir)
    assert Config.from_json((run / "config.json").read_text()) == first
    assert (run / "metrics.jsonl").read_text()
    with lock_folder(run):  # nothing holds it any more
        RunFolder(first, WORLD)


def test_a_step_that_is_there_is_an_error_unless_it_is_the_runs_own(make_config: Make, tmp_path: Path) -> None:
    run = make_config().run
    tensors, texts = {"model.w": torch.ones(2)}, {"config.json": "{}", "state.json": "{}"}
    saver = Saver(tmp_path / "checkpoints", WORLD, run)
    saver.save(1, tensors, texts)
    saver.save(1, tensors, texts)
    saver.wait()
    with pytest.raises(OSError, match=r"step-00000001.* is there already and is not of this run"):
        Saver(tmp_path / "checkpoints", WORLD, run).save(1, tensors, texts)


def test_a_full_disk_is_named_with_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match=r"No space left on device \(3 bytes were to be written\).*a\.json"):
        write_atomically(tmp_path / "a.json", "abc")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_run_starts(number: signal.Signals, images: Path, tmp_path: Path) -> None:
    script = """import sys, time
import d2v.train.pretraining as p
p.open_data = lambda *given: (print("reading", flush=True), time.sleep(60))
from d2v.cli import main
sys.exit(main(sys.argv[1:]))"""
    command = [
        sys.executable,
        "-c",
        script,
        "pretrain",
        "vision-tiny",
        "--data.path",
        str(images),
        "--run.dir",
        str(tmp_path / "run"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "reading\n"
        time.sleep(0.1)
        os.kill(process.pid, number)
        _, text = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, text
    assert number.name in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()


# ---- checksums ------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_refused_and_the_checkpoint_before_is_offered(make_config: Make, tmp_path: Path) -> None:
    config = make_config(run={"steps": 6, "checkpoint_every": 2, "keep_checkpoints": 3})
    run = pretrain(config)
    expected = weights(run)
    last, before = list_checkpoints(run / "checkpoints")[:0:-1]
    for file in sorted(last.iterdir()):
        good = file.read_bytes()
        bad, place = bytearray(good), -2
        if file.suffix == ".safetensors":
            length = int.from_bytes(good[:8], "little")
            header = json.loads(good[8 : 8 + length])
            place = 8 + length + header["model.teacher.blocks.blocks.0.mlp.fc1.weight"]["data_offsets"][0] + 3
        bad[place] ^= 4
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"{file.name}.*; the checkpoint before it is .*{before.name}"):
            pretrain(config)
        if file.suffix == ".safetensors":
            with pytest.raises(ValueError, match="is not as it was written"):
                Data2Vec.from_checkpoint(run)
        file.write_bytes(good)
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    pretrain(config)
    assert all(torch.equal(expected[n], value) for n, value in weights(run).items())


def test_older_checkpoints_have_no_checksums(make_config: Make, tmp_path: Path) -> None:
    run = pretrain(make_config(run={"steps": 3}))
    newest = latest_checkpoint(run)
    assert newest is not None
    index = json.loads((newest / "metadata.json").read_text())
    del index["sum"], index["texts"]
    for entry in index["tensors"].values():
        for chunk in entry["chunks"]:
            del chunk["sum"]
    (newest / "metadata.json").write_text(json.dumps(index))
    pretrain(make_config(run={"steps": 3}))
    Data2Vec.from_checkpoint(run)


def test_an_exported_file_has_checksums(make_config: Make, tmp_path: Path) -> None:
    model = build_model(make_config())
    write_folder(model, tmp_path / "export")
    file = tmp_path / "export" / MODEL
    assert all(torch.equal(value, model.state_dict()[n]) for n, value in load_file(file).items())
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors.* is not as it was written"):
        Data2Vec.from_checkpoint(tmp_path / "export")


def test_every_bit_counts() -> None:
    data = bytes(range(256)) * 65 + b"end"
    sums = []
    for place in (0, 1, 8191, 8192, 16_000, len(data) - 1):
        other = bytearray(data)
        other[place] ^= 1 << (place % 8)
        sums.append(checksum(bytes(other)))
    sums += [checksum(data[:-1]), checksum(b""), checksum(data + b"\0")]
    assert checksum(data) not in sums
