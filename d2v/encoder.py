"""Transformer blocks of student and teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Encoder


class Attention(nn.Module):
    """Multi-head self-attention over (N,T,C); query, key and value from one projection."""

    def __init__(self, config: Encoder) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.proj_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        # Rows of the projection: q, k, v, and inside each, head by head.
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        result: Tensor = self.proj_dropout(self.proj(mixed.transpose(1, 2).reshape(n, t, c)))
        return result


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, config: Encoder) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.fc1 = nn.Linear(config.width, hidden)
        self.dropout = nn.Dropout(config.activation_dropout)
        self.fc2 = nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.dropout(F.gelu(self.fc1(x))))
        return result


class DropPath(nn.Module):
    """Drops a branch for whole samples with the given probability; kept ones are divided by the rest."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        return x * x.new_empty((x.shape[0], 1, 1)).bernoulli_(keep).div_(keep)


def make_norm(config: Encoder) -> nn.LayerNorm:
    """Layer norm over C as configured."""
    return nn.LayerNorm(config.width, eps=config.norm_eps, elementwise_affine=config.norm_affine)


class Block(nn.Module):
    """One transformer block.

    Post-norm (published 2.0): u = norm1(x + attn(x)), f = mlp(u), out = norm2(u + f).
    Pre-norm: u = x + attn(norm1(x)), f = mlp(norm2(u)), out = u + f. The published pre-norm code computes f + f
    instead; `keep_residual=False` reproduces that.
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
        self.drop_path = DropPath(drop_path)

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The residual u and the MLP output f, the published target tensor; both (N,T,C)."""
        if not self.pre_norm:
            u = self.norm1(x + self.drop_path(self.attn(x)))
            return u, self.mlp(u)
        u = x + self.drop_path(self.attn(self.norm1(x)))
        f = self.mlp(self.norm2(u))
        return (u if self.keep_residual else f), f

    def merge(self, residual: Tensor, f: Tensor) -> Tensor:
        """The block's output from what `branch` returned."""
        out = residual + self.drop_path(self.dropout(f))
        return out if self.pre_norm else self.norm2(out)

    def forward(self, x: Tensor) -> Tensor:
        """(N,T,C) to (N,T,C)."""
        return self.merge(*self.branch(x))


class Context(nn.Module):
    """What stands before the main blocks: extra tokens, a norm (post-norm models), dropout, prenet blocks."""

    def __init__(self, config: Encoder, keep_residual: bool = True) -> None:
        super().__init__()
        count = config.extra_tokens
        # Standard deviation 1, not 0.02: as published.
        self.extra_tokens = nn.Parameter(torch.randn(1, count, config.width)) if count else None
        self.norm = make_norm(config) if config.norm_order == "post" else None
        self.dropout = nn.Dropout(config.prenet_dropout)
        self.blocks = nn.ModuleList(Block(config, 0.0, keep_residual) for _ in range(config.prenet_depth))
        initialise_linears(self, config.init_std)

    def embed(self, x: Tensor) -> Tensor:
        """Input (N,E+T,C) of the first block from tokens (N,T,C)."""
        if self.extra_tokens is not None:
            x = torch.cat([self.extra_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        if self.norm is not None:
            x = self.norm(x)
        result: Tensor = self.dropout(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N,T,C) to (N,E+T,C), E extra tokens first."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


class MainBlocks(nn.Module):
    """The blocks whose tensors are targets, and the final norm of pre-norm models."""

    def __init__(self, config: Encoder, keep_residual: bool = True) -> None:
        super().__init__()
        depth = config.depth
        rates = [config.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.layer_drop = config.layer_drop
        self.blocks = nn.ModuleList(Block(config, rate, keep_residual) for rate in rates)
        self.norm = make_norm(config) if config.norm_order == "pre" else None
        initialise_linears(self, config.init_std)

    def forward(self, x: Tensor) -> Tensor:
        """(N,T,C) to (N,T,C); in training a block is skipped with probability `layer_drop`."""
        for block in self.blocks:
            if self.training and self.layer_drop > 0.0 and float(torch.rand(())) < self.layer_drop:
                continue
            x = block(x)
        return x if self.norm is None else self.norm(x)

    def collect(self, x: Tensor, top_k: int, source: str) -> list[Tensor]:
        """Target tensors of the top K blocks, lowest first; stops after the last tensor it needs.

        Args:
            x: (N,T,C) input of the first main block.
            top_k: number of blocks K.
            source: "ffn", the MLP output before the residual sum, or "block", the block's output.

        Returns:
            K tensors (N,T,C).
        """
        first, last = len(self.blocks) - top_k, len(self.blocks) - 1
        tensors: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            residual, f = block.branch(x)
            if source == "ffn" and i >= first:
                tensors.append(f)
                if i == last:
                    break
            x = block.merge(residual, f)
            if source == "block" and i >= first:
                tensors.append(x)
        return tensors


def initialise_linears(module: nn.Module, std: float | None) -> None:
    """Every linear layer N(0, std^2) with bias 0, as published; norms and convolutions keep PyTorch's defaults, and so
    do the linear layers for std None."""
    for part in module.modules():
        if std is not None and isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            nn.init.zeros_(part.bias)
