"""The loop: exact resume, gradient of the right quotient, clear stops."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (its import is slow; once, outside the tests)

from d2v import cli
from d2v.config import Config
from d2v.folder import latest_checkpoint, list_checkpoints, load_tensors
from d2v.model.data2vec import build_model
from d2v.train import pretraining
from d2v.train.distributed import Ranks
from d2v.train.logging import read_metrics
from d2v.train.optim import learning_rate_at
from d2v.train.pretraining import Pretraining, load_weights, open_data, pretrain
from d2v.train.trainer import RunStopped, Trainer

from .conftest import tiny_options

CPU = torch.device("cpu")
ROOT = Path(pretraining.__file__).parents[2]
CONTRACT_KEYS = {
    "step", "loss", "target_std", "prediction_std", "explained_variance", "content_spread", "learning_rate",
    "ema_decay", "grad_norm", "samples_per_second", "step_seconds",
}  # fmt: skip
TIMES = {"samples_per_second", "step_seconds", "tokens_per_second", "data_wait", "memory_bytes", "mfu"}
Make = Callable[..., Config]


def make_trainer(config: Config) -> Trainer:
    source, valid = open_data(config)
    return Trainer(Pretraining(config, source, valid, CPU), Ranks(CPU))


def metrics_of(folder: Path | str) -> list[dict[str, Any]]:
    """Lines of metrics without the clock."""
    lines = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def weights_of(folder: Path | str) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(Path(folder))
    assert newest is not None
    return load_tensors(newest, "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics_of(a) == metrics_of(b)
    left, right = weights_of(a), weights_of(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_a_run_writes_what_the_contract_says(make_config: Make, images: Path) -> None:
    config = make_config(data={"valid": str(images)})
    folder = pretrain(config)
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line.keys() >= CONTRACT_KEYS for line in lines)
    assert all(math.isfinite(v) for line in lines for v in line.values())
    assert [line.get("valid_step") for line in lines] == [None, 3, 6]
    assert lines[0]["learning_rate"] == learning_rate_at(config.optim, 2, 6)
    assert lines[0]["ema_decay"] == config.ema.decay(2, 6)
    assert [p.name for p in list_checkpoints(folder / "checkpoints")] == ["step-00000003", "step-00000006"]
    assert Config.from_json((folder / "config.json").read_text()) == config
    assert list((folder / "tensorboard").iterdir())
    assert json.loads((folder / "data.json").read_text()) == {"samples": 12, "bad": 0, "converted": {}, "left_out": {}}
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".pkl", ".bin")]


def test_first_update_moves_nothing_but_the_moments(make_config: Make) -> None:
    config = make_config()
    trainer = make_trainer(config)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    batches = trainer.objective.updates(0, trainer.ranks)
    trainer.run_update(next(batches))
    # Rate 0; and the teacher equals the student, so its average stays too.
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    trainer.run_update(next(batches))
    assert not all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


def test_teacher_is_updated_once_per_update_with_the_scheduled_decay(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(data={"micro_batch": 2})
    trainer = make_trainer(config)
    decays: list[float] = []
    monkeypatch.setattr(trainer.model.get_submodule("teacher"), "update", decays.append)
    for batches in trainer.objective.updates(0, trainer.ranks):
        assert len(batches) == 2
        trainer.run_update(batches)
    assert decays == [config.ema.decay(u, 6) for u in range(1, 7)]


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_give_the_gradient_of_the_whole(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    gradients: list[dict[str, torch.Tensor]] = []
    losses = []
    for size in (None, micro):
        # No dropout, which draws other numbers for other shapes; squared class loss included.
        config = make_config(
            data={"micro_batch": size, "global_batch": 6},
            encoder={"dropout": 0.0, "extra_tokens": 1},
            loss={"class_weight": 0.01},
        )
        trainer = make_trainer(config)
        objective = trainer.objective
        assert isinstance(objective, Pretraining)
        trainer.model.double()
        kept: dict[str, torch.Tensor] = {}

        def remember(*_: Any, trainer: Trainer = trainer, kept: dict[str, torch.Tensor] = kept) -> None:
            kept.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

        trainer.optimiser.register_step_pre_hook(remember)
        prepare = objective.modality.prepare
        monkeypatch.setattr(objective.modality, "prepare", lambda x, prepare=prepare: prepare(x).double())
        trainer.run_update(next(trainer.objective.updates(0, trainer.ranks)))
        gradients.append(kept)
        losses.append(trainer.window.means())
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-6, atol=1e-9)
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-6)
    assert losses[0]["cls"] == pytest.approx(losses[1]["cls"], rel=1e-6)


def test_stopping_anywhere_and_resuming_is_exact(make_config: Make, tmp_path: Path, images: Path) -> None:
    """SIGTERM after every single update; log and checkpoint intervals that do not meet."""
    common = {"steps": 7, "log_every": 3, "checkpoint_every": 2}
    valid = {"valid": str(images), "micro_batch": 3}
    (images / "ant" / "0.png").write_bytes(b"broken")
    whole = make_config(run={**common, "dir": str(tmp_path / "whole")}, data={**valid, "bad_fraction": 0.5})
    pretrain(whole)
    parts = make_config(run={**common, "dir": str(tmp_path / "parts")}, data={**valid, "bad_fraction": 0.5})
    original = Trainer.run_update

    def then_stop(self: Trainer, batches: Any) -> Any:
        out = original(self, batches)
        os.kill(os.getpid(), signal.SIGTERM)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run_update", then_stop)
        for _ in range(6):
            with pytest.raises(SystemExit) as stop:
                pretrain(parts)
            assert stop.value.code == 75
    pretrain(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    texts = [(tmp_path / n / "bad_samples.jsonl").read_text() for n in ("whole", "parts")]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 1


def test_a_killed_run_resumes_exactly(
    make_config: Make, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of the real command, twice, at moments of its own; a loader worker included."""
    steps = 40
    run = {"steps": steps, "log_every": 1, "checkpoint_every": 5}
    pretrain(make_config(run={**run, "dir": str(tmp_path / "whole")}))
    folder = tmp_path / "killed"
    command = [
        sys.executable, "-m", "d2v", "pretrain", "vision-tiny", *tiny_options(), "--data.path", str(images),
        "--run.dir", str(folder), "--run.steps", str(steps), "--run.log-every", "1", "--run.checkpoint-every", "5",
        "--data.workers", "1",
    ]  # fmt: skip
    for kill_after in (7, 18):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
        while process.poll() is None and len(metrics_of(folder)) < kill_after:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert kill_after <= len(metrics_of(folder)) < steps
    capsys.readouterr()
    for _ in range(2):  # the second time there is nothing left to do
        assert cli.main(command[3:]) == 0
        assert_same_run(tmp_path / "whole", folder)
    assert "resuming" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_to_the_whole_process_group_saves(name: str, code: int, tmp_path: Path, images: Path) -> None:
    """As job schedulers and Ctrl-C send it: loader workers get it too."""
    folder, number = tmp_path / "run", getattr(signal, name)
    command = [
        sys.executable, "-m", "d2v", "pretrain", "vision-tiny", *tiny_options(), "--data.path", str(images),
        "--run.dir", str(folder), "--run.steps", "100000", "--run.log-every", "1", "--data.workers", "2",
        "--run.checkpoint-every", "100000",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    while process.poll() is None and len(metrics_of(folder)) < 3:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == code, text
    assert (folder / "requeue").is_file() == (code == 75)
    assert f"{name}: saved update" in text
    newest = latest_checkpoint(folder)
    assert newest is not None
    assert int(newest.name[5:]) == metrics_of(folder)[-1]["step"]


def test_results_do_not_depend_on_workers(make_config: Make, tmp_path: Path) -> None:
    for workers in (0, 2):
        pretrain(make_config(data={"workers": workers}, run={"dir": str(tmp_path / str(workers))}))
    assert_same_run(tmp_path / "0", tmp_path / "2")


def test_other_settings_are_refused_by_name(make_config: Make, tmp_path: Path, images: Path) -> None:
    pretrain(make_config(run={"steps": 3}))
    before = metrics_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"other settings: .*") as error:
        pretrain(make_config(run={"steps": 9}, optim={"learning_rate": 1.0}))
    text = str(error.value)
    assert "optim.learning_rate (stored 0.004, given 1.0)" in text
    assert "run.steps (stored 3, given 9)" in text
    assert "workers" not in text
    pretrain(make_config(run={"steps": 3, "log_every": 1}, data={"workers": 1}))
    (images / "new.png").write_bytes((images / "ant" / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"data\.path: expected the 12 samples .* got 13"):
        pretrain(make_config(run={"steps": 3}))
    assert metrics_of(tmp_path / "run") == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_good_checkpoint(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.run_update

    def poison(self: Trainer, batches: Any) -> Any:
        if self.update == 4:
            with torch.no_grad():
                next(iter(self.parameters)).fill_(math.nan)
        return original(self, batches)

    monkeypatch.setattr(Trainer, "run_update", poison)
    # The next line is due at update 100, the next checkpoint at 6: the checkpoint must not be written.
    config = make_config(run={"steps": 200, "log_every": 100})
    with pytest.raises(RunStopped, match=r"stopped at update 6: not finite: loss nan.*last good .*step-00000003"):
        pretrain(config)
    assert [p.name for p in list_checkpoints(Path(config.run.dir) / "checkpoints")] == ["step-00000003"]


def test_collapse_stops(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "measure", lambda *_: {"content_spread": math.nan})
    config = make_config(run={"collapse_after": 3, "collapse_prediction_std": 100.0})
    with pytest.raises(RunStopped, match="stopped at update 4: collapse: prediction_std"):
        pretrain(config)


def test_bad_run_folders(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder, text in (("", "got nothing"), (str(tmp_path / "file"), "got the file"), (str(tmp_path), "other files")):
        with pytest.raises(ValueError, match=f"run.dir: expected .*{text}"):
            pretrain(make_config(run={"dir": folder}))


def test_nothing_is_written_before_the_input_is_known_to_be_good(make_config: Make, tmp_path: Path) -> None:
    cases: list[dict[str, dict[str, Any]]] = [
        {"data": {"path": str(tmp_path / "missing")}},
        {"data": {"valid": str(tmp_path / "missing")}},
        {"stem": {"channels": 2}},
    ]
    for case in cases:
        with pytest.raises(ValueError, match="expected"):
            pretrain(make_config(**case))
    with pytest.raises(ValueError, match=r"model\.init: expected"):
        pretrain(make_config(), init=str(tmp_path / "missing"))
    assert not (tmp_path / "run").exists()


def test_two_processes_cannot_share_a_run(make_config: Make) -> None:
    config = make_config()
    Path(config.run.dir).mkdir()
    (Path(config.run.dir) / "config.json").write_text(config.to_json())
    hold = "import sys; from pathlib import Path; from d2v.train.run_dir import lock_folder\n"
    hold += "with lock_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, config.run.dir]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is training"):
            pretrain(config)
        other.stdin.close()
    pretrain(config)


def test_starting_from_other_weights(make_config: Make, tmp_path: Path) -> None:
    first = pretrain(make_config())
    config = make_config(run={"dir": str(tmp_path / "second"), "seed": 5})
    model = build_model(config)
    load_weights(model, str(first), "model.init")
    stored = weights_of(first)
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())
    wide = make_config(encoder={"width": 32})
    with pytest.raises(ValueError, match=r"model\.init .*expected shape"):
        load_weights(build_model(wide), str(first), "model.init")


def test_bf16_trains_and_resumes(make_config: Make, tmp_path: Path) -> None:
    run = {"precision": "bf16", "steps": 4, "log_every": 1, "checkpoint_every": 2}
    pretrain(make_config(run={**run, "dir": str(tmp_path / "whole")}))
    config = make_config(run={**run, "dir": str(tmp_path / "parts")})
    pretrain(config)
    (newest,) = list_checkpoints(tmp_path / "parts" / "checkpoints")[1:]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    pretrain(config)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert all(t.dtype == torch.float32 for t in weights_of(tmp_path / "whole").values() if t.is_floating_point())


def test_fp16_skips_updates_that_overflow(make_config: Make) -> None:
    """A loss scale that is far too large: weights and teacher stay until it has come down."""
    trainer = make_trainer(make_config(run={"precision": "fp16", "steps": 30}, optim={"warmup_steps": 1}))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    updates = trainer.objective.updates(0, trainer.ranks)
    trainer.run_update(next(updates))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.run_update(next(updates))
    assert trainer.window.means()["skipped"] == 1.0
    assert trainer.window.means()["grad_norm"] == 0.0
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    for batches in updates:
        trainer.run_update(batches)
    assert 0.0 < trainer.window.means()["skipped"] < 1.0
    changed = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("teacher.") for k in changed)
    assert any(k.startswith("blocks.") for k in changed)


