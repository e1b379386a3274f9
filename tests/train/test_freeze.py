"""A teacher that stands still: from an update on, from the beginning, and when a run is taken up again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from d2v.config import Config
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
