"""Training, from top to bottom: one update, and the loop around it.

Rank 0 alone writes files and prints. What decides how the loop goes on - a signal, a failure, too many bad samples - is
agreed on by all ranks, so that none waits for one that has left.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v.data.dataset import Batch
from d2v.data.loader import BadSamples
from d2v.folder import latest_checkpoint, step_of
from d2v.runtime import Profiler, memory_bytes, span
from d2v.train.checkpoint import RunState, Saver
from d2v.train.digests import Digests
from d2v.train.distributed import Ranks, StopFlag, accumulating, parallelise
from d2v.train.logging import Report
from d2v.train.objective import Objective, Step
from d2v.train.optim import build_optimiser, clip_gradients, learning_rate_at, set_learning_rate
from d2v.train.run_dir import RunFolder, StopRequest, exit_code, lock_folder
from d2v.train.trackers import Tracker, make_trackers

_SAVE_FAILED = 1 << 16
"""Asked of all ranks, above every signal's number: stop, a checkpoint could not be written."""


class RunStopped(RuntimeError):
    """Training cannot go on: the loss is not finite, or the collapse rule applies."""


class Trainer(RunState):
    """Updates an objective's model on all ranks; `run` does so until the last update."""

    folder: RunFolder
    """This and the next three belong to `run`."""
    saver: Saver
    local_saver: Saver | None = None
    bad: BadSamples
    report: Report

    def __init__(self, objective: Objective, ranks: Ranks) -> None:
        config, model = objective.config, objective.model
        self.objective = objective
        self.network = parallelise(model, objective.blocks(), config.run, ranks, may_skip=objective.may_skip)
        optimiser = build_optimiser(objective.parameter_groups(), config.optim)
        super().__init__(config, model, optimiser, objective.source, ranks)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.digests = Digests(self.network, ranks, config.run) if config.run.digest_every else None

    # ---- one update -------------------------------------------------------------------------------------------

    def run_update(self, batches: list[Batch]) -> Step:
        """One update from this rank's micro-batches; returns the first forward. Nothing is read from the device.

        The gradient is that of (sum of losses) / (weight of the whole update, over all micro-batches and ranks).
        """
        objective, ranks, optim = self.objective, self.ranks, self.config.optim
        objective.begin_update(self.update + 1)
        if self.digests is not None:
            self.digests.before_update(self.is_due(self.digests.every, self.update + 1))
        # What the losses are divided by: known on the host for one rank, on the device for several.
        weight: float | Tensor = max(own := sum(objective.weigh(batch) for batch in batches), 1.0)
        if ranks.size > 1:
            total = torch.full((), own, dtype=torch.float32, device=ranks.device)
            weight = ranks.sum_(total).clamp_(min=1.0)
        sums: dict[str, Tensor] = {}
        first: Step | None = None
        self.model.train()
        for number, batch in enumerate(batches):
            with accumulating(self.network, number == len(batches) - 1):
                step = objective.forward(self.network, batch, ranks)
                parts = {name: value / weight for name, value in step.losses.items()}
                loss = torch.stack(list(parts.values())).sum()
                with span("backward"):
                    # Gradients are averaged over the ranks; theirs is a sum.
                    self.scaler.scale(loss * ranks.size if ranks.size > 1 else loss).backward()
            for name, value in {"loss": loss, **(parts if len(parts) > 1 else {}), **step.values}.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
            self.window.count(**step.work)
            first = first or step

        with span("optimiser"):
            self.scaler.unscale_(self.optimiser)
            norm = clip_gradients(self.parameters, optim.clip)
            self.update += 1
            set_learning_rate(self.optimiser, self._rate())
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self.optimiser.zero_grad(set_to_none=True)

        applied = None
        if self.scaler.is_enabled():  # gradients that overflowed were not applied
            applied = norm.isfinite().double()
            norm = norm.nan_to_num(0.0, 0.0, 0.0)
            sums["skipped"] = (1.0 - applied) / ranks.size
        objective.end_update(self.update, applied)  # the teacher's moving average
        sums["grad_norm"] = norm / ranks.size  # the same on every rank
        self.window.add(sums)
        assert first is not None
        return first

    def _rate(self) -> float:
        run = self.config.run
        return learning_rate_at(self.config.optim, self.update, run.steps, run.extend)

    # ---- the loop ---------------------------------------------------------------------------------------------

    def run(
        self, folder: RunFolder, stop: StopRequest, profiler: Profiler, trackers: Mapping[str, Tracker] | None = None
    ) -> None:
        """Updates from the beginning, or from the folder's checkpoint, until the last one, a signal or a failure."""
        run, stop_flag = self.config.run, StopFlag(self.ranks)
        probe_every = self.config.probe.every or run.checkpoint_every
        self._prepare(folder, trackers)
        updates = self.objective.updates(self.update, self.ranks)
        # Closing `updates` ends the loader's workers, also when an error is on its way out.
        with self.report, contextlib.closing(updates):
            self.report.begin(self.config, self.bad)
            self.window.resume_clock()
            for batches in self.window.watch(updates):
                self._check_samples(batches)
                step = self.run_update(batches)
                self.report.advance()
                profiler.step()
                due = self.is_due(run.checkpoint_every, self.update)
                if self.digests is not None and self.is_due(self.digests.every, self.update):
                    self._digest(self.digests)
                if due and self.objective.valid is not None:
                    self._validate()
                if self.objective.probe is not None and self.is_due(probe_every, self.update):
                    self._probe()
                if self.is_due(run.log_every, self.update):
                    self._log(step, batches[0])
                failed = any(saver.failed for saver in self._savers())
                asked = stop_flag.exchange(_SAVE_FAILED if failed else stop.signal)
                if asked == _SAVE_FAILED:
                    self._finish_saving()
                    raise RunStopped("a checkpoint could not be written on another rank")
                if asked:
                    self._leave(asked)
                if due:
                    self._save(self.saver)
                elif self.local_saver is not None and self.is_due(run.local_every, self.update):
                    self._save(self.local_saver)
            self._finish_saving()
        if folder.local is not None:
            folder.local.remove()
        self.report.summarise(self.update, self.bad)
        self.ranks.wait()

    def is_due(self, every: int, update: int) -> bool:
        """Whether what happens `every` so many updates, and after the last one, does after this one."""
        return update % every == 0 or update == self.config.run.last

    def _prepare(self, folder: RunFolder, trackers: Mapping[str, Tracker] | None) -> None:
        run, first = self.config.run, self.ranks.is_first
        self.folder = folder
        self.saver = Saver(folder.path / "checkpoints", self.ranks, run)
        if folder.local is not None:
            folder.local.begin(folder.path, step_of(folder.resumed) if folder.resumed is not None else 0)
            self.local_saver = Saver(folder.local.folder, self.ranks, run, local=True)
        file = folder.path / "bad_samples.jsonl" if first else None
        self.bad = BadSamples(self.source, self.config.data.bad_fraction, file)
        if folder.resumed is None:
            self.bad.start_file()
        else:
            state = self.load(folder.resumed)
            self.bad.restore(state["bad"])
            if first:
                folder.describe_resume(state, self.config, self.ranks)
        self.bad.check(0)
        self.report = Report(folder.path, self.update, run.last, first, trackers)

    def _check_samples(self, batches: list[Batch]) -> None:
        """Bad samples of all ranks, and the verdict on them; with several ranks at the log interval."""
        update = self.update + 1
        for batch in batches:
            self.report.say(self.bad.add(batch.notes))
        if self.ranks.size > 1:
            if not self.is_due(self.config.run.log_every, update):
                return
            self._exchange_bad()
        self.bad.write()
        with self.ranks.saying_once():
            self.bad.check(update * self.config.data.global_batch)

    def _digest(self, digests: Digests) -> None:
        """A line of digests; stops where copies of the model on several ranks are no longer the same."""
        self.window.pause_clock()
        line, odd = digests.collect(self.update, self.model)
        self.report.write_digests(line)
        self._stop_on(odd)
        self.window.resume_clock()

    def _exchange_bad(self) -> None:
        """Every rank learns what the others found, so that all come to the same verdict and rank 0 can write it."""
        found = [entry for part in self.ranks.gather(self.bad.take()) for entry in part]
        self.report.say(self.bad.add_entries(found))

    def _validate(self) -> None:
        """Measures the held-out samples; the result goes into the next line of metrics."""
        self.window.pause_clock()
        self.pending |= {**self.objective.validate(self.network, self.ranks), "valid_step": self.update}
        self.window.resume_clock()

    def _probe(self) -> None:
        """Measures the features on labelled samples; the result goes into the next line of metrics."""
        self.window.pause_clock()
        assert self.objective.probe is not None
        self.pending |= self.objective.probe(self.update, self.report.say)
        self.window.resume_clock()

    def _log(self, step: Step, batch: Batch) -> None:
        """A line of metrics, made on every rank: means over the window, and monitors of this rank's micro-batch."""
        config, ranks, window, objective = self.config, self.ranks, self.window, self.objective
        means, rates = window.means(ranks.sum_), window.rates(ranks.sum_, ranks.device)
        step_seconds = window.step_seconds()
        rates["samples"] = config.data.global_batch / step_seconds if step_seconds else math.nan
        line = {
            "step": self.update,
            **means,
            **(objective.monitor(step, batch) if ranks.is_first else {}),
            "learning_rate": self._rate(),
            **objective.describe(self.update, rates, ranks),
            "step_seconds": step_seconds,
            "data_wait": window.data_wait(),
            "memory_bytes": memory_bytes(ranks.device),
            **self.pending,
        }
        self.latest, self.pending = line, {}
        window.reset()
        self.report.write(line)
        self._stop_on(ranks.share(objective.find_failure(line, batch)))

    def _stop_on(self, failure: str | None) -> None:
        if failure is None:
            return
        self.saver.wait()
        kept = latest_checkpoint(self.folder.path)
        held = f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"
        with self.ranks.saying_once():
            raise RunStopped(f"training stopped at update {self.update}: {failure}; {held}")

    def _savers(self) -> list[Saver]:
        return [self.saver, *([self.local_saver] if self.local_saver is not None else [])]

    def _finish_saving(self) -> None:
        """Until all checkpoints are written; raises where one cannot be."""
        for saver in self._savers():
            saver.wait()

    def _save(self, saver: Saver) -> None:
        """A checkpoint, unless a value since the last line is not finite: a good one is never replaced by a broken
        one."""
        self.window.pause_clock()
        means = self.window.means(self.ranks.sum_)
        self._stop_on(self.objective.find_failure({"step": 0, **means}, None))
        if self.ranks.size > 1:
            self._exchange_bad()
        saver.save(self.update, self.tensors(), self.texts(self.bad.state()))
        self.report.write_counts(self.bad)
        self.window.resume_clock()

    def _leave(self, number: int) -> None:
        """Saves and ends the process after a signal."""
        if self.update:
            self._save(self.saver)
            self._finish_saving()
            if self.folder.local is not None:
                self.folder.local.remove()
        code = exit_code(number)
        if self.ranks.is_first:
            self.folder.mark_stopped(self.update, number, code)
            done = f"saved update {self.update} in {self.folder.path}; the same command resumes it"
            print(f"{signal.Signals(number).name}: {done if self.update else 'nothing to save yet'}", file=sys.stderr)
        self.ranks.wait()
        raise SystemExit(code)


