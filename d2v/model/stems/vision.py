"""Images: patches as tokens; fixed 2-D sin-cos positions (2.0) or a learned relative bias of attention (1.0)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v.config import Encoder, Stem
from d2v.model.stems.positions import Positions
from d2v.model.transformer import Surroundings


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

    def measure(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[int, Tensor | None]:
        """Tokens T of such inputs, and the valid tokens a row: None, all.

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
        return (inputs.shape[2] // self.proj.kernel_size[0]) * (inputs.shape[3] // self.proj.kernel_size[1]), None

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Tokens (B,T,C), patches row by row, of images (B, channels, H, W) that `measure` took; lengths: None."""
        # Patches do not overlap, so the convolution is one matrix product; its result has channels last, as the
        # token operators need them, without a transposed copy.
        batch, channels, height, width = inputs.shape
        p = self.proj.kernel_size[0]
        patches = inputs.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        flat = patches.reshape(batch, (height // p) * (width // p), channels * p * p)
        return F.linear(flat, self.proj.weight.flatten(1), self.proj.bias)


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


class SinCosPositions(Positions):
    """Adds fixed 2-D sin-cos positions; no parameters."""

    table: Tensor

    def __init__(self, config: Encoder, grid: tuple[int, int], scale: float = 1.0) -> None:
        """
        Args:
            config: its width C is a multiple of 4.
            grid: rows and columns of patches.
            scale: factor on the table; 0 adds no positions. Published: 1.
        """
        super().__init__(config, grid)
        self.enabled = scale != 0.0
        tokens, width = grid[0] * grid[1], config.width
        table = scale * sincos_positions(width, grid) if self.enabled else torch.zeros(tokens, width)
        self.register_buffer("table", table.to(torch.get_default_dtype())[None])

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (B,T,C) plus the table."""
        return x + self.table if self.enabled else x


def relative_index(grid: tuple[int, int]) -> Tensor:
    """(1+T, 1+T) int64: row of the bias table for each pair of tokens, the class token first (BEiT; data2vec 1.0).

    Patches (r, c) and (r', c'): (r - r' + h - 1) * (2 w - 1) + (c - c' + w - 1); then one row each for class token to
    patch, patch to class token, class token to itself.
    """
    height, width = grid
    r = torch.arange(height).repeat_interleave(width)
    c = torch.arange(width).repeat(height)
    pairs = (r[:, None] - r + height - 1) * (2 * width - 1) + (c[:, None] - c + width - 1)
    rows = (2 * height - 1) * (2 * width - 1)
    index = torch.empty(len(r) + 1, len(r) + 1, dtype=torch.int64)
    index[1:, 1:] = pairs
    index[0, 1:], index[1:, 0], index[0, 0] = rows, rows + 1, rows + 2
    return index


class RelativePositions(Positions):
    """A learned bias of attention for each head and offset of two patches, shared by all blocks (data2vec 1.0)."""

    index: Tensor

    def __init__(self, config: Encoder, grid: tuple[int, int]) -> None:
        """
        Args:
            config: heads; at most one extra token.
            grid: rows and columns of patches.
        """
        super().__init__(config)
        if config.extra_tokens > 1:
            raise ValueError(
                f"encoder.extra_tokens: expected 0 or 1 with relative positions, got {config.extra_tokens}"
            )
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
        self.table = nn.Parameter(torch.zeros(rows, config.heads))
        self.register_buffer("index", relative_index(grid))

    def surround(self, x: Tensor, lengths: Tensor | None = None, places: Tensor | None = None) -> Surroundings:
        """Bias of all pairs; the rows are full and have no padding."""
        index = self.index[1 - self.extra :, 1 - self.extra :]
        return Surroundings(table=self.table[index].permute(2, 0, 1))
