"""`d2v features`: rows and index agree with encoding by hand; bad samples are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.images import encode, make_image

import d2v
from d2v import recipes
from d2v.data import make_modality
from d2v.evaluate.features import extract
from d2v.model.saving import write_folder
from d2v.saved import load_model


@pytest.fixture
def setting(tmp_path: Path) -> tuple[str, str]:
    """A checkpoint and a folder with four images and a broken one."""
    torch.manual_seed(0)
    write_folder(d2v.Data2Vec(recipes.vision_tiny()), tmp_path / "model")
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(encode(make_image(i, (40, 36))))
    (tmp_path / "images" / "2b.png").write_bytes(b"broken")
    return str(tmp_path / "model"), str(tmp_path / "images")


def read_index(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_every_token(setting: tuple[str, str], tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out{suffix}"
    said = extract(*setting, str(output), batch=2)
    assert "256 rows of 64 of 4 images" in said and "left out 1" in said and "2b.png" in said
    rows = np.load(output) if suffix == ".npy" else load_file(output)["features"]
    assert rows.dtype == np.float32 and rows.shape == (256, 64)
    index = read_index(tmp_path / f"out{suffix}.index.tsv")
    assert [(int(a), int(b)) for _, a, b in index] == [(0, 64), (64, 64), (128, 64), (192, 64)]
    assert [Path(name).name for name, _, _ in index] == ["0.png", "1.png", "2.png", "3.png"]
    model, config, _ = load_model(setting[0], "cpu")
    modality = make_modality(config)
    source = modality.open(setting[1], option="input")
    value = modality.eval_transform(modality.load(source, 0)[0])
    expected = model.teacher.encode(modality.prepare(torch.from_numpy(np.stack([value])))).features[0]
    np.testing.assert_allclose(rows[:64], expected.numpy(), atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "model", output.name, f"{output.name}.index.tsv"]


def test_mean_of_the_student(setting: tuple[str, str], tmp_path: Path) -> None:
    extract(*setting, str(tmp_path / "a.npy"), weights="student")
    extract(*setting, str(tmp_path / "b.npy"), weights="student", pool="mean")
    tokens, means = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    np.testing.assert_allclose(means, tokens.reshape(4, 64, 64).mean(1), atol=1e-5)


def test_refused_before_anything_is_written(setting: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output: expected a name that ends in"):
        extract(*setting, str(tmp_path / "out.txt"))
    with pytest.raises(ValueError, match="pool: expected one of tokens, mean"):
        extract(*setting, str(tmp_path / "out.npy"), pool="max")
    for file in Path(setting[1]).iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(ValueError, match="input: expected images that can be decoded"):
        extract(*setting, str(tmp_path / "out.npy"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "model"]
