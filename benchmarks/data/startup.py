"""Starts on many files: `python -m benchmarks.data.startup --folder DIR [--images 1200000] [--lines 10000000]`.

Makes a tree of links to a few images, .tar shards of them (what lies behind each header is a hole of the disk) and a
manifest of files that are not there, in DIR, unless they are there; then opens each in a process of its own, first
without what an earlier start has kept, then with it. Prints wall and processor seconds, and what was added to the
resident memory, at the end and at most, in MB. Keeps nothing else. The shards need 4 kB of the disk for each image.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from d2v import recipes
from d2v.data import make_modality

from ..harness.record import parse

PER_FOLDER, PER_SHARD, MEMBER_BYTES, LINKS = 1200, 1000, 110_000, 30_000


def image_bytes() -> bytes:
    """A small JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((64, 96, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_tree(root: Path, images: int) -> None:
    """Folders of links."""
    for number in range(images):
        place = root / f"n{number // PER_FOLDER:08d}"
        if number % PER_FOLDER == 0:
            place.mkdir(parents=True)
        name = place / f"{number:09d}.jpg"
        if number % LINKS == 0:
            linked = name
            name.write_bytes(image_bytes())
        else:
            os.link(linked, name)


def make_shards(root: Path, images: int) -> None:
    """Shards with holes."""
    root.mkdir(parents=True)
    data = image_bytes()
    for first in range(0, images, PER_SHARD):
        with (root / f"shard-{first // PER_SHARD:06d}.tar").open("wb") as file:
            place = 0
            for number in range(first, min(first + PER_SHARD, images)):
                member = tarfile.TarInfo(f"{number:09d}.jpg")
                member.size = MEMBER_BYTES
                file.seek(place)
                file.write(member.tobuf(tarfile.USTAR_FORMAT) + data)
                place += 512 + -(-MEMBER_BYTES // 512) * 512
            file.seek(place)
            file.write(b"\0" * 1024)


def make_list(file: Path, lines: int) -> None:
    """A manifest with random counts."""
    counts = np.random.default_rng(0).integers(16_000, 256_000, lines).tolist()
    with file.open("w") as out:
        out.write(f"{file.parent}/audio\n")
        out.writelines(f"{i // 10**6:02d}/{i // 1000:06d}/utterance-{i:010d}.flac\t{n}\n" for i, n in enumerate(counts))


def resident() -> float:
    """MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def open_once(recipe: str, path: str, cache: str) -> None:
    """Prints what opening takes, as JSON."""
    config = recipes.get(recipe).change(data=dict(path=path, cache=cache))
    modality, before = make_modality(config), resident()
    wall, used = time.perf_counter(), time.process_time()
    source = modality.open(path)
    wall, used = time.perf_counter() - wall, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps([len(source), wall, used, resident() - before, peak - before]))


def main(arguments: list[str] | None = None) -> None:
    """Makes the data and measures; two lines each."""
    options = parse(
        "data.startup", __doc__, arguments,
        folder=(Path("many-files"), "where the data is made"),
        images=(1_200_000, "images of the tree, and of the shards"),
        lines=(10_000_000, "lines of the manifest"),
        once=([""], ""),
    )  # fmt: skip
    if options.once != [""]:
        open_once(*options.once)
        return
    root = options.folder.absolute()
    made = {
        "vision-base": [(root / "tree", make_tree, options.images), (root / "shards", make_shards, options.images)],
        "speech-base": [(root / "list.tsv", make_list, options.lines)],
    }
    for recipe, data in made.items():
        for place, make, count in data:
            if not place.exists():
                root.mkdir(parents=True, exist_ok=True)
                make(place, count)
            path = f"{place}/*.tar" if make is make_shards else str(place)
            cache = root / f"cache-{time.time_ns()}"
            for start in ("first", "again"):
                command = [sys.executable, "-m", "benchmarks.data.startup", "--once", recipe, path, str(cache)]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                samples, wall, used, after, peak = json.loads(run.stdout.splitlines()[-1])
                print(
                    f"{place.name:10}{start:7}{samples:>12,} samples, {wall:.1f} s, {used:.1f} CPU s, "
                    f"{after:.0f} MB, at most {peak:.0f} MB", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
