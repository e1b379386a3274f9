"""A teacher that stands still: from an update on, from the beginning, and when a run is taken up again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.images import make_image

from d2v.config import Config
from d2v.model.target_cache import TargetCache
from d2v.model.teacher import Teacher
from d2v.train.pretraining import pretrain

from .test_going_on import assert_equal, weights

Make = Callable[..., Config]
LONG = {"keep_checkpoints": 9, "checkpoint_every": 1}


def teacher(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(folder).items() if name.startswith("teacher.")}


def at(run: Path, step: int, to: Path) -> Path:
    """The run as it was after an update."""
    shutil.copytree(run, to)
    for checkpoint in (to / "checkpoints").iterdir():
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    return to


def test_the_teacher_stands_still_and_the_student_goes_on(make_config: Make, tmp_path: Path) -> None:
    plain = pretrain(make_config(run={**LONG, "dir": str(tmp_path / "plain")}))
    frozen = pretrain(make_config(run=LONG, ema={"freeze_after": 3}))
    early = at(frozen, 3, tmp_path / "early")
    assert_equal(early, at(plain, 3, tmp_path / "plain-early"))
    before, after = teacher(early), teacher(frozen)
    assert before and all(torch.equal(after[n], before[n]) for n in before)
    assert any(not torch.equal(weights(early)[n], v) for n, v in weights(frozen).items())
    assert any(not torch.equal(teacher(plain)[n], v) for n, v in after.items())
    decays = [json.loads(line)["ema_decay"] for line in (frozen / "metrics.jsonl").open()]
    assert decays[-1] == 1.0 and decays[0] < 1.0


def test_a_run_may_freeze_later_but_not_change_its_past(make_config: Make, tmp_path: Path) -> None:
    frozen = pretrain(make_config(run=LONG, ema={"freeze_after": 4}))
    plain = pretrain(make_config(run={**LONG, "dir": str(tmp_path / "plain")}))
    later = at(plain, 4, tmp_path / "later")
    with pytest.raises(ValueError, match=r"ema.freeze_after \(stored None, given 3\); the rates and decays of its 4"):
        pretrain(make_config(run={**LONG, "dir": str(later)}, ema={"freeze_after": 3}))
    pretrain(make_config(run={**LONG, "dir": str(later)}, ema={"freeze_after": 4}))
    assert_equal(later, frozen)


def test_a_checkpoint_s_teacher_from_the_beginning(make_config: Make, tmp_path: Path) -> None:
    first = pretrain(make_config(run={"dir": str(tmp_path / "first")}, ema={"scope": "encoder"}))
    stored = weights(first)
    assert not any(name.startswith("teacher.stem") for name in stored)
    second = pretrain(make_config(ema={"freeze_after": 0}), init=str(first))  # scope all
    for name, value in teacher(second).items():
        own = name if name in stored else name.removeprefix("teacher.")
        assert torch.equal(value, stored[own]), name


# ---- targets on disk --------------------------------------------------------------------------------------------


@pytest.fixture
def same(tmp_path: Path) -> dict[str, Any]:
    """Eight square images, two updates an epoch, the same each time."""
    (tmp_path / "square").mkdir()
    for seed in range(8):
        make_image(seed, (16, 16)).save(tmp_path / "square" / f"{seed}.png")
    return {"path": str(tmp_path / "square"), "crop_scale": (1.0, 1.0), "flip": False, "rotate": False}


class Calls:
    """Counts the teacher's forwards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, collect = 0, Teacher.collect

        def counted(this: Teacher, *given: Any) -> Any:
            self.count += 1
            return collect(this, *given)

        monkeypatch.setattr(Teacher, "collect", counted)

    def of(self, config: Config) -> int:
        self.count = 0
        pretrain(config)
        return self.count


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]


def test_cached_targets_save_the_teacher_and_leave_the_losses(
    make_config: Make,
    tmp_path: Path,
    same: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls, run = Calls(monkeypatch), {"steps": 12, "log_every": 1}

    def config(name: str, cache: str | None, **data: Any) -> Config:
        return make_config(
            ema={"freeze_after": 2}, data={**same, **data}, run={**run, "dir": str(tmp_path / name)},
            target={"cache": cache and str(tmp_path / cache)},
        )  # fmt: skip

    assert calls.of(config("plain", None)) == 12
    samples = 8
    first = calls.of(config("first", "kept"))
    assert first == 2 + samples // 4
    assert "note: target.cache: up to" in capsys.readouterr().err
    # The same teacher again: everything is there, and the losses are those of a run that computed every target.
    assert calls.of(config("second", "kept")) == 2
    assert losses(tmp_path / "second") == losses(tmp_path / "first") == losses(tmp_path / "plain")
    # Crops that are others each time are never found.
    assert calls.of(config("crops", "kept", crop_scale=(0.3, 1.0))) == 12
    assert "target.cache: full, 0 of " in capsys.readouterr().err
    held = sum(f.stat().st_size for f in (tmp_path / "kept").rglob("*.bf16"))
    tokens, width = 16, 16
    assert held <= 2 * 2 * samples * tokens * width  # both views, each within its limit


def test_damaged_targets_are_computed_again(
    make_config: Make, tmp_path: Path, same: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)

    def config(name: str) -> Config:
        return make_config(
            ema={"freeze_after": 0}, data=same, run={"dir": str(tmp_path / name), "log_every": 1},
            target={"cache": str(tmp_path / "kept")},
        )  # fmt: skip

    assert calls.of(config("first")) == 2
    (numbers,) = (tmp_path / "kept").rglob("*.bf16")
    data = bytearray(numbers.read_bytes())
    data[7] ^= 1
    numbers.write_bytes(bytes(data))
    assert calls.of(config("second")) == 1  # the batch with the damaged one
    assert losses(tmp_path / "second") == losses(tmp_path / "first")
    numbers.write_bytes(bytes(data[: len(data) // 2]))
    (rows,) = [f for f in (tmp_path / "kept").rglob("*.rows") if f.stem == numbers.stem]
    rows.write_bytes(rows.read_bytes()[:-5])  # a kill in the middle
    calls.of(config("third"))
    assert losses(tmp_path / "third") == losses(tmp_path / "first")


def test_keys_know_values_lengths_and_shapes() -> None:
    one = torch.arange(12.0).view(2, 6)
    keys = TargetCache.keys(one, torch.tensor([6, 4]))
    assert keys == TargetCache.keys(torch.nn.functional.pad(one, (0, 3)), torch.tensor([6, 4]))
    assert keys[1] != TargetCache.keys(one, torch.tensor([6, 5]))[1]
    assert TargetCache.keys(one.view(2, 2, 3), None)[0] != keys[0]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "target.cache: expected nothing without ema.freeze_after"),
        ({"ema": {"freeze_after": 1, "scope": "blocks"}}, "target.cache: expected nothing without ema.freeze_after"),
        ({"ema": {"freeze_after": 1}, "target": {"norm": "batch"}}, "depend on the rest of a batch"),
    ],
)
def test_targets_that_cannot_be_kept_are_refused(sections: dict[str, Any], message: str, make_config: Make) -> None:
    target = {"cache": "somewhere", **sections.pop("target", {})}
    with pytest.raises(ValueError, match=message):
        make_config(**sections, target=target).check()
