"""Kinds of input of one's own: the check that users run on them, what it catches, and the example."""

from __future__ import annotations

import pkgutil
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support.images import write_class_folders
from support.sounds import write_sounds, write_text
from torch import Tensor, nn

import d2v
from d2v import Config, recipes
from d2v.config.inputs import KINDS, find_kind
from d2v.data import make_modality
from d2v.data.dataset import Modality
from d2v.interop.program import make_program
from d2v.model.layers import check_lengths, valid_positions
from d2v.model.stems import InputStem
from d2v.testing import check_modality

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_modality.py"
SMALL: dict[str, Any] = {
    "encoder": {"width": 16, "heads": 2, "depth": 2}, "target": {"top_k": 2}, "run": {"threads": 1}
}  # fmt: skip
SECOND = {"decoder": {"layers": 1, "width": 16, "groups": 2}, "mask": {"copies": 2}}


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """Kinds that a test registers are gone after it."""
    with mock.patch.dict(KINDS):
        yield


@pytest.mark.parametrize("name", [name for name in recipes.RECIPES if name.endswith("-tiny")])
def test_built_in_kinds_pass(name: str, tmp_path: Path) -> None:
    config = recipes.get(name).change(**SMALL, **(SECOND if "1-" not in name else {}))
    kind = config.stem.modality
    if kind == "signals":
        for i, length in enumerate((90, 140, 90, 200)):
            np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).standard_normal((length, 12)))
        path = tmp_path
    elif kind == "text":
        mask = 299 if config.version == 1 else None
        config = config.change(stem={"vocabulary": 300, "max_tokens": 32, "mask_token": mask})
        path = write_text(tmp_path / "text.txt")
    elif kind == "vision":
        config, path = config.change(stem={"image_size": 16}), write_class_folders(tmp_path / "images")
    else:
        path = write_sounds(tmp_path / "sounds")
    found = check_modality(config.change(data={"path": str(path)}))
    assert [line.split(":")[0] for line in found] == [
        "samples", "tokens and masks", "gradients", "padding", "resumed run"
    ]  # fmt: skip
    grid = config.grid is not None
    assert found[-2] == f"padding: {'none, a grid is always full' if grid else 'changes nothing before it'}"


# ---- what is caught -------------------------------------------------------------------------------------------------


