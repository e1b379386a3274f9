"""Images: patches as tokens, fixed 2-D sin-cos positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Stem


class PatchStem(nn.Module):
    """Patch embedding: a convolution whose kernel and stride are the patch (data2vec 2.0, images)."""

    def __init__(self, config: Stem, width: int) -> None:
        """
        Args:
            config: image size, patch size, channels; the patch divides the image.
            width: channels C of a token.
        """
        super().__init__()
        if config.patch_size < 1 or config.image_size % config.patch_size:
            raise ValueError(
                f"stem.patch_size: expected a divisor of stem.image_size {config.image_size}, got {config.patch_size}"
            )
        self.image_shape = (config.channels, config.image_size, config.image_size)
        self.proj = nn.Conv2d(config.channels, width, config.patch_size, config.patch_size)
        # Xavier on the flattened (C, channels * p * p) kernel, as published; the bias keeps the module's default.
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens of images.

        Args:
            inputs: (B, channels, H, W) floating.
            lengths: None; all images have one size.

        Returns:
            (B,T,C), patches row by row; and the valid tokens a row: None, all.

        Raises:
            ValueError, TypeError: inputs of another shape or dtype, or lengths.
        """
        if lengths is not None:
            raise ValueError(f"lengths: expected None for images, got a tensor of shape {tuple(lengths.shape)}")
        if not inputs.is_floating_point():
            raise TypeError(f"inputs: expected floating images, got {str(inputs.dtype).removeprefix('torch.')}")
        if inputs.dim() != 4 or tuple(inputs.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"inputs: expected shape (B, {expected}), got {tuple(inputs.shape)}")
        # Patches do not overlap, so the convolution is one matrix product; its result has channels last, as the
        # token operators need them, without a transposed copy.
        batch, channels, height, width = inputs.shape
        p = self.proj.kernel_size[0]
        patches = inputs.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        flat = patches.reshape(batch, (height // p) * (width // p), channels * p * p)
        return F.linear(flat, self.proj.weight.flatten(1), self.proj.bias), None


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D positions (T, C) float64, T = rows * columns of the grid, row-major.

    Quarters [sin(c w), cos(c w), sin(r w), cos(r w)] with w_i = 10000^(-i / (C/4)): the first half encodes the column,
    as in the published code.

    Raises:
        ValueError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"encoder.width: expected a multiple of 4 for 2-D sin-cos positions, got {width}")
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = grid
    r = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)[:, None] * omega
    c = torch.arange(columns, dtype=torch.float64).repeat(rows)[:, None] * omega
    return torch.cat([c.sin(), c.cos(), r.sin(), r.cos()], dim=1)


class SinCosPositions(nn.Module):
    """Adds fixed 2-D sin-cos positions; no parameters."""

    table: Tensor

    def __init__(self, width: int, grid: tuple[int, int], scale: float = 1.0) -> None:
        """
        Args:
            width: channels C, a multiple of 4.
            grid: rows and columns of patches.
            scale: factor on the table; 0 adds no positions. Published: 1.
        """
        super().__init__()
        self.enabled = scale != 0.0
        table = scale * sincos_positions(width, grid) if self.enabled else torch.zeros(grid[0] * grid[1], width)
        self.register_buffer("table", table.to(torch.get_default_dtype())[None])

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (B,T,C) plus the table."""
        return x + self.table if self.enabled else x
