"""Slow storage: `python -m benchmarks.data.delay [--delay 0.3] [--readers 1 4 16 64] [--workers 1 2]`.

Shards of images lie at a URL whose file system (of fsspec) waits DELAY seconds before each answer, as storage far away
does. The loader of vision-tiny reads images from it. Printed for each number of readers a worker: samples a second
after the first batches, and their share of what the delay allows, readers x workers / delay. Nearly all of the time is
waiting, so other work on the machine matters little.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from d2v.runtime import prepare_process

from ..harness.record import parse
from ..harness.report import markdown
from ..loader import make_shards, measure, settings, write_images


class Slow(LocalFileSystem):  # type: ignore[misc]
    """Files of this machine at slow://, each part of them after `delay` seconds."""

    protocol = "slow"
    delay = 0.0

    def cat_file(self, path: str, *given: Any, **more: Any) -> bytes:
        """Bytes of a file or of a part of it."""
        time.sleep(self.delay)
        return bytes(super().cat_file(path, *given, **more))


def main(arguments: list[str] | None = None) -> None:
    """Measures; prints a table."""
    options = parse(
        "data.delay", __doc__, arguments,
        delay=(0.3, "seconds before each answer"),
        readers=([1, 4, 16, 64], "reads in flight of a worker"),
        workers=([1, 2], "loader workers"),
        batch=(64, "samples of a batch"),
        seconds=(20.0, "of each measurement"),
        images=(2000, "images of 40 x 40 pixels; the reads in flight end with an epoch"),
    )  # fmt: skip
    fsspec.register_implementation("slow", Slow)
    Slow.delay = options.delay
    prepare_process(1, keep_pages=True, products="auto")  # as a run begins
    rows = []
    with TemporaryDirectory(prefix="d2v-delay-") as folder:
        shards = make_shards(write_images(Path(folder) / "images", (40, 40), options.images), "images")
        for workers in options.workers:
            for readers in options.readers:
                data = {"readers": readers, "global_batch": options.batch}
                config = settings("vision-tiny", f"slow://{shards}", Path(folder) / "run", workers, **data)
                rate = measure(config, options.seconds)["samples_per_second"]
                share = rate * options.delay / (readers * workers)
                rows.append((workers, readers, f"{rate:.1f}", f"{100 * share:.0f} %"))
    print(markdown(("workers", "readers", "samples/s", f"of readers x workers / {options.delay:g} s"), rows))


if __name__ == "__main__":
    main()
