"""Memory of the loader over epochs: `python -m benchmarks.data.memory [--epochs 5] [--workers 2] [--samples 20000]`.

A folder of small images (links to a few files, so that names are many and bytes few) is read epoch after epoch, as a
run of vision-tiny does. After each epoch the proportional set size of the main process and its workers is taken:
pages that they share count once, and pages that a worker has copied by writing to them, for example by counting
references to objects of Python, count as its own. Prints it and its ratio to that after the first epoch; 1.01 is the
goal.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from d2v import recipes
from d2v.data import make_modality
from d2v.data.loader import train_updates
from d2v.runtime import prepare_process

from ..harness.record import parse

FILES = 20
"""Of which the images are links."""


def make_folder(root: Path, samples: int) -> None:
    """Images of 40 x 40 pixels."""
    rng = np.random.default_rng(0)
    for number in range(samples):
        place = root / f"{number // 1000:04d}"
        place.mkdir(exist_ok=True)
        if number < FILES:
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(place / f"{number:07d}.png")
        else:
            os.link(root / "0000" / f"{number % FILES:07d}.png", place / f"{number:07d}.png")


def resident_bytes() -> int:
    """Proportional set size of this process and its children."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    texts = (Path(f"/proc/{process}/smaps_rollup").read_text() for process in (own, *children))
    return 1024 * sum(int(found[1]) for text in texts if (found := re.search(r"^Pss:\s+(\d+)", text, re.M)))


def measure(folder: Path, epochs: int, workers: int) -> list[int]:
    """Bytes after each epoch."""
    config = recipes.get("vision-tiny").change(data=dict(path=str(folder), workers=workers, global_batch=64))
    source = make_modality(config).open(config.data.path)
    updates = len(source) // 64
    config = config.change(run=dict(steps=updates * epochs))
    sizes = []
    for number, _ in enumerate(train_updates(config, source, 0, torch.device("cpu")), 1):
        if number % updates == 0:
            sizes.append(resident_bytes() if number < updates * epochs else sizes[-1])
    return sizes


def main(arguments: list[str] | None = None) -> None:
    """Measures; a line an epoch."""
    options = parse(
        "data.memory", __doc__, arguments,
        epochs=(5, "epochs"),
        workers=(2, "loader workers"),
        samples=(20_000, "images"),
    )  # fmt: skip
    prepare_process(1, keep_pages=True, products="auto")  # as a run begins
    with TemporaryDirectory(prefix="d2v-memory-") as folder:
        make_folder(Path(folder), options.samples)
        # The last epoch is measured before the workers leave.
        sizes = measure(Path(folder), options.epochs + 1, options.workers)[: options.epochs]
    for number, size in enumerate(sizes, 1):
        print(f"epoch {number}: {size / 1e6:.1f} MB, {size / sizes[0]:.4f} of the first")


if __name__ == "__main__":
    main()
