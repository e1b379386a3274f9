"""Checkpoints appear whole or not at all and hold safetensors and JSON only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v import checkpoint
from d2v.checkpoint import (
    clean_folder,
    copy_into,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_config,
    load_json,
    load_tensors,
    save_checkpoint,
)
from d2v.config import Config


def save(folder: Path, step: int, keep: int = 9) -> Path:
    shared = torch.arange(6.0).reshape(2, 3)
    model = {"a": shared, "b": shared, "c": shared.T, "d": torch.tensor(step), "e": shared[:, 1:]}
    return save_checkpoint(
        folder / "checkpoints", step, config=Config(), model=model, trainer={"x": torch.zeros(2)}, state={}, keep=keep
    )


def test_round_trip(tmp_path: Path) -> None:
    folder = save(tmp_path, 12)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "model.safetensors", "state.json", "trainer.safetensors",
    ]  # fmt: skip
    tensors = load_tensors(folder, "model.safetensors")
    shared = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(tensors["b"], shared)
    assert torch.equal(tensors["c"], shared.T)
    assert torch.equal(tensors["e"], shared[:, 1:])
    assert load_json(folder / "state.json")["step"] == 12
    assert load_config(folder) == Config()


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 100, 20, 100_000_000):
        save(tmp_path, step, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000100", "step-100000000"]
    assert find_checkpoint(str(tmp_path)) == latest_checkpoint(tmp_path)
    inside = tmp_path / "checkpoints" / "step-00000100"
    assert find_checkpoint(str(inside)) == inside


@pytest.mark.parametrize("where", ["save_file", "_flush", "rename"])
def test_a_failure_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    save(tmp_path, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "rename":
            patch.setattr(Path, "rename", fail)
        else:
            patch.setattr(checkpoint, where, fail)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000001"]
    save(tmp_path, 2)
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 2


def test_leftovers_of_a_kill_are_no_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    for name in (".partial-step-00000002", ".removed-step-00000000"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
    assert [p.name for p in list_checkpoints(folder)] == ["step-00000001"]
    clean_folder(folder)
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    for name in ("missing", str(tmp_path / "nothing"), ""):
        with pytest.raises(ValueError, match="checkpoint: expected"):
            find_checkpoint(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"found neither model\.safetensors nor"):
        find_checkpoint(str(tmp_path / "empty"))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors"):
        load_tensors(folder, "model.safetensors")
    (folder / "state.json").write_text("[1")
    with pytest.raises(ValueError, match=r"cannot read .*state\.json"):
        load_json(folder / "state.json")
    (folder / "state.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        load_json(folder / "state.json")
    (folder / "config.json").write_text(json.dumps({"nonsense": 1}))
    with pytest.raises(ValueError, match="unknown fields"):
        load_config(folder)


def test_tensors_that_do_not_fit_are_named() -> None:
    target = {"a": torch.zeros(2), "b": torch.zeros(3)}
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"a": torch.zeros(2)}, "w: expected a tensor 'b', found none"),
        ({**target, "c": torch.zeros(1)}, "w: unexpected tensor 'c'"),
        ({"a": torch.zeros(2), "b": torch.zeros(4)}, r"w: b: expected shape \(3,\), got \(4,\)"),
    ]
    for source, text in cases:
        with pytest.raises(ValueError, match=text):
            copy_into(target, source, "w")
    address = target["a"].data_ptr()
    copy_into(target, {"a": torch.ones(2), "b": torch.ones(3)}, "w")
    assert target["a"].data_ptr() == address
    assert target["a"].sum() == 2


def test_config_is_written_with_the_run(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    config = make_config()
    (tmp_path / "config.json").write_text(config.to_json())
    assert load_config(tmp_path) == config
