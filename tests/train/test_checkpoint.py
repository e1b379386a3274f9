"""Checkpoints appear whole or not at all and hold safetensors and JSON only."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v.config import Config, Run
from d2v.config.fields import forget_places
from d2v.config.finetune import read_config
from d2v.folder import (
    CONFIG,
    clean_folder,
    copy_into,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_json,
    load_tensors,
    step_of,
)
from d2v.train import checkpoint as storage
from d2v.train.checkpoint import Saver, load_into, mix_seed
from d2v.train.distributed import Ranks

WORLD = Ranks(torch.device("cpu"))


def save(folder: Path, step: int, metrics: dict[str, Any] | None = None, **run: Any) -> Path:
    shared = torch.arange(6.0).reshape(2, 3)
    model = {"a": shared, "b": shared, "c": shared.T, "d": torch.tensor(step), "e": shared[:, 1:]}
    tensors = {f"model.{name}": value for name, value in model.items()} | {"optim.x": torch.zeros(2)}
    texts = {"config.json": Config().to_json(), "state.json": json.dumps({"step": step, "metrics": metrics or {}})}
    saver = Saver(folder / "checkpoints", WORLD, Run(**{"keep_checkpoints": 9, **run}))
    saver.save(step, tensors, texts)
    saver.wait()
    return folder / "checkpoints" / f"step-{step:08d}"


def test_round_trip(tmp_path: Path) -> None:
    folder = save(tmp_path, 12)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "metadata.json", "shard-00000.safetensors", "state.json",
    ]  # fmt: skip
    tensors = load_tensors(folder, "model.safetensors")
    shared = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(tensors["b"], shared)
    assert torch.equal(tensors["c"], shared.T)
    assert torch.equal(tensors["e"], shared[:, 1:])
    assert tensors["d"].shape == ()
    assert load_json(folder / "state.json")["step"] == 12
    places = {"model.c": torch.empty(3, 2), "optim.x": torch.ones(2)}
    load_into(folder, places, WORLD)
    assert torch.equal(places["model.c"], shared.T)
    assert not places["optim.x"].any()
    assert read_config(folder / CONFIG) == Config()


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 100, 20, 100_000_000):
        save(tmp_path, step, keep_checkpoints=2)
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000100", "step-100000000"]
    assert find_checkpoint(str(tmp_path)) == latest_checkpoint(tmp_path)
    inside = tmp_path / "checkpoints" / "step-00000100"
    assert find_checkpoint(str(inside)) == inside


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: math.nan, 5: 1.0, 6: 5.0}
    for step, loss in losses.items():
        metrics = {"valid_loss": loss} if math.isfinite(loss) else {}
        save(tmp_path, step, metrics, keep_checkpoints=1, keep_every=3, keep_best="valid_loss")
    assert [step_of(c) for c in list_checkpoints(tmp_path / "checkpoints")] == [2, 3, 6]
    save(tmp_path, 7, {"valid_loss": 9.0}, keep_checkpoints=1, keep_best="valid_loss", best="highest")
    assert [step_of(c) for c in list_checkpoints(tmp_path / "checkpoints")] == [7]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what was there when `save` was called."""
    began, go_on = threading.Event(), threading.Event()
    original = storage.save_file

    def slow(*args: Any) -> None:
        began.set()
        assert go_on.wait(30)
        original(*args)

    monkeypatch.setattr(storage, "save_file", slow)
    weights = torch.zeros(1000)
    saver = Saver(tmp_path / "checkpoints", WORLD, Run())
    saver.save(1, {"model.w": weights}, {"config.json": "{}", "state.json": "{}"})
    assert began.wait(30)
    weights += 1.0
    assert not list_checkpoints(tmp_path / "checkpoints")
    go_on.set()
    saver.wait()
    (written,) = list_checkpoints(tmp_path / "checkpoints")
    assert not load_tensors(written, "model.safetensors")["w"].any()


def test_metadata_is_not_trusted(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    good = (folder / "metadata.json").read_text()
    for old, new, text in (
        ("shard-00000.safetensors", "../../other.safetensors", "the name of a file"),
        ("float32", "save", "the name of a dtype"),
        ("d2v-checkpoint-1", "other", "expected format"),
        ('"shape": [2, 3]', '"shape": [2, -3]', "sizes of 0 or more"),
        ("{", "[", "cannot read"),
    ):
        (folder / "metadata.json").write_text(good.replace(old, new))
        with pytest.raises(ValueError, match=text):
            load_tensors(folder, "model.safetensors")


@pytest.mark.parametrize("where", ["save_file", "flush", "rename"])
def test_a_failure_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    save(tmp_path, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "rename":
            patch.setattr(Path, "rename", fail)
        else:
            patch.setattr(storage, where, fail)
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
    shard = folder / "shard-00000.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*shard-00000\.safetensors"):
        load_tensors(folder, "model.safetensors")
    with pytest.raises(ValueError, match=r"cannot read .*shard-00000\.safetensors"):
        load_into(folder, {"model.c": torch.empty(3, 2)}, WORLD)
    (folder / "state.json").write_text("[1")
    with pytest.raises(ValueError, match=r"cannot read .*state\.json"):
        load_json(folder / "state.json")
    (folder / "state.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        load_json(folder / "state.json")
    (folder / "config.json").write_text(json.dumps({"nonsense": 1}))
    with pytest.raises(ValueError, match="unknown fields"):
        read_config(folder / CONFIG)


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
    assert Config.from_json((tmp_path / CONFIG).read_text()) == config
    assert read_config(tmp_path / CONFIG) == forget_places(config)


def test_ranks_and_updates_have_streams_of_their_own() -> None:
    """The CPU's generator drops the upper 32 bits of a seed."""
    seeds = [mix_seed(3, update, rank) for update in range(0, 400_000, 64) for rank in range(8)]
    assert len({seed % (1 << 32) for seed in seeds}) == len(seeds)
    drawn = {torch.rand(4, generator=torch.Generator().manual_seed(mix_seed(0, u, 1))).sum().item() for u in (0, 4096)}
    assert len(drawn) == 2
