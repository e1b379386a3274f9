"""Probes and the report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import make_image

from d2v.config import Config
from d2v.data import make_modality
from d2v.data.dataset import Batch
from d2v.data.index import open_source
from d2v.evaluate.probe import (
    POOLS,
    align_labels,
    encode_batch,
    extract_features,
    probe,
    score_features,
    standardise_features,
)
from d2v.model.data2vec import build_model
from d2v.saved import load_model
from d2v.tools.plot import compare_patches, draw_report
from d2v.train.pretraining import pretrain

OPTIONS = {"neighbours": 3, "labels_per_class": 5, "draws": 3, "seed": 0}
CPU = torch.device("cpu")


@pytest.fixture
def run(make_config: Callable[..., Config]) -> Path:
    return pretrain(make_config())


def test_scores_know_signal_from_noise() -> None:
    rng = np.random.default_rng(0)
    labels, truth = np.repeat(np.arange(4), 30), np.repeat(np.arange(4), 20)
    means = rng.normal(size=(4, 8)) * 5
    noise = [rng.normal(size=(len(y), 8)) for y in (labels, truth)]
    good = score_features((means[labels] + noise[0], labels), (means[truth] + noise[1], truth), **OPTIONS)
    assert all(good[k] > 0.95 for k in ("linear_probe", "knn", "few_label"))
    poor = score_features((noise[0], labels), (noise[1], truth), **OPTIONS)
    assert all(poor[k] < 0.45 for k in ("linear_probe", "knn", "few_label"))
    assert good == score_features((means[labels] + noise[0], labels), (means[truth] + noise[1], truth), **OPTIONS)


def test_standardisation_uses_the_training_set_only() -> None:
    train = np.array([[1.0, 5.0], [3.0, 5.0]])
    x, z = standardise_features(train, np.array([[5.0, 9.0]]))
    assert np.array_equal(x, [[-1.0, 0.0], [1.0, 0.0]])
    assert np.array_equal(z, [[3.0, 0.0]])


def test_pixel_baselines(make_config: Callable[..., Config]) -> None:
    modality = make_modality(make_config())

    def features(name: str, images: torch.Tensor) -> torch.Tensor:
        return modality.raw_features(name, Batch(images, None, None, None, None, ()))

    images = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8)
    assert features("pixels", images).shape == (5, 256)
    ordered = features("sorted_pixels", images)
    assert (ordered.diff() >= 0).all()
    torch.testing.assert_close(features("sorted_pixels", images.rot90(1, (2, 3))), ordered, atol=1e-5, rtol=0)
    spectrum = features("power_spectrum", images)
    torch.testing.assert_close(features("power_spectrum", images.roll((3, 5), (2, 3))), spectrum, atol=1e-2, rtol=0)
    large = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    assert features("pixels", large).shape == (2, 32 * 32)


def test_features_of_student_and_teacher(run: Path, images: Path) -> None:
    model, config, device = load_model(str(run), "cpu")
    modality, source = make_modality(config), open_source(str(images), labelled=True)
    fresh = build_model(config)
    encoders = {"teacher": model.teacher, "student": model, "fresh": fresh, "fresh teacher": fresh.teacher}
    extractors = {
        name: lambda part, encoder=encoder: encode_batch(encoder, modality, part, device)
        for name, encoder in encoders.items()
    }
    (images / "bee" / "0.png").write_bytes(b"broken")
    loose = dataclasses.replace(config, data=dataclasses.replace(config.data, bad_fraction=0.5))
    found, labels = extract_features(extractors, loose, source, "train", batch=5)
    assert labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert found["teacher"].shape == (11, 16)
    assert not np.allclose(found["teacher"], found["student"])
    assert np.allclose(found["fresh"], found["fresh teacher"], atol=1e-6)
    again, _ = extract_features(extractors, loose, source, "train")
    assert np.allclose(again["teacher"], found["teacher"], atol=1e-6)


def test_probe_prints_a_table_and_one_json_line(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["random_init", "pixels", "sorted_pixels", "power_spectrum"]
    result = probe(str(run), str(images), str(images), baselines=names, labels_per_class=2, draws=2, device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result
    assert json.loads((run / "probe.json").read_text()) == result
    for key in ("linear_probe", "knn", "few_label"):
        assert set(result[key]) == {"pretrained", *names}
        assert all(0.0 <= v <= 1.0 for v in result[key].values())
    assert [line.split()[0] for line in lines[-6:-1]] == ["pretrained", *names]
    assert sum("cut to the middle" in line for line in lines[:-6]) == 2  # of both sets, which are not square
    inside = next((run / "checkpoints").iterdir())
    assert probe(str(inside), str(images), str(images), draws=1, device="cpu")["weights"] == "teacher"
    assert not (inside / "probe.json").exists()


def test_pools() -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 9, 5)
    counts = [9, 6, 2]
    valid = torch.arange(9)[None] < torch.tensor(counts)[:, None]
    features[~valid] = 1e9  # padding must not be seen
    mean, both, parts = (pool(features, valid) for pool in POOLS.values())
    for i, n in enumerate(counts):
        rows = features[i, :n]
        torch.testing.assert_close(mean[i], rows.mean(0))
        torch.testing.assert_close(both[i], torch.cat([rows.mean(0), rows.std(0, correction=0)]))
        bounds = [(n * k // 4, max(n * (k + 1) // 4, n * k // 4 + 1)) for k in range(4)]
        torch.testing.assert_close(parts[i], torch.cat([rows[a:b].mean(0) for a, b in bounds]))


def test_probe_with_other_pools(run: Path, images: Path) -> None:
    for pool in ("mean-std", "segments"):
        result = probe(str(run), str(images), str(images), labels_per_class=2, draws=2, device="cpu", pool=pool)
        assert result["pool"] == pool


def test_probe_of_the_class_token(make_config: Callable[..., Config], images: Path) -> None:
    run = pretrain(make_config(encoder={"extra_tokens": 1}, run={"steps": 1}))
    result = probe(str(run), str(images), str(images), labels_per_class=2, draws=2, device="cpu", pool="class")
    assert result["pool"] == "class"
    assert 0.0 <= result["knn"]["pretrained"] <= 1.0


def refuse_features(*_: object, **__: object) -> None:
    raise AssertionError("features were computed for a probe that cannot be")


def test_probes_that_cannot_be_cost_no_features(run: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v.evaluate.probe.extract_features", refuse_features)
    with pytest.raises(ValueError, match=r"pool: expected one of mean, .* without a class token, got class"):
        probe(str(run), str(images), str(images), device="cpu", pool="class")
    with pytest.raises(ValueError, match="pool: expected one of mean, mean-std, segments, class, got 'sum'"):
        probe(str(run), str(images), str(images), device="cpu", pool="sum")


def test_probe_refusals(run: Path, images: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "dog"
    other.mkdir(parents=True)
    make_image(0).save(other / "0.png")
    train, odd = (open_source(str(p), labelled=True) for p in (images, tmp_path / "other"))
    with pytest.raises(ValueError, match="test: expected the classes ant, bee, cat, got 'dog'"):
        align_labels(train, odd)
    with pytest.raises(ValueError, match="at least 2 classes"):
        probe(str(run), str(tmp_path / "other"), str(tmp_path / "other"))
    for i in range(4):
        (images / "ant" / ("deep" if i % 2 else "") / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="train: expected decodable samples, got 4 of 12"):
        probe(str(run), str(images), str(images))


def test_labels_follow_the_training_classes(images: Path, tmp_path: Path) -> None:
    (tmp_path / "test" / "cat").mkdir(parents=True)
    make_image(0).save(tmp_path / "test" / "cat" / "0.png")
    train, test = (open_source(str(p), labelled=True) for p in (images, tmp_path / "test"))
    assert align_labels(train, test).tolist() == [2]


def test_patch_similarity(make_config: Callable[..., Config]) -> None:
    config = make_config()
    features = torch.zeros(16, 4)
    features[5], features[6] = torch.tensor([9.0, 0, 0, 0]), torch.tensor([8.0, 0, 0, 0])
    patch, similarity = compare_patches(features, config)
    assert patch == (1, 1)
    assert similarity.shape == (4, 4)
    assert similarity[1, 1] == pytest.approx(1.0)
    assert similarity[1, 2] == pytest.approx(1.0)
    assert similarity[0, 0] == pytest.approx(-1.0)


def test_report(run: Path, images: Path, tmp_path: Path) -> None:
    assert "left out: no probe.json" in draw_report(run)
    probe(str(run), str(images), str(images), baselines=["pixels"], draws=2, device="cpu")
    elsewhere = tmp_path / "other.png"
    assert draw_report(run, images=str(images), count=2, output=str(elsewhere)) == str(elsewhere)
    with Image.open(elsewhere) as full, Image.open(run / "report.png") as part:
        assert full.height > part.height
    images.rename(tmp_path / "moved")
    assert "no --images" in draw_report(run)
    with pytest.raises(ValueError, match="images: expected"):
        draw_report(run, images=str(images))
    with pytest.raises(ValueError, match="dir: expected a run folder"):
        draw_report(tmp_path)
