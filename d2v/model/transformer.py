"""Transformer blocks of student and teacher."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2v.config import Encoder
from d2v.model.layers import LayerNorm, Linear
from d2v_kernels import Alibi, Packed, attend, dropout_add_layer_norm, gelu_linear, prefers_dropout_add_layer_norm


@dataclass(frozen=True)
class AttentionBias:
    """What attention knows of a row of tokens besides their content; the same for all blocks but for the scales."""

    lengths: Tensor | None = None
    """(N,) int64 on the device: tokens before the padding, extra tokens counted; None: no padding."""
    alibi: Alibi | None = None
    """ALiBi slopes and positions of the tokens, without scale; None: no ALiBi."""
    scales: Tensor | None = None
    """(L,H) or (1,H): ALiBi's scale of each block, prenet blocks first, or of all."""
    pairs: Tensor | None = None
    """(N or 1, H or 1, E+T, E+T): what -slope * scale multiplies, for tokens on a grid or tables; None: distances of
    their positions."""
    table: Tensor | None = None
    """(H,E+T,E+T): bias of all pairs of tokens, for relative positions; None: none."""
    packed: Packed | None = None
    """Layout without padding: the blocks take (1,total,C) in place of (N,E+T,C), ALiBi has positions (total,)."""
    tokens: int = 0
    """E+T, with `packed`."""

    def pack(self, x: Tensor) -> Tensor:
        """What the blocks take, of rows (N,E+T,C)."""
        return x if self.packed is None else self.packed.unpad(x).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """Rows (N,E+T,C) of what the blocks give; 0 at padding, where that was not computed."""
        return x if self.packed is None else self.packed.pad(x.squeeze(0), self.tokens)

    def matrix_of(self, index: int) -> Tensor | None:
        """(N or 1, H, E+T, E+T) of one block, where attention cannot compute it from positions."""
        if self.table is not None:
            return self.table[None]
        alibi = self.alibi_of(index)
        if self.pairs is None or alibi is None or alibi.scale is None:
            return None
        slopes = alibi.slopes * alibi.scale.clamp_min(0.0)
        return -slopes[:, None, None] * self.pairs

    def alibi_of(self, index: int) -> Alibi | None:
        """ALiBi of one block."""
        if self.alibi is None or self.scales is None:
            return None
        return self.alibi._replace(scale=self.scales[index if len(self.scales) > 1 else 0])


NO_BIAS = AttentionBias()
"""Tokens without padding, ALiBi or relative positions."""


def mix_tokens(q: Tensor, k: Tensor, v: Tensor, bias: AttentionBias, index: int, dropout: float) -> Tensor:
    """Attention of block `index`; all (N,T,H,D). Padding is never a key; as a query it sees what the others see."""
    if bias.packed is not None:
        sequences = (x.squeeze(0) for x in (q, k, v))
        mixed = attend(*sequences, packed=bias.packed, alibi=bias.alibi_of(index), dropout=dropout)
        return mixed.unsqueeze(0)
    matrix = bias.matrix_of(index)
    if matrix is None:
        return attend(q, k, v, valid=bias.lengths, alibi=bias.alibi_of(index), dropout=dropout)
    if bias.lengths is not None:
        padding = torch.arange(k.shape[1], device=k.device) >= bias.lengths[:, None]
        matrix = matrix.masked_fill(padding[:, None, None], -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, matrix.to(q.dtype), dropout).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over (N,T,C); query, key and value from one projection."""

    def __init__(self, config: Encoder) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.qkv = Linear(config.width, 3 * config.width, bias=config.key_bias)
        self.q_bias = None if config.key_bias else nn.Parameter(torch.zeros(config.width))
        self.v_bias = None if config.key_bias else nn.Parameter(torch.zeros(config.width))
        self.proj = Linear(config.width, config.width)

    def forward(self, x: Tensor, bias: AttentionBias = NO_BIAS, index: int = 0) -> Tensor:
        """(N,T,C) to (N,T,C), before any dropout of the result; `index`: number of the block."""
        n, t, c = x.shape
        projected = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            projected = projected + qkv_bias.to(projected.dtype)
        # Rows of the projection: q, k, v, and inside each, head by head.
        q, k, v = projected.view(n, t, 3, self.heads, c // self.heads).unbind(2)
        mixed = mix_tokens(q, k, v, bias, index, self.dropout if self.training else 0.0)
        return self.proj(mixed.reshape(n, t, c))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, config: Encoder) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.fc1 = Linear(config.width, hidden)
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc2 = Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        # A compiler has GELU in its own kernels; without dropout in between, the activation need not be kept.
        if torch.compiler.is_compiling() or (self.training and self.dropout.p > 0.0):
            return self.forward_plain(x)
        return gelu_linear(self.fc1(x), self.fc2.weight, self.fc2.bias)

    def forward_plain(self, x: Tensor) -> Tensor:
        """`forward` by PyTorch's own operators."""
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))


