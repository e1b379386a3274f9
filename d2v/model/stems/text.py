"""Text: token ids as tokens, learned positions inside the stem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from d2v.config import Config, Stem
from d2v.model.layers import LayerNorm, Linear, check_lengths, valid_positions
from d2v.model.stems.base import InputStem, StemFlops
from d2v.model.transformer import initialise_linears

PADDING = 1
"""Id of the padding token; position ids start behind it, at 2."""
_INIT_STD = 0.02


class TextStem(InputStem):
    """Embeddings of tokens and positions, layer norm, dropout (RoBERTa's, as data2vec 1.0 and 2.0 use them)."""

    project: Linear | None

    def __init__(self, config: Stem, width: int, zero_padding: bool) -> None:
        """
        Args:
            config: vocabulary, longest sequence, and which steps there are.
            width: channels C of a token.
            zero_padding: write 0 at padded positions (1.0).
        """
        super().__init__()
        self.vocabulary, self.max_tokens, self.scale = config.vocabulary, config.max_tokens, config.embedding_scale
        self.zero_padding = zero_padding
        width = self.make_projection(config.width, width)
        self.embed_tokens = nn.Embedding(config.vocabulary, width, PADDING)
        learned = config.learned_positions
        self.embed_positions = nn.Embedding(config.max_tokens + PADDING + 1, width, PADDING) if learned else None
        self.norm = LayerNorm(width, eps=config.norm_eps) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        for embedding in (self.embed_tokens, self.embed_positions):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=_INIT_STD)
                with torch.no_grad():
                    embedding.weight[PADDING].zero_()

    def measure(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[int, Tensor | None]:
        """Checks inputs (B,T) int64; returns T, and the tokens before the padding of each row, or None: all.

        Without lengths the padding ids are counted, which reads them from their device; on the host ids are checked.

        Raises:
            ValueError, TypeError: other shapes or dtypes, ids outside the vocabulary, padding inside a row, too long.
        """
        if inputs.dtype != torch.int64:
            raise TypeError(f"inputs: expected int64 token ids, got {str(inputs.dtype).removeprefix('torch.')}")
        if inputs.dim() != 2 or inputs.shape[1] < 1:
            raise ValueError(f"inputs: expected token ids of shape (B, T), got {tuple(inputs.shape)}")
        batch, tokens = inputs.shape
        if tokens > self.max_tokens:
            raise ValueError(f"inputs: expected at most stem.max_tokens {self.max_tokens} tokens, got {tokens}")
        if lengths is None:
            lengths = (inputs != PADDING).sum(dim=1).cpu()
        lengths = check_lengths(lengths, batch, tokens)
        if inputs.device.type == "cpu":
            self._check_ids(inputs, lengths)
        return tokens, None if lengths is None or bool((lengths == tokens).all()) else lengths

    def _check_ids(self, inputs: Tensor, lengths: Tensor | None) -> None:
        if inputs.numel() and not (int(inputs.min()) >= 0 and int(inputs.max()) < self.vocabulary):
            raise ValueError(
                f"inputs: expected token ids 0 to {self.vocabulary - 1}, got {int(inputs.min())} to {int(inputs.max())}"
            )
        padding = inputs == PADDING
        valid = valid_positions(lengths, inputs.shape[1], inputs.device)
        inside = (padding if valid is None else padding & valid).any(dim=1)
        if bool(inside.any()):
            rows = inside.nonzero()[:, 0].tolist()[:8]
            raise ValueError(f"inputs: expected padding (id {PADDING}) on the right only, got it inside rows {rows}")

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features (B,T,C) of token ids (B,T), with the lengths that `measure` gave."""
        tokens = inputs.shape[1]
        valid = valid_positions(lengths, tokens, inputs.device)
        positions = torch.arange(PADDING + 1, PADDING + 1 + tokens, device=inputs.device).expand_as(inputs)
        if valid is not None:
            inputs, positions = inputs.masked_fill(~valid, PADDING), positions.masked_fill(~valid, PADDING)
        x = self.embed_tokens(inputs)
        if self.scale != 1.0:
            x = self.scale * x
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        if self.norm is not None:
            x = self.norm(x)
        x = self.dropout(x)
        if self.project is not None:
            x = self.project(x)
        if valid is not None and self.zero_padding:
            x = x * valid[..., None]
        return x

    def initialise_model(self, model: Any) -> None:
        """The projections of stem and decoder, or the head, as published."""
        initialise_linears(self.project, model.config.encoder.init_std)
        initialise_linears(model.head if model.decoder is None else model.decoder.proj, model.config.encoder.init_std)

    def count_flops(self, tokens: int, length: int) -> StemFlops:
        """Embeddings are looked up; their gradient is not a product."""
        return 0.0, 0.0 if self.project is None else 2.0 * tokens * self.project.weight.numel(), 0.0


def make_stem(config: Config) -> TextStem:
    """The stem of text."""
    return TextStem(config.stem, config.encoder.width, zero_padding=config.version == 1)