def train(
    objective: Objective, ranks: Ranks, folder: RunFolder, *, profile: int = 0, track: Iterable[Any] = ()
) -> Path:
    """Trains an objective to its last update, from the beginning or from the folder's checkpoint; returns the folder.

    track: as `d2v.train.trackers.make_trackers` takes it, besides `run.track`.
    Raises as `d2v.train.pretraining.pretrain` does.
    """
    batch = objective.config.data.global_batch
    with ranks.saying_once():
        if batch < ranks.size:
            raise ValueError(f"data.global_batch: expected at least {ranks.size}, one for each rank, got {batch}")
    with ranks.first_before_others():
        trackers = make_trackers(objective.config.run.track, track) if ranks.is_first else {}
    trainer = Trainer(objective, ranks)
    with lock_folder(folder.path) if ranks.is_first else contextlib.nullcontext():
        with ranks.first_before_others():
            if ranks.is_first:
                folder.begin(objective.config)
            for option, source in (("data.path", objective.source), ("data.valid", objective.valid)):
                if source is None:
                    continue
                if ranks.is_first:
                    folder.compare_files(source, option, objective.config.data.bad_fraction)
                source.prepare(folder.path, fresh=folder.resumed is None and source is objective.source)
        with StopRequest() as stop, Profiler(folder.path / "profile", profile if ranks.is_first else 0) as profiler:
            trainer.run(folder, stop, profiler, trackers)
    return folder.path