def drop_samples(x: Tensor, probability: float) -> Tensor:
    """Drops a branch for whole samples with the given probability; kept ones are divided by the rest."""
    keep = 1.0 - probability
    return x * x.new_empty((x.shape[0], 1, 1)).bernoulli_(keep).div_(keep)


def make_norm(config: Encoder) -> nn.LayerNorm:
    """Layer norm over C as configured."""
    return LayerNorm(config.width, eps=config.norm_eps, elementwise_affine=config.norm_affine)


def add_and_norm(
    branch: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: float, narrow: bool = False, copy: bool = False
) -> tuple[Tensor, ...]:
    """norm(total) and total = residual + dropout(branch), all (N,T,C); the dropped elements come from drawn row keys.

    narrow: under autocast the norm may have the dtype of its matrix products; copy: it is given back once more, in that
    dtype where it may. In one pass where `prefers_dropout_add_layer_norm` says so; compiled, `torch.compile` fuses
    PyTorch's steps.
    """
    n, _, channels = branch.shape
    if torch.compiler.is_compiling() or not prefers_dropout_add_layer_norm(
        branch.device.type, branch.dtype, residual.dtype, channels, dropout
    ):
        return add_and_norm_plain(branch, residual, norm, dropout, narrow, copy)
    keys = torch.randint(0, 2**62, (n,), device=branch.device) if dropout > 0.0 else None
    branch, residual = (x if x.stride(-1) == 1 else x.contiguous() for x in (branch, residual))
    return dropout_add_layer_norm(
        branch, residual, norm.weight, norm.bias, dropout=dropout, keys=keys, eps=norm.eps,
        normed_dtype=branch.dtype if narrow else None, copy=copy,
    )  # fmt: skip


def add_and_norm_plain(
    branch: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout: float, narrow: bool = False, copy: bool = False
) -> tuple[Tensor, ...]:
    """`add_and_norm` by PyTorch's own operators."""
    total = residual + F.dropout(branch, dropout)
    normed = norm(total)
    return (normed, total, normed) if copy else (normed, total)


class BlockOutput(NamedTuple):
    """What a block computes; both (N,T,C)."""

    output: Tensor
    """Input of the next block."""
    ffn: Tensor
    """The MLP output before the residual sum."""


