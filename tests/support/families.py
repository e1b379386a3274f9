"""Small models of every family, and inputs for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from d2v import Config, Data2Vec, recipes
from d2v.config import Decoder, Encoder

SPEECH = {"convolutions": ((16, 10, 5), (16, 3, 2), (16, 2, 2)), "position_layers": 3, "position_width": 15}
SPEECH |= {"position_groups": 4}
_ENCODER: dict[str, Any] = {"width": 32, "heads": 4, "depth": 3, "init_std": None}
_DECODER = Decoder(layers=2, width=16, kernel=3, groups=4)


def make_config(name: str, **encoder: Any) -> Config:
    """A small version of a recipe without dropout; `encoder`: fields of its encoder."""
    config = recipes.get(name)
    silent = {"dropout": 0.0, "attention_dropout": 0.0, "prenet_dropout": 0.0, "layer_drop": 0.0, "drop_path": 0.0}
    stem: dict[str, Any] = {"dropout": 0.0}
    if "waveform" in config.traits:
        stem |= SPEECH
    elif config.stem.modality == "text":
        stem |= {"vocabulary": 50, "max_tokens": 40, "mask_token": 49 if config.version == 1 else None}
    else:
        stem |= {"image_size": 32, "patch_size": 8}
    fields = {f.name for f in dataclasses.fields(Encoder)}
    assert fields >= encoder.keys()
    decoder = dataclasses.replace(
        _DECODER, residual=config.decoder.residual, projection_layers=config.decoder.projection_layers
    )
    return dataclasses.replace(
        config,
        stem=dataclasses.replace(config.stem, **stem),
        encoder=dataclasses.replace(config.encoder, **{**_ENCODER, **silent, **encoder}),
        decoder=decoder,
        mask=dataclasses.replace(config.mask, copies=2 if config.version == 2 else 1),
        target=dataclasses.replace(config.target, top_k=2),
        run=dataclasses.replace(config.run, precision="fp32"),
    )


def make_model(config: Config, seed: int = 0) -> Data2Vec:
    """A model whose teacher differs from its student."""
    torch.manual_seed(seed)
    model = Data2Vec(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def make_batch(config: Config, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows of tokens or samples of these lengths, padded on the right, and the lengths."""
    generator = torch.Generator().manual_seed(3)
    rows = len(lengths), max(lengths)
    valid = torch.arange(rows[1]) < torch.tensor(lengths)[:, None]
    if config.stem.modality == "text":
        tokens = torch.randint(4, 49, rows, generator=generator)
        return torch.where(valid, tokens, 1), torch.tensor(lengths)
    if config.stem.modality == "signals":
        signals = torch.randn((*rows, config.stem.channels), generator=generator)
        return torch.where(valid[..., None], signals, 0.0), torch.tensor(lengths)
    return torch.where(valid, torch.randn(rows, generator=generator), 0.0), torch.tensor(lengths)
