"""Quick-start images: small grey crops of photographs that ship inside the scikit-image package.

The task is to say from which photograph a crop comes. No pixel is shared between train, validation and test: they are
cut from the left 60 %, the next 10 % and the right 30 % of each photograph. Every crop is turned by a random multiple
of 90 degrees and mirrored at random, so that orientation carries no class.

Photographs and the licence notes in the docstrings of scikit-image 0.26 (`skimage.data`): brick and gravel, CC0
(CC0Textures); grass, CC0 (DeviantArt, linolafett); hubble_deep_field, public domain (NASA); immunohistochemistry, no
known copyright restrictions (CMMI); coins, no known copyright restrictions (Brooklyn Museum); text, public domain
(Wikipedia); retina, CC0 (Mikael Haeggstroem). Left out: moon and page, whose docstrings name neither source nor
licence.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from d2v.data.sources import check_output

PHOTOGRAPHS = (
    "brick", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "retina", "text",
)  # fmt: skip
REGIONS = {"train": (0.0, 0.6), "pretrain": (0.0, 0.6), "valid": (0.6, 0.7), "test": (0.7, 1.0)}
"""Share of the width that each split may use."""


def load_photographs() -> dict[str, np.ndarray]:
    """Name -> grey uint8 (H,W). `ValueError` where scikit-image is not installed."""
    try:
        from skimage import data
    except ImportError:
        raise ValueError("data textures: expected the scikit-image package, which is not installed") from None
    images = {}
    for name in PHOTOGRAPHS:
        image = Image.fromarray(getattr(data, name)())
        images[name] = np.asarray(image.convert("L"))
    return images


def cut_crops(image: np.ndarray, split: str, size: int, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random crops (size,size) of one photograph (H,W) from the region of `split`, turned and mirrored."""
    height, width = image.shape
    low, high = (round(width * edge) for edge in REGIONS[split])
    largest = min(height, high - low)
    if not 1 <= size <= largest:
        raise ValueError(f"size: expected 1 to {largest} pixels for split {split}, got {size}")
    crops = []
    for _ in range(count):
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(low, high - size + 1))
        crop = np.rot90(image[top : top + size, left : left + size], int(rng.integers(4)))
        crops.append(np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop))
    return crops


def write_textures(output: Path, *, seed: int, size: int, counts: Mapping[str, int]) -> str:
    """Writes `output/SPLIT/CLASS/NNNN.png`; appears whole or not at all. Returns a summary.

    Raises `ValueError` where `output` is not empty or `size` does not fit a photograph.
    """
    output = output.resolve()
    check_output(output)
    photographs = load_photographs()
    temporary = output.with_name(f".partial-{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for number, split in enumerate(REGIONS):
            for index, (name, image) in enumerate(photographs.items()):
                rng = np.random.default_rng([seed, number, index])
                folder = temporary / split / name
                crops = cut_crops(image, split, size, counts.get(split, 0), rng)
                if crops:
                    folder.mkdir(parents=True)
                for i, crop in enumerate(crops):
                    Image.fromarray(crop).save(folder / f"{i:05d}.png")
        if output.exists():
            output.rmdir()
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    parts = ", ".join(f"{split} {count}" for split, count in counts.items())
    return f"{output}: {len(photographs)} photographs; crops of {size} x {size} per photograph: {parts}"
