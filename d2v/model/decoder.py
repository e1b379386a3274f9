"""Decoders of data2vec 2.0: convolutions (Baevski et al. 2022b, section 3.3) and, of the published code, blocks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d2v.config import Decoder, Encoder, Head, SharedDecoder
from d2v.model.layers import Linear, convolve_grid, convolved_rows, fused_layer, norm_gelu, takes_fused_layer
from d2v.model.transformer import AttentionBias, Block, Mlp, initialise_linears, make_norm
from d2v_kernels import gelu_linear

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d}


class ConvDecoder(nn.Module):
    """Convolutions over the token grid, each with layer norm (no affine), GELU and residual; then a projection.

    The convolutions see all tokens; the projection is per token, so it is applied to the masked rows only
    (`project`), which is exact.
    """

    def __init__(
        self, config: SharedDecoder, width: int, dims: int, convolution: str = "auto", dropout: float = 0.0
    ) -> None:
        """
        Args:
            config: layers, width, kernel, groups, residual, projection.
            width: channels C of the tokens that enter and of the predictions.
            dims: axes of the token grid: 1 for sequences, 2 for images.
            convolution: as in `config.run`.
            dropout: on the tokens that enter.
        """
        super().__init__()
        inputs = [width] + [config.width] * config.layers
        section = "decoder" if isinstance(config, Decoder) else "shared_decoder"
        for name, channels in (("width of the encoder", width), (f"{section}.width", config.width)):
            if config.layers and channels % config.groups:
                raise ValueError(f"{section}.groups: expected a divisor of the {name} {channels}, got {config.groups}")
        self.residual, self.trim, self.convolution = config.residual, config.kernel % 2 == 0, convolution
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            _CONVOLUTIONS[dims](c, config.width, config.kernel, padding=config.kernel // 2, groups=config.groups)
            for c in inputs[:-1]
        )
        hidden = [int(inputs[-1] * config.projection_ratio)] * (config.projection_layers - 1)
        projection = stack_linears([inputs[-1], *hidden, width])
        self.proj = projection if hidden else projection[0]

    def take(self, kept: Tensor) -> Tensor:
        """Visible tokens (N,V,C) with dropout, in the dtype of the rows that are convolved (`convolved_rows`): better
        before the many masked ones are among them."""
        return convolved_rows(self.convolution, self.dropout(kept))

    def forward(self, x: Tensor, grid: tuple[int, ...], valid: Tensor | None = None) -> Tensor:
        """Hidden rows of all tokens.

        Args:
            x: (N,T,C), visible tokens, and noise at the masked positions.
            grid: extents of the token grid; their product is T.
            valid: (N,T) bool, False at padding, which every convolution then sees as 0; None: no padding.

        Returns:
            (N,T,D), D the decoder width.
        """
        n, tokens, _ = x.shape
        x = x.view(n, *grid, -1)
        shown = None if valid is None else valid.view(n, *grid, 1)
        for conv in self.blocks:
            x = x if shown is None else x * shown
            if takes_fused_layer(self.convolution, x):
                x = fused_layer(conv, x, self.residual and conv.in_channels == conv.out_channels)
                continue
            y = convolve_grid(conv, x)
            if self.trim:  # an even kernel yields one position too many on every axis
                for axis in range(1, y.dim() - 1):
                    y = y.narrow(axis, 0, y.shape[axis] - 1)
            y = norm_gelu(y)
            x = x + y if self.residual and x.shape[-1] == y.shape[-1] else y
        return x.reshape(n, tokens, -1)

    def project(self, hidden: Tensor) -> Tensor:
        """Predictions (..., C) of hidden rows (..., D)."""
        if torch.compiler.is_compiling() or not isinstance(self.proj, nn.Sequential):
            return self.proj(hidden)
        first, *rest = self.proj
        x: Tensor = first(hidden)
        for layer in rest:
            if isinstance(layer, nn.Linear):  # behind a GELU, which is part of this call
                x = gelu_linear(x, layer.weight, layer.bias)
        return x


class TransformerDecoder(nn.Module):
    """A linear layer, transformer blocks like the encoder's over all tokens, a projection."""

    def __init__(self, config: Decoder, encoder: Encoder, keep_residual: bool = True) -> None:
        """
        Args:
            config: layers, width D, heads.
            encoder: norms, MLP and dropout of the blocks; width C of what enters and of the predictions.
            keep_residual: as of `Block`.
        """
        super().__init__()
        inner = dataclasses.replace(encoder, width=config.width, heads=config.heads, layer_scale=0.0, key_bias=True)
        self.dropout = nn.Dropout(config.input_dropout)
        self.embed, self.proj = Linear(encoder.width, config.width), Linear(config.width, encoder.width)
        self.blocks = nn.ModuleList(
            CrossBlock(config, encoder.width, residual=i > 0)
            if config.kind == "cross"
            else Block(inner, 0.0, keep_residual)
            for i in range(config.layers)
        )
        initialise_linears(self, encoder.init_std)

    def take(self, kept: Tensor) -> Tensor:
        """Visible tokens (N,V,C) with dropout."""
        return self.dropout(kept)

    def forward(self, x: Tensor, grid: tuple[int, ...], valid: Tensor | None = None) -> Tensor:
        """Hidden rows (N,T,D) of x (N,T,C), visible tokens and noise; `valid` as of `ConvDecoder`."""
        x, bias = self.embed(x), AttentionBias(None if valid is None else valid.sum(dim=1))
        for block in self.blocks:
            x = block(x, bias).output
        return x

    def attend(self, queries: Tensor, kept: Tensor) -> Tensor:
        """Hidden rows (N,P,D) of the positions (N,P,C) of masked tokens and visible tokens (N,V,C), for kind cross."""
        x = self.embed(queries)
        for block in self.blocks:
            x = block(x, kept)
        return x

    def project(self, hidden: Tensor) -> Tensor:
        """Predictions (..., C) of hidden rows (..., D)."""
        return self.proj(hidden)


