"""The tiny recipes as options of `d2v pretrain`, and small generated data for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from support.images import encode, make_image, write_class_folders, write_tar
from support.sounds import write_sounds

MODALITIES = ("vision", "speech", "text")

NO_DROPOUT = (
    "--stem.dropout", "0", "--encoder.dropout", "0", "--encoder.attention-dropout", "0",
    "--encoder.activation-dropout", "0", "--encoder.prenet-dropout", "0", "--encoder.layer-drop", "0",
    "--encoder.drop-path", "0", "--decoder.input-dropout", "0",
)  # fmt: skip
"""No random number depends on how the batch is split over ranks."""

RANDOM = ("--encoder.dropout", "0.1", "--encoder.layer-drop", "0.1")
"""The state of the generators matters for what a resumed run computes."""

SMALL = {
    "vision": ("--encoder.width", "32", "--encoder.depth", "2", "--target.top-k", "2", "--decoder.width", "32"),
    "speech": ("--encoder.width", "32", "--encoder.depth", "2", "--target.top-k", "2", "--decoder.width", "32"),
    "text": (
        "--encoder.width", "32", "--encoder.depth", "2", "--target.top-k", "2", "--decoder.width", "32",
        "--stem.vocabulary", "512",
    ),
}  # fmt: skip
"""Smaller still than the tiny recipes: for experiments in which the model does not matter."""


def make_data(modality: str, root: Path) -> Path:
    """Generates the training data of a modality under `root`, once; returns its path."""
    path = root / {"vision": "images", "speech": "sounds", "text": "topics.txt"}[modality]
    if path.exists():
        return path
    root.mkdir(parents=True, exist_ok=True)
    if modality == "vision":
        return write_class_folders(path)
    if modality == "speech":
        return write_sounds(path, 24)
    path.write_text("\n\n".join(" ".join(text.split()) for text in topics.values())[:60_000] + "\n", encoding="utf-8")
    return path


def make_shards(root: Path, shards: int = 4, samples: int = 8) -> list[Path]:
    """webdataset shards of images under `root`."""
    root.mkdir(parents=True, exist_ok=True)
    return [
        write_tar(
            root / f"part-{s}.tar", {f"{s:02d}{i:02d}.png": encode(make_image(100 * s + i)) for i in range(samples)}
        )
        for s in range(shards)
    ]


def options(
    modality: str, data: Path | str, run: Path, steps: int, *more: str, batch: int = 8, every: int = 10,
    small: bool = False, extra: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Recipe and options of a run of `steps` updates that logs every one of them; `more` and `extra` come last."""
    return [
        f"{modality}-tiny", "--data.path", str(data), "--run.dir", str(run), "--run.steps", str(steps),
        "--run.log-every", "1", "--run.checkpoint-every", str(every), "--run.threads", "1", "--run.device", "cpu",
        "--data.global-batch", str(batch), "--data.workers", "0", "--optim.warmup-steps", "10",
        *(SMALL[modality] if small else ()), *more, *extra,
    ]  # fmt: skip