class Block(nn.Module):
    """One transformer block.

    Post-norm (published 2.0, 1.0 speech and text): u = norm1(x + attn(x)), f = mlp(u), out = norm2(u + f).
    Pre-norm: u = x + attn(norm1(x)), f = mlp(norm2(u)), out = u + f. The published pre-norm code of 2.0 computes f + f
    instead; `keep_residual=False` reproduces that. With a layer scale, both branches are multiplied by a learned vector
    (published 1.0 vision), and then f is the scaled MLP output.
    """

    def __init__(self, config: Encoder, drop_path: float = 0.0, keep_residual: bool = True) -> None:
        super().__init__()
        self.pre_norm = config.norm_order == "pre"
        self.keep_residual = keep_residual
        self.norm1 = make_norm(config)
        self.attn = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = Mlp(config)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = drop_path
        scaled = config.layer_scale > 0.0
        self.scale1 = nn.Parameter(torch.full((config.width,), config.layer_scale)) if scaled else None
        self.scale2 = nn.Parameter(torch.full((config.width,), config.layer_scale)) if scaled else None

    def branch(self, x: Tensor, bias: AttentionBias = NO_BIAS, index: int = 0) -> tuple[Tensor, Tensor]:
        """The residual u and the MLP output f, the published target tensor; both (N,T,C)."""
        attended = self.attn(self.norm1(x) if self.pre_norm else x, bias, index)
        if self.scale1 is not None:
            attended = self.scale1 * attended
        if self.pre_norm:
            normed, u = self.add_and_norm(attended, x, self.norm2, narrow=True)
        else:
            u, _, normed = self.add_and_norm(attended, x, self.norm1, copy=True)
        f = self.mlp(normed)
        if self.scale2 is not None:
            f = self.scale2 * f
        return (f if self.pre_norm and not self.keep_residual else u), f

    def merge(self, residual: Tensor, f: Tensor) -> Tensor:
        """The block's output from what `branch` returned."""
        if self.pre_norm:
            return residual + self.drop(f)
        return self.add_and_norm(f, residual, self.norm2)[0]

    def drop(self, branch: Tensor) -> Tensor:
        """A branch after dropout and drop path."""
        branch = self.dropout(branch)
        return drop_samples(branch, self.drop_path) if self.training and self.drop_path > 0.0 else branch

    def add_and_norm(
        self, branch: Tensor, residual: Tensor, norm: nn.LayerNorm, narrow: bool = False, copy: bool = False
    ) -> tuple[Tensor, ...]:
        """norm(total) and total = residual + branch after dropout and drop path; all (N,T,C); as `add_and_norm`."""
        if self.training and self.drop_path > 0.0:
            return add_and_norm(self.drop(branch), residual, norm, 0.0, narrow, copy)
        return add_and_norm(branch, residual, norm, self.dropout.p if self.training else 0.0, narrow, copy)

    def forward(self, x: Tensor, bias: AttentionBias = NO_BIAS, index: int = 0, output: bool = True) -> BlockOutput:
        """(N,T,C) to (N,T,C); `output` False: the block's output is not needed, and x comes back in its place.

        Sharded and compiled blocks know their parameters in this call only.
        """
        residual, f = self.branch(x, bias, index)
        return BlockOutput(self.merge(residual, f) if output else x, f)