def test_activation_checkpointing_changes_nothing(make_config: Make, tmp_path: Path) -> None:
    """Dropout included: its random numbers are drawn again."""
    for on in (False, True):
        run = {"activation_checkpointing": on, "dir": str(tmp_path / str(on))}
        pretrain(make_config(run=run, encoder={"dropout": 0.1, "prenet_depth": 1}))
    assert_same_run(tmp_path / "False", tmp_path / "True")


def test_layer_drop_is_a_draw_of_the_update(make_config: Make, tmp_path: Path) -> None:
    """Micro-batches of an update skip the same blocks: the gradient is that of the whole."""
    for micro in (None, 2):
        run = {"dir": str(tmp_path / str(micro)), "log_every": 1}
        pretrain(
            make_config(run=run, encoder={"layer_drop": 0.5, "depth": 4, "dropout": 0.0}, data={"micro_batch": micro})
        )
    left, right = (metrics_of(tmp_path / n) for n in ("None", "2"))
    assert [a["loss"] for a in left] == pytest.approx([b["loss"] for b in right], rel=1e-5)


def test_changed_free_settings_are_said(make_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(make_config(run={"steps": 3}))
    pretrain(make_config(run={"steps": 3, "log_every": 1}))
    assert "note: changed run.log_every (stored 2, given 1)" in capsys.readouterr().err


def test_settings_survive_json(make_config: Make) -> None:
    config = dataclasses.replace(make_config(), published=frozenset({"equal-mask-counts"}))
    assert Config.from_json(config.to_json()) == config
