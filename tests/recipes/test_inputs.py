"""Input that cannot be used: one clear error each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import make_config, make_model

from d2v import Data2Vec, recipes


def tokens(*changes: tuple[int, int, int]) -> torch.Tensor:
    rows = torch.full((2, 12), 7)
    for row, place, value in changes:
        rows[row, place] = value
    return rows


def waves(samples: int = 2_000, **bad: float) -> torch.Tensor:
    x = torch.zeros(2, samples)
    if bad:
        x[1, 5] = bad["value"]
    return x


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values)


ALL = torch.ones(4, 12, dtype=torch.bool)
FRONT = ALL.clone()
FRONT[:, 6:] = False

CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("text-base", {"inputs": tokens((0, 3, 50))}, ValueError, "inputs: expected token ids 0 to 49, got 7 to 50"),
    ("text-base", {"inputs": tokens((1, 3, -1))}, ValueError, "inputs: expected token ids 0 to 49, got -1 to 7"),
    ("text1-base", {"inputs": tokens((1, 3, 1))}, ValueError, r"padding \(id 1\) on the right only.* rows \[1\]"),
    ("text-base", {"inputs": torch.zeros(2, 12)}, TypeError, "inputs: expected int64 token ids, got float32"),
    ("text-base", {"inputs": torch.ones(2, 41, dtype=torch.int64)}, ValueError, "at most stem.max_tokens 40 .* got 41"),
    ("text-base", {"inputs": torch.ones(2, 12, dtype=torch.int64)}, ValueError, "lengths: expected 1 to 12, got"),
    ("text-base", {"inputs": tokens(), "lengths": lengths(13, 2)}, ValueError, r"lengths: expected 1 to 12, got \[13"),
    ("text-base", {"inputs": tokens(), "lengths": lengths(3)}, ValueError, r"lengths: expected int64 \(2,\) on"),
    ("text-base", {"inputs": tokens(), "lengths": torch.ones(2)}, ValueError, "lengths: expected int64 .* got float32"),
    ("text-base", {"inputs": tokens(), "lengths": lengths(4, 12), "masks": FRONT}, ValueError, r"none in \[0, 1\]"),
    ("text-base", {"inputs": tokens(), "masks": ALL[:, :11]}, ValueError, r"masks: expected \(N, 12\)"),
    ("speech-base", {"inputs": waves(24)}, ValueError, "at least 30 samples, the receptive field, got 24"),
    ("speech-base", {"inputs": waves(value=float("nan"))}, ValueError, r"expected finite samples.* rows \[1\]"),
    ("speech1-base", {"inputs": waves(value=float("inf"))}, ValueError, r"expected finite samples.* rows \[1\]"),
    ("speech-base", {"inputs": torch.zeros(2, 1, 2_000)}, ValueError, r"inputs: expected waveforms of shape \(B, S\)"),
    ("speech-base", {"inputs": waves().long()}, TypeError, "inputs: expected floating waveforms, got int64"),
    ("speech-base", {"inputs": waves(), "lengths": lengths(2_001, 5)}, ValueError, "lengths: expected 30 to 2000, got"),
    ("speech-base", {"inputs": waves(), "lengths": lengths(2_000, 24)}, ValueError, "lengths: expected 30 to 2000"),
    (
        "text1-base",
        {"inputs": tokens(), "noise": torch.zeros(2, 3, 32)},
        ValueError,
        "noise: expected None, 1.0 has no",
    ),
    ("vision1-base", {"inputs": torch.zeros(2, 3, 4, 4)}, ValueError, r"shape \(B, 3, 32, 32\), got \(2, 3, 4"),
    ("vision1-base", {"inputs": torch.zeros(2, 3, 32, 32), "lengths": lengths(1, 1)}, ValueError, "None for images"),
]


@pytest.mark.parametrize(("name", "arguments", "error", "text"), CASES)
def test_bad_input_is_named(name: str, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    model = make_model(make_config(name))
    with pytest.raises(error, match=text):
        model(**arguments)
    if arguments.keys() <= {"inputs", "lengths"}:
        with pytest.raises(error, match=text):
            model.encode(**arguments)


def test_published_waveforms_need_400_samples() -> None:
    with torch.device("meta"):
        model = Data2Vec(recipes.speech_base())
    assert model.stem.samples_needed() == 400
    assert [model.stem.count_tokens(n) for n in (400, 16_000, 320_000)] == [1, 49, 999]


def test_an_image_smaller_than_a_patch_is_refused() -> None:
    config = make_config("vision1-base")
    with pytest.raises(ValueError, match=r"inputs: expected shape \(B, 3, 32, 32\), got \(1, 3, 7, 7\)"):
        make_model(config).encode(torch.zeros(1, 3, 7, 7))
