"""A model small enough to train in a test, and images for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.images import write_class_folders

from d2v import recipes
from d2v.config import Config

CHANGES: dict[str, dict[str, Any]] = {
    "stem": {"image_size": 16},
    # Dropout, so that the state of torch's generator matters.
    "encoder": {"width": 16, "heads": 2, "depth": 2, "dropout": 0.1},
    "decoder": {"layers": 1, "width": 16, "groups": 2},
    "mask": {"copies": 2},
    "target": {"top_k": 2},
    "optim": {"warmup_steps": 2},
    "data": {"global_batch": 4, "workers": 0, "crop_scale": (0.4, 1.0)},
    "run": {"steps": 6, "log_every": 2, "checkpoint_every": 3, "threads": 1, "device": "cpu"},
}


def tiny_options() -> list[str]:
    """The same settings as options of `d2v pretrain vision-tiny`."""
    options = []
    for section, values in CHANGES.items():
        for name, value in values.items():
            texts = [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
            options += [f"--{section}.{name.replace('_', '-')}", *texts]
    return options


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_class_folders(tmp_path / "images")


@pytest.fixture
def make_config(tmp_path: Path, images: Path) -> Callable[..., Config]:
    """make_config(run={"steps": 3}, ...) -> tiny configuration in tmp_path / "run" (or run={"dir": ...})."""

    def make(**sections: dict[str, Any]) -> Config:
        base = recipes.vision_tiny()
        defaults: dict[str, dict[str, Any]] = {"data": {"path": str(images)}, "run": {"dir": str(tmp_path / "run")}}
        changed = {}
        for name in {*CHANGES, *sections}:
            values = {**CHANGES.get(name, {}), **defaults.get(name, {}), **sections.get(name, {})}
            changed[name] = dataclasses.replace(getattr(base, name), **values)
        return dataclasses.replace(base, **changed)

    return make
