"""The objective of fine-tuning: the loss of a task on labelled samples."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from d2v.config.finetune import Decoding, FineTuneConfig
from d2v.data.dataset import Batch, EvaluationSamples, Modality, Note, TrainSamples, random_stream
from d2v.data.loader import load_pass, load_updates
from d2v.data.sampler import UpdateSampler
from d2v.evaluate.pieces import PieceBatch, Uncut
from d2v.finetune.augment import erase_rectangles, mix_images, smooth_targets
from d2v.finetune.data import Labelled, LabelledBatch, LabelledCollate, LabelledSource
from d2v.finetune.decoding import Decoder, find_seam, read_logits
from d2v.finetune.scores import headline, quick_score
from d2v.finetune.spelling import Spelling
from d2v.model.data2vec import Data2Vec
from d2v.model.finetuned import FineTuned
from d2v.train.distributed import Ranks
from d2v.train.monitors import find_broken
from d2v.train.objective import Objective, Step, autocast

CHOICE = "valid_choice"
"""Metric that chooses the checkpoint: the task's score, and its loss where scores are equal."""
_TIE = 1e-7
STREAM_MIX = 102
"""Purpose of the random stream of mixup, CutMix and erasing."""


@dataclass(frozen=True)
class Outcome:
    """What a model made of one sample."""

    row: int
    """Number of the sample in its source."""
    truth: Any
    """Class number, numbers of labels, number, or transcript."""
    predicted: Any
    """The same; of labels the probability of each (K,)."""
    loss: float
    confidence: float
    """Probability of the predicted class, or of the most probable label; CTC: mean log-probability of the best labels;
    numbers: nan."""


