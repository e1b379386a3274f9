"""Models at another image size than they were trained at: positions are computed anew or interpolated."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.families import make_config, make_model
from support.images import write_class_folders

from d2v import Config
from d2v.cli import main
from d2v.model.data2vec import Data2Vec
from d2v.model.saving import write_folder
from d2v.model.stems.positions import resize_positions, resize_relative, sincos_positions
from d2v.saved import load_model

FAMILIES = ["vision-base", "vision1-base"]


def at(config: Config, size: int) -> Config:
    return config.change(stem={"image_size": size})


def save(name: str, folder: Path, **encoder: Any) -> Data2Vec:
    model = make_model(make_config(name, **encoder)).eval()
    write_folder(model, folder)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_sizes_are_untouched(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path / "m")
    tensors = model.state_dict()
    same, note = resize_positions(tensors, model.config, model.config)
    assert same is tensors and note is None
    again, _, _ = load_model(str(tmp_path / "m"), "cpu", 32)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, tensors[key])


@pytest.mark.parametrize("size", [16, 48, 64])
@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_another_size(name: str, size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(name, tmp_path / "m")
    other, config, _ = load_model(str(tmp_path / "m"), "cpu", size)
    how = "computed" if name == "vision-base" else "interpolated"
    assert (
        f"stem.image_size 32 to {size}: positions {how}, 4 x 4 to {size // 8} x {size // 8}" in capsys.readouterr().err
    )
    assert config.stem.image_size == size
    for part in (other, other.teacher):
        assert part.encode(torch.randn(2, 3, size, size)).features.shape == (2, (size // 8) ** 2, 32)
    # Patches of one colour each, all sides longer by a factor: the mean features go along.
    torch.manual_seed(0)
    images = torch.randn(6, 3, 1, 1).expand(-1, -1, 32, 32).contiguous()
    larger = torch.nn.functional.interpolate(images, size=(size, size))
    few, many = (m.features(x).mean(dim=1) for m, x in ((model, images), (other, larger)))
    correlation = np.corrcoef(few.flatten().numpy(), many.flatten().numpy())[0, 1]
    assert correlation > 0.9


def test_fixed_positions_are_those_of_the_new_grid(tmp_path: Path) -> None:
    save("vision-base", tmp_path / "m")
    other, _, _ = load_model(str(tmp_path / "m"), "cpu", 48)
    assert torch.equal(other.state_dict()["positions.table"][0], sincos_positions(32, (6, 6)).float())


def test_relative_positions_are_splines_over_growing_offsets() -> None:
    """A table that is linear in where its offsets are placed stays linear in the new offsets; the places are found here
    by bisection."""
    old, new = 4, 9
    low, high = 1.0, 4.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if 1 + middle + middle**2 > new - 1 else (middle, high)
    outwards = np.cumsum([1.0, low, low**2])
    places = np.concatenate([-outwards[::-1], [0.0], outwards])
    assert outwards[-1] == pytest.approx(new - 1) and all(a < b for a, b in pairwise(places))
    slopes = np.array([[2.0, -1.0], [0.5, 3.0]])  # (heads, axes)
    table = np.stack([s[0] * places[:, None] + s[1] * places for s in slopes], axis=-1).reshape(-1, 2)
    extra = torch.tensor([[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]])
    found = resize_relative(torch.cat([torch.from_numpy(table).float(), extra]), (old, old), (new, new))
    offsets = np.arange(1 - new, new)
    expected = np.stack([s[0] * offsets[:, None] + s[1] * offsets for s in slopes], axis=-1).reshape(-1, 2)
    torch.testing.assert_close(found[:-3], torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[-3:], extra)


def test_smaller_grids_keep_the_near_offsets() -> None:
    table = torch.randn(7 * 7 + 3, 2)
    found = resize_relative(table, (4, 4), (2, 2))
    torch.testing.assert_close(found[:-3].view(3, 3, 2), table[:-3].view(7, 7, 2)[2:5, 2:5])
    for old, new in ((2, 5), (3, 1)):
        one = resize_relative(torch.full(((2 * old - 1) ** 2 + 3, 2), 0.5), (old, old), (new, new))
        torch.testing.assert_close(one, torch.full(((2 * new - 1) ** 2 + 3, 2), 0.5))


@pytest.mark.parametrize("name", FAMILIES)
def test_commands_take_another_size(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(name, tmp_path / "m")
    images = str(write_class_folders(tmp_path / "images"))
    size, model = ["--stem.image-size", "48"], ["--checkpoint", str(tmp_path / "m")]
    features = ["--input", images, "--output", str(tmp_path / "f.npy"), "--device", "cpu"]
    assert main(["features", *model, *features, *size]) == 0
    assert np.load(tmp_path / "f.npy").shape[0] % 36 == 0
    assert "4 x 4 to 6 x 6" in capsys.readouterr().err
    begun = ["--model.init", str(tmp_path / "m"), "--data.path", images, "--run.device", "cpu", "--data.workers", "0"]
    begun += ["--run.steps", "1", "--data.global-batch", "2", "--run.precision", "fp32"]
    assert main(["pretrain", name, *begun, *size, "--run.dir", str(tmp_path / "run")]) == 0
    assert "4 x 4 to 6 x 6" in capsys.readouterr().err
    assert load_model(str(tmp_path / "run"), "cpu")[1].stem.image_size == 48
    tuned = ["--train", images, "--task.valid-share", "0.3", "--run.steps", "1", "--data.global-batch", "2"]
    tuned += ["--run.device", "cpu", "--data.workers", "0", "--run.dir", str(tmp_path / "tuned")]
    assert main(["finetune", "vision-classify", *model, *tuned, *size]) == 0
    assert "4 x 4 to 6 x 6" in capsys.readouterr().err
    assert load_model(str(tmp_path / "tuned"), "cpu")[1].stem.image_size == 48
    assert main(["features", "--checkpoint", str(tmp_path / "tuned"), *features, "--stem.image-size", "32"]) == 0
    assert "6 x 6 to 4 x 4" in capsys.readouterr().err
    assert main(["features", *model, *features, "--stem.image-size", "50"]) == 2
    assert "stem.patch_size: expected a divisor of stem.image_size 50" in capsys.readouterr().err


def test_other_kinds_have_no_image_size(tmp_path: Path) -> None:
    write_folder(make_model(make_config("speech-base")), tmp_path / "m")
    with pytest.raises(ValueError, match=r"stem\.modality: expected vision with stem\.image_size, got speech"):
        load_model(str(tmp_path / "m"), "cpu", 48)
