"""Slow storage: `python -m benchmarks.data.delay [--delay 0.3] [--readers 1 4 16 64] [--workers 1 2]`.

Shards of images lie at a URL whose file system (of fsspec) waits DELAY seconds before each answer, as storage far away
does. The loader of vision-tiny reads images from it. Printed for each number of readers a worker: samples a second
after the first batches, and their share of what the delay allows, readers x workers / delay. Nearly all of the time is
waiting, so other work on the machine matters little.
"""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from d2v import recipes
from d2v.data import make_modality
from d2v.data.loader import train_updates
from d2v.runtime import prepare_process

from ..harness.record import parse
from ..harness.report import markdown

PER_SHARD = 500


class Slow(LocalFileSystem):  # type: ignore[misc]
    """Files of this machine at slow://, each part of them after `delay` seconds."""

    protocol = "slow"
    delay = 0.0

    def cat_file(self, path: str, *given: Any, **more: Any) -> bytes:
        """Bytes of a file or of a part of it."""
        time.sleep(self.delay)
        return bytes(super().cat_file(path, *given, **more))


def make_shards(root: Path, count: int) -> None:
    """Shards of images of 40 x 40 pixels."""
    rng = np.random.default_rng(0)
    for shard in range(count):
        with tarfile.open(root / f"{shard:02d}.tar", "w") as file:
            for n in range(PER_SHARD):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "JPEG")
                member = tarfile.TarInfo(f"{n:04d}.jpg")
                member.size = buffer.tell()
                buffer.seek(0)
                file.addfile(member, buffer)


def measure(path: str, readers: int, workers: int, batch: int, seconds: float) -> float:
    """Samples a second after two batches of every worker."""
    data = dict(path=path, readers=readers, workers=workers, global_batch=batch)
    config = recipes.get("vision-tiny").change(data=data, run=dict(steps=100_000))
    source = make_modality(config).open(config.data.path)
    begin = now = 0.0
    for number, _ in enumerate(train_updates(config, source, 0, torch.device("cpu"))):
        now = time.monotonic()
        if number == 2 * workers:
            begin = now
        if begin and now - begin > seconds:
            break
    return (number - 2 * workers) * batch / (now - begin)


def main(arguments: list[str] | None = None) -> None:
    """Measures; prints a table."""
    options = parse(
        "data.delay", __doc__, arguments,
        delay=(0.3, "seconds before each answer"),
        readers=([1, 4, 16, 64], "reads in flight of a worker"),
        workers=([1, 2], "loader workers"),
        batch=(64, "samples of a batch"),
        seconds=(20.0, "of each measurement"),
        shards=(4, f"of {PER_SHARD} images"),
    )  # fmt: skip
    fsspec.register_implementation("slow", Slow)
    Slow.delay = options.delay
    prepare_process(1, keep_pages=True, products="auto")  # as a run begins
    rows = []
    with TemporaryDirectory(prefix="d2v-delay-") as folder:
        make_shards(Path(folder), options.shards)
        for workers in options.workers:
            for readers in options.readers:
                rate = measure(f"slow://{folder}/*.tar", readers, workers, options.batch, options.seconds)
                share = rate * options.delay / (readers * workers)
                rows.append((workers, readers, f"{rate:.1f}", f"{100 * share:.0f} %"))
    print(markdown(("workers", "readers", "samples/s", f"of readers x workers / {options.delay:g} s"), rows))


if __name__ == "__main__":
    main()
