"""A training update never waits for the GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors", reason="safetensors is not installed: there is no trainer")
pytest.importorskip("PIL", reason="Pillow is not installed: there are no images")

from d2v import recipes
from d2v.data.dataset import Batch
from d2v.model.masking import make_mask_sampler
from d2v.train.distributed import Ranks
from d2v.train.pretraining import Pretraining
from d2v.train.trainer import Trainer


@pytest.fixture
def refuse_waiting(gpu: torch.device) -> Iterator[Any]:
    """Called with True, every wait of the host for the device raises."""
    yield lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("recipe", ["vision-tiny", "vision1-tiny", "text-tiny", "text1-tiny", "speech-tiny"])
def test_updates_do_not_wait(recipe: str, precision: Any, gpu: torch.device, refuse_waiting: Any) -> None:
    if recipe.startswith("speech"):
        pytest.importorskip("soundfile", reason="soundfile is not installed")
    if recipe.startswith("text"):
        pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    config = recipes.get(recipe)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, global_batch=8),
        run=dataclasses.replace(config.run, precision=precision, steps=100),
    )
    no_source: Any = None
    trainer = Trainer(Pretraining(config, no_source, None, gpu), Ranks(gpu))
    shapes = {"vision": (8, 3, 32, 32), "text": (8, 40), "speech": (8, 9_000)}
    shape = shapes[config.stem.modality]
    text = config.stem.modality == "text"
    inputs = torch.randint(5, config.stem.vocabulary, shape) if text else torch.randn(shape)
    lengths = torch.full((8,), 40) if text else None
    stem: Any = trainer.model.get_submodule("stem")
    tokens, _ = stem.measure(inputs, lengths)
    copies = config.mask.copies
    masks = make_mask_sampler(config, tokens=tokens).draw(list(range(8)), 0, copies=copies)
    keys = torch.arange(8 * copies) if config.version == 2 else None
    batch = Batch(inputs, lengths, None, masks, keys, ()).pin_memory()
    for _ in range(3):  # kernels are loaded, tables built, caches filled
        trainer.run_update([batch])
    refuse_waiting(True)
    for _ in range(3):
        trainer.run_update([batch])
    refuse_waiting(False)
    assert trainer.window.means()["loss"] > 0.0
