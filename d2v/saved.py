"""Models of checkpoints, pre-trained or fine-tuned, ready to be used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from d2v.config import Config
from d2v.config.fields import require
from d2v.config.finetune import FineTuneConfig, read_config
from d2v.folder import CONFIG, MODEL, build_filled, find_model, load_tensors
from d2v.model.data2vec import Data2Vec, build_model, strip_pretraining
from d2v.model.finetuned import FineTuned, build_finetuned
from d2v.model.stems.positions import resize_positions
from d2v.runtime import choose_device


def load_model(
    checkpoint: str, device: str = "auto", image_size: int | None = None, frames: int | None = None
) -> tuple[Data2Vec, Config, torch.device]:
    """The model of a checkpoint, in evaluation mode, with its configuration and device; of a fine-tuned one the
    encoder. image_size, frames: as of `load_any`."""
    model, config, place = load_any(checkpoint, device, image_size=image_size, frames=frames)
    return (model.encoder if isinstance(model, FineTuned) else model), config, place


def load_any(
    checkpoint: str, device: str = "auto", *, takes_data: bool = True, image_size: int | None = None,
    frames: int | None = None,
) -> tuple[Data2Vec | FineTuned, Config, torch.device]:  # fmt: skip
    """The model of a checkpoint, pre-trained or fine-tuned; else as `load_model`.

    It computes in float32 whatever it was trained in, as run.precision of the configuration says then. Of the folder of
    a fine-tuning run the model that it chose on held-out data. takes_data: False where no text will be
    read, for which a tokenizer has to be found. image_size, frames: others of `stem` than it was trained with.
    """
    folder = find_model(checkpoint)
    config = read_config(folder / CONFIG)
    config = replace(config, run=replace(config.run, device=device))  # type: ignore[arg-type]
    place = choose_device(device)
    tensors = load_tensors(folder, MODEL)
    for word, name, value in (("vision", "image_size", image_size), ("spectrograms", "frames", frames)):
        if value is None:
            continue
        require(word in config.traits, "stem.modality", f"{word} with stem.{name}", config)
        resized = config.change(stem={name: value})
        tensors, note = resize_positions(tensors, config, resized)
        config = resized
        if note is not None:
            print(f"note: {checkpoint}: {note}", file=sys.stderr)
    build: Callable[[], Data2Vec | FineTuned] = partial(_build_pretrained, config, tensors)
    if isinstance(config, FineTuneConfig):
        build = partial(build_finetuned, config, tensors)
    model: Data2Vec | FineTuned = build_filled(build, config, tensors, f"checkpoint {str(folder)!r}")
    # No sample is too short to be evaluated, as far as the stem can take it.
    tokenizer = find_tokenizer(folder, config) if takes_data else config.data.tokenizer
    data = replace(config.data, min_seconds=0.0, tokenizer=tokenizer)
    (model.encoder if isinstance(model, FineTuned) else model).drop_training_settings()
    return model.to(place).eval(), replace(config, data=data, run=replace(config.run, precision="fp32")), place


def _build_pretrained(config: Config, names: Collection[str]) -> Data2Vec:
    """A model without its weights; without decoder or head where an imported file had none."""
    model = build_model(config)
    if not any(name.startswith(("decoder.", "head.")) for name in names):
        strip_pretraining(model, teacher=False)
    return model


def find_tokenizer(folder: Path, config: Config) -> str | None:
    """The tokenizer folder that goes with a checkpoint: beside it, or of its run, which keeps a copy of a given one."""
    if "ids" not in config.traits:
        return None
    places = [folder / "tokenizer", folder.parent.parent / "tokenizer"]
    found = next((p for p in places if (p / "tokenizer.json").is_file()), None)
    if found is None:
        listed = ", ".join(repr(str(p)) for p in places)
        raise ValueError(
            f"checkpoint: expected its tokenizer in one of {listed}, found none; copy its folder there (d2v finetune "
            "takes it from --data.tokenizer, too)"
        )
    return str(found)
