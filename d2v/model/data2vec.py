"""One training forward of data2vec: student, teacher, targets, loss."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from d2v.config import Config
from d2v.config.finetune import FineTuneConfig, read_config
from d2v.config.inputs import find_kind
from d2v.folder import CONFIG, MODEL, build_filled, find_model, load_tensors
from d2v.model.decoder import ConvDecoder, RegressionHead, TransformerDecoder, initialise_xavier
from d2v.model.layers import Linear, valid_positions
from d2v.model.losses import add_losses, compute_loss
from d2v.model.masking import MaskedRows, resolve_masks
from d2v.model.stems import PADDING, InputStem, make_positions, make_stem
from d2v.model.stems.positions import ConvPositions
from d2v.model.targets import Output, make_targets
from d2v.model.teacher import (
    PARTS,
    Encoded,
    GraphedTargets,
    Layers,
    Record,
    Teacher,
    encode_parts,
    evaluating,
)
from d2v.model.transformer import InputBlock, TransformerEncoder
from d2v.runtime import choose_device, span
from d2v_kernels import Masks, Noise, gather_tokens, restore_tokens

WORKING_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtype of the teacher's working copies by `run.precision`."""


class Data2Vec(nn.Module):
    """data2vec 2.0 (Baevski et al. 2022b): a student that sees the visible tokens of M masked copies of each sample
    regresses, at the masked positions, on the teacher's averaged layers of the whole sample. In 1.0 (Baevski et al.
    2022a) it sees a mask token at the masked positions and has a regression head in place of the decoder.

    Attributes: stem, positions, context, blocks (the student's encoder), decoder (2.0) or head (1.0), mask_token (1.0
    speech and vision), shared_decoder and reconstruction (rare losses of 2.0), teacher; origin: what a loader of
    foreign files remembers, to write the same again.
    """

    origin: object = None
    stem: Any
    positions: Any

    @property
    def saved_config(self) -> Config:
        """What a saved folder holds."""
        return self.config

    def __init__(self, config: Config) -> None:
        """Weights are drawn from torch's global generator; the teacher starts equal to the student.

        Args:
            config: the model's sections, and run.precision: bf16 and fp16 give the teacher such working copies.

        Raises:
            ValueError: sizes that do not fit.
        """
        super().__init__()
        self.config, self.grid, self.takes_ids = config, config.grid, "ids" in config.traits
        width = config.encoder.width
        keep_residual = "pre-norm-without-residual" not in config.published
        self.stem = make_stem(config)
        self.positions = make_positions(config)
        self.context = InputBlock(config.encoder, keep_residual)
        self.blocks = TransformerEncoder(config.encoder, keep_residual)
        self.decoder: ConvDecoder | TransformerDecoder | None = None
        self.shared_decoder: ConvDecoder | None = None
        self.head: RegressionHead | None = None
        self.mask_token: nn.Parameter | None = None
        self.reconstruction: nn.Linear | None = None
        if config.version == 2:
            dims = 1 if self.grid is None else 2
            choice, dropout = config.run.convolution, config.decoder.input_dropout
            if config.decoder.kind == "conv":
                self.decoder = ConvDecoder(config.decoder, width, dims, choice, dropout)
            else:
                self.decoder = TransformerDecoder(config.decoder, config.encoder, keep_residual)
            if config.shared_decoder.layers > 0:
                self.shared_decoder = ConvDecoder(config.shared_decoder, width, 1, choice, dropout)
                initialise_xavier(self.shared_decoder)
        else:
            self.head = RegressionHead(config.head, width)
            if not self.takes_ids:  # which have a mask token of their own
                self.mask_token = nn.Parameter(torch.rand(width))
        with torch.no_grad():
            self.stem.initialise_model(self)
        if config.loss.reconstruction > 0.0:
            self.reconstruction = Linear(width, self.stem.raw_width)
        student = {name: self.get_submodule(name) for name in PARTS}
        # A sharded teacher is cast as it is gathered.
        sharded = config.run.parallel != "ddp"
        working_dtype = None if sharded else WORKING_DTYPES.get(config.run.precision)
        self.teacher = Teacher(student, config.ema.scope, working_dtype, sharded)
        self.graphed: GraphedTargets | None = None
        self.compiled: Callable[..., Output] | None = None
        self.rounds_targets = False
        """Whether targets have the bits that a cache keeps of them."""
        self._drawn = 0

    def __repr__(self) -> str:
        """One line; `print(model.blocks)` and the other attributes show the layers."""
        stem, encoder = self.config.stem, self.config.encoder
        teacher = sum(p.numel() for p in self.teacher.parameters())
        student = sum(p.numel() for p in self.parameters()) - teacher
        about = f"{self.config.version}.0, {stem.modality}: {find_kind(stem.modality).describe(stem)}"
        blocks = f"{encoder.prenet_depth + encoder.depth} blocks of width {encoder.width}"
        return f"Data2Vec({about}; {blocks}; parameters: student {student:,}, teacher {teacher:,})"

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor | None = None,
        masks: Tensor | Masks | None = None,
        noise: Tensor | None = None,
        noise_keys: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Output:
        """One training forward; with `Masks` given, nothing is read from a device (text: with lengths too).

        Args:
            inputs: images (B, channels, H, W), spectrograms (B, 1, frames, 128) or waveforms (B,S), floating, as the
                modality of `d2v.data` makes them; or token ids (B,T) int64, not yet masked.
            lengths: (B,) int64 on the host, samples or tokens before the padding; None: no padding (text: counted from
                the padding id); images: None.
            masks: bool (N,T), True = masked, copies of a sample adjacent; or `Masks`; None: drawn by config.mask,
                others at every call. N is a multiple of B. In 2.0 every row masks the same number.
            noise: (N,T-V,C) decoder rows of the masked positions in ascending order; None: drawn. 2.0 only.
            noise_keys: int64 (N,), keys of the drawn noise; None: drawn with torch's generator. 2.0 only.
            targets: (B,T,C) on the inputs' device, in place of the teacher's; None: the teacher's.

        Raises:
            ValueError, TypeError: inputs, lengths, masks or noise that do not fit; a model without the parts that only
                pre-training uses.
        """
        self._check_parts()
        tokens, valid = self.stem.measure(inputs, lengths)
        inputs = self.stem.mark(inputs, lengths)
        batch = inputs.shape[0]
        rows = resolve_masks(self.config, masks, batch, tokens, valid, self._drawn)
        self._drawn += batch if masks is None else 0
        drawn = rows.masks.to(inputs.device, non_blocking=True)
        if noise is not None:
            self._check_noise(noise, rows.masks)
        elif noise_keys is None and self.decoder is not None:
            # In front of the graph: a compiler draws other numbers.
            noise_keys = torch.randint(-(2**63), 2**63 - 1, (len(rows.masks.mask),), device=inputs.device)
        if self.teacher.working_dtype is not None:
            self.teacher.working_parts()  # rewritten where the averages came from a checkpoint
        if self.compiled is None:
            return self._compute(inputs, drawn, rows, valid, noise, noise_keys, targets)
        if self.config.version == 1 or valid is not None:
            # Differs from batch to batch: a size of the graph from the first one on. Others become one as they change.
            torch._dynamo.maybe_mark_dynamic(drawn.rows, 0)
        return self.compiled(self, inputs, drawn, rows, valid, noise, noise_keys, targets)

    def _compute(
        self, inputs: Tensor, drawn: Masks, rows: MaskedRows, valid: Tensor | None, noise: Tensor | None,
        noise_keys: Tensor | None, targets: Tensor | None,
    ) -> Output:  # fmt: skip
        """What `forward` does once everything that the host decides is decided: one graph for a compiler.

        Args:
            inputs, noise, noise_keys, targets: of `forward`, checked.
            drawn: the masks of `rows` on the device.
            rows: of the student.
            valid: (B,) tokens before the padding, on the host; None: no padding.
        """
        inputs = self.stem.prepare(inputs, valid)
        with span("student"):
            encode = self._encode_masked if self.decoder is None else self._encode_visible
            features, encoded = encode(inputs, drawn, rows, valid)
        shared = None
        with span("decoder"):
            if self.decoder is None:
                prediction = self._regress(encoded, drawn.rows, drawn.mask.shape[1])
            else:
                prediction = self._decode(self.decoder, encoded, drawn, rows, noise, noise_keys)
            if self.shared_decoder is not None:  # with noise of its own
                keys = None if noise_keys is None else ~noise_keys
                shared = self._decode(self.shared_decoder, encoded, drawn, rows, noise, keys)
        only_masked = "masked-tokens-only-teacher" in self.config.published
        with span("teacher"):
            if targets is not None:
                targets = targets.float()
            elif only_masked and self.takes_ids and self.decoder is None:
                targets = self._make_targets_of_masked_tokens(inputs, drawn.mask, rows.masks.mask)
            else:
                targets = self._make_targets(inputs, features, valid)
            if self.rounds_targets:
                targets = targets.bfloat16().float()
        with span("loss"):
            out = self.compute_loss(prediction, encoded, targets, features, drawn.rows, rows.copies, valid)
            if shared is None and self.reconstruction is None:
                return out
            pixels = raw = None
            if self.reconstruction is not None:
                made = prediction if shared is None else shared
                pixels, raw = self.reconstruction(made), self.stem.raw_tokens(inputs)
            return add_losses(self.config, out, shared, pixels, raw)

    def compute_loss(self, *made: Any) -> Output:
        """Of `d2v.model.losses.compute_loss`; other losses replace it."""
        return compute_loss(self.config, *made)

    def encode(self, inputs: Tensor, lengths: Tensor | None = None, layer: Layers = None) -> Encoded:
        """Features of unmasked inputs by the student, in evaluation mode and without gradient.

        Args:
            inputs, lengths: as in `forward`. Padding is invisible: a sample has the same features alone and in a batch.
            layer: number of blocks that run, prenet blocks first, 0 to all; their output is returned as it is. None:
                all blocks and, in pre-norm models, the final norm. Several numbers: the output of each.

        Returns:
            `Encoded`: features (B,T,C), of K layers (B,T,K,C); valid (B,T) bool; class_token (B,C), (B,K,C) or None.
        """
        return encode_parts({name: self.get_submodule(name) for name in PARTS}, inputs, lengths, layer)

    def features(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B,T,C): features of `encode`, inputs as in `forward`, all blocks; the training flag stays as it was."""
        return self.encode(inputs, lengths).features

    @staticmethod
    def from_checkpoint(path: str | Path, device: str = "cpu") -> Data2Vec:
        """The model of a run folder, a checkpoint in it or an exported folder, in evaluation mode; of a fine-tuned one
        the encoder.

        Raises:
            ValueError: no such folder, or files in it that are damaged or do not belong together.
        """
        folder = find_model(str(path))
        config = read_config(folder / CONFIG)
        tensors = load_tensors(folder, MODEL)
        if isinstance(config, FineTuneConfig):
            tensors = {n.removeprefix("encoder."): t for n, t in tensors.items() if n.startswith("encoder.")}
        what = f"checkpoint {str(folder)!r}"
        model = build_filled(lambda: build_encoder(config, tensors), config, tensors, what)
        return model.to(choose_device(device)).eval().drop_training_settings()

    def drop_training_settings(self) -> Data2Vec:
        """Takes off, in place, what is right in training only, and returns the model: the precision of the teacher's
        working copies, and statistics and positions that see padding: features would depend on the rest of a batch."""
        self.teacher.working_dtype = None
        for part in self.modules():
            if isinstance(part, InputStem):
                part.over_padding = False
            elif isinstance(part, ConvPositions):
                part.zero_input = part.zero_between = True
        return self

    def run_encoder(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """(N,E+T,C): the encoder's output of full rows of features (N,T,C)."""
        bias = self.positions.attention_bias(x, lengths)
        return self.blocks(self.context(self.positions(x, lengths), bias), bias)

    def hide_tokens(self, x: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """Features (N,T,C) with the mask token (1.0) or noise (2.0) at the masked positions.

        Args:
            mask: bool (N,T).
            keys: int64 (N,), keys of the noise; None: drawn. 2.0 only.

        Raises:
            ValueError: a model of 1.0 without a mask token.
        """
        tokens = x.shape[1]
        positions = torch.arange(tokens, device=x.device)
        fill: Tensor | Noise
        if self.mask_token is not None:
            restore, fill = torch.where(mask, tokens, positions), self.mask_token.to(x.dtype)
        elif self.config.version == 1:
            raise ValueError("mask: expected None for an encoder without a mask token, got a mask")
        else:
            if keys is None:
                keys = torch.randint(-(2**63), 2**63 - 1, (len(x),), device=x.device)
            restore = torch.where(mask, tokens + positions, positions)
            fill = Noise(self.config.mask.noise_std, keys.to(x.device))
        return restore_tokens(x.contiguous(), restore, fill=fill)

    def _encode_visible(
        self, inputs: Tensor, masks: Masks, rows: MaskedRows, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """2.0: the stem's features (B,T,C), and the encoder's (N,E+V,C) of the visible tokens of every copy."""
        features = self.stem(inputs, lengths)
        bias = self.positions.attention_bias(features, rows.kept_lengths, masks.keep)
        x = self.positions.visible(features, masks, rows.copies, lengths)
        return features, self.blocks(self.context(x, bias), bias)

    def _encode_masked(
        self, inputs: Tensor, masks: Masks, rows: MaskedRows, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """1.0: the stem's features (B,T,C) that the teacher takes, and the encoder's (N,E+T,C) of every masked copy."""
        if self.mask_token is None:
            assert self.config.stem.mask_token is not None
            copies = inputs.repeat_interleave(rows.copies, dim=0) if rows.copies > 1 else inputs
            x = self.stem(copies.masked_fill(masks.mask, self.config.stem.mask_token), rows.lengths)
            features = x
            if "stem" not in self.teacher.owned:
                with torch.no_grad(), evaluating(self.stem):
                    features = self.stem(inputs, lengths)
        else:
            features = self.stem(inputs, lengths)
            x = functional.dropout(features, self.config.stem.dropout, self.training)
            x = x.repeat_interleave(rows.copies, dim=0) if rows.copies > 1 else x
            x = self.hide_tokens(x, masks.mask)
        return features, self.run_encoder(x, rows.lengths)

    def _regress(self, encoded: Tensor, rows: Tensor, tokens: int) -> Tensor:
        """(P,C): the head at the masked positions."""
        assert self.head is not None
        extra = encoded.shape[1] - tokens
        if extra:
            rows = rows + (rows // tokens + 1) * extra
        selected = gather_tokens(encoded.reshape(1, -1, encoded.shape[2]), rows[None])[0]
        if "no-head-1.0-vision" in self.config.published and "vision" in self.config.traits:
            return selected
        return self.head(selected)

    def _decode(
        self, decoder: ConvDecoder | TransformerDecoder, encoded: Tensor, masks: Masks, rows: MaskedRows,
        noise: Tensor | None, noise_keys: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """(P,C): a decoder at the masked positions."""
        assert masks.keep is not None and masks.restore is not None
        count, tokens = masks.restore.shape
        visible = masks.keep.shape[1]
        kept = decoder.take(encoded[:, encoded.shape[1] - visible :])
        if self.config.decoder.kind == "cross" and isinstance(decoder, TransformerDecoder):
            table = self.positions(kept.new_zeros(1, tokens, kept.shape[2]))[0]
            kept = kept + table[masks.keep.long()] if self.config.decoder.positions_all else kept
            queries = table[masks.rows % tokens].unflatten(0, (count, -1))
            return decoder.project(decoder.attend(queries, kept).flatten(0, 1))
        fill: Tensor | Noise
        if noise is not None:
            fill = noise.to(kept)
        else:
            assert noise_keys is not None
            fill = Noise(self.config.mask.noise_std, noise_keys.to(kept.device, non_blocking=True))
        x = restore_tokens(kept, masks.restore, fill=fill)
        if self.config.decoder.positions_masked:
            x = x + masks.mask[..., None] * self.positions(torch.zeros_like(x[:1]))
        if self.config.decoder.positions_all:
            x = self.positions(x)
        hides = "positions-see-padding" not in self.config.published
        valid = valid_positions(rows.lengths, tokens, x.device) if hides else None
        hidden = decoder(x, (tokens,) if self.grid is None or decoder is self.shared_decoder else self.grid, valid)
        # The projection is per token: only the rows that enter the loss are projected.
        selected = gather_tokens(hidden.reshape(1, count * tokens, hidden.shape[-1]), masks.rows[None])
        return decoder.project(selected[0])

    def _check_parts(self) -> None:
        """`ValueError` for a model that `strip_pretraining` has been at."""
        missing = [] if self.decoder is not None or self.head is not None else ["decoder or head"]
        missing += [] if self.teacher.owned else ["the teacher's averages"]
        if missing:
            raise ValueError(
                f"forward: expected a model that can be pre-trained, got one without {', '.join(missing)} (an imported "
                "or fine-tuned encoder); encode() and features() need neither"
            )

    def _check_noise(self, noise: Tensor, masks: Masks) -> None:
        if masks.keep is None or self.decoder is None:
            raise ValueError(f"noise: expected None, 1.0 has no decoder; got shape {tuple(noise.shape)}")
        rows, tokens = masks.mask.shape
        expected = (rows, tokens - masks.keep.shape[1], self.config.encoder.width)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise: expected shape {expected}, got {tuple(noise.shape)}")

    @torch.no_grad()
    def _make_targets(self, inputs: Tensor, features: Tensor, lengths: Tensor | None) -> Tensor:
        """(B,T,C) targets: mean of the teacher's K normalised tensors, normalised again (section 3.3 of the paper)."""
        if self.graphed is None or lengths is not None:
            return self._compute_targets(inputs, features, lengths)
        return self.graphed(inputs, features)

    def _compute_targets(self, inputs: Tensor, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        target = self.config.target
        layers = self.teacher.collect(inputs, features, lengths, target.top_k, target.source)
        return make_targets(self.config, layers, lengths)

    def graph_teacher(self, record: Record | None = None) -> None:
        """From here on the targets of batches without padding come from a recording (`d2v.model.teacher`).

        record: as in `GraphedTargets`; unset: CUDA graphs.
        """
        self.graphed = GraphedTargets(torch.no_grad()(self._compute_targets), record)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """From here on a training forward is one graph, from the stem to the loss; options as of `torch.compile`.

        What reads values on the host stays in front of it: checks of the inputs, drawing and checking of masks. A copy
        of the model, or one that was pickled, is not compiled. Layer drop and the teacher of masked tokens alone
        (`published`) cannot be part of a graph: they raise torch._dynamo.exc.Unsupported, or compile without end.
        """
        self.compiled = torch.compile(Data2Vec._compute, *args, fullgraph=True, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compiled": None}

    @torch.no_grad()
    def _make_targets_of_masked_tokens(self, inputs: Tensor, mask: Tensor, host_mask: Tensor) -> Tensor:
        """(B,T,C) targets as published 1.0 text makes them: the teacher gets the masked tokens only, as if the others
        were padding. They are moved to the front, where that is the same."""
        if mask.shape[0] != inputs.shape[0]:
            raise ValueError(f"masks: expected one row a sample, got {mask.shape[0]} rows of {inputs.shape[0]} samples")
        lengths = host_mask.sum(dim=1).cpu()
        if not bool((lengths > 0).all()):
            raise ValueError(f"masks: expected a masked token in every row, got counts {lengths.tolist()}")
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        front = inputs.gather(1, order)
        front = front.masked_fill(~mask.gather(1, order), PADDING)
        with evaluating(self.stem):
            features = self.stem(front, lengths)
        y = self._make_targets(front, features, lengths)
        return gather_tokens(y, order.argsort(dim=1))


def build_model(config: Config, device: torch.device | None = None) -> Data2Vec:
    """The untrained model of a configuration; its weights are a function of `run.seed`."""
    torch.manual_seed(config.run.seed)
    model = Data2Vec(config)
    return model.to(device) if device is not None else model


def build_encoder(config: Config, names: Collection[str]) -> Data2Vec:
    """A model without its weights; only random draws of a fork are made.

    Args:
        config: of the model. Of an imported one, what predicts may be left out; of a fine-tuned one, all of the
            pre-training, and the final norm is where the head has one behind its pool.
        names: of the tensors that will be loaded; the parts of which there is none are those.
    """
    with torch.random.fork_rng(devices=[]):
        model = Data2Vec(config)
    has = {part: any(n.startswith(f"{part}.") for n in names) for part in ("decoder", "head", "teacher")}
    tuned = isinstance(config, FineTuneConfig)
    strip_pretraining(model, decoder=not (has["decoder"] or has["head"]), teacher=tuned and not has["teacher"])
    if isinstance(config, FineTuneConfig):
        if "mask_token" not in names:
            model.mask_token = None
        if config.finetune.head.kind == "pooled" and config.finetune.head.norm_eps is not None:
            model.blocks.norm = None
    return model


def strip_pretraining(model: Data2Vec, *, decoder: bool = True, teacher: bool = True) -> Data2Vec:
    """Removes, in place, what only pre-training uses, and returns the model.

    Args:
        decoder: the decoder (2.0) or the regression head (1.0).
        teacher: the averages; `model.teacher.encode` then uses the student's weights.
    """
    if decoder:
        model.decoder = model.shared_decoder = model.head = model.reconstruction = None
    if teacher:
        for name in model.teacher.owned:
            delattr(model.teacher, name)
    return model
