"""One training forward of data2vec: student, teacher, targets, loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2v_kernels import (
    Masks,
    MaskSampler,
    Noise,
    average_layers,
    gather_tokens,
    masked_regression_loss,
    masks_from_bool,
    restore_tokens,
)

from .config import Config
from .decoder import ConvDecoder
from .encoder import Context, MainBlocks
from .modalities import PatchStem, SinCosPositions
from .teacher import PARTS, Encoded, Teacher, encode_parts

_TARGET_EPS = 1e-5


@dataclass
class Output:
    """Result of a training forward. N rows, P masked positions in all, in row-major order (row, then position)."""

    loss: Tensor
    """0-D: sum of `losses` over `sample_size`."""
    losses: dict[str, Tensor]
    """Differentiable sums: "regression", and "cls" where the class token has a loss."""
    sample_size: int
    """P."""
    prediction: Tensor
    """(P,C)."""
    targets: Tensor
    """(B,T,C) float32 targets at all positions, without gradient."""
    target_rows: Tensor
    """(P,) int64: row of `targets` viewed as (B*T, C) that each prediction regresses on."""
    prediction_std: Tensor
    """0-D: mean over channels of the predictions' standard deviation over the P rows."""
    target_std: Tensor
    """0-D: the same of the targets."""
    class_prediction: Tensor | None = None
    """(N,C), or None without class loss."""
    class_target: Tensor | None = None
    """(N,C): mean target of the row's sample, or None."""

    @property
    def target(self) -> Tensor:
        """(P,C): the targets of `prediction`, copied out of `targets` when asked for."""
        return self.targets.flatten(0, 1).index_select(0, self.target_rows)


def make_mask_sampler(config: Config, seed: int | None = None) -> MaskSampler:
    """The sampler of `config.mask` on the token grid of `config.stem`; seed: `config.run.seed` unless given."""
    mask = config.mask
    return MaskSampler(
        mask.kind, grid=config.stem.grid, ratio=mask.ratio, span=mask.span, adjust=mask.adjust, inverse=mask.inverse,
        equal_counts="equal-mask-counts" in config.published, seed=config.run.seed if seed is None else seed,
    )  # fmt: skip


