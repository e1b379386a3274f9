"""`d2v evaluate maps`: what is drawn is what the model computes; pictures of all kinds of data; refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.sounds import encode_sound, make_sound, write_sounds, write_text

from d2v.cli import main
from d2v.config import Config
from d2v.data import make_modality
from d2v.evaluate.probe import encode_batch
from d2v.saved import load_model
from d2v.tools.maps import choose_patches, choose_rows, collect_features, cover_patches, draw_maps, embed, project_pca
from d2v.train.pretraining import pretrain

from .test_plot import small

Make = Callable[..., Config]


def shape_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_images(make_config: Make, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, output = str(pretrain(make_config())), tmp_path / "maps"
    options = ["--checkpoint", run, "--output", str(output), "--device", "cpu", "--count", "3"]
    assert main(["evaluate", "maps", *options, "--input", str(images), "--labelled", str(images)]) == 0
    words = capsys.readouterr().out
    assert f"{output}/maps.png: 3 images; {output}/embedding.png: 12 images of 3 classes" in words
    assert {p.name for p in output.iterdir()} == {"maps.png", "embedding.png"}
    wide = shape_of(output / "maps.png")
    assert main(["evaluate", "maps", *options[:-1], "5", "--input", str(images)]) == 0
    assert shape_of(output / "maps.png")[0] > wide[0]
    assert main(["evaluate", "maps", *options]) == 2
    assert "input: expected --input, --labelled or both, got neither" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["speech-tiny", "text-tiny", "spectrograms-tiny"])
def test_other_kinds(recipe: str, tmp_path: Path) -> None:
    speech = not recipe.startswith("text")
    path = write_sounds(tmp_path / "sounds") if speech else write_text(tmp_path / "text.txt")
    run = str(pretrain(small(recipe, path, tmp_path / "run")))
    table = path if speech else tmp_path / "table.tsv"
    if not speech:
        table.write_text("".join(f"{'kan sota' if i % 2 else 'meer tor lis'}\t{i % 2}\n" for i in range(12)))
    output = tmp_path / "maps"
    text = draw_maps(run, str(output), input=str(path), labelled=str(table), count=2, samples=9, device="cpu")
    noun = {"speech": "utterances", "text": "texts"}.get(recipe.removesuffix("-tiny"), "recordings")
    assert f"maps.png: 2 {noun};" in text
    assert f"embedding.png: 9 {noun} of {3 if speech else 2} classes" in text
    assert shape_of(output / "maps.png")[1] > 500


@pytest.mark.parametrize("recipe", ["speech-tiny", "text-tiny"])
def test_what_is_cut_or_left_out_is_named(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    speech = recipe.startswith("speech")
    path = write_sounds(tmp_path / "sounds") if speech else write_text(tmp_path / "text.txt")
    config = small(recipe, path, tmp_path / "run")
    run = str(pretrain(config))
    if speech:
        longest, wrong = config.data.max_seconds, tmp_path / "long" / "b.wav"
        wrong.parent.mkdir()
        (wrong.parent / "a.wav").write_bytes(encode_sound(make_sound(0, longest + 1.5)))
        (wrong.parent / "c.wav").write_bytes(encode_sound(make_sound(0, min(longest, 1.0))))
        wrong.write_bytes(encode_sound(np.full(16_000, np.nan, np.float32), subtype="FLOAT"))
        data, cut = (
            wrong.parent,
            f"pictures: cut 1: {wrong.parent / 'a.wav'}: cut to {longest:g} of {longest + 1.5:g} s",
        )
    else:
        tokens = config.stem.max_tokens
        data = tmp_path / "long.txt"
        data.write_text("a short text of some words\n\n" + "kan sota meer " * tokens + "\n")
        cut = f"pictures: cut 1: document 2 of {data}: cut to {tokens} of "
    capsys.readouterr()
    draw_maps(run, str(tmp_path / "maps"), input=str(data), count=3, device="cpu")
    said = capsys.readouterr().err
    assert cut in said
    assert ("pictures: left out 1: " in said) == speech
    if not speech:
        path = tmp_path / "short.txt"
        path.write_text("kan sota meer\n\ntor lis\n")
    draw_maps(run, str(tmp_path / "maps"), input=str(path), count=2, device="cpu")
    assert "pictures:" not in capsys.readouterr().err


def test_refusals(make_config: Make, images: Path, tmp_path: Path) -> None:
    run, output = str(pretrain(make_config())), tmp_path / "maps"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input": str(tmp_path / "missing")}, "input: expected"),
        ({"labelled": str(tmp_path / "missing")}, "labelled: expected"),
        ({"input": str(images), "count": 0}, "count: expected 1 or more, got 0"),
        ({"labelled": str(images), "samples": 0}, "samples: expected 1 or more, got 0"),
        ({"labelled": str(images), "method": "umap"}, "method: expected one of pca, tsne, got 'umap'"),
    ]
    for options, words in cases:
        with pytest.raises(ValueError, match=words):
            draw_maps(run, str(output), device="cpu", **options)
    assert not output.exists()
    with pytest.raises(ValueError, match="labelled: expected at least 3 images that can be decoded, got 2"):
        draw_maps(run, str(output), labelled=str(images), samples=2, device="cpu")
    for file in images.rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(ValueError, match="input: expected images that can be decoded and masked, got none"):
        draw_maps(run, str(output), input=str(images), device="cpu")


def test_features_are_those_of_the_model(make_config: Make, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(pretrain(make_config()))
    model, config, place = load_model(run, "cpu")
    modality = make_modality(config)
    source = modality.open(str(images), labelled=True, option="x")
    Path(source.describe(3)).write_bytes(b"broken")

    def encode(part: Any) -> torch.Tensor:
        return encode_batch(model, modality, part, place)

    rows = np.array([1, 3, 4, 10])
    assert source.labels is not None
    features, labels = collect_features(source, rows, modality, encode, 2)
    assert f"labelled: left out 1: {source.describe(3)}: " in capsys.readouterr().err
    alone = [collect_features(source, np.array([i] * 3), modality, encode, 1)[0][0] for i in (1, 4, 10)]
    np.testing.assert_allclose(features, np.stack(alone), rtol=1e-5, atol=1e-6)
    assert labels.tolist() == source.labels[[1, 4, 10]].tolist()


def test_every_class_has_its_share() -> None:
    labels = np.array([0] * 100 + [1] * 10 + [2] * 3)
    rows = choose_rows(labels, 15, seed=0)
    assert np.bincount(labels[rows]).tolist() == [6, 6, 3]
    assert (np.diff(rows) > 0).all()
    assert choose_rows(labels, 15, seed=0).tolist() == rows.tolist()
    assert choose_rows(labels, 15, seed=1).tolist() != rows.tolist()
    assert choose_rows(labels, 500, seed=0).tolist() == list(range(113))


def test_patches_that_differ_are_chosen() -> None:
    features = torch.zeros(16, 4)
    features[5, 0], features[9, 0], features[2, 1] = 9.0, 8.9, 5.0
    chosen = choose_patches(features, 2)
    assert chosen[0] == 5
    assert chosen[1] not in (5, 9)
    assert len(set(choose_patches(torch.randn(16, 4), 3))) == 3
    assert choose_patches(torch.ones(1, 4)) == [0]


def test_masked_patches_are_covered() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    mask = np.zeros(4, dtype=bool)
    mask[1] = True
    covered = cover_patches(image, mask, (2, 2))
    assert (covered[:4, 4:] == 128).all()
    assert covered.sum() == 128 * 16 * 3
    assert image.sum() == 0


def test_pca_finds_the_directions() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    scores = rng.normal(size=(500, 6)) * [5.0, 2.0, 0.1, 0.1, 0.1, 0.1]
    points, shares = project_pca(scores @ basis.T + 7.0)
    for i in range(2):
        assert abs(np.corrcoef(points[:, i], scores[:, i])[0, 1]) > 0.99
    assert shares[0] == pytest.approx(25 / 29, rel=0.05)
    again, _ = project_pca((scores @ basis.T)[::-1])
    np.testing.assert_allclose(again[::-1], points, atol=1e-6)


def test_tsne_is_repeatable() -> None:
    features = np.random.default_rng(0).normal(size=(40, 5))
    features[:20] += 10.0
    first, names = embed(features, "tsne", 3)
    assert names == ("t-SNE 1", "t-SNE 2")
    assert first.shape == (40, 2)
    assert np.array_equal(first, embed(features, "tsne", 3)[0])
    # Two clouds stay two.
    centres = first[:20].mean(0), first[20:].mean(0)
    spread = max(first[:20].std(), first[20:].std())
    assert np.linalg.norm(centres[0] - centres[1]) > spread
