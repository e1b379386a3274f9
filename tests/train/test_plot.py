"""`d2v plot`: every monitor has its panel; runs without probes, of all kinds of data, and cut off in the middle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.sounds import write_sounds, write_text

from d2v import recipes
from d2v.config import Config
from d2v.data import make_modality
from d2v.model.data2vec import build_model
from d2v.tools.figures import centre_features, compare_tokens, draw_spectrogram, take_pictures
from d2v.tools.plot import PANELS, choose_panels, draw_report
from d2v.train.logging import read_metrics
from d2v.train.pretraining import pretrain

from .test_flops import change

CPU = torch.device("cpu")


def write_lines(folder: Path, lines: list[dict[str, Any]], end: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return folder


def test_every_key_has_a_panel(make_config: Callable[..., Config], images: Path) -> None:
    folder = pretrain(make_config(data={"valid": str(images)}, run={"steps": 3, "log_every": 1}))
    lines = read_metrics(folder / "metrics.jsonl")
    shown = {key for _, keys in choose_panels(lines) for key in keys}
    assert set().union(*lines) - {"step", "valid_step", "step_seconds"} == shown
    assert {key for _, keys in PANELS for key in keys} - shown == {
        "regression", "cls", "mfu", "probe_linear", "probe_knn"
    }  # fmt: skip
    text = draw_report(folder, images=str(images))
    assert text == f"{folder}/report.png (left out: no probe.json)"
    with Image.open(folder / "report.png") as image:
        assert image.height > 700


def test_other_numbers_get_a_panel_of_their_own() -> None:
    lines = [{"step": 1, "loss": 1.0, "wer": 0.5, "note": "text"}, {"step": 2, "valid_wer": None, "output_std": 1.0}]
    assert choose_panels(lines) == [("loss", ("loss",)), ("wer", ("wer", "valid_wer")), ("output std", ("output_std",))]


def pixels(folder: Path, lines: list[dict[str, Any]], end: str = "") -> np.ndarray:
    """The drawn report of these lines."""
    draw_report(write_lines(folder, lines, end))
    with Image.open(folder / "report.png") as image:
        return np.asarray(image.convert("RGB"))


def test_runs_that_were_cut_off(tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 1.0 / i, "grad_norm": 0.0 if i == 1 else 1.0} for i in range(1, 6)]
    folder = tmp_path / "run"
    text = draw_report(write_lines(folder, lines, '{"step": 6, "lo'))
    assert text == f"{folder}/report.png (left out: no probe.json; no checkpoint)"
    assert np.array_equal(pixels(folder, lines), pixels(folder, lines, '{"step": 6, "lo'))
    for broken in ('{"linear_pr', '{"linear_probe": {}}', "[1]"):
        (folder / "probe.json").write_text(broken)
        assert "no probe.json" in draw_report(folder)
    # One line is enough; none is not.
    draw_report(write_lines(folder, lines[:1]))
    with pytest.raises(ValueError, match=r"dir: expected lines in .*found none"):
        draw_report(write_lines(folder, [], '{"step": 6, "lo'))


def test_what_was_not_finite_is_marked(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": i, "loss": 1.0} for i in range(1, 6)]
    whole = pixels(tmp_path / "run", lines)
    lines[2]["loss"] = None  # as NaN is written
    marked = pixels(tmp_path / "run", lines)
    red = [(p[..., 0] > 200) & (p[..., 1] < 150) & (p[..., 2] < 150) for p in (whole, marked)]
    assert red[0].sum() == 0
    assert red[1].sum() > 20


def small(recipe: str, path: Path, folder: Path) -> Config:
    base = recipes.get(recipe)
    changes: dict[str, dict[str, Any]] = {
        "encoder": {"width": 16, "heads": 2, "depth": 2},
        "target": {"top_k": 2},
        "data": {"path": str(path), "global_batch": 4, "workers": 0, "min_seconds": 0.0},
        "run": {"dir": str(folder), "steps": 2, "log_every": 1, "threads": 1, "device": "cpu"},
    }
    if base.version == 2:
        changes["decoder"] = {"layers": 1, "width": 16, "groups": 2}
    if recipe.startswith("text"):
        changes["stem"] = {"vocabulary": 300, "max_tokens": 32, "mask_token": 299 if base.version == 1 else None}
    return change(base, **changes)


@pytest.mark.parametrize("recipe", ["speech-tiny", "text-tiny", "spectrograms-tiny"])
def test_other_kinds_have_their_own_pictures(recipe: str, tmp_path: Path) -> None:
    speech = not recipe.startswith("text")
    path = write_sounds(tmp_path / "sounds") if speech else write_text(tmp_path / "text.txt")
    folder = pretrain(small(recipe, path, tmp_path / "run"))
    text = draw_report(folder, images=str(path), count=3)
    assert text == f"{folder}/report.png (left out: no probe.json)"
    with Image.open(folder / "report.png") as image:
        height = image.height
    # The checkpoint may be gone, or the data not named; the rest is drawn.
    moved = path.rename(tmp_path / ("moved" if speech else "moved.txt"))
    assert "no --images" in draw_report(folder)
    with Image.open(folder / "report.png") as image:
        assert image.height < height
    with pytest.raises(ValueError, match="images: expected"):
        draw_report(folder, images=str(path))
    assert "left out: no probe.json)" in draw_report(folder, images=str(moved), count=1)


def test_pictures_hold_what_the_model_says(tmp_path: Path) -> None:
    config = small("speech-tiny", write_sounds(tmp_path / "sounds"), tmp_path)
    model, modality = build_model(config).eval(), make_modality(config)
    source = modality.open_whole(config.data.path, option="path")
    pictures = take_pictures(config, modality, source, model, CPU, 3, masks=True)
    assert [p.name for p in pictures] == [source.describe(i) for i in (0, 6, 11)]
    for picture, index in zip(pictures, (0, 6, 11), strict=True):
        waveform, _ = modality.load(source, index)
        assert picture.seconds == pytest.approx(len(waveform) / 16_000)
        expected = model.encode(torch.from_numpy(waveform[:])[None]).features[0]
        torch.testing.assert_close(picture.features, expected, rtol=1e-4, atol=1e-5)
        assert picture.mask is not None
        assert picture.mask.shape == (config.mask.copies, len(expected))
        assert 0.0 < picture.mask.mean() < 1.0
        assert picture.content.shape == (64, (len(waveform) - 400) // 160 + 1)


def test_tokens_are_shown_as_words(tmp_path: Path) -> None:
    config = small("text-tiny", write_text(tmp_path / "text.txt"), tmp_path / "run")
    folder = pretrain(config)
    config = change(config, data={"tokenizer": str(folder / "tokenizer")})
    modality = make_modality(config)
    source = modality.open_whole(config.data.path, option="path")
    (picture,) = take_pictures(config, modality, source, build_model(config).eval(), CPU, 1)
    assert len(picture.tokens) == len(picture.features)
    assert (picture.tokens[0], picture.tokens[-1]) == ("·", "·")  # <s> and </s>
    text = (tmp_path / "text.txt").read_text().split("\n\n")[0]
    words = "".join(picture.tokens[1:-1]).replace("·", "")  # of a line's end
    assert len(words) > 30
    assert text.replace(" ", "").replace("\n", "").startswith(words)


def test_broken_samples_are_left_out(make_config: Callable[..., Config], images: Path) -> None:
    config = make_config()
    modality = make_modality(config)
    source = modality.open_whole(str(images), option="path")
    first = source.describe(0)
    model = build_model(config).eval()
    assert take_pictures(config, modality, source, model, CPU, 3)[0].name == first
    Path(first).write_bytes(b"broken")
    assert first not in [p.name for p in take_pictures(config, modality, source, model, CPU, 3)]


def test_a_tone_is_a_line_of_its_height() -> None:
    time = torch.arange(16_000) / 16_000
    bands = [int(draw_spectrogram(torch.sin(2 * math.pi * f * time)[None]).mean(1).argmax()) for f in (300, 1200, 5000)]
    assert 0 < bands[0] < bands[1] < bands[2] < 64


def test_similarity_of_tokens() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 8)
    features = torch.stack([first, first, second, second]) + 100.0  # what is common to all is taken off
    similarity = compare_tokens(features)
    assert similarity.shape == (4, 4)
    np.testing.assert_allclose(similarity[:2, :2], 1.0, atol=1e-4)
    np.testing.assert_allclose(similarity[:2, 2:], -1.0, atol=1e-4)
    assert float(centre_features(features).mean(0).abs().max()) < 1e-4
