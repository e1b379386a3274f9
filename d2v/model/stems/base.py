"""What every stem has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

StemFlops = tuple[float, float, float]
"""FLOPs of one sample: the layer whose input needs no gradient, the other trained ones, what is not trained."""


class InputStem(nn.Module):
    """Turns inputs into tokens."""

    def measure(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[int, Tensor | None]:
        """Checks a batch of inputs, and lengths, int64 (B,) on the host: what is before the padding of each row.

        Returns the tokens T, and of each row those before its padding, or None: all.

        Raises:
            ValueError, TypeError: inputs or lengths that do not fit.
        """
        raise NotImplementedError

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features (B,T,C) of inputs that `measure` took, with the token lengths that it gave. No token before the
        padding may depend on the padding."""
        raise NotImplementedError

    def count_tokens(self, length: int) -> int:
        """Tokens of a sample of a length; where samples have one."""
        raise NotImplementedError

    def prepare(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """What student and teacher share, as it has no weights; `forward` takes this too. By default the inputs."""
        return inputs

    def initialise_model(self, model: Any) -> None:
        """Changes the initial weights of a whole `Data2Vec` where a family's published ones are not those of its
        parts."""

    def count_flops(self, tokens: int, length: int) -> StemFlops:
        """Of the forward of one sample of so many tokens and so long; by default as if every matrix were used once a
        token, as those of patches and linear layers are."""
        return 2.0 * tokens * sum(p.numel() for p in self.parameters() if p.dim() > 1), 0.0, 0.0
