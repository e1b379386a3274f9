"""A pre-trained encoder with a head for a task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2v.config import Config
from d2v.config.finetune import FineTune, FineTuneConfig, read_config
from d2v.folder import CONFIG, MODEL, build_filled, find_model, load_tensors
from d2v.model.data2vec import Data2Vec, build_encoder
from d2v.model.layers import valid_positions
from d2v.model.saving import write_folder
from d2v.model.task_heads import Head, make_head
from d2v.runtime import choose_device


class FineTuned(nn.Module):
    """An encoder, a head, and what the head's outputs are called.

    Attributes: encoder (`Data2Vec`; its decoder, regression head and teacher may be gone, see `strip_pretraining`),
    head, labels; origin: what a loader of foreign files remembers, to write the same again.
    """

    origin: object = None
    frozen = False
    """Train the head alone."""

    def __init__(self, encoder: Data2Vec, head: Head, labels: Sequence[str]) -> None:
        """Takes the encoder over: the final norm of a pre-norm encoder goes where the head has its own behind the pool,
        as in the published image classifiers.

        Args:
            encoder: its student is what is used.
            head: see `make_head`.
            labels: names of the outputs in their order; regression has one.

        Raises:
            ValueError: another number of labels than of outputs.
        """
        super().__init__()
        if len(labels) != head.settings.outputs:
            raise ValueError(f"labels: expected {head.settings.outputs}, one for each output, got {len(labels)}")
        self.encoder, self.head, self.labels = encoder, head, tuple(labels)
        self.compiled: Callable[..., Tensor] | None = None
        if head.settings.kind == "pooled" and head.settings.norm_eps is not None:
            encoder.blocks.norm = None

    @property
    def config(self) -> Config:
        """The encoder's configuration."""
        return self.encoder.config

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        channels: Tensor | None = None,
        noise_keys: Tensor | None = None,
    ) -> Tensor:
        """Logits (B,K), or (B,T,K) of a head that predicts for every token; differentiable.

        Args:
            inputs, lengths: as `Data2Vec` takes them.
            mask: bool (B,T); such tokens are hidden from the encoder. 1.0: by the mask token; 2.0: by noise.
            channels: bool (B,C); such channels of the features are set to 0.
            noise_keys: int64 (B,), keys of that noise; None: drawn. 2.0 only.

        Raises:
            ValueError, TypeError: inputs or lengths that do not fit.
        """
        stem = self.encoder.stem
        (tokens, valid), inputs = stem.measure(inputs, lengths), stem.mark(inputs, lengths)
        if mask is not None and noise_keys is None and self.encoder.mask_token is None:
            # In front of the graph: a compiler draws other numbers.
            noise_keys = torch.randint(-(2**63), 2**63 - 1, (len(inputs),), device=inputs.device)
        if self.compiled is None or not self.training:
            return self._compute(inputs, tokens, valid, mask, channels, noise_keys)
        return self.compiled(self, inputs, tokens, valid, mask, channels, noise_keys)

    def _compute(
        self, inputs: Tensor, tokens: int, lengths: Tensor | None, mask: Tensor | None, channels: Tensor | None,
        noise_keys: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """What `forward` does once everything that the host decides is decided; lengths: of tokens."""
        stem = self.encoder.stem
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = self._hide(stem(inputs, lengths), mask, channels, noise_keys)
            x = self.encoder.run_encoder(x, lengths)
        return self.head(x, x.shape[1] - tokens, valid_positions(lengths, tokens, x.device))

    def _hide(self, x: Tensor, mask: Tensor | None, channels: Tensor | None, keys: Tensor | None) -> Tensor:
        """Features (B,T,C) with masked tokens and channels."""
        if self.encoder.mask_token is not None:
            x = nn.functional.dropout(x, self.encoder.config.stem.dropout, self.training)
        if mask is not None:
            x = self.encoder.hide_tokens(x, mask, keys)
        return x if channels is None else x.masked_fill(channels[:, None], 0.0)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """From here on a training forward is one graph, as that of `Data2Vec.compile`."""
        self.compiled = torch.compile(FineTuned._compute, *args, fullgraph=True, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compiled": None}

    @property
    def saved_config(self) -> FineTuneConfig:
        """The encoder's configuration with the head's section: what a saved folder holds."""
        config = self.encoder.config
        if isinstance(config, FineTuneConfig):
            return config
        return FineTuneConfig.of(config, finetune=FineTune(head=self.head.settings, labels=self.labels))

    def save(self, folder: str | Path) -> Path:
        """Writes config.json and model.safetensors into an absent or empty folder, which `load` and `--checkpoint`
        take; returns it."""
        write_folder(self, Path(folder))
        return Path(folder)

    @staticmethod
    def load(folder: str | Path, device: str = "cpu") -> FineTuned:
        """A model that `save`, a fine-tuning run or `d2v import` wrote, in evaluation mode.

        Raises:
            ValueError: no such folder, or one of a pre-trained model.
        """
        found = find_model(str(folder))
        config = read_config(found / CONFIG)
        if not isinstance(config, FineTuneConfig):
            raise ValueError(f"checkpoint: expected a fine-tuned model, got a pre-trained one at {str(folder)!r}")
        tensors = load_tensors(found, MODEL)
        what = f"checkpoint {str(found)!r}"
        model = build_filled(lambda: build_finetuned(config, tensors), config, tensors, what)
        model.encoder.drop_training_settings()
        return model.to(choose_device(device)).eval()

    def count_tokens(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B,) int64 on the host: tokens of each sample, those that its padding yields not counted."""
        tokens, valid = self.encoder.stem.measure(inputs, lengths)
        return torch.full((len(inputs),), tokens) if valid is None else valid


def build_finetuned(config: FineTuneConfig, names: Collection[str]) -> FineTuned:
    """A fine-tuned model without its weights; only random draws of a fork are made.

    Args:
        config: of encoder, head and labels.
        names: of the tensors that will be loaded; parts of the pre-training that are not among them are left out.
    """
    encoder = build_encoder(config, [n.removeprefix("encoder.") for n in names if n.startswith("encoder.")])
    with torch.random.fork_rng(devices=[]):
        head = make_head(config.finetune.head, config.encoder.width)
    return FineTuned(encoder, head, config.finetune.labels)
