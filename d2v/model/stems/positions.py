"""What all positions have in common: features with positions, features of visible tokens, attention biases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v.config import Encoder
from d2v.model.transformer import Surroundings
from d2v_kernels import Alibi, Masks, alibi_slopes, gather_tokens


def grid_distances(grid: tuple[int, int], kind: str) -> Tensor:
    """(T,T) float32: distances of all pairs of patches, row by row; "manhattan" or "euclidean"."""
    row = torch.arange(grid[0]).repeat_interleave(grid[1]).float()
    column = torch.arange(grid[1]).repeat(grid[0]).float()
    down, across = (row[:, None] - row).abs(), (column[:, None] - column).abs()
    return down + across if kind == "manhattan" else torch.hypot(down, across)


class AlibiScale(nn.Module):
    """Slopes of ALiBi, and their factors that are learned, or fixed."""

    slopes: Tensor
    scale: Tensor

    distances: Tensor | None

    def __init__(self, config: Encoder, grid: tuple[int, int] | None = None) -> None:
        """
        Args:
            config: heads, and which factors there are.
            grid: rows and columns of patches, for distances on a grid.
        """
        super().__init__()
        distances = None
        if config.alibi_distance != "sequence":
            if grid is None:
                raise ValueError(
                    f"encoder.alibi_distance: expected sequence without a grid, got {config.alibi_distance}"
                )
            distances = grid_distances(grid, config.alibi_distance)
        self.register_buffer("distances", distances, persistent=False)
        count = config.alibi_heads if config.alibi_heads is not None else config.heads
        layers = config.prenet_depth + config.depth if config.alibi_per_layer else 1
        # The published shape: blocks, batch, heads, queries, keys.
        scale = torch.full((layers, 1, count if config.alibi_per_head else 1, 1, 1), config.alibi_scale)
        if config.alibi == "learned":
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        # Heads without the bias have slope 0.
        slopes = F.pad(alibi_slopes(count, scale.device), (0, config.heads - count))
        self.register_buffer("slopes", slopes, persistent=False)

    def surround(self, lengths: Tensor | None, places: Tensor, extra: int = 0) -> Surroundings:
        """`Surroundings` of tokens at `places` (N,V), behind `extra` tokens that have no place."""
        heads = self.slopes.shape[0]
        scales = self.scale.float().flatten(1)
        if scales.shape[1] > 1:
            scales = F.pad(scales, (0, heads - scales.shape[1]))
        alibi = Alibi(self.slopes.float(), places)
        if self.distances is None:
            return Surroundings(lengths=lengths, alibi=alibi, scales=scales)
        index = places.long()
        distances = self.distances[index[:, :, None], index[:, None, :]]
        distances = F.pad(distances, (extra, 0, extra, 0))
        return Surroundings(lengths=lengths, alibi=alibi, scales=scales, distances=distances)


class Positions(nn.Module):
    """No positions of its own; the base of those that have some. May hold an ALiBi."""

    def __init__(self, config: Encoder, grid: tuple[int, int] | None = None) -> None:
        """
        Args:
            config: extra tokens, ALiBi, width.
            grid: rows and columns of patches.
        """
        super().__init__()
        self.extra = config.extra_tokens
        self.alibi = AlibiScale(config, grid) if config.alibi != "none" else None

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features (B,T,C) with positions; `lengths`: (B,) tokens before the padding, on the host."""
        return x

    def visible(self, x: Tensor, masks: Masks, copies: int, lengths: Tensor | None = None) -> Tensor:
        """(N,V,C): features with positions of the visible tokens of `copies` masked copies of each sample.

        Args:
            x: (B,T,C) features.
            masks: on the device of x, with `keep`.
            lengths: (B,) tokens before the padding, on the host; None: no padding.
        """
        assert masks.keep is not None
        return gather_tokens(self(x, lengths), masks.keep, clones=copies)

    def surround(self, x: Tensor, lengths: Tensor | None = None, places: Tensor | None = None) -> Surroundings:
        """What attention needs to know of rows of features.

        Args:
            x: (N,T,C) features of full rows, read for their shape and device only; or of samples, with `places`.
            lengths: (N,) tokens before the padding, on the host or the device; None: no padding.
            places: (N,V) positions of the visible tokens; None: all T.
        """
        if lengths is not None:
            lengths = (lengths + self.extra).to(x.device, non_blocking=True)
        if self.alibi is None:
            return Surroundings(lengths=lengths)
        if places is None:
            places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return self.alibi.surround(lengths, places, self.extra)


class SequencePositions(Positions):
    """Adds fixed 1-D sin-cos positions to a sequence of any length; no parameters. Not published."""

    omega: Tensor

    def __init__(self, config: Encoder, scale: float) -> None:
        super().__init__(config)
        if config.width % 2:
            raise ValueError(f"encoder.width: expected a multiple of 2 for sin-cos positions, got {config.width}")
        self.scale = scale
        half = config.width // 2
        self.register_buffer("omega", 10000.0 ** (-torch.arange(half) / half), persistent=False)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x (B,T,C) plus scale * [sin(t w), cos(t w)], w_i = 10000^(-i / (C/2))."""
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.omega.float()
        return x + self.scale * torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype)


def valid_positions(lengths: Tensor | None, tokens: int, device: torch.device) -> Tensor | None:
    """(B,T) bool on the device, True before the padding; None where there is no padding."""
    if lengths is None:
        return None
    return torch.arange(tokens, device=device) < lengths.to(device, non_blocking=True)[:, None]


def check_lengths(lengths: Tensor | None, batch: int, longest: int, shortest: int = 1) -> Tensor | None:
    """Lengths as given, or None where no row is padded.

    Raises:
        ValueError: anything but int64 (B,) on the host, from `shortest` to `longest`.
    """
    if lengths is None:
        return None
    if tuple(lengths.shape) != (batch,) or lengths.dtype != torch.int64 or lengths.device.type != "cpu":
        name = str(lengths.dtype).removeprefix("torch.")
        raise ValueError(
            f"lengths: expected int64 ({batch},) on the host, got {name} {tuple(lengths.shape)} on {lengths.device}"
        )
    if batch and not (int(lengths.min()) >= shortest and int(lengths.max()) <= longest):
        raise ValueError(f"lengths: expected {shortest} to {longest}, got {lengths.tolist()}")
    return lengths
