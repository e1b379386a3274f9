"""Parts of models that no published configuration uses: they train, go on exactly, and come back from a folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.images import write_class_folders
from support.sounds import write_sounds, write_text

from d2v import Data2Vec, recipes
from d2v.config import Config
from d2v.folder import MODEL, latest_checkpoint, load_tensors
from d2v.train.logging import read_metrics
from d2v.train.pretraining import pretrain

from .conftest import CHANGES

Make = Callable[..., Config]
WAVES = {"kind": "stock", "convolutions": ((16, 10, 5), (16, 8, 8), (16, 8, 8)), "positions": "sincos"}
CASES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "norm over time": ("speech-tiny", {"stem": {**WAVES, "convolution_norm": "group"}}),
    "norm over time, padded": (
        "speech1-tiny", {"stem": {**WAVES, "convolution_norm": "group"}, "data": {"unequal": "pad"}},
    ),
    "whole teacher of speech": ("speech1-tiny", {"ema": {"scope": "all"}}),
    "whole teacher of images": ("vision1-tiny", {"ema": {"scope": "all"}}),
    "some masked visible": ("vision-tiny", {"mask": {"keep_masked": 0.4}}),
    "some masked visible, padded": ("speech-tiny", {"mask": {"keep_masked": 0.4}, "data": {"unequal": "pad"}}),
    "narrow patches": ("vision-tiny", {"stem": {"width": 8}}),
    "narrow tokens": ("text-tiny", {"stem": {"width": 8}}),
    "table of patches": ("vision-tiny", {"encoder": {"alibi": "learned", "alibi_table": 16}}),
    "table of tokens": ("text1-tiny", {"encoder": {"alibi": "fixed", "alibi_table": 9}}),
    "pixels": ("vision-tiny", {"loss": {"reconstruction": 0.1}}),
    "transformer decoder": ("vision-tiny", {"decoder": {"kind": "transformer", "heads": 2}}),
    "transformer decoder, padded": (
        "speech-tiny", {"decoder": {"kind": "transformer", "heads": 2}, "data": {"unequal": "pad"}},
    ),
    "cross decoder": ("vision-tiny", {"decoder": {"kind": "cross", "heads": 2, "positions_all": True}}),
    "shared decoder": ("vision-tiny", {
        "shared_decoder": {"layers": 2, "width": 8, "groups": 2}, "loss": {"reconstruction": 0.1},
    }),
}  # fmt: skip


@pytest.fixture
def make(tmp_path: Path) -> Make:
    places: dict[str, Path] = {}

    def data(modality: str) -> str:
        write = {"vision": write_class_folders, "speech": write_sounds, "text": write_text}[modality]
        if modality not in places:
            places[modality] = write(tmp_path / f"{modality}.txt")
        return str(places[modality])

    def build(recipe: str, folder: str, changes: dict[str, dict[str, Any]], **run: Any) -> Config:
        base = recipes.get(recipe)
        tiny = {name: dict(values) for name, values in CHANGES.items()}
        tiny["stem"], tiny["data"] = {}, {"global_batch": 4, "micro_batch": 2, "workers": 0}
        tiny["mask"] = {"copies": 2 if base.version == 2 else 1}
        modality = base.stem.modality
        if modality == "vision":
            tiny["stem"] = {"image_size": 16, "patch_size": 4}
        elif modality == "text":
            tiny["stem"] = {"vocabulary": 300, "max_tokens": 32, "mask_token": 299 if base.version == 1 else None}
        tiny["data"] |= {"path": data(modality)}
        # A schedule that is the same for runs of any length.
        tiny["optim"], tiny["ema"] = {"warmup_steps": 0, "final_rate": 1.0}, {"anneal_steps": 1}
        tiny["run"] |= {"dir": str(tmp_path / folder), "log_every": 1, **run}
        for name, values in changes.items():
            tiny[name] = {**tiny.get(name, {}), **values}
        return dataclasses.replace(base, **{n: dataclasses.replace(getattr(base, n), **v) for n, v in tiny.items()})

    return build


@pytest.mark.parametrize("name", CASES)
def test_training(name: str, make: Make, tmp_path: Path) -> None:
    recipe, changes = CASES[name]
    whole = pretrain(make(recipe, "whole", changes, steps=2))
    lines = read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(v) for line in lines for v in line.values() if v is not None)
    for steps in (1, 2):
        parts = pretrain(make(recipe, "parts", changes, steps=steps))
    tensors = []
    for folder in (whole, parts):
        newest = latest_checkpoint(folder)
        assert newest is not None
        tensors.append(load_tensors(newest, MODEL))
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())
    torch.manual_seed(make(recipe, "whole", changes).run.seed)
    start = Data2Vec(make(recipe, "whole", changes)).state_dict()
    model = Data2Vec.from_checkpoint(whole)
    trained = {n for n, p in model.named_parameters() if not n.startswith("teacher.")}
    still = {n for n in trained if torch.equal(start[n], tensors[0][n])}
    assert not still, still
    if name.startswith("whole teacher"):
        assert not torch.equal(start["teacher.stem.proj.weight"], tensors[0]["teacher.stem.proj.weight"])
