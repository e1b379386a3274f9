"""The published data2vec step written plainly in PyTorch: the opponent of `benchmarks.step`.

It has the parameters and blocks of `d2v.Data2Vec` and gives the same loss and gradients, by the formulation that the
published code has: clones of the features for every mask, index lists by argsort in the step, positions and decoder
projections of all tokens, boolean selections, an attention bias of all pairs of tokens, one normalisation a teacher
layer, all teacher blocks, an average tensor by tensor. It is no straw man: attention is
`scaled_dot_product_attention` or, on a CPU, products and a softmax where they are quicker, optimiser and clipping are
PyTorch's fused ones, and masks come from the loader.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v.model import transformer as encoder
from d2v.model.data2vec import Data2Vec, Output
from d2v.model.layers import LayerNorm
from d2v.model.losses import class_weight
from d2v.model.stems.positions import ConvPositions, grid_distances
from d2v.model.stems.speech import WaveformStem
from d2v.model.stems.vision import PatchStem
from d2v.model.teacher import PARTS, evaluating
from d2v.model.transformer import AttentionBias
from d2v_kernels import Masks
from d2v_kernels.bench.timer import seconds_of


def compose_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention of (N,H,T,D) as two products and a softmax."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    weights = (logits if mask is None else logits + mask).softmax(dim=-1)
    return F.dropout(weights, dropout) @ v


@torch.compiler.assume_constant_result
@functools.cache
def composed_is_quicker(shape: tuple[int, ...], dtype: torch.dtype, masked: bool, dropout: float) -> bool:
    """Forward and backward of both forms on random numbers of this shape, twice, the better time of each."""
    q, k, v = torch.randn(3, *shape, dtype=dtype).requires_grad_().unbind()
    mask = torch.randn(shape[0], shape[1], shape[2], shape[2], dtype=dtype) if masked else None

    def seconds(form: Callable[..., Tensor]) -> float:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            return min(seconds_of(lambda: form(q, k, v, mask, dropout).sum().backward()) for _ in range(2))

    return seconds(compose_attention) < seconds(F.scaled_dot_product_attention)


def mix_plain(q: Tensor, k: Tensor, v: Tensor, around: AttentionBias, index: int, dropout: float) -> Tensor:
    """Attention with its bias as a tensor (N,H,T,T), where there is one."""
    bias = around.table
    alibi = around.alibi_of(index)
    if alibi is not None and alibi.scale is not None:
        bias = alibi.slopes * alibi.scale.clamp_min(0.0)  # (H,)
        assert around.pairs is not None
        bias = -bias[:, None, None] * around.pairs
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if bias is None else bias.to(q.dtype)
    composed = q.device.type == "cpu" and composed_is_quicker(tuple(q.shape), q.dtype, mask is not None, dropout)
    form = compose_attention if composed else F.scaled_dot_product_attention
    return form(q, k, v, mask, dropout).transpose(1, 2)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Blocks use `mix_plain` meanwhile."""
    with mock.patch.object(encoder, "mix_tokens", mix_plain):
        yield


@contextlib.contextmanager
def plain_blocks() -> Iterator[None]:
    """Blocks use `mix_plain`, and PyTorch's own dropout, sum, layer norm, GELU and linear one by one meanwhile."""
    with (
        plain_attention(),
        mock.patch.object(encoder, "add_and_norm", encoder.add_and_norm_plain),
        mock.patch.object(encoder.Mlp, "forward", encoder.Mlp.forward_plain),
        mock.patch.object(LayerNorm, "forward", torch.nn.LayerNorm.forward),
    ):
        yield


def norm_layer(x: Tensor, name: str) -> Tensor:
    """One published normalisation of (B,T,C) in float32."""
    x = x.float()
    if name == "layer":
        return F.layer_norm(x, x.shape[-1:])
    if name == "instance":
        return F.instance_norm(x.transpose(1, 2)).transpose(1, 2)
    if name == "batch":
        return F.batch_norm(x.flatten(0, 1), None, None, training=True).view_as(x)
    if name == "position":
        return F.batch_norm(x.flatten(1), None, None, training=True).view_as(x)
    return x


def variance_of(rows: Tensor) -> Tensor:
    """The published monitor of (P,C)."""
    return (rows.float().var(dim=0) + 1e-6).sqrt().mean()


def embed(stem: Any, inputs: Tensor) -> Tensor:
    """(B,T,C): a stem, channels first."""
    if isinstance(stem, PatchStem):
        return stem.proj(inputs).flatten(2).transpose(1, 2)
    if not isinstance(stem, WaveformStem):
        result: Tensor = stem(inputs, None)
        return result
    x = inputs[:, None]
    for conv, norm in zip(stem.convs, stem.norms, strict=True):
        x = F.gelu(norm(conv(x).transpose(1, 2)).transpose(1, 2))
    return stem.proj(stem.norm(x.transpose(1, 2)))


