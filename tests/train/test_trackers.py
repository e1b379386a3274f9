"""What gets the lines of metrics besides metrics.jsonl: each line once, over resumes, and never at the run's cost."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from d2v import cli, settings
from d2v.config import Config
from d2v.train.logging import read_metrics
from d2v.train.pretraining import pretrain
from d2v.train.trackers import make_trackers

from .conftest import tiny_options


def of(config: Config, **run: Any) -> Config:
    return config.change(run=run)


class Calls:
    """A user's tracker."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, config: dict[str, Any], folder: Path, resumed: int) -> None:
        self.calls.append(("start", config["run"]["steps"], folder, resumed))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("log", step, sorted(values)[:1]))

    def finish(self, status: str) -> None:
        self.calls.append(("finish", status))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Modules wandb, mlflow and trackio that write down how they are called."""
    calls: list[Any] = []

    class Run:
        def __init__(self, **given: Any) -> None:
            calls.append(("init", given))
            self.id = given.get("id")

        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("log", step, values["loss"]))

        def finish(self, **given: Any) -> None:
            calls.append(("finish", given))

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            calls.append(("client", tracking_uri))

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return "1"

        def create_run(self, experiment: str, run_name: str) -> Any:
            calls.append(("create", run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="ab12"))

        def update_run(self, number: str, status: str) -> None:
            calls.append(("update", number, status))

        def log_batch(self, number: str, params: Any = (), metrics: Any = ()) -> None:
            calls.extend(("log", step, value) for key, value, _, step in metrics if key == "loss")
            assert len(params) <= 100

        def set_terminated(self, number: str, status: str) -> None:
            calls.append(("end", number, status))

    mlflow = {
        "MlflowClient": Client,
        "entities": types.SimpleNamespace(Param=lambda *a: a, Metric=lambda *a: a),
    }
    for name, contents in {"wandb": {"init": Run}, "trackio": {"init": Run}, "mlflow": mlflow}.items():
        module: Any = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update({k: staticmethod(v).__func__ if isinstance(v, types.FunctionType) else v
                             for k, v in contents.items()})  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return calls


def test_users_trackers_get_every_line(make_config: Callable[..., Config]) -> None:
    calls, lines = Calls(), []
    folder = pretrain(
        of(make_config(), track=("none",)), track=[calls, lambda step, values: lines.append((step, values))]
    )
    assert calls.calls[0] == ("start", 6, folder, 0)
    assert [c[:2] for c in calls.calls[1:]] == [("log", 2), ("log", 4), ("log", 6), ("finish", "finished")]
    stored = read_metrics(folder / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in stored] == [(step, values["loss"]) for step, values in lines]
    assert not (folder / "tensorboard").exists()
    pretrain(of(make_config(), track=("none",)), track=[calls])
    assert len(calls.calls) == 5  # nothing is left to do, so nothing begins


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_resumed_run_is_the_same_and_has_no_line_twice(
    name: str, fakes: list[Any], make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2v.train.trainer import Trainer

    config = of(make_config(), track=(name,), log_every=1, async_checkpoint=False)
    whole = Trainer.run_update

    def killed(self: Any, batches: Any) -> Any:
        if self.update == 5:
            raise MemoryError  # stands for a kill: lines 4 and 5 come after the checkpoint
        return whole(self, batches)

    monkeypatch.setattr(Trainer, "run_update", killed)
    with pytest.raises(MemoryError):
        pretrain(config)
    first = json.loads((Path(config.run.dir) / f"{name}.json").read_text())
    monkeypatch.setattr(Trainer, "run_update", whole)
    folder = pretrain(config)
    assert json.loads((folder / f"{name}.json").read_text()) == {"id": first["id"], "step": 6}
    logged = [call[1] for call in fakes if call[0] == "log"]
    assert logged == [1, 2, 3, 4, 5, 6]
    if name == "mlflow":
        assert [c for c in fakes if c[0] != "log"] == [
            ("client", f"sqlite:///{folder / 'mlflow.db'}"), ("create", "run"), ("end", "ab12", "FAILED"),
            ("client", f"sqlite:///{folder / 'mlflow.db'}"), ("update", "ab12", "RUNNING"), ("end", "ab12", "FINISHED"),
        ]  # fmt: skip
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        return
    given = [call[1] for call in fakes if call[0] == "init"]
    assert [g.get("id", g["name"]) for g in given] == [first["id"]] * 2
    assert {g["resume"] for g in given} == {"allow"}
    if name == "wandb":
        assert {g["mode"] for g in given} == {"offline"} and given[0]["dir"] == str(folder)
        assert [call[1] for call in fakes if call[0] == "finish"] == [{"exit_code": 1}, {"exit_code": 0}]


def test_the_network_is_the_users_choice(
    fakes: list[Any], make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    pretrain(of(make_config(), track=("wandb", "mlflow")))
    assert next(call[1]["mode"] for call in fakes if call[0] == "init") == "online"
    assert ("client", "http://somewhere") in fakes


def test_an_id_of_a_stranger_names_no_path(fakes: list[Any], make_config: Callable[..., Config]) -> None:
    folder = pretrain(of(make_config(), track=("wandb",), steps=3))
    (folder / "wandb.json").write_text('{"id": "../../evil", "step": true}')
    pretrain(of(make_config(), track=("wandb",), steps=3, extend=3))
    ids = [call[1]["id"] for call in fakes if call[0] == "init"]
    assert len(ids) == 2 and "evil" not in ids[1]


def test_what_fails_is_dropped_and_the_run_goes_on(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def broken(step: int, values: Mapping[str, float]) -> None:
        tried.append(step)
        raise OSError("the disk\nis full")

    calls = Calls()
    folder = pretrain(make_config(), track=[broken, calls])
    assert tried == [2] and len(read_metrics(folder / "metrics.jsonl")) == 3 and len(calls.calls) == 5
    said = [line for line in capsys.readouterr().err.splitlines() if "run.track" in line]
    assert said == [
        "note: run.track: broken (1) failed and gets nothing more, the run goes on: OSError: the disk is full"
    ]


def test_a_missing_package_is_said_before_anything_is_written(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = of(make_config(), track=("tensorboard", "wandb"))
    with pytest.raises(ValueError, match=r"run\.track: wandb cannot be imported .*: pip install wandb"):
        pretrain(config)
    assert not (Path(config.run.dir) / "config.json").exists()
    with pytest.raises(ValueError, match=r"expected an object with start, log and finish, or a function, got int"):
        make_trackers((), [3])
    with pytest.raises(ValueError, match="expected none alone"):
        make_trackers(("none", "wandb"))


def test_code_is_named_on_the_command_line_alone(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = tmp_path / "mine.py"
    code.write_text(
        "from pathlib import Path\nHERE = Path(__file__).parent\n(HERE / 'ran').touch()\n"
        "def note(step, values):\n    with (HERE / 'out').open('a') as f:\n        print(step, file=f)\n"
    )
    base = ["pretrain", "vision-tiny", *tiny_options(), "--data.path", str(images), "--run.dir", str(tmp_path / "run")]
    assert cli.main([*base, "--run.track", f"{code}:note"]) == 0
    assert (tmp_path / "out").read_text().split() == ["2", "4", "6"]
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["run"]["track"] == ["none"] and "mine.py" not in json.dumps(stored)
    (tmp_path / "ran").unlink()

    stored["run"]["track"] = [f"{code}:note"]
    (tmp_path / "theirs.json").write_text(json.dumps(stored))
    arguments = ["pretrain", "--config", str(tmp_path / "theirs.json"), "--data.path", str(images), "--run.dir"]
    assert cli.main([*arguments, str(tmp_path / "other")]) == 2
    assert (
        "run.track: expected one of tensorboard, wandb, mlflow, trackio, prometheus, none, got"
        in capsys.readouterr().err
    )
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "config.json").write_text(json.dumps(stored))
    assert cli.main(["pretrain", "--run.dir", str(tmp_path / "run")]) == 2
    with pytest.raises(ValueError, match=r"run\.track: expected one of"):
        Config.from_json(json.dumps(stored))
    assert not (tmp_path / "ran").exists()
    assert cli.main([*base, "--run.track", f"{code}:notes"]) == 2
    assert "did you mean 'note'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "kept", "code"),
    [
        (["--run.track", "wandb", "a.py:f", "--x", "3"], ["--run.track", "wandb", "--x", "3"], ["a.py:f"]),
        (["--run.track=a.py:f"], ["--run.track", "none"], ["a.py:f"]),
        (["--recipe", "a.py:f", "--run.track", "none"], ["--recipe", "a.py:f", "--run.track", "none"], []),
    ],
)  # fmt: skip
def test_code_is_taken_out_of_the_arguments(given: list[str], kept: list[str], code: list[str]) -> None:
    assert settings.take_code(given) == (kept, code)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_real_package(
    name: str, make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    pretrain(of(make_config(), track=(name,), steps=3))
    folder = pretrain(of(make_config(), track=(name,), steps=3, extend=3))
    known = json.loads((folder / f"{name}.json").read_text())
    assert known["step"] == 6
    if name == "wandb":
        assert len(list((folder / "wandb").glob(f"offline-run-*-{known['id']}"))) == 2
    if name == "mlflow":
        client = importlib.import_module("mlflow").MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        assert [m.step for m in client.get_metric_history(known["id"], "loss")] == [2, 3, 4, 6]
        assert client.get_run(known["id"]).info.status == "FINISHED"
    assert not {p.name for p in tmp_path.iterdir()} - {"run", "images", "trackio"}
