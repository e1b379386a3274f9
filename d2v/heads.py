"""What data2vec 1.0 predicts with: linear layers on the encoder's output."""

from __future__ import annotations

from torch import Tensor, nn

from .config import Head


class RegressionHead(nn.Module):
    """Linear layers with GELU between, C to C (Baevski et al. 2022; one layer for speech and images, two for text)."""

    def __init__(self, config: Head, width: int) -> None:
        """
        Args:
            config: number of layers; those before the last have width 2 C.
            width: channels C of the encoder and of the targets.
        """
        super().__init__()
        layers: list[nn.Module] = []
        inputs = width
        for _ in range(config.layers - 1):
            layers += [nn.Linear(inputs, 2 * width), nn.GELU()]
            inputs = 2 * width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, width))

    def forward(self, x: Tensor) -> Tensor:
        """Predictions (..., C) of encoded tokens (..., C)."""
        result: Tensor = self.layers(x)
        return result