class FineTuning(Objective):
    """A fine-tuned model and its labelled samples."""

    model: FineTuned
    may_skip = True
    """A frozen encoder or stem has no gradient, nor has a skipped block, nor a class token that is not read."""

    def __init__(
        self, config: FineTuneConfig, model: FineTuned, modality: Labelled, source: LabelledSource,
        valid: LabelledSource | None, spelling: Spelling | None,
    ) -> None:  # fmt: skip
        self.config, self.model, self.source, self.valid = config, model, source, valid
        self.modality, self.spelling, self.noun = modality, spelling, modality.noun
        self.options, self.task = config.finetune.options, config.finetune.head.task
        self._update = 0
        self.set_recompute()

    # ---- the model ------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> Data2Vec:
        """The pre-trained part."""
        return self.model.encoder

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups by weight decay and learning rate: block i of N has rate d^(N - i), the head 1, what precedes the
        blocks 1 (published 2.0), or d^(N + 1) with `decay_stem` (BEiT)."""
        optim = self.config.optim
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                decay = optim.weight_decay if optim.decay_all or parameter.dim() >= 2 else 0.0
                groups.setdefault((decay, self.rate_of(name)), []).append(parameter)
        return [{"params": p, "weight_decay": decay, "rate": rate} for (decay, rate), p in groups.items()]

    def rate_of(self, name: str) -> float:
        """Learning rate of a parameter over that of the head."""
        decay, depth = self.options.layer_decay, len(self.blocks())
        parts = name.split(".")
        if parts[0] == "head":
            return 1.0
        if len(parts) > 3 and parts[2] == "blocks" and parts[1] in ("context", "blocks"):
            prenet = len(self.model.encoder.context.blocks) if parts[1] == "blocks" else 0
            return decay ** (depth - prenet - int(parts[3]))
        if parts[1] == "blocks":  # a final norm
            return 1.0
        return decay ** (depth + 1) if self.options.decay_stem else 1.0

    # ---- an update ------------------------------------------------------------------------------------------

    def updates(self, first: int, ranks: Ranks) -> Generator[list[Batch], None, None]:
        """Labelled micro-batches, with masks of speech."""
        sampler = UpdateSampler(self.config, self.source, first, self.config.run.last, ranks.rank, ranks.size)
        dataset = TrainSamples(self.source, self.modality, self.config.run.seed)
        collate = LabelledCollate(self.config, self.modality, self.spelling, training=True)
        return load_updates(self.config, dataset, collate, sampler, ranks.device)

    def weigh(self, batch: Batch) -> float:
        """Samples."""
        return float(len(batch))

    def begin_update(self, update: int) -> None:
        """One draw of the skipped blocks for all ranks; freezes the encoder in the first updates."""
        self._update = update
        self.model.frozen = update <= self.options.freeze_encoder
        super().begin_update(update)

    def forward(self, network: nn.Module, batch: Batch, ranks: Ranks) -> Step:
        """The task's loss, summed over samples."""
        assert isinstance(batch, LabelledBatch)
        inputs = self.modality.prepare(batch.inputs.to(ranks.device, non_blocking=True))
        targets = batch.targets.to(ranks.device, non_blocking=True)
        if self.task in ("classification", "multi-label"):
            targets = smooth_targets(targets, len(self.model.labels), self.options.label_smoothing)
            if self.config.stem.modality == "vision":
                rng = random_stream(self.config.run.seed, self._update, batch.rows[0], STREAM_MIX)
                inputs = erase_rectangles(inputs, self.options.erasing, rng)
                inputs, targets = mix_images(inputs, targets, self.options, rng)
        with autocast(self.config.run.precision, ranks.device):
            logits = network(
                inputs, batch.lengths, mask=_move(batch.hidden, ranks.device),
                channels=_move(batch.channels, ranks.device), noise_keys=_move(batch.noise_keys, ranks.device),
            )  # fmt: skip
        losses = self.measure_losses(logits, targets, batch)
        values = {}
        if self.task == "classification":
            hits = (logits.argmax(-1) == targets.argmax(-1)).sum()
            values["accuracy"] = hits * (1.0 / self.config.data.global_batch)
        return Step({"task": losses.sum()}, values, logits.detach())

    def measure_losses(
        self, logits: Tensor, targets: Tensor, batch: LabelledBatch, zero_infinity: bool = True
    ) -> Tensor:
        """(B,) float32: cross entropy with (soft) targets, binary ones summed over labels, squared error, or CTC.

        zero_infinity: CTC: of a transcript that is longer than its frames the loss is 0, not infinite.
        """
        logits = logits.float()
        if self.task == "classification":
            soft = targets if targets.dim() == 2 else F.one_hot(targets, logits.shape[1]).float()
            return -(soft * logits.log_softmax(-1)).sum(-1)
        if self.task == "multi-label":
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)
        if self.task == "regression":
            return (logits[:, 0] - targets).square()
        assert batch.target_lengths is not None
        lengths = token_lengths(batch, logits)
        return F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), targets, lengths, batch.target_lengths,
            blank=self.config.finetune.head.blank, reduction="none",
            zero_infinity=zero_infinity,
        )  # fmt: skip

    # ---- what is shown --------------------------------------------------------------------------------------

    def monitor(self, step: Step, batch: Batch) -> dict[str, float]:
        """Spread of the outputs: 0 where a model predicts the same for every sample."""
        logits = step.out.float()
        flat = logits.flatten(0, -2)
        return {"output_std": float(flat.std(dim=0).mean()) if len(flat) > 1 else math.nan}

    def validate(self, network: nn.Module, ranks: Ranks) -> dict[str, float]:
        """Loss and the score that chooses a checkpoint, on the held-out samples."""
        assert isinstance(self.valid, LabelledSource)
        if len(self.valid) < ranks.size:
            raise ValueError(f"valid: expected a sample for each of {ranks.size} ranks, got {len(self.valid)}")
        outcomes = [o for part in ranks.gather(self.predict(self.valid, ranks)) for o in part]
        if not outcomes:
            raise ValueError(f"valid: expected {self.noun} that can be decoded, got none of {len(self.valid)}")
        name, best = headline(self.task)
        truth, predicted = [o.truth for o in outcomes], [o.predicted for o in outcomes]
        loss, score = float(np.mean([o.loss for o in outcomes])), quick_score(name, truth, predicted)
        # Few samples give many equal scores: of those the one with the least loss.
        choice = score + (_TIE if best == "lowest" else -_TIE) * loss
        scores = {"valid_loss": loss, f"valid_{name}": score, CHOICE: choice}
        if self.task == "classification" and len(self.model.labels) == 2:
            scores["valid_f1"] = quick_score("f1", truth, predicted)
        return scores

    @torch.no_grad()
    def predict(self, source: LabelledSource, ranks: Ranks, decoder: Decoder | None = None) -> list[Outcome]:
        """Outcomes of this rank's share of the samples that can be decoded, as validation sees them: cut to what the
        model is trained on, in its precision."""
        data = self.config.data
        if decoder is None and self.spelling is not None:
            decoder = Decoder(Decoding(), self.spelling, self.config.finetune.head.blank)
        collate = LabelledCollate(self.config, self.modality, self.spelling, training=False)
        size = data.micro_batch or -(-data.global_batch // ranks.size)
        samples = EvaluationSamples(source, self.modality)
        batches = load_pass(self.config, samples, collate, ranks.device, size, ranks.rank, ranks.size, data.workers)
        self.model.eval()
        outcomes: list[Outcome] = []
        with contextlib.closing(batches):
            for batch, counted in ranks.in_step(batches):
                assert isinstance(batch, LabelledBatch)
                inputs = self.modality.prepare(batch.inputs.to(ranks.device))
                with autocast(self.config.run.precision, ranks.device):
                    logits = self.model(inputs, batch.lengths)
                losses = self.measure_losses(logits, batch.targets.to(ranks.device), batch)
                if counted:
                    outcomes += self._judge(source, batch, logits.float().cpu(), losses.cpu(), decoder)
        return outcomes

    @torch.no_grad()
    def predict_whole(
        self, source: LabelledSource, device: torch.device, decoder: Decoder | None, uncut: Uncut, precision: str
    ) -> tuple[list[Outcome], tuple[Note, ...]]:
        """Outcomes of all samples that can be decoded, whatever their length, and notes about others and what is cut.

        The loss of a transcript that is longer than its frames is infinite.

        Raises:
            ValueError: outputs that are not finite.
        """
        collate = LabelledCollate(self.config, Labelled(uncut.modality), self.spelling, training=False)
        size, workers = self.config.data.micro_batch or self.config.data.global_batch, self.config.data.workers
        outcomes: list[Outcome] = []
        notes: list[Note] = []
        self.model.eval()
        for part in uncut.batches(source, device, size, modality=collate.modality, workers=workers):
            with autocast(precision, device):
                logits = run_model(self.model, uncut.modality, part, device)
            rows = tuple(sample.sample_id for sample in part.samples)
            bad = {note.sample_id for note in part.notes if note.kind == "bad"}
            for row, found in zip(rows, logits, strict=True):
                if row not in bad and not bool(torch.isfinite(found).all()):
                    raise ValueError(f"test: expected finite outputs, got others for {source.describe(row)}")
            targets, counts = collate.stack_targets([None if i in bad else source.targets[i] for i in rows])
            batch = LabelledBatch(
                part.inputs, None, torch.tensor([len(found) for found in logits]), None, None, (), targets, counts,
                None, None, rows, tuple(i for i, row in enumerate(rows) if row in bad),
            )  # fmt: skip
            joined = pad_sequence(logits, batch_first=True)
            losses = self.measure_losses(joined, targets, batch, zero_infinity=False)
            outcomes += self._judge(source, batch, joined, losses, decoder)
            notes += part.notes
        return outcomes, tuple(notes)

    def _judge(
        self, source: LabelledSource, batch: LabelledBatch, logits: Tensor, losses: Tensor, decoder: Decoder | None
    ) -> list[Outcome]:
        lengths = token_lengths(batch, logits) if decoder is not None else None
        outcomes = []
        for i, row in enumerate(batch.rows):
            if i not in batch.bad:
                frames = None if lengths is None else int(lengths[i])
                answer = read_logits(logits[i], frames, self.task, decoder)
                loss, truth = float(losses[i]), source.targets[row]
                outcomes.append(Outcome(row, truth, answer.value, loss, answer.confidence))
        return outcomes

    def find_failure(self, line: Mapping[str, Any], batch: Batch | None) -> str | None:
        """A loss or gradient that is not finite."""
        return find_broken(line)


def run_model(
    model: FineTuned, modality: Modality, batch: PieceBatch, device: torch.device,
    report: Callable[[float], object] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Logits of each sample on the host, float32: (K,), or (T,K) of its frames. report: as of `PieceBatch.run`."""

    def forward(inputs: Tensor, lengths: Tensor | None) -> list[Tensor]:
        logits = model(modality.prepare(inputs.to(device)), lengths).float().cpu()
        if logits.dim() == 2:
            return list(logits)
        return [row[:n] for row, n in zip(logits, model.count_tokens(inputs, lengths).tolist(), strict=True)]

    head = model.head.settings
    return batch.run(forward, partial(find_seam, blank=head.blank) if head.task == "ctc" else None, report)


def _move(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def token_lengths(batch: Batch, logits: Tensor) -> Tensor:
    """(B,) int64 on the host: valid frames of each row of logits (B,T,K)."""
    if batch.token_lengths is not None:
        return batch.token_lengths
    return torch.full((logits.shape[0],), logits.shape[1])