class InputBlock(nn.Module):
    """What precedes the main blocks: extra tokens, a norm (post-norm models), dropout, prenet blocks."""

    def __init__(self, config: Encoder, keep_residual: bool = True) -> None:
        super().__init__()
        count = config.extra_tokens
        # Standard deviation 1, not 0.02: as published for 2.0.
        self.extra_tokens = nn.Parameter(torch.randn(1, count, config.width)) if count else None
        self.norm = make_norm(config) if config.norm_order == "post" and config.input_norm else None
        self.dropout = nn.Dropout(config.prenet_dropout)
        self.recompute = False
        self.blocks = nn.ModuleList(Block(config, 0.0, keep_residual) for _ in range(config.prenet_depth))
        initialise_linears(self, config.init_std)

    def embed(self, x: Tensor, bias: AttentionBias = NO_BIAS) -> Tensor:
        """Input (N,E+T,C) of the first block, or what `bias` packs of it, from tokens (N,T,C)."""
        if self.extra_tokens is not None:
            x = torch.cat([self.extra_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        x = bias.pack(x)
        if self.norm is not None:
            x = self.norm(x)
        return self.dropout(x)

    def forward(self, x: Tensor, bias: AttentionBias = NO_BIAS) -> Tensor:
        """Tokens (N,T,C) to (N,E+T,C), E extra tokens first, or packed; `bias` counts them."""
        x = self.embed(x, bias)
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, bias, i, self.recompute)
        return x


def run_block(block: nn.Module, x: Tensor, bias: AttentionBias, index: int, recompute: bool = False) -> Tensor:
    """(N,T,C) to (N,T,C); `recompute`: keep no activations for the backward pass, run the block there once more."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, bias, index, use_reentrant=False).output
    return block(x, bias, index).output


class TransformerEncoder(nn.Module):
    """The blocks whose tensors are targets, and the final norm of pre-norm models."""

    def __init__(self, config: Encoder, keep_residual: bool = True) -> None:
        super().__init__()
        depth = config.depth
        rates = [config.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.layer_drop, self.first = config.layer_drop, config.prenet_depth
        self.recompute = False
        self.skipped: frozenset[int] | None = None
        self.blocks = nn.ModuleList(Block(config, rate, keep_residual) for rate in rates)
        self.norm = make_norm(config) if config.norm_order == "pre" else None
        initialise_linears(self, config.init_std)
        if config.init_rescale:
            _rescale_outputs(self.blocks, config.init_std)

    def forward(self, x: Tensor, bias: AttentionBias = NO_BIAS) -> Tensor:
        """(N,T,C), or packed, to (N,T,C); in training a block is skipped with probability `layer_drop`."""
        skipped: Collection[int] = ()
        if self.training and self.layer_drop > 0.0:  # those of the update, or new ones where no trainer chose any
            chosen = self.skipped
            skipped = self.draw_skipped(torch.rand(len(self.blocks)).tolist()) if chosen is None else chosen
        for i, block in enumerate(self.blocks):
            if i not in skipped:
                x = run_block(block, x, bias, self.first + i, self.recompute)
        return bias.unpack(x if self.norm is None else self.norm(x))

    def draw_skipped(self, uniform: Sequence[float]) -> frozenset[int]:
        """Blocks whose number of [0, 1) is below `layer_drop`."""
        return frozenset(i for i, u in enumerate(uniform) if u < self.layer_drop)

    def collect(self, x: Tensor, top_k: int, source: str, bias: AttentionBias = NO_BIAS) -> list[Tensor]:
        """Target tensors of the top K blocks, lowest first; stops after the last tensor it needs.

        Args:
            x: (N,T,C), or packed: input of the first main block.
            top_k: number of blocks K.
            source: "ffn", the MLP output before the residual sum, or "block", the block's output.
            bias: padding, ALiBi and relative positions of the tokens.

        Returns:
            K tensors (N,T,C).
        """
        first, last = len(self.blocks) - top_k, len(self.blocks) - 1
        tensors: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x, f = block(x, bias, self.first + i, output=i < last or source == "block")
            if i >= first:
                tensors.append(bias.unpack(f if source == "ffn" else x))
        return tensors


def initialise_linears(module: nn.Module | None, std: float | None) -> None:
    """Every linear layer N(0, std^2) with bias 0, as published; norms and convolutions keep PyTorch's defaults, and so
    do the linear layers for std None."""
    for part in () if module is None else module.modules():
        if std is not None and isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


@torch.no_grad()
def _rescale_outputs(blocks: nn.ModuleList, std: float | None) -> None:
    """Truncated normal weights; output weights of block i (from 1) divided by sqrt(2 i), as BEiT does."""
    for i, block in enumerate(blocks, 1):
        assert isinstance(block, Block)
        layers = (block.attn.qkv, block.mlp.fc1, block.attn.proj, block.mlp.fc2)
        for layer in layers:
            if std is not None:
                nn.init.trunc_normal_(layer.weight, std=std, a=-2.0 * std, b=2.0 * std)
        for layer in layers[2:]:
            layer.weight.div_((2.0 * i) ** 0.5)
