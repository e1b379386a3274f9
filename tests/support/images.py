"""Tiny image sets made on the spot."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def make_image(seed: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_class_folders(root: Path) -> Path:
    """Three classes of four images, half of them one folder deeper."""
    for c, name in enumerate(("ant", "bee", "cat")):
        (root / name / "deep").mkdir(parents=True)
        for i in range(4):
            make_image(10 * c + i).save(root / name / ("deep" if i % 2 else "") / f"{i}.png")
    return root