class Data2Vec(nn.Module):
    """data2vec 2.0 (Baevski et al. 2022b): a student that sees the visible tokens of M masked copies of each sample
    regresses, at the masked positions, on the teacher's averaged layers of the whole sample.

    Attributes: stem, positions, context, blocks (the student's encoder), decoder, teacher.
    """

    def __init__(self, config: Config) -> None:
        """Weights are drawn from torch's global generator; the teacher starts equal to the student.

        Args:
            config: the model's sections, and run.precision: bf16 gives the teacher bfloat16 working copies.

        Raises:
            ValueError: sizes that do not fit. NotImplementedError: version 1.
        """
        super().__init__()
        if config.version != 2:
            raise NotImplementedError(f"version: expected 2, got {config.version}")
        self.config = config
        width = config.encoder.width
        keep_residual = "pre-norm-without-residual" not in config.published
        self.grid = config.stem.grid
        self.stem = PatchStem(config.stem, width)
        self.positions = SinCosPositions(width, self.grid, config.stem.position_scale)
        self.context = Context(config.encoder, keep_residual)
        self.blocks = MainBlocks(config.encoder, keep_residual)
        self.decoder = ConvDecoder(config.decoder, width, dims=len(self.grid))
        student = {name: self.get_submodule(name) for name in PARTS}
        working_dtype = torch.bfloat16 if config.run.precision == "bf16" else None
        self.teacher = Teacher(student, config.ema.scope, working_dtype)
        self._sampler = make_mask_sampler(config)
        self._drawn = 0

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor | None = None,
        masks: Tensor | Masks | None = None,
        noise: Tensor | None = None,
        noise_keys: Tensor | None = None,
    ) -> Output:
        """One training forward; with `Masks` given, nothing is read from the device.

        Args:
            inputs: images (B, channels, H, W), floating.
            lengths: None for images.
            masks: bool (N,T), True = masked, copies of a sample adjacent; or `Masks`; None: drawn by config.mask,
                others at every call. N is a multiple of B. Every row masks the same number.
            noise: (N,T-V,C) decoder rows of the masked positions in ascending order; None: drawn.
            noise_keys: int64 (N,), keys of the drawn noise; None: drawn with torch's generator.

        Raises:
            ValueError, TypeError: inputs, masks or noise that do not fit.
        """
        features, lengths = self.stem(inputs, lengths)
        batch, tokens, _ = features.shape
        drawn, copies = self._resolve_masks(masks, batch, tokens)
        drawn = drawn.to(inputs.device, non_blocking=True)
        encoded = self._encode_visible(self.positions(features, lengths), drawn, copies)
        prediction = self._predict(encoded, drawn, noise, noise_keys)
        targets = self._make_targets(inputs, features, lengths)
        return self._compute_loss(prediction, encoded, targets, drawn.rows, copies)

    def encode(self, inputs: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> Encoded:
        """Features of unmasked inputs by the student, in evaluation mode and without gradient.

        Args:
            inputs, lengths: as in `forward`.
            layer: number of blocks that run, prenet blocks first, 0 to all; their output is returned as it is. None:
                all blocks and, in pre-norm models, the final norm.

        Returns:
            `Encoded`: features (B,T,C), valid (B,T) bool, class_token (B,C) or None.
        """
        return encode_parts({name: self.get_submodule(name) for name in PARTS}, inputs, lengths, layer)

    def _resolve_masks(self, masks: Tensor | Masks | None, batch: int, tokens: int) -> tuple[Masks, int]:
        """Masks with lists, and the copies M of each sample."""
        if masks is None:
            ids = range(self._drawn, self._drawn + batch)
            self._drawn += batch
            masks = self._sampler.draw(list(ids), epoch=0, copies=self.config.mask.copies)
        elif isinstance(masks, Tensor):
            masks = self._masks_from_tensor(masks)
        rows = masks.mask.shape[0]
        if masks.mask.dim() != 2 or masks.mask.shape[1] != tokens or batch == 0 or rows % batch or rows == 0:
            raise ValueError(
                f"masks: expected (N, {tokens}) with N a multiple of the {batch} samples, got {tuple(masks.mask.shape)}"
            )
        if masks.keep is None or masks.restore is None:
            counts = masks.mask.sum(dim=1)
            odd = (counts != counts[0]).nonzero()[:, 0].tolist()
            raise ValueError(
                f"masks: expected the same number of masked positions in every row, row 0 has {int(counts[0])}; got "
                f"{counts[odd].tolist()[:8]} in rows {odd[:8]}"
            )
        return masks, rows // batch

    def _masks_from_tensor(self, mask: Tensor) -> Masks:
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"masks: expected bool (N, T), got {mask.dtype} {tuple(mask.shape)}")
        mask = mask.detach().cpu()
        masks = masks_from_bool(mask)
        if masks.keep is None and "visible-count-of-row-0" in self.config.published and mask.shape[0] > 0:
            return _cut_to_first_row(masks)
        return masks

    def _encode_visible(self, x: Tensor, masks: Masks, copies: int) -> Tensor:
        """(N,E+V,C): the student's encoder on the visible tokens of every masked copy."""
        assert masks.keep is not None
        encoded: Tensor = self.blocks(self.context(gather_tokens(x, masks.keep, clones=copies)))
        return encoded

    def _predict(self, encoded: Tensor, masks: Masks, noise: Tensor | None, noise_keys: Tensor | None) -> Tensor:
        """(P,C): the decoder at the masked positions."""
        assert masks.keep is not None and masks.restore is not None
        rows, tokens = masks.restore.shape
        visible = masks.keep.shape[1]
        kept = self.decoder.dropout(encoded[:, encoded.shape[1] - visible :])
        fill = self._make_fill(kept, tokens - visible, noise, noise_keys)
        hidden = self.decoder(restore_tokens(kept, masks.restore, fill=fill), self.grid)
        # The projection is per token: only the rows that enter the loss are projected.
        selected = gather_tokens(hidden.reshape(1, rows * tokens, hidden.shape[-1]), masks.rows[None])
        return self.decoder.project(selected[0])

    def _make_fill(self, kept: Tensor, masked: int, noise: Tensor | None, noise_keys: Tensor | None) -> Tensor | Noise:
        rows, _, width = kept.shape
        if noise is not None:
            if tuple(noise.shape) != (rows, masked, width):
                raise ValueError(f"noise: expected shape ({rows}, {masked}, {width}), got {tuple(noise.shape)}")
            return noise.to(kept)
        if noise_keys is None:
            noise_keys = torch.randint(-(2**63), 2**63 - 1, (rows,), device=kept.device)
        return Noise(self.config.mask.noise_std, noise_keys.to(kept.device, non_blocking=True))

    @torch.no_grad()
    def _make_targets(self, inputs: Tensor, features: Tensor, lengths: Tensor | None) -> Tensor:
        """(B,T,C) targets: mean of the teacher's K normalised tensors, normalised again (section 3.3 of the paper)."""
        target = self.config.target
        layers = self.teacher.collect(inputs, features, lengths, target.top_k, target.source)
        return average_layers(layers, norm=target.norm, out_norm=target.out_norm, lengths=lengths, eps=_TARGET_EPS)

    def _compute_loss(self, prediction: Tensor, encoded: Tensor, targets: Tensor, rows: Tensor, copies: int) -> Output:
        config = self.config.loss
        batch, tokens, _ = targets.shape
        sample_size = rows.shape[0]
        # Row r of the student belongs to sample r // M; the targets are never repeated.
        row = rows // tokens
        target_rows = rows - (row - row // copies) * tokens
        beta, scale = config.beta, self.config.loss_scale
        regression = masked_regression_loss(prediction, targets, None, target_rows, beta=beta, scale=scale)
        losses = {"regression": regression.loss}
        class_prediction = class_target = None
        if config.class_weight > 0.0:
            class_prediction = encoded[:, self.config.encoder.extra_tokens - 1]
            class_target = targets.mean(dim=1).repeat_interleave(copies, dim=0)
            weight = self._class_weight(sample_size, batch * copies)
            losses["cls"] = masked_regression_loss(
                class_prediction, class_target, beta=beta, scale=scale * weight
            ).loss  # fmt: skip
        total = torch.stack(list(losses.values())).sum()
        return Output(
            loss=total / max(sample_size, 1), losses=losses, sample_size=sample_size, prediction=prediction,
            targets=targets, target_rows=target_rows, prediction_std=regression.prediction_std,
            target_std=regression.target_std, class_prediction=class_prediction, class_target=class_target,
        )  # fmt: skip

    def _class_weight(self, sample_size: int, rows: int) -> float:
        """Factor on the class loss, which the division by the sample size turns into a weight of the mean over rows.

        Published: weight * P, so that the effective weight grows with the rows of a micro-batch. Here it is
        weight * class_rows for any number of rows.
        """
        config = self.config.loss
        if "class-loss-per-micro-batch" in self.config.published:
            return config.class_weight * sample_size
        return config.class_weight * config.class_rows * sample_size / rows


def _cut_to_first_row(masks: Masks) -> Masks:
    """Lists with row 0's number of visible tokens in every row, as the published code makes them.

    A row that masks fewer loses its last visible tokens; in one that masks more, its first masked tokens stay visible.
    """
    mask = masks.mask
    visible = mask.shape[1] - int(mask[0].sum())
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return Masks(mask, order[:, :visible].to(torch.int32), order.argsort(dim=1).to(torch.int32), masks.rows)