class CrossBlock(nn.Module):
    """u = norm1(x + attention of x to y), out = norm2(u + mlp(u)); the first one of a stack leaves out "x +"."""

    def __init__(self, config: Decoder, width: int, residual: bool) -> None:
        """
        Args:
            config: width D and heads.
            width: channels C of y.
            residual: not the first block.
        """
        super().__init__()
        inner = Encoder(width=config.width, heads=config.heads)  # as published, whatever the encoder has
        self.heads, self.residual = config.heads, residual
        self.norm1, self.norm2, self.mlp = make_norm(inner), make_norm(inner), Mlp(inner)
        self.attn = nn.ModuleDict(
            {"q_proj": Linear(config.width, config.width), "kv_proj": Linear(width, 2 * config.width),
             "proj": Linear(config.width, config.width)}
        )  # fmt: skip

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(N,P,D) from x (N,P,D) and y (N,V,C)."""
        q = self.attn["q_proj"](x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = (t.transpose(1, 2) for t in self.attn["kv_proj"](y).unflatten(2, (2, self.heads, -1)).unbind(2))
        mixed = self.attn["proj"](nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        u = self.norm1(x + mixed if self.residual else mixed)
        return self.norm2(u + self.mlp(u))


def stack_linears(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with GELU between, in PyTorch's default initialisation, as published for images and speech (text:
    N(0, 0.02^2))."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def initialise_xavier(module: nn.Module) -> None:
    """Linear layers by Glorot's rule with bias 0, as published for the shared decoder."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


class RegressionHead(nn.Module):
    """Linear layers with GELU between, C to C (Baevski et al. 2022; one layer for speech and images, two for text)."""

    def __init__(self, config: Head, width: int) -> None:
        """
        Args:
            config: number of layers; those before the last have width 2 C.
            width: channels C of the encoder and of the targets.
        """
        super().__init__()
        self.layers = stack_linears([width, *[2 * width] * (config.layers - 1), width])

    def forward(self, x: Tensor) -> Tensor:
        """Predictions (..., C) of encoded tokens (..., C)."""
        return self.layers(x)
