"""Quick-start crops: splits share no pixel, same seed same bytes, all or nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from d2v.tools.textures import PHOTOGRAPHS, REGIONS, cut_crops, load_photographs, write_textures

COUNTS = {"train": 3, "valid": 2, "test": 2}


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.png")):
        total.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return total.hexdigest()


def test_crops_stay_in_their_region() -> None:
    columns = np.tile(np.arange(200, dtype=np.uint8), (64, 1))
    for split, (low, high) in REGIONS.items():
        size = 16
        for crop in cut_crops(columns, split, size, 50, np.random.default_rng(0)):
            assert crop.shape == (size, size)
            assert low * 200 <= crop.min()
            assert crop.max() < high * 200


def test_folders_and_seeds(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_textures(tmp_path / name, seed=seed, size=32, counts=COUNTS)
    assert sorted(p.name for p in (tmp_path / "a" / "train").iterdir()) == sorted(PHOTOGRAPHS)
    assert len(list((tmp_path / "a").rglob("*.png"))) == 7 * len(PHOTOGRAPHS)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(ValueError, match="output: expected an absent or empty folder"):
        write_textures(tmp_path / "full", seed=0, size=32, counts=COUNTS)
    with pytest.raises(ValueError, match="size: expected 1 to"):
        write_textures(tmp_path / "new", seed=0, size=100, counts=COUNTS)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_photographs_without_a_clear_licence_are_left_out() -> None:
    photographs = load_photographs()
    assert set(photographs) == set(PHOTOGRAPHS)
    assert not {"moon", "page"} & set(photographs)
    assert all(image.ndim == 2 and image.dtype == np.uint8 for image in photographs.values())
