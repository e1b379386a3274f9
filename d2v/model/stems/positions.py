"""Positions of tokens: what is added to the features, and what attention gets as a bias.

None (text has learned ones in its stem), fixed sin-cos in one or two dimensions, convolutions (speech), a learned
relative bias (1.0 images); all may have ALiBi.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v.config import Config, Encoder, Stem
from d2v.model.layers import (
    NORM_EPS,
    LayerNorm,
    convolve,
    fused_layer,
    norm_gelu,
    product_dtype,
    takes_fused_layer,
    valid_positions,
)
from d2v.model.transformer import AttentionBias
from d2v_kernels import Alibi, Masks, alibi_slopes, gather_tokens, pack_lengths, prefers_packed


def grid_coordinates(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(T,) int64 each: row and column of every patch, row by row."""
    rows, columns = grid
    return torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)


def grid_distances(grid: tuple[int, int], kind: str) -> Tensor:
    """(T,T) float32: distances of all pairs of patches, row by row; "manhattan" or "euclidean"."""
    down, across = ((c[:, None] - c).abs().float() for c in grid_coordinates(grid))
    return down + across if kind == "manhattan" else torch.hypot(down, across)


class AlibiScale(nn.Module):
    """Slopes of ALiBi or a table in their place, and their factors that are learned, or fixed."""

    slopes: Tensor
    scale: Tensor
    table: nn.Parameter | None
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
        count = config.alibi_heads if config.alibi_heads is not None else config.heads
        layers = config.prenet_depth + config.depth if config.alibi_per_layer else 1
        # The published shape: blocks, batch, heads, queries, keys.
        scale = torch.full((layers, 1, count if config.alibi_per_head else 1, 1, 1), config.alibi_scale)
        if config.alibi == "learned":
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        slopes, table = alibi_slopes(count, scale.device), None
        if config.alibi_table is not None:
            places = torch.arange(config.alibi_table)
            apart = (places[:, None] - places).abs().float() if distances is None else distances
            table, distances = nn.Parameter((-slopes[:, None, None] * apart)[None]), None
            slopes = -torch.ones(count)
        self.register_parameter("table", table)
        self.register_buffer("distances", distances, persistent=False)
        # Heads without the bias have slope 0.
        self.register_buffer("slopes", F.pad(slopes, (0, config.heads - count)), persistent=False)

    def attention_bias(
        self, lengths: Tensor | None, positions: Tensor, extra: int = 0, same: bool = False
    ) -> AttentionBias:
        """`AttentionBias` of tokens at `positions` (N,V), the `same` in all rows, behind `extra` ones without any."""
        heads = self.slopes.shape[0]
        scales, pairs = self.scale.float().flatten(1), None
        if scales.shape[1] > 1:
            scales = F.pad(scales, (0, heads - scales.shape[1]))
        if self.table is not None:
            index = (positions[:1] if same else positions).long().clamp_max(self.table.shape[2] - 1)
            pairs = self.table.float()[0][:, index[:, :, None], index[:, None, :]].transpose(0, 1)
            pairs = F.pad(pairs, (extra, 0, extra, 0, 0, heads - pairs.shape[1]))
        elif self.distances is not None:
            index = positions.long()
            pairs = F.pad(self.distances[index[:, :, None], index[:, None, :]], (extra, 0, extra, 0))[:, None]
        return AttentionBias(lengths, Alibi(self.slopes.float(), positions), scales, pairs)


class Positions(nn.Module):
    """No positions of its own; the base of those that have some. May hold an ALiBi."""

    packed = "never"
    """Whether blocks get the valid tokens of full rows alone, as in `config.run`."""

    def __init__(self, config: Encoder, grid: tuple[int, int] | None = None) -> None:
        """
        Args:
            config: extra tokens, ALiBi, width.
            grid: rows and columns of patches.
        """
        super().__init__()
        self.extra, self.head_width = config.extra_tokens, config.width // config.heads
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

    def attention_bias(
        self, x: Tensor, lengths: Tensor | None = None, positions: Tensor | None = None
    ) -> AttentionBias:
        """What attention needs to know of rows of features.

        Args:
            x: (N,T,C) features of full rows, read for their shape and device only; or of samples, with `positions`.
            lengths: (N,) tokens before the padding, on the host or the device; None: no padding.
            positions: (N,V) positions of the visible tokens; None: all T.
        """
        if lengths is not None:
            if positions is None and self._packs(x):
                packed, tokens = pack_lengths(lengths + self.extra, x.device), x.shape[1] + self.extra
                places = packed.places(tokens)[0][0] % tokens
                bias = AttentionBias() if self.alibi is None else self.alibi.attention_bias(None, places)
                return replace(bias, packed=packed, tokens=tokens)
            lengths = (lengths + self.extra).to(x.device, non_blocking=True)
        if self.alibi is None:
            return AttentionBias(lengths)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
            return self.alibi.attention_bias(lengths, positions, self.extra, same=True)
        return self.alibi.attention_bias(lengths, positions, self.extra)

    def _packs(self, x: Tensor) -> bool:
        """Whether blocks get full rows packed; extra tokens and tables have no place in a packed ALiBi."""
        if self.packed == "never" or torch.compiler.is_compiling():
            return False
        if self.alibi is not None and (self.extra > 0 or self.alibi.table is not None):
            return False
        where = x.device.type, product_dtype(x), self.head_width
        return self.packed == "always" or prefers_packed(*where, alibi=self.alibi is not None)


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
    r, c = (x[:, None] * omega for x in grid_coordinates(grid))
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
    r, c = grid_coordinates(grid)
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

    def attention_bias(
        self, x: Tensor, lengths: Tensor | None = None, positions: Tensor | None = None
    ) -> AttentionBias:
        """Bias of all pairs; the rows are full and have no padding."""
        index = self.index[1 - self.extra :, 1 - self.extra :]
        return AttentionBias(table=self.table[index].permute(2, 0, 1))


