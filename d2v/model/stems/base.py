"""What every stem has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from d2v.model.layers import Linear

StemFlops = tuple[float, float, float]
"""FLOPs of one sample: the layer whose input needs no gradient, the other trained ones, what is not trained."""


class InputStem(nn.Module):
    """Turns inputs into tokens."""

    over_padding = False
    """Statistics of a sample count its padding, too (published)."""
    step = 1  # values of a sample from the beginning of a token to that of the next one

    def measure(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[int, Tensor | None]:
        """Checks a batch of inputs, and lengths (B,) int64 on the host, before the padding; `ValueError`, `TypeError`.

        Returns the tokens T, and of each row those before its padding, or None: all.
        """
        raise NotImplementedError

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features (B,T,C) of what `measure` took, with the token lengths that it gave. No token before the padding may
        depend on the padding."""
        raise NotImplementedError

    raw_width = 0
    """D of `raw_tokens`."""
    project: Linear | None
    """From `stem.width` to the width of the encoder, where these differ."""

    def make_projection(self, local: int | None, width: int) -> int:
        """Makes `project`; returns the channels in front of it."""
        self.project = None if local in (None, width) else Linear(local, width)
        return local or width

    def mark(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """What `forward` takes of inputs and lengths that `measure` took: inputs, with a mark at the padding where
        lengths in tokens do not say enough."""
        return inputs

    def raw_tokens(self, inputs: Tensor) -> Tensor:
        """(B,T,D): the values of inputs that each token stands for; of kinds with the word "pixels"."""
        raise NotImplementedError

    def samples_needed(self) -> int:
        """Values of the shortest sample that yields a token."""
        return 1

    def count_tokens(self, length: int) -> int:
        """Tokens of a sample of so many values; by default each is one."""
        return length

    def prepare(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """What student and teacher share, as it has no weights; `forward` takes this too."""
        return inputs

    def initialise_model(self, model: Any) -> None:
        """Initial weights of a whole `Data2Vec` that are published otherwise than those of its parts."""

    def count_flops(self, tokens: int, length: int) -> StemFlops:
        """Of the forward of one sample; by default as if every matrix were used once a token, as for patches."""
        return 2.0 * tokens * sum(p.numel() for p in self.parameters() if p.dim() > 1), 0.0, 0.0
