"""The training loop: exact resume, atomic checkpoints, clear stops; the same on one rank and on many.

Rank 0 alone writes files and speaks. What decides how the loop goes on - a signal, a failure, too many bad samples - is
agreed on by all ranks, so that none waits for one that has left.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from d2v.config import Config
from d2v.data import make_modality
from d2v.data.dataset import Batch
from d2v.data.loader import BadSamples
from d2v.data.sources import Source
from d2v.files import write_atomically
from d2v.folder import MODEL, copy_into, find_checkpoint, latest_checkpoint, load_tensors
from d2v.model.data2vec import Data2Vec
from d2v.train.checkpoint import Saver
from d2v.train.distributed import Agreement, World, open_world
from d2v.train.objective import Objective, Step
from d2v.train.pretraining import Pretraining
from d2v.train.profile import Profiler
from d2v.train.report import Report
from d2v.train.run_dir import RunFolder
from d2v.train.signals import StopRequest, exit_code
from d2v.train.trainer import Trainer

_SAVE_FAILED = 1 << 16
"""Asked of all ranks, above every signal's number: stop, a checkpoint could not be written."""


class RunStopped(RuntimeError):
    """Training cannot go on: the loss is not finite, or the collapse rule applies."""


def load_weights(model: Data2Vec, checkpoint: str, option: str) -> None:
    """Copies student and teacher from a checkpoint; `ValueError` names the first tensor that does not fit."""
    folder = find_checkpoint(checkpoint, option)
    copy_into(model.state_dict(), load_tensors(folder, MODEL), f"{option} {str(folder)!r}")


def open_data(config: Config) -> tuple[Source, Source | None]:
    """Training and held-out samples of a configuration; reads only. Before use they need `Source.prepare`."""
    modality = make_modality(config)
    source = modality.open(config.data.path, option="data.path")
    valid = modality.open(config.data.valid, option="data.valid") if config.data.valid is not None else None
    return source, valid


def pretrain(config: Config, *, init: str | None = None, profile: int = 0) -> Path:
    """Runs or resumes a pre-training run; returns the run folder. Under torchrun every rank calls it.

    Args:
        config: of the run.
        init: checkpoint whose weights a new run starts from.
        profile: updates to trace (`d2v.train.profile`).

    Raises:
        ValueError (also OSError of the file system): input that cannot be used, before anything is written.
        RunStopped: a loss that is not finite, or collapse.
        SystemExit: 75 after SIGTERM and SIGUSR1, 130 after SIGINT, once a checkpoint is saved.
    """
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with open_world(config.run) as world:
        folder = RunFolder(config, world)
        # With a cache of the index, one rank fills it and the others read it.
        with world.first_before_others() if config.data.cache else contextlib.nullcontext():
            source, valid = open_data(config)
        objective = Pretraining(config, source, valid, world.device)
        if init is not None and folder.resumed is None:
            load_weights(objective.model, init, "model.init")
        return train(objective, world, folder, profile=profile)


def train(objective: Objective, world: World, folder: RunFolder, *, profile: int = 0) -> Path:
    """Trains an objective to its last update, from the beginning or from the folder's checkpoint; returns the folder.

    Raises as `pretrain` does.
    """
    batch = objective.config.data.global_batch
    with world.saying_once():
        if batch < world.size:
            raise ValueError(f"data.global_batch: expected at least {world.size}, one for each rank, got {batch}")
    trainer = Trainer(objective, world)
    sources = [s for s in (objective.source, objective.valid) if s is not None]
    with folder.locked():
        with world.first_before_others():
            if world.is_first:
                folder.begin(objective.config)
            for source in sources:
                source.prepare(folder.path, fresh=folder.resumed is None and source is objective.source)
        with StopRequest() as stop, Profiler(folder.path / "profile", profile if world.is_first else 0) as profiler:
            Loop(trainer, folder, stop, profiler).run()
    return folder.path


