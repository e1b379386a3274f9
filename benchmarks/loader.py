"""Throughput of the loader: `python -m benchmarks.loader [--workers 0 1 2] [--seconds 5] [--only images speech text]`.

Data is generated: JPEG photographs (320 x 240, random blobs and noise), FLAC recordings (4 to 16 s), documents of
random words. Each is read as for the base recipe, decoded, cropped, masked and batched; nothing is computed with it.
Reported are samples and decoded megabytes a second, and processor time of the main process per sample. With workers
they are slowed by whatever else the machine does: the load average is part of the record.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from d2v import recipes
from d2v.config import Config
from d2v.data import make_modality
from d2v.data.loader import train_updates
from d2v.data.pack import PackSettings, pack

from .harness.record import RESULTS, machine_basics, parse, read_rows, write_rows
from .training.cases import change

IMAGES, RECORDINGS, DOCUMENTS = 400, 64, 4000
VOCABULARY = 1000
"""Tokens of the generated text's tokenizer: training a large one takes longer than the measurement."""


def write_images(root: Path, size: tuple[int, int] = (320, 240), count: int = IMAGES) -> str:
    """JPEG files of (width, height) pixels."""
    from PIL import Image

    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize(size, 3)
        noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (*size[::-1], 3), dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / f"{i:04d}.jpg", quality=90)
    return str(root)


def write_recordings(root: Path) -> str:
    """FLAC files of 4 to 16 s at 16 kHz."""
    import soundfile

    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    for i in range(RECORDINGS):
        time_axis = np.arange(int(rng.integers(4 * 16_000, 16 * 16_000))) / 16_000
        tones = sum(np.sin(2 * np.pi * rng.uniform(100, 4000) * time_axis) for _ in range(6))
        soundfile.write(root / f"{i:03d}.flac", 0.05 * tones + 0.01 * rng.standard_normal(len(time_axis)), 16_000)
    return str(root)


def write_documents(root: Path) -> str:
    """Text of random words, a document per paragraph."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnoprstuvw"), rng.integers(2, 9))) for _ in range(3000)]
    root.mkdir(parents=True)
    text = "\n\n".join(" ".join(rng.choice(words, rng.integers(40, 400))) for _ in range(DOCUMENTS))
    (root / "text.txt").write_text(text + "\n", encoding="utf-8")
    return str(root)


def make_shards(path: str, kind: Any) -> str:
    """The same samples in .tar shards."""
    output = Path(path).with_name(f"{Path(path).name}-shards")
    pack(path, output, PackSettings(kind=kind, shard_bytes=2_000_000, unchecked=True))
    return str(output / "*.tar")


def settings(recipe: str, path: str, run: Path, workers: int, **data: Any) -> Config:
    """A base recipe on generated data, for as many updates as anyone asks for."""
    base = recipes.get(recipe)
    stem = {"vocabulary": VOCABULARY} if base.stem.modality == "text" else {}
    data |= {"path": path, "workers": workers, "min_seconds": 0.5}
    return change(base, stem=stem, data=data, run={"dir": str(run), "steps": 1_000_000})


def measure(config: Config, seconds: float) -> dict[str, float]:
    """Rates over about so many seconds, after the workers have begun to deliver."""
    source = make_modality(config).open(config.data.path)
    source.prepare(Path(config.run.dir), fresh=True)
    updates = train_updates(config, source, 0, torch.device("cpu"))
    for _ in range(2):
        next(updates)
    samples, size = 0, 0
    start, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        for batch in next(updates):
            samples += len(batch)
            size += batch.inputs.nbytes
    elapsed, used = time.perf_counter() - start, time.process_time() - used
    updates.close()
    return {
        "samples_per_second": samples / elapsed,
        "megabytes_per_second": size / elapsed / 1e6,
        "main_ms_per_sample": 1e3 * used / max(samples, 1),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints a table and appends a record."""
    writers: dict[str, tuple[str, Callable[[Path], str]]] = {
        "images": ("vision-base", write_images),
        "speech": ("speech-base", write_recordings),
        "text": ("text-base", write_documents),
    }
    options = parse(
        "loader", __doc__, arguments,
        workers=([0, 1, 2], "worker processes"),
        seconds=(5.0, "seconds of a row"),
        only=(list(writers), "kinds of data"),
        output=(RESULTS / "loader.jsonl", "JSON lines to append to"),
    )  # fmt: skip
    unknown = [kind for kind in options.only if kind not in writers]
    if unknown:
        raise SystemExit(f"--only: expected some of {', '.join(writers)}; got {unknown[0]!r}")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print(f"{'data':24}{'workers':>8}{'samples/s':>12}{'MB/s':>10}{'main ms/sample':>16}")
    with TemporaryDirectory(prefix="d2v-loader-") as folder:
        for kind in options.only:
            recipe, write = writers[kind]
            path = write(Path(folder) / kind)
            places: dict[str, tuple[str, dict[str, Any]]] = {f"{kind}, folder": (path, {})}
            if kind != "text":
                shards = make_shards(path, kind)
                places[f"{kind}, shards"] = (shards, {})
                places[f"{kind}, shards in turn"] = (shards, {"shuffle": "shards", "shuffle_buffer": 100})
            for (name, (place, data)), workers in itertools.product(places.items(), options.workers):
                config = settings(recipe, place, Path(folder) / f"run-{kind}", workers, global_batch=32, **data)
                row = {"data": name, "recipe": recipe, "workers": workers, **measure(config, options.seconds)}
                rows.append(row)
                rates = [row[n] for n in ("samples_per_second", "megabytes_per_second", "main_ms_per_sample")]
                print(f"{name:24}{workers:8}{rates[0]:12.1f}{rates[1]:10.1f}{rates[2]:16.3f}", flush=True)
    record = {"machine": machine_basics(), "load": os.getloadavg(), "rows": rows}
    write_rows(options.output, [*read_rows(options.output), record])


if __name__ == "__main__":
    main()