def resize_positions(
    tensors: dict[str, Tensor], old: Config, new: Config
) -> tuple[dict[str, Tensor], str | None]:  # fmt: skip
    """Tensors of a model, student and teacher, for another grid of patches, and what was done in words; as they are,
    and None, where the grid is the same. Fixed positions are computed anew, relative ones interpolated."""
    before, after = old.grid, new.grid
    if before is None or after is None or before == after:
        return tensors, None
    found, how, rows = dict(tensors), None, (2 * before[0] - 1) * (2 * before[1] - 1) + 3
    for name, tensor in tensors.items():
        if name.endswith("positions.index"):
            found[name] = relative_index(after)
        elif name.endswith("positions.table") and new.stem.positions == "sincos":
            found[name], how = SinCosPositions(new.encoder, after, new.stem.position_scale).table, "computed"
        elif name.endswith("positions.table") and len(tensor) == rows and min(before) > 1:
            found[name], how = resize_relative(tensor, before, after), "interpolated"
    patches = " to ".join(f"{r} x {c}" for r, c in (before, after))
    size = "frames" if new.stem.modality == "spectrograms" else "image_size"
    sizes = " to ".join(str(getattr(config.stem, size)) for config in (old, new))
    return found, how and f"stem.{size} {sizes}: positions {how}, {patches}"


def resize_relative(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The table of `RelativePositions` of one grid for another one, by cubic splines over the offsets; the rows of the
    class token stay (Bao et al. 2022, fine-tuning at another size).

    Offsets of the old grid are placed so that near ones keep their distance in patches, and steps grow geometrically
    until the farthest is the farthest of the new grid. In a smaller grid all keep their distance.
    """
    from scipy.interpolate import RectBivariateSpline

    places, wanted = [_place_offsets(o, n) for o, n in zip(old, new, strict=True)], [np.arange(1 - n, n) for n in new]
    heads = []
    for column in table[:-3].double().cpu().numpy().T:
        values = column.reshape(len(places[0]), len(places[1]))
        spline = RectBivariateSpline(*places, values, kx=min(3, len(places[0]) - 1), ky=min(3, len(places[1]) - 1))
        heads.append(spline(*wanted).ravel())
    return torch.cat([torch.from_numpy(np.stack(heads, axis=1)).to(table), table[-3:]])


def _place_offsets(old: int, new: int) -> np.ndarray:
    """(2 old - 1,) where the offsets along a side of `old` patches lie among those of `new`."""
    from scipy.optimize import brentq

    powers, ratio = np.arange(old - 1), 1.0
    if new > old > 2:
        ratio = brentq(lambda q: (q**powers).sum() - (new - 1), 1.0, float(new))
    outwards = np.cumsum(ratio**powers)
    return np.concatenate([-outwards[::-1], [0.0], outwards])


class ConvPositions(Positions):
    """Adds the output of a stack of grouped convolutions, each with layer norm (no affine) and GELU.

    The student's convolutions see zeros at masked frames. Padding is invisible: zeros before every convolution; the
    published code zeroes the first input only (1.0) or nothing (2.0).
    """

    def __init__(
        self, stem: Stem, encoder: Encoder, *, zero_input: bool = True, zero_between: bool = True,
        convolution: str = "auto",
    ) -> None:  # fmt: skip
        """
        Args:
            stem: layers, width and groups of the convolutions.
            encoder: width C.
            zero_input: write 0 at padded frames before the convolutions.
            zero_between: and between them.
            convolution: as in `config.run`.
        """
        super().__init__(encoder)
        width, groups = encoder.width, stem.position_groups
        if width % groups:
            raise ValueError(f"stem.position_groups: expected a divisor of encoder.width {width}, got {groups}")
        kernel = max(3, stem.position_width // stem.position_layers)
        self.zero_input, self.zero_between, self.convolution = zero_input, zero_between, convolution
        self.norm = LayerNorm(width, eps=NORM_EPS) if stem.position_norm else None
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups) for _ in range(stem.position_layers)
        )

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features (B,T,C) plus positions."""
        valid = valid_positions(lengths, x.shape[1], x.device)
        if valid is not None and self.zero_input:
            x = x * valid[..., None]
        return x + self._convolve(x, valid)

    def visible(self, x: Tensor, masks: Masks, copies: int, lengths: Tensor | None = None) -> Tensor:
        """Features of visible frames plus positions computed with zeros at the masked ones; see `Positions.visible`."""
        assert masks.keep is not None
        batch, tokens, _ = x.shape
        shown = ~masks.mask.view(batch, copies, tokens)
        valid = valid_positions(lengths, tokens, x.device)
        if valid is not None and self.zero_input:
            shown = shown & valid[:, None]
        rows = (x[:, None] * shown[..., None]).flatten(0, 1)
        positions = self._convolve(rows, None if valid is None else valid.repeat_interleave(copies, dim=0))
        return gather_tokens(x, masks.keep, clones=copies) + gather_tokens(positions, masks.keep)

    def _convolve(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        for i, conv in enumerate(self.convs):
            assert isinstance(conv, nn.Conv1d)
            if valid is not None and self.zero_between and (i > 0 or self.norm is not None):
                x = x * valid[..., None]
            fused = takes_fused_layer(self.convolution, x)
            x = fused_layer(conv, x) if fused else norm_gelu(convolve(conv, x))
        return x