class Loop:
    """One sitting of a run."""

    def __init__(self, trainer: Trainer, folder: RunFolder, stop: StopRequest, profiler: Profiler) -> None:
        self.trainer, self.folder, self.stop, self.profiler = trainer, folder, stop, profiler
        self.objective, self.world, self.config = trainer.objective, trainer.world, trainer.config
        self.agreement = Agreement(self.world)
        self.saver = Saver(folder.path / "checkpoints", self.world, self.config.run)
        allowed, file = self.config.data.bad_fraction, folder.path / "bad_samples.jsonl"
        self.bad = BadSamples(self.objective.source, allowed, file if self.world.is_first else None)
        self._take_up()
        run = self.config.run
        self.report = Report(folder.path, trainer.update, run.steps, self.world.is_first)

    def _take_up(self) -> None:
        if self.folder.resumed is None:
            self.bad.start_file()
        else:
            state = self.trainer.load(self.folder.resumed)
            self.bad.restore(state["bad"])
            if self.world.is_first:
                self.folder.describe_resume(state, self.config, self.world)
        self.bad.check(0)

    def run(self) -> None:
        """Updates until the last one, a signal or a failure."""
        self.report.begin(self.config, self.bad)
        batches = self.objective.updates(self.trainer.update, self.world)
        try:
            asked = self._run_updates(batches)
            if asked:
                self._leave(asked)
            self.saver.wait()
        finally:
            batches.close()  # ends the loader's workers, also when an error is on its way out
            self.report.close()
        if self.world.is_first:
            self.report.summarise(self.folder.path, self.trainer.update, self.bad)
        self.world.wait()

    def _run_updates(self, batches: Generator[list[Batch], None, None]) -> int:
        """Trains; returns the number of the signal that ended it, or 0 after the last update."""
        trainer, run = self.trainer, self.config.run
        trainer.window.resume_clock()
        for micro_batches in trainer.window.watch(batches):
            for batch in micro_batches:
                self.report.say(self.bad.add(batch.notes))
            self._settle_bad(trainer.update + 1)
            step = trainer.run_update(micro_batches)
            update = trainer.update
            self.report.advance()
            self.profiler.step()
            last = update == run.steps
            due = last or update % run.checkpoint_every == 0
            if due and self.objective.valid is not None:
                trainer.validate()
            if last or update % run.log_every == 0:
                self._log(step, micro_batches[0])
            asked = self.agreement.exchange(_SAVE_FAILED if self.saver.failed else self.stop.signal)
            if asked == _SAVE_FAILED:
                self.saver.wait()
                raise RunStopped("a checkpoint could not be written on another rank")
            if asked:
                return asked
            if due:
                self._save()
        return 0

    def _settle_bad(self, update: int) -> None:
        """Bad samples of all ranks, and the verdict on them; with several ranks at the log interval."""
        if self.world.size > 1:
            if update % self.config.run.log_every and update != self.config.run.steps:
                return
            self._exchange_bad()
        self.bad.write()
        with self.world.saying_once():
            self.bad.check(update * self.config.data.global_batch)

    def _exchange_bad(self) -> None:
        """Every rank learns what the others found, so that all come to the same verdict and rank 0 can write it."""
        found = [entry for part in self.world.gather(self.bad.take()) for entry in part]
        self.report.say(self.bad.add_entries(found))

    def _log(self, step: Step, batch: Batch) -> None:
        line = self.trainer.make_line(step, batch)
        self.report.write(line)
        self._stop_on(self.world.share(self.objective.find_failure(line, batch)))

    def _stop_on(self, failure: str | None) -> None:
        if failure is None:
            return
        self.saver.wait()
        kept = latest_checkpoint(self.folder.path)
        held = f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"
        with self.world.saying_once():
            raise RunStopped(f"training stopped at update {self.trainer.update}: {failure}; {held}")

    def _save(self) -> None:
        """A checkpoint, unless a value since the last line is not finite: a good one is never replaced by a broken
        one."""
        trainer = self.trainer
        trainer.window.pause_clock()
        means = trainer.window.means(self.world.sum_)
        self._stop_on(self.objective.find_failure({"step": 0, **means}, None))
        if self.world.size > 1:
            self._exchange_bad()
        self.saver.save(trainer.update, trainer.tensors(), trainer.texts(self.bad.state()))
        if self.world.is_first:
            write_report(self.folder.path, self.bad)
        trainer.window.resume_clock()

    def _leave(self, number: int) -> None:
        """Saves and ends the process after a signal."""
        update = self.trainer.update
        if update:
            self._save()
            self.saver.wait()
        code = exit_code(number)
        if self.world.is_first:
            self.folder.mark_stopped(update, number, code)
            done = f"saved update {update} in {self.folder.path}; the same command resumes it"
            print(f"{signal.Signals(number).name}: {done if update else 'nothing to save yet'}", file=sys.stderr)
        self.world.wait()
        raise SystemExit(code)


def write_report(folder: Path, bad: BadSamples) -> None:
    """`data.json`: how many samples there are, how many were bad, what was converted and what was left out."""
    report: dict[str, Any] = {
        "samples": len(bad.source), "bad": len(bad.entries), "converted": bad.converted,
        "left_out": bad.source.left_out,
    }  # fmt: skip
    write_atomically(folder / "data.json", json.dumps(report, indent=1))
