"""Pre-training: data2vec's masked regression with its moving average."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2v.config import Config
from d2v.config.finetune import read_config
from d2v.config.model import architecture
from d2v.data import make_modality
from d2v.data.dataset import Batch
from d2v.data.loader import train_updates, validation_batches
from d2v.data.sources import Source, for_example
from d2v.folder import CONFIG, MODEL, copy_into, describe_mismatch, find_checkpoint, load_tensors
from d2v.model.data2vec import Data2Vec, build_model
from d2v.model.stems.positions import resize_positions
from d2v.model.target_cache import TargetCache
from d2v.model.targets import Output
from d2v.runtime import prepare_process, span
from d2v.train.digests import digest
from d2v.train.distributed import Ranks, open_ranks
from d2v.train.flops import count_work, describe_rates
from d2v.train.monitors import check_teacher, find_divergence, find_failure, measure
from d2v.train.objective import Objective, Probe, Step, autocast
from d2v.train.run_dir import RunFolder
from d2v.train.trainer import train

SKIPPING = frozenset({"no-head-1.0-vision"})


def pretrain(
    config: Config, *, init: str | None = None, profile: int = 0,
    probe: Callable[[Objective, Ranks, bool], Probe] | None = None, track: Iterable[Any] = (), plan: str | None = None,
) -> Path:  # fmt: skip
    """Runs or resumes a pre-training run; returns the run folder. Under torchrun every rank calls it.

    Args:
        config: of the run.
        init: checkpoint whose weights a new run starts from.
        profile: updates to trace (`d2v.runtime.Profiler`).
        probe: `d2v.evaluate.watch.RunProbe`, where config.probe.train is set.
        track: trackers besides those of run.track: objects with the methods of `d2v.train.trackers.Tracker`, or
            functions of (step, values) that get every line of metrics. On rank 0 alone.
        plan: file of `d2v plan --output`, with which the run is compared at its end.

    Raises:
        ValueError (also OSError of the file system): input that cannot be used, before anything is written.
        RunStopped: a loss that is not finite, or collapse.
        SystemExit: 75 after SIGTERM and SIGUSR1, 130 after SIGINT, once a checkpoint is saved.
    """
    if config.probe.train is not None and probe is None:
        raise ValueError("probe.train: expected pretrain(config, probe=d2v.evaluate.watch.RunProbe), got no probe")
    prepare_process(config.run.threads, config.run.keep_pages, config.run.products)
    with open_ranks(config.run) as ranks:
        folder = RunFolder(config, ranks, plan)
        if init is None and folder.resumed is None:
            with ranks.saying_once():
                check_teacher(config)
        source, valid = open_data(config, ranks)
        objective = Pretraining(config, source, valid, ranks.device)
        if probe is not None and config.probe.train is not None:
            objective.probe = probe(objective, ranks, folder.resumed is None)
        if init is not None and folder.resumed is None:
            note, objective.lenient = load_weights(objective.model, init, "model.init"), True
            if note is not None and ranks.is_first:
                print(f"note: {note}", file=sys.stderr)
        return train(objective, ranks, folder, profile=profile, track=track)


def open_data(config: Config, ranks: Ranks | None = None) -> tuple[Source, Source | None]:
    """Training and held-out samples of a configuration; reads only. Before use they need `Source.prepare`.

    Of several ranks the first one looks for them; the others get what its index has learnt, or read it in data.cache.
    """
    modality, valid = make_modality(config), config.data.valid

    def opened() -> tuple[Source, Source | None]:
        source = modality.open(config.data.path, option="data.path")
        return source, modality.open(valid, option="data.valid") if valid is not None else None

    if ranks is None or ranks.size == 1:
        return opened()
    with ranks.first_before_others():
        found = opened() if ranks.is_first else None
    cache = modality.index_cache
    cache.pending = ranks.share(cache.pending)
    return found or opened()


def load_weights(model: Data2Vec, checkpoint: str, option: str) -> str | None:
    """Copies student and teacher from a checkpoint; returns what became of its positions where the grid of patches is
    another one. `ValueError` names the settings that differ, or the first tensor that does not fit."""
    folder = find_checkpoint(checkpoint, option)
    what = f"{option} {str(folder)!r}"
    stored = load_tensors(folder, MODEL)
    # A part that is averaged from now on begins as the student's.
    stored |= {
        f"teacher.{name}": tensor
        for name, tensor in stored.items()
        if name.split(".")[0] in model.teacher.owned and f"teacher.{name}" not in stored
    }
    tensors, note = resize_positions(stored, read_config(folder / CONFIG), model.config)
    if problem := describe_mismatch(model.state_dict(), tensors):
        stored, given = (architecture(c) for c in (read_config(folder / CONFIG), model.config))
        differing = [f"{name} {stored[name]}, got {given[name]}" for name in stored if stored[name] != given[name]]
        raise ValueError(f"{what}: " + (f"expected {'; '.join(differing)} ({problem})" if differing else problem))
    copy_into(model.state_dict(), tensors, what)
    return note and f"{what}: {note}"


class Pretraining(Objective):
    """Student, teacher and unlabelled samples of a configuration."""

    model: Data2Vec

    def __init__(self, config: Config, source: Source, valid: Source | None, device: torch.device) -> None:
        self.config, self.source, self.valid = config, source, valid
        self.modality = make_modality(config)
        self.noun = self.modality.noun
        self.cache: TargetCache | None = None
        self._low: dict[str, int] = {}
        """Monitors under their limits, and for how many lines."""
        self.lenient = False
        """Whether the next line of metrics may have any loss: given weights may predict anything at first."""
        self._said: set[int] | None = None
        """Held-out samples that `_say_unread` has spoken about; None: it was not called yet."""
        self.model = build_model(config, device)
        if config.run.teacher_graph:
            if device.type != "cuda":
                raise ValueError(f"run.teacher_graph: expected a GPU, got a run on {device.type}")
            self.model.graph_teacher()
        self.set_recompute()
        # Layer drop skips blocks; a frozen stem and a head that is left out have no gradient.
        frozen = config.stem.gradient_scale == 0.0 and "waveform" in config.traits
        self.may_skip = config.encoder.layer_drop > 0.0 or frozen or bool(SKIPPING & config.published)

    @property
    def encoder(self) -> Data2Vec:
        """The student."""
        return self.model

    def blocks(self) -> list[nn.Module]:
        """Of student and teacher."""
        teacher = self.model.teacher
        owners = [teacher.get_submodule(name) for name in teacher.owned if name in ("context", "blocks")]
        if teacher.working_dtype is not None:
            owners += [part for name, part in teacher.working_parts().items() if name in ("context", "blocks")]
        return super().blocks() + [block for owner in owners for block in owner.get_submodule("blocks").children()]

    def updates(self, first: int, ranks: Ranks) -> Generator[list[Batch], None, None]:
        """With masks and noise keys, drawn in the loader's workers."""
        return train_updates(self.config, self.source, first, ranks.device, ranks.rank, ranks.size)

    def weigh(self, batch: Batch) -> float:
        """Masked positions."""
        assert batch.masks is not None
        return float(len(batch.masks.rows))

    def inputs_of(self, batch: Batch, device: torch.device) -> Tensor:
        """The model's inputs of a batch, on the device."""
        return self.modality.prepare(batch.inputs.to(device, non_blocking=True))

    def _open_cache(self, ranks: Ranks) -> TargetCache:
        """The targets of this teacher; says how much they may become. `ValueError` where the disk has less."""
        config, grid, longest = self.config, self.model.grid, self.modality.longest_piece()
        assert config.target.cache is not None
        folder, lengths = Path(config.target.cache), self.source.lengths
        if grid is None and lengths is not None:
            values, counts = np.unique(lengths, return_counts=True)
            most = [min(self.modality.count_tokens(n), longest or n) for n in values.tolist()]
            tokens = int(counts @ np.array(most))
        else:
            tokens = len(self.source) * (longest if grid is None and longest is not None else math.prod(grid or (1,)))
        wanted = 2 * tokens * config.encoder.width
        teacher = json.dumps(digest(self.model.teacher.state_dict()))
        cache = TargetCache(folder, config, teacher, wanted // ranks.size + 1)
        free, there = shutil.disk_usage(folder).free, sum(f.stat().st_size for f in cache.folder.glob("*.bf16"))
        with ranks.saying_once():
            if wanted - there > free:
                raise ValueError(f"target.cache: expected {wanted - there} bytes free in {str(folder)!r}, got {free}")
        if ranks.is_first:
            sizes = f"up to {wanted / 1e9:.3g} GB in {cache.folder}, {there / 1e9:.3g} GB are there"
            print(f"note: target.cache: {sizes}", file=sys.stderr)
        return cache

    def run_model(
        self, network: nn.Module, batch: Batch, device: torch.device, targets: Tensor | None = None
    ) -> Output:  # fmt: skip
        """One forward under the run's precision; targets: (B,T,C) on the host, in place of the teacher's."""
        if targets is not None:
            targets = targets.to(device, non_blocking=True)
        with autocast(self.config.run.precision, device):
            out: Output = network(
                self.inputs_of(batch, device), lengths=batch.lengths, masks=batch.masks, noise_keys=batch.noise_keys,
                targets=targets,
            )  # fmt: skip
            return out

    def begin_update(self, update: int) -> None:
        """Besides: whether targets may be kept from now on; then they have the same bits with a cache and without."""
        super().begin_update(update)
        self.model.rounds_targets = self.config.ema.scope == "all" and self.config.ema.is_frozen(update)

    def forward(self, network: nn.Module, batch: Batch, ranks: Ranks) -> Step:
        """Regression and class loss; spreads as this micro-batch's share of their mean over the update."""
        if not self.model.rounds_targets or self.config.target.cache is None:
            out = self.run_model(network, batch, ranks.device)
        else:
            self.cache = self.cache or self._open_cache(ranks)
            assert batch.masks is not None
            keys = self.cache.keys(batch.inputs, batch.lengths)
            targets = self.cache.read(keys, batch.masks.mask.shape[1])
            out = self.run_model(network, batch, ranks.device, targets)
            if targets is None:
                self.cache.write(keys, out.targets, batch.token_lengths)
        share = len(batch) / self.config.data.global_batch
        values = {"prediction_std": out.prediction_std * share, "target_std": out.target_std * share}
        return Step(out.losses, values, out, count_work(self.config, batch))

    def end_update(self, update: int, applied: Tensor | None) -> None:
        """One step of the moving average, which a skipped optimiser step skips, too."""
        if self.config.ema.is_frozen(update):
            return
        decay = self.config.ema.decay(update, self.config.run.steps)
        with span("ema"):
            self.model.teacher.update(decay if applied is None else applied * (1.0 - decay))

    def monitor(self, step: Step, batch: Batch) -> dict[str, float]:
        """Collapse monitors."""
        return measure(step.out, batch.token_lengths)

    def describe(self, update: int, rates: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
        """Besides: decay of the moving average, tokens a second, and the share of the GPUs' peak where it is known."""
        entries = {"ema_decay": self.config.ema.decay(update, self.config.run.steps)}
        entries |= super().describe(update, rates, ranks)
        return entries | describe_rates(rates, self.config, ranks.device, ranks.size)

    def validate(self, network: nn.Module, ranks: Ranks) -> dict[str, float]:
        """Loss with fixed masks and without dropout."""
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        assert self.valid is not None
        if len(self.valid) < ranks.size:
            raise ValueError(f"data.valid: expected a sample for each of {ranks.size} ranks, got {len(self.valid)}")
        held_out = validation_batches(self.config, self.valid, ranks.device, ranks.rank, ranks.size)
        bad: dict[int, str] = {}
        self.model.eval()
        with torch.no_grad(), contextlib.closing(held_out):
            for batch, counted in ranks.in_step(held_out):
                out = self.run_model(self.model, batch, ranks.device)
                bad |= {note.sample_id: note.text for note in batch.notes if note.kind == "bad"}
                if counted:
                    sums[0] += torch.stack(list(out.losses.values())).sum()
                    sums[1] += out.sample_size
        self._say_unread({row: text for part in ranks.gather(bad) for row, text in part.items()}, ranks)
        total, masked = ranks.sum_(sums).tolist()
        return {"valid_loss": total / max(masked, 1.0)}

    def _say_unread(self, bad: Mapping[int, str], ranks: Ranks) -> None:
        """Says what of the held-out samples the loss does not see, each once: the trainer reports training samples."""
        assert self.valid is not None
        texts = []
        if self._said is None:
            texts = [f"left out {count} {reason}" for reason, count in self.valid.left_out.items()]
            if rejected := self.valid.rejected:
                texts += [f"{len(rejected)} of {self.valid.indexed} cannot be used{for_example(rejected)}"]
        new, self._said = sorted(bad.keys() - (self._said or set())), (self._said or set()) | bad.keys()
        if new:
            example = f"for example {self.valid.describe(new[0])}: {bad[new[0]]}"
            texts += [f"{len(new)} of {len(self.valid)} cannot be read and count as blank samples, {example}"]
        for text in texts if ranks.is_first else ():
            print(f"note: data.valid: {text}", file=sys.stderr)

    def find_failure(self, line: Mapping[str, Any], batch: Batch | None) -> str | None:
        """A value that is not finite, divergence or collapse."""
        judged = batch is not None and not self.lenient
        diverged = find_divergence(line, self.config) if judged else None
        self.lenient = self.lenient and batch is None
        return diverged or find_failure(line, self.config.run, 0 if batch is None else len(batch), self._low)
