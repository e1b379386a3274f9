"""Features of several layers, and weights of their sum."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.families import make_config
from support.images import encode, make_image, write_class_folders
from support.sounds import encode_sound, make_sound

import d2v
from d2v import recipes
from d2v.cli import main
from d2v.evaluate.features import extract
from d2v.evaluate.layers import learn_layer_weights, parse_layers
from d2v.evaluate.probe import probe
from d2v.model.saving import write_folder


def write_model(folder: Path, recipe: str) -> d2v.Data2Vec:
    torch.manual_seed(0)
    model = d2v.Data2Vec(make_config(recipe) if recipe != "vision-tiny" else recipes.vision_tiny())
    write_folder(model, folder)
    return model.eval()


@pytest.mark.parametrize("recipe", ["speech-base", "speech1-base"])
def test_layers_of_one_recording(tmp_path: Path, recipe: str) -> None:
    """All at once as one by one, in pieces, too; their sum."""
    model = write_model(tmp_path / "m", recipe)
    (tmp_path / "a.wav").write_bytes(encode_sound(make_sound(0, 1.5)))
    blocks = model.config.encoder.prenet_depth + model.config.encoder.depth
    given = str(tmp_path / "m"), str(tmp_path / "a.wav")
    said = extract(*given, str(tmp_path / "all.npy"), layer="all", device="cpu")
    found = np.load(tmp_path / "all.npy")
    assert f"{len(found)} rows of {blocks + 1} x {found.shape[2]} of 1 utterances" in said
    for layer in range(blocks + 1):
        extract(*given, str(tmp_path / "one.npy"), layer=layer, device="cpu")
        np.testing.assert_allclose(found[:, layer], np.load(tmp_path / "one.npy"), atol=1e-5)
    extract(*given, str(tmp_path / "two.npy"), layer=f"{blocks},0", pool="mean", device="cpu")
    np.testing.assert_allclose(np.load(tmp_path / "two.npy"), found[:, [blocks, 0]].mean(0)[None], atol=1e-5)
    extract(*given, str(tmp_path / "sum.npy"), layer=f"{blocks},0", layer_weights=(0.25, 2.0), device="cpu")
    np.testing.assert_allclose(np.load(tmp_path / "sum.npy"), 0.25 * found[:, blocks] + 2 * found[:, 0], atol=1e-4)


def test_layers_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "m", "vision-tiny")
    (tmp_path / "a.png").write_bytes(encode(make_image(0, (32, 32))))
    assert parse_layers("all", model)[-1] == parse_layers(model.config.encoder.depth, model)  # type: ignore[index]
    for text in ("1,9", "-1", "one", "1,1", "", "1,"):
        with pytest.raises(ValueError, match=r"layer: expected 0 to \d, numbers separated by commas, or all, got"):
            parse_layers(text, model)
    command = ["features", "--checkpoint", str(tmp_path / "m"), "--input", str(tmp_path / "a.png"), "--output"]
    command += [str(tmp_path / "f.npy"), "--layer", "0,1", "--layer-weights", "1"]
    assert main(command) == 2
    assert "layer-weights: expected a number for each of 2 layers (--layer), got [1.0]" in capsys.readouterr().err
    assert main([*command, "2"]) == 0
    maps = ["evaluate", "maps", "--checkpoint", str(tmp_path / "m"), "--output", str(tmp_path / "maps")]
    assert main([*maps, "--input", str(tmp_path / "a.png"), "--layer", "all"]) == 2
    assert "layer: expected 0 to 3, got all" in capsys.readouterr().err


def test_weights_find_the_layer_that_knows() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, size=120)
    features = rng.standard_normal((120, 4, 6)).astype(np.float32)
    features[:, 2, :3] += 3 * np.eye(3, dtype=np.float32)[labels]
    features[:, 1] *= 100.0
    for truth in (labels, np.eye(3, dtype=bool)[labels]):
        weights, factors = learn_layer_weights(features, truth)
        np.testing.assert_allclose(1 / factors, (features - features.mean(0)).std((0, 2)), rtol=1e-4)
        assert weights.argmax() == 2 and weights[2] > 0.6 and weights.sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("pool", ["mean", "mean-std", "class"])
def test_probe_of_several_layers(tmp_path: Path, pool: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "m", "vision-base")
    images = write_class_folders(tmp_path / "images")
    result = probe(
        str(tmp_path / "m"), str(images), str(images), layer="0,2", baselines=["random_init", "pixels"], draws=1,
        labels_per_class=2, pool=pool, device="cpu", output=str(tmp_path / "out.json"),
    )  # fmt: skip
    assert result["layers"] == [0, 2] and set(result["layer_weights"]) == {"pretrained", "random_init"}
    assert sum(result["layer_weights"]["pretrained"]) == pytest.approx(1.0, abs=1e-5)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert "weights of the layers of pretrained: 0: " in capsys.readouterr().out