def convolve_positions(positions: ConvPositions, x: Tensor) -> Tensor:
    """(N,T,C): positions of full rows, channels first."""
    y = (x if positions.norm is None else positions.norm(x)).transpose(1, 2)
    for conv in positions.convs:
        y = conv(y)[:, :, : x.shape[1]]
        y = F.gelu(F.layer_norm(y.transpose(1, 2), y.shape[1:2]).transpose(1, 2))
    return y.transpose(1, 2)


def add_positions(positions: Any, x: Tensor) -> Tensor:
    """(N,T,C): full rows with their positions."""
    result: Tensor = x + convolve_positions(positions, x) if isinstance(positions, ConvPositions) else positions(x)
    return result


class PlainData2Vec(Data2Vec):
    """`Data2Vec` whose training forward is the published formulation; no padding."""

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor | None = None,
        masks: Tensor | Masks | None = None,
        noise: Tensor | None = None,
        noise_keys: Tensor | None = None,
    ) -> Output:
        """As `Data2Vec.forward`, with `Masks` given, of which the boolean mask alone is used."""
        assert isinstance(masks, Masks)
        mask = masks.mask.to(inputs.device, non_blocking=True)
        copies = mask.shape[0] // inputs.shape[0]
        features = embed(self.stem, inputs)
        if self.decoder is not None:
            assert masks.keep is not None
            # Rules of 2.0 enforce their count: it is known without asking the device.
            visible = masks.keep.shape[1]
            encoded, restore = self.encode_visible(features, mask, copies, visible)
            prediction = self.decode(encoded, restore, visible, noise)[mask]
        else:
            assert self.head is not None
            encoded = self.encode_masked(inputs, features, mask, copies)
            prediction = self.head(encoded[:, encoded.shape[1] - mask.shape[1] :][mask])
        targets = self.make_targets(inputs, features)
        target = targets.repeat_interleave(copies, dim=0)[mask]
        return self.compute_loss(prediction, target, targets, encoded, copies, features)

    def bias(self, places: Tensor, positions: Any) -> AttentionBias:
        """Distances of all pairs of tokens at `places` (N,V), which the published code keeps with the heads' slopes."""
        around: AttentionBias = positions.attention_bias(places[..., None], None, places)
        if around.alibi is None:
            return around
        distances = (places[:, :, None] - places[:, None, :]).abs().float()
        if self.config.encoder.alibi_distance != "sequence":
            table = grid_distances(self.config.stem.grid, self.config.encoder.alibi_distance).to(places.device)
            distances = table[places[:, :, None], places[:, None, :]]
        extra = self.config.encoder.extra_tokens
        return AttentionBias(
            alibi=around.alibi, scales=around.scales, pairs=F.pad(distances, (extra, 0, extra, 0))[:, None]
        )

    def encode_visible(self, features: Tensor, mask: Tensor, copies: int, visible: int) -> tuple[Tensor, Tensor]:
        """2.0: the encoder's output (N,E+V,C), and where each token of a row is among visible, then masked ones."""
        shuffle = mask.to(torch.uint8).argsort(dim=1, stable=True)
        restore = shuffle.argsort(dim=1)
        keep = shuffle[:, :visible]
        index = keep[..., None].expand(-1, -1, features.shape[2])
        if isinstance(self.positions, ConvPositions):
            x = features.repeat_interleave(copies, dim=0)
            places = convolve_positions(self.positions, x.masked_fill(mask[..., None], 0.0))
            x = x.gather(1, index) + places.gather(1, index)
        else:
            x = add_positions(self.positions, features).repeat_interleave(copies, dim=0).gather(1, index)
        around = self.bias(keep, self.positions)
        encoded: Tensor = self.blocks(self.context(x, around), around)
        return encoded, restore

    def encode_masked(self, inputs: Tensor, features: Tensor, mask: Tensor, copies: int) -> Tensor:
        """1.0: the encoder's output (N,E+T,C) with mask tokens in place."""
        if self.mask_token is None:
            assert self.config.stem.mask_token is not None
            tokens = inputs.repeat_interleave(copies, dim=0).masked_fill(mask, self.config.stem.mask_token)
            x = self.stem(tokens, None)
        else:
            x = F.dropout(features, self.config.stem.dropout, self.training).repeat_interleave(copies, dim=0)
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        positions: Any = self.positions
        around = positions.attention_bias(x, None)
        encoded: Tensor = self.blocks(self.context(add_positions(positions, x), around), around)
        return encoded

    def decode(self, encoded: Tensor, restore: Tensor, visible: int, noise: Tensor | None) -> Tensor:
        """(N,T,C): the decoder at all tokens, channels first."""
        assert self.decoder is not None
        decoder = self.decoder
        rows, tokens = restore.shape
        kept = decoder.dropout(encoded[:, encoded.shape[1] - visible :])
        if noise is None:
            noise = kept.new_empty(rows, tokens - visible, kept.shape[2]).normal_(0, self.config.mask.noise_std)
        x = torch.cat([kept, noise.to(kept.dtype)], dim=1)
        x = x.gather(1, restore[..., None].expand(-1, -1, x.shape[2]))
        grid = self.config.stem.grid if self.config.stem.modality == "vision" else (tokens,)
        x = x.transpose(1, 2).reshape(rows, -1, *grid)
        for conv in decoder.blocks:
            y = conv(x)
            if decoder.trim:
                y = y[tuple(slice(0, n) for n in (*y.shape[:2], *grid))]
            y = F.layer_norm(y.movedim(1, -1), y.shape[1:2]).movedim(-1, 1)
            y = F.gelu(y)
            x = x + y if decoder.residual and x.shape[1] == y.shape[1] else y
        result: Tensor = decoder.proj(x.flatten(2).transpose(1, 2))
        return result

    @torch.no_grad()
    def make_targets(self, inputs: Tensor, features: Tensor) -> Tensor:
        """(B,T,C): every block of the teacher, K of them normalised one by one."""
        target = self.config.target
        parts = {name: self.get_submodule(name) for name in PARTS} | dict(self.teacher.named_children())
        with evaluating(parts["stem"]):
            given = "stem" not in self.teacher.owned and self.mask_token is not None
            x = features.detach() if given or self.config.version == 2 else embed(parts["stem"], inputs)
            if "stem" in self.teacher.owned:
                x = embed(parts["stem"], inputs)
        tokens = x.shape[1]
        positions: Any = parts["positions"]
        if positions.alibi is None:
            around = positions.attention_bias(x, None)
        else:
            around = self.bias(torch.arange(tokens, device=x.device).expand(len(x), -1), positions)
        x = add_positions(positions, x)
        x = parts["context"](x, around)
        blocks: Any = parts["blocks"]
        tensors = []
        for i, block in enumerate(blocks.blocks):
            x, f = block(x, around, blocks.first + i)
            tensors.append(f if target.source == "ffn" else x)
        layers = [t[:, t.shape[1] - tokens :] for t in tensors[-target.top_k :]]
        for name in target.norm.split(","):
            layers = [norm_layer(t, name) for t in layers]
        y = torch.stack(layers).mean(dim=0) if len(layers) > 1 else layers[0]
        for name in target.out_norm.split(","):
            y = norm_layer(y, name)
        return y.float()

    def compute_loss(
        self, prediction: Tensor, target: Tensor, targets: Tensor, encoded: Tensor, copies: int, features: Tensor
    ) -> Output:
        """Regression at the masked positions, class loss, and the two monitors."""
        config, size = self.config.loss, len(target)
        beta, scale = config.beta, self.config.loss_scale
        value = prediction.float()
        error = F.mse_loss(value, target, reduction="none")
        if beta > 0.0:
            error = F.smooth_l1_loss(value, target, reduction="none", beta=beta)
        losses = {"regression": error.sum() * scale}
        if config.class_weight > 0.0:
            cls = encoded[:, self.config.encoder.extra_tokens - 1].float()
            mean = targets.mean(dim=1).repeat_interleave(copies, dim=0)
            weight = class_weight(self.config, size, len(cls))
            losses["cls"] = F.mse_loss(cls, mean, reduction="none").sum() * (scale * weight)
        with torch.no_grad():
            deviations = variance_of(prediction.detach()), variance_of(target)
        total = torch.stack(list(losses.values())).sum()
        return Output(
            loss=total / max(size, 1), losses=losses, sample_size=size, prediction=prediction, targets=targets,
            target_rows=torch.empty(0), prediction_std=deviations[0], target_std=deviations[1],
            features=features.detach(),
        )  # fmt: skip

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """The average, tensor by tensor, in float32."""
        for name in self.teacher.owned:
            pairs = zip(
                self.teacher.get_submodule(name).parameters(), self.get_submodule(name).parameters(), strict=True
            )
            for average, source in pairs:
                average.mul_(decay).add_(source.float(), alpha=1.0 - decay)
