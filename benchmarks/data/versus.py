"""The loader against others: `python -m benchmarks.data.versus [--only images speech text] [--samples 256]`.

Same files, same outputs, one process, one thread; the forms take turns. Images: JPEG of 500 x 375 pixels (random
blobs and noise), random resized crop (bicubic) to 224 and mirror, uint8 (B,3,224,224). Speech: FLAC of 4 to 16 s, a
random crop of 4 s, normalised, float32 (B,64000). Text: blocks of 512 tokens, int64 (B,512). Each form in its own
way: d2v with the masks left out; webdataset with its decoders (sound by soundfile, which d2v uses, too);
torchvision's ImageFolder with its transforms, and with v2 on tensors of its own decoder. What is not installed is
said and left out. Reported are samples for a second of processor time, by the median of the rounds, and the ratio to
the best of the others; a row of JSON is kept.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from d2v.data import make_modality
from d2v.data.dataset import Collate, TrainSamples
from d2v.data.sampler import UpdateSampler

from ..harness.record import RESULTS, machine_basics, parse, read_rows, write_rows
from ..loader import make_shards, settings, write_documents, write_images, write_recordings

BATCH, SIDE, SECONDS, TOKENS = 32, 224, 4, 512
Form = Iterator[Any]


def ours(kind: str, path: str, folder: Path, **data: Any) -> Form:
    """Batches of d2v, without masks; data: further settings."""
    recipe = {"images": "vision-base", "speech": "speech-base", "text": "text-base"}[kind]
    config = settings(
        recipe, path, folder / f"run-{kind}", 0, global_batch=BATCH, micro_batch=BATCH, max_seconds=SECONDS, **data
    )
    modality = make_modality(config)
    source = modality.open(path)
    source.prepare(Path(config.run.dir), fresh=True)
    sampler = UpdateSampler(config, source, 0, config.run.steps)
    samples, collate = TrainSamples(source, modality, 0), Collate(modality)
    if kind == "speech":  # the crop of training
        collate = lambda batch: modality.stack(batch, training=True)  # type: ignore[assignment]  # noqa: E731
        return (inputs for inputs, _ in DataLoader(samples, collate_fn=collate, batch_sampler=sampler))
    return (batch.inputs for batch in DataLoader(samples, collate_fn=collate, batch_sampler=sampler))


def endless(loader: Any) -> Form:
    """Epoch after epoch."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


def plain_transform() -> Callable[[Any], Any]:
    """torchvision's transforms of Pillow images."""
    from torchvision import transforms

    return transforms.Compose([
        transforms.RandomResizedCrop(SIDE, scale=(0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.PILToTensor(),
    ])  # fmt: skip


def folder_of(path: str, *, tensors: bool) -> Form:
    """torchvision's ImageFolder."""
    from torchvision import datasets
    from torchvision import io as decoders
    from torchvision.transforms import v2

    found: Any = datasets.ImageFolder(Path(path).parent, plain_transform(), allow_empty=True)
    if tensors:
        crop = v2.RandomResizedCrop(SIDE, scale=(0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        loaded = lambda name: decoders.decode_jpeg(decoders.read_file(name), mode=decoders.ImageReadMode.RGB)  # noqa: E731
        transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
        found = datasets.ImageFolder(Path(path).parent, transform, loader=loaded, allow_empty=True)
    return (images for images, _ in endless(DataLoader(found, batch_size=BATCH, shuffle=True, drop_last=True)))


def crop_sound(data: bytes) -> torch.Tensor:
    """A random crop, normalised."""
    import soundfile

    values, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    start = int(np.random.default_rng().integers(len(values) - SECONDS * 16_000 + 1))
    return torch.nn.functional.layer_norm(torch.from_numpy(values), (len(values),))[start : start + SECONDS * 16_000]


def webdataset_of(kind: str, shards: str) -> Form:
    """webdataset's own loader over the same shards."""
    import webdataset

    shown = sorted(str(path) for path in Path(shards).parent.glob("*.tar"))
    stream = webdataset.WebDataset(shown, shardshuffle=len(shown), empty_check=False).shuffle(200)
    if kind == "images":
        stream = stream.decode("pil").to_tuple("jpg").map_tuple(plain_transform())
    elif kind == "speech":
        stream = stream.to_tuple("flac").map_tuple(crop_sound)
    else:
        stream = stream.decode().to_tuple("npy").map_tuple(torch.from_numpy)
    return (batch for (batch,) in endless(stream.batched(BATCH, collation_fn=default_collate, partial=False)))


def pack_blocks(ours: Form, folder: Path) -> str:
    """webdataset shards of blocks of tokens."""
    import webdataset

    with webdataset.ShardWriter(str(folder / "blocks-%04d.tar"), maxcount=500, verbose=0) as writer:
        for number, row in enumerate(itertools.chain.from_iterable(itertools.islice(ours, 50))):
            writer.write({"__key__": f"{number:06d}", "npy": row.numpy()})
    return str(folder / "*.tar")


def make_forms(kind: str, folder: Path) -> dict[str, Form]:
    """What is installed."""
    write: dict[str, Callable[[Path], str]] = {
        "images": lambda root: write_images(root, (500, 375)), "speech": write_recordings, "text": write_documents
    }  # fmt: skip
    path = write[kind](folder / "data" / kind)
    forms = {"d2v, folder": ours(kind, path, folder)}
    if kind == "text":
        shards = pack_blocks(ours(kind, path, folder), folder) if _has("webdataset") else ""
    else:
        shards = make_shards(path, kind)
        forms["d2v, shards"] = ours(kind, shards, folder)
    if _has("webdataset"):
        forms["webdataset"] = webdataset_of(kind, shards)
    if kind == "images":
        forms["d2v, --data.resize torch"] = ours(kind, path, folder, resize="torch")
    if kind == "images" and _has("torchvision"):
        forms |= {f"torchvision{name}": folder_of(path, tensors=t) for name, t in (("", False), (" v2, tensors", True))}
    for missing in ("webdataset", "torchvision", "ffcv"):
        if not _has(missing):
            print(f"{missing} is not installed: left out")
    return forms


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def measure(forms: dict[str, Form], samples: int, rounds: int) -> dict[str, float]:
    """Samples a second of processor time of each form."""
    shapes = {name: tuple(next(form).shape[1:]) for name, form in forms.items()}
    if len(set(shapes.values())) != 1:
        raise SystemExit(f"expected outputs of one shape, got {shapes}")
    rates: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start, count = time.process_time(), 0
            while count < samples:
                count += len(next(form))
            rates[name].append(count / (time.process_time() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measures every kind; a line a form."""
    kinds = ["images", "speech", "text"]
    options = parse(
        "data.versus", __doc__, arguments,
        only=(kinds, "kinds of data"),
        samples=(256, "samples of a form in a round"),
        rounds=(7, "rounds"),
        output=(RESULTS / "loader-versus.jsonl", "JSON lines to append to"),
    )  # fmt: skip
    torch.set_num_threads(1)
    for kind in options.only:
        with TemporaryDirectory(prefix="d2v-versus-") as folder:
            rates = measure(make_forms(kind, Path(folder)), options.samples, options.rounds)
        best = max((rate for name, rate in rates.items() if not name.startswith("d2v")), default=float("nan"))
        for name, rate in rates.items():
            print(f"{kind:8}{name:26}{rate:10.1f} samples a CPU second{rate / best:8.2f} of the best other", flush=True)
        row = {"kind": kind, "rates": rates, "machine": machine_basics()}
        write_rows(options.output, [*read_rows(options.output), row])


if __name__ == "__main__":
    main()