class RowsStem(InputStem):
    """Each row of numbers a token; what a planted fault changes."""

    fault = ""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(3, width)
        self.unused = nn.Parameter(torch.zeros(3)) if self.fault == "unused" else None

    def count_tokens(self, length: int) -> int:
        return length + (self.fault == "count")

    def measure(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[int, Tensor | None]:
        lengths = check_lengths(lengths, len(inputs), inputs.shape[1])
        return inputs.shape[1], None if self.fault == "ignored" else lengths

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        valid = valid_positions(None if self.fault == "leak" else lengths, inputs.shape[1], inputs.device)
        if valid is not None:
            inputs = inputs * valid[..., None]
        # The sum over the whole row is the same with and without padding only where that is 0.
        features: Tensor = self.proj(inputs + 0.1 * inputs.sum(dim=1, keepdim=True))
        return features[:, 1:] if self.fault == "shape" else features


class Rows(Modality):
    name, noun, suffixes = "rows", "tables", (".npy",)
    fault, seen = "", 0

    @staticmethod
    def make_stem(config: Config) -> InputStem:
        return RowsStem(config.encoder.width)

    def load(self, source: Any, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        with source.open_file(index) as file:
            return np.load(file), ()

    def train_transform(self, value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        rng = np.random.default_rng() if self.fault == "random" else rng
        if self.fault == "state":  # depends on what was asked for before
            self.seen += 1
            return np.asarray(value * self.seen, dtype=np.float32)
        return np.asarray(value * rng.uniform(0.5, 2.0), dtype=np.float32)

    def placeholder(self) -> np.ndarray:
        return np.zeros((8, 3), dtype=np.float32)

    def stack(self, samples: list[Any], training: bool) -> tuple[Tensor, Tensor | None]:
        lengths = torch.tensor([len(s.value) for s in samples])
        inputs = torch.zeros(len(samples), int(lengths.max()), 3)
        for row, sample in zip(inputs, samples, strict=True):
            row[: len(sample.value)] = torch.from_numpy(sample.value)
        inputs = inputs * torch.nan if self.fault == "nan" else inputs
        return inputs, None if bool((lengths == lengths[0]).all()) else lengths


def make_rows(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    for i, length in enumerate((12, 20, 16, 9, 14)):
        np.save(folder / f"{i}.npy", np.random.default_rng(i).standard_normal((length, 3)).astype(np.float32))
    monkeypatch.setattr(RowsStem, "fault", fault)
    monkeypatch.setattr(Rows, "fault", fault)
    d2v.register_modality(Rows)
    base = recipes.signals_tiny().change(**SMALL, **SECOND)
    return base.change(stem={"modality": "rows"}, data={"path": str(folder)})


def test_one_of_ones_own_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check_modality(make_rows(tmp_path, "", monkeypatch))
    assert found[-2:] == ["padding: changes nothing before it", "resumed run: the same, bit for bit"]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("leak", "padding: expected the same features beside a longer sample as alone, got a difference of "),
        ("ignored", r"tokens: expected \[.*\], as of `count_tokens`, got \["),
        ("count", r"tokens: expected \[.*\], as of `count_tokens`, got \["),
        ("shape", r"tokens: expected features \(4, 20, 16\), as `measure` says, got \(4, 19, 16\)"),
        ("unused", "gradients: expected one of every parameter, got none of stem.unused"),
        ("random", "samples: expected the same from the same seed, epoch and id, got others"),
        ("nan", "samples: expected finite values, got NaN or infinity"),
        ("state", "resumed run: expected the same weights as of the whole run, got others in "),
    ],
)
def test_planted_faults_are_caught(fault: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=text):
        check_modality(make_rows(tmp_path, fault, monkeypatch))


# ---- registration ---------------------------------------------------------------------------------------------------


def test_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"stem.modality: expected one of speech, vision, text, signals.*, got 'rows'"):
        recipes.signals_tiny().change(stem={"modality": "rows"})
    config = make_rows(tmp_path, "", monkeypatch)
    assert d2v.register_modality(Rows) is Rows, "once more is no other class"
    other = type("Other", (Modality,), {"name": "rows"})
    for kind in (other, type("Speech2", (Modality,), {"name": "speech"}), type("Nameless", (Modality,), {})):
        with pytest.raises(ValueError, match="register_modality: expected a name besides speech, vision, text"):
            d2v.register_modality(kind)
    text = config.to_json()
    assert Config.from_json(text) == config and config.grid is None and "sequence" in config.traits
    del KINDS["rows"]
    with pytest.raises(ValueError, match=r"got 'rows'; one of your own has to be registered first"):
        Config.from_json(text)


@pytest.mark.parametrize("name", ["speech", "vision", "text", "signals", "spectrograms"])
def test_built_in_entries_are_what_their_classes_say(name: str) -> None:
    kind = find_kind(name)
    modality = pkgutil.resolve_name(str(kind.modality))
    assert modality.name == name and frozenset(modality.words) == kind.words
    assert pkgutil.resolve_name(str(kind.stem)) is modality.make_stem
    config = recipes.get(f"{name}-tiny")
    assert type(make_modality(config)) is modality and kind.describe(config.stem)


def test_a_grid_of_ones_own_is_masked_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 4 x 5 tokens, blocks of 2 x 2 of which are visible, or masked."""
    monkeypatch.setattr(Rows, "grid", staticmethod(lambda stem: (4, 5)))
    base = make_rows(tmp_path, "", monkeypatch)
    for i in range(5):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).standard_normal((20, 3)).astype(np.float32))
    assert base.grid == (4, 5) and "image" in base.traits
    for inverse in (False, True):
        config = base.change(mask={"span": 2, "inverse": inverse, "ratio": 0.5})
        assert "tokens and masks: 20 a row, at least 10 of them visible and 10 masked" in check_modality(config)
    model = d2v.Data2Vec(base)
    assert model.decoder is not None and isinstance(model.decoder.blocks[0], nn.Conv2d)
    with pytest.raises(ValueError, match=r"stem.positions: expected other than conv"):
        base.change(stem={"positions": "conv"})


# ---- the example ----------------------------------------------------------------------------------------------------


def test_the_example_passes_its_check(tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLE))
    path = example["write_recordings"](tmp_path, 2, 0)
    config = example["recipe"]().change(**SMALL, **SECOND, data={"path": str(path)})
    assert check_modality(config)[-2].startswith("padding: none, the stem takes no lengths")
    model = d2v.Data2Vec(config).eval()
    program = make_program(model).module()
    for batch in (1, 3):
        inputs = torch.randn(batch, 600, 12)
        torch.testing.assert_close(program(inputs), model.teacher.encode(inputs).features, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_the_example_beats_an_untrained_network(tmp_path: Path) -> None:
    scores = runpy.run_path(str(EXAMPLE))["main"](tmp_path)
    assert scores["pretrained"] > scores["random_init"] + 0.08
    assert scores["pretrained"] > 0.48
