"""The training loop, one process: exact resume, atomic checkpoints, clear stops.

One update: forward and backward of each micro-batch with the gradient of (sum of losses) / (sum of masked positions),
clipping, AdamW at the scheduled rate, one step of the teacher's average (data2vec 2.0, section 3).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v.checkpoint import (
    CONFIG,
    MODEL,
    STATE,
    TRAINER,
    clean_folder,
    copy_into,
    find_checkpoint,
    latest_checkpoint,
    load_config,
    load_json,
    load_tensors,
    save_checkpoint,
    write_atomically,
)
from d2v.config import Config
from d2v.data import make_modality
from d2v.data.loader import BadSamples, train_updates, validation_batches
from d2v.data.samples import Batch
from d2v.data.sources import Source
from d2v.data2vec import Data2Vec, Output
from d2v.metrics import (
    Board,
    MetricsFile,
    Window,
    find_failure,
    measure_content_spread,
    measure_explained_variance,
)
from d2v.optim import (
    build_optimiser,
    clip_gradients,
    learning_rate_at,
    load_optimiser,
    optimiser_tensors,
    set_learning_rate,
)
from d2v.progress import Progress
from d2v.resume import compare_configs


class RunStopped(RuntimeError):
    """Training cannot go on: the loss is not finite, or the collapse rule applies."""


class StopRequest:
    """Turns the first SIGTERM or SIGINT into a request to save and leave; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, _frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def choose_device(config: Config) -> torch.device:
    """`run.device` as a torch device; `ValueError` where CUDA is asked for and absent."""
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: expected cuda to be available, got a PyTorch that sees no GPU")
    use_cuda = config.run.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def build_model(config: Config, device: torch.device | None = None) -> Data2Vec:
    """The untrained model of a configuration; its weights are a function of `run.seed`."""
    torch.manual_seed(config.run.seed)
    model = Data2Vec(config)
    return model.to(device) if device is not None else model


def load_weights(model: Data2Vec, checkpoint: str, option: str) -> None:
    """Copies student and teacher from a checkpoint; `ValueError` names the first tensor that does not fit."""
    folder = find_checkpoint(checkpoint, option)
    copy_into(model.state_dict(), load_tensors(folder, MODEL), f"{option} {str(folder)!r}")


class Trainer:
    """A run in memory: model, optimiser, monitors, and the number of completed updates."""

    def __init__(self, config: Config, source: Source, device: torch.device) -> None:
        self.config, self.source, self.device = config, source, device
        self.modality = make_modality(config)
        self.model = build_model(config, device)
        self.optimiser = build_optimiser(self.model, config.optim)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.window = Window()
        self.update = 0
        self.rate = self.decay = 0.0
        self.pending: dict[str, Any] = {}

    # ---- one update -------------------------------------------------------------------------------------------

    def inputs_of(self, batch: Batch) -> Tensor:
        """The model's inputs of a batch, on the device."""
        return self.modality.prepare(batch.inputs.to(self.device, non_blocking=True))

    def forward(self, batch: Batch) -> Output:
        """One forward under the run's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bf16"):
            return self.model(
                self.inputs_of(batch), lengths=batch.lengths, masks=batch.masks, noise_keys=batch.noise_keys
            )

    def run_update(self, batches: list[Batch]) -> Output:
        """One optimiser update from its micro-batches; returns the output of the first, which is never the rest."""
        config = self.config
        # Masks are drawn on the host, so the denominator is known before the first backward pass.
        masked = max(sum(len(b.masks.rows) for b in batches if b.masks is not None), 1)
        self.model.train()
        sums: dict[str, Tensor] = {}
        first: Output | None = None
        for batch in batches:
            out = self.forward(batch)
            first = first or out
            parts = {name: value / masked for name, value in out.losses.items()}
            loss = torch.stack(list(parts.values())).sum()
            loss.backward()
            share = len(batch) / config.data.global_batch
            values = {"loss": loss, **(parts if len(parts) > 1 else {})}
            values |= {"prediction_std": out.prediction_std * share, "target_std": out.target_std * share}
            for name, value in values.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        sums["grad_norm"] = clip_gradients(self.parameters, config.optim.clip)
        self.update += 1
        self.rate = learning_rate_at(config.optim, self.update, config.run.steps)
        set_learning_rate(self.optimiser, self.rate)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.decay = config.ema.decay(self.update, config.run.steps)
        self.model.teacher.update(self.decay)
        self.window.add(sums)
        assert first is not None
        return first

    def is_log_step(self, update: int) -> bool:
        """Whether a line of metrics follows this update."""
        return update % self.config.run.log_every == 0 or update == self.config.run.steps

    def is_checkpoint_step(self, update: int) -> bool:
        """Whether a checkpoint follows this update."""
        return update % self.config.run.checkpoint_every == 0 or update == self.config.run.steps

    def make_line(self, out: Output, lengths: Tensor | None = None) -> dict[str, Any]:
        """A line of metrics: means over the window; spread and explained variance of one micro-batch, whose rows have
        `lengths` tokens before their padding."""
        means = self.window.means()
        step_seconds = self.window.step_seconds()
        with torch.no_grad():
            explained = float(measure_explained_variance(out.prediction, out.target))
            spread = float(measure_content_spread(out.targets, lengths))
        line: dict[str, Any] = {
            "step": self.update,
            **means,
            "explained_variance": explained,
            "content_spread": spread,
            "learning_rate": self.rate,
            "ema_decay": self.decay,
            "samples_per_second": self.config.data.global_batch / step_seconds if step_seconds else math.nan,
            "step_seconds": step_seconds,
            **self.pending,
        }
        self.pending = {}
        self.window.reset()
        return line

    def validate(self, source: Source) -> None:
        """Loss on held-out images, with fixed masks and without dropout; goes into the next line of metrics."""
        total, masked = torch.zeros((), dtype=torch.float64, device=self.device), 0
        self.model.eval()
        self.window.pause_clock()
        held_out = validation_batches(self.config, source, self.device)
        with torch.no_grad(), contextlib.closing(held_out):
            for batch in held_out:
                out = self.forward(batch)
                total += torch.stack(list(out.losses.values())).sum()
                masked += out.sample_size
        self.window.resume_clock()
        self.pending = {"valid_loss": float(total) / max(masked, 1), "valid_step": self.update}

    # ---- state ------------------------------------------------------------------------------------------------

    def save(self, folder: Path, bad: BadSamples) -> Path:
        """Writes a checkpoint of the present state."""
        tensors = optimiser_tensors(self.model, self.optimiser) | self.window.tensors()
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "window": self.window.state(),
            "pending": self.pending,
            "bad": bad.state(),
            "data": self.data_identity(),
        }
        return save_checkpoint(
            folder / "checkpoints", self.update, config=self.config, model=self.model.state_dict(), trainer=tensors,
            state=state, keep=self.config.run.keep_checkpoints,
        )  # fmt: skip

    def data_identity(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        return {"samples": len(self.source), "names": self.source.digest()}

    def load(self, checkpoint: Path, bad: BadSamples) -> None:
        """Takes up a checkpoint; `ValueError` where the data or the tensors do not fit."""
        state = load_json(checkpoint / STATE)
        if state["data"] != self.data_identity():
            raise ValueError(
                f"data.path: expected the {state['data']['samples']} samples that {str(checkpoint)!r} was trained on, "
                f"got {len(self.source)} with {'other' if len(self.source) == state['data']['samples'] else ''} names"
            )
        copy_into(self.model.state_dict(), load_tensors(checkpoint, MODEL), f"checkpoint {str(checkpoint)!r}")
        tensors = load_tensors(checkpoint, TRAINER)
        load_optimiser(self.model, self.optimiser, {k: v for k, v in tensors.items() if k.startswith("optim.")})
        self.window.restore(state["window"], tensors, self.device)
        self.pending = state["pending"]
        self.update = int(state["step"])
        bad.restore(state["bad"])
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)


def pretrain(config: Config, *, init: str | None = None) -> Path:
    """Runs or resumes a pre-training run; returns the run folder.

    Raises `ValueError` (also `OSError` of the file system) for input that cannot be used, before anything is written;
    `RunStopped` for a loss that is not finite and for collapse; `SystemExit` (143, 130) after SIGTERM and SIGINT, once
    a checkpoint is saved.
    """
    folder = check_run_folder(config)
    resumed = latest_checkpoint(folder)
    if resumed is not None:
        compare_configs(load_config(folder), config, folder)
    source, valid = open_data(config)
    device = choose_device(config)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    trainer = Trainer(config, source, device)
    if init is not None and resumed is None:
        load_weights(trainer.model, init, "model.init")
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        if resumed is None:
            write_atomically(folder / CONFIG, config.to_json())
        prepare_data(source, valid, folder, fresh=resumed is None)
        _take_up(trainer, folder, resumed, valid)
    return folder


def _take_up(trainer: Trainer, folder: Path, resumed: Path | None, valid: Source | None) -> None:
    """Trains from the beginning, or from the checkpoint `resumed`."""
    config, source = trainer.config, trainer.source
    with StopRequest() as stop:
        clean_folder(folder / "checkpoints")
        bad = BadSamples(source, config.data.bad_fraction, folder / "bad_samples.jsonl")
        if resumed is not None:
            trainer.load(resumed, bad)
            write_atomically(folder / CONFIG, config.to_json())
            print(f"resuming {folder} after update {trainer.update} of {config.run.steps}", file=sys.stderr)
        else:
            bad.start_file()
        bad.check(0)
        _loop(trainer, folder, bad, valid, stop)


def _loop(trainer: Trainer, folder: Path, bad: BadSamples, valid: Source | None, stop: StopRequest) -> None:
    config = trainer.config
    metrics = MetricsFile(folder / "metrics.jsonl", trainer.update)
    board = Board(folder / "tensorboard", trainer.update)
    progress = Progress(trainer.update, config.run.steps)
    if trainer.update < config.run.steps and config.optim.warmup_steps >= config.run.steps:
        progress.say(f"note: optim.warmup_steps ({config.optim.warmup_steps}) covers all of run.steps")
    for reason, count in trainer.source.left_out.items():
        progress.say(f"note: left out {count} {reason}")
    if bad.source.rejected:
        progress.say(f"note: {len(bad.source.rejected)} of {bad.source.indexed} cannot be used; {bad.examples()}")
    batches = train_updates(config, trainer.source, trainer.update, trainer.device)
    try:
        trainer.window.resume_clock()
        for micro_batches in batches:
            for batch in micro_batches:
                for news in bad.add(batch.notes):
                    progress.say(f"note: {news}")
            bad.write()
            bad.check((trainer.update + 1) * config.data.global_batch)
            out = trainer.run_update(micro_batches)
            progress.advance()
            due = trainer.is_checkpoint_step(trainer.update)
            if due and valid is not None:
                trainer.validate(valid)
            if trainer.is_log_step(trainer.update):
                line = trainer.make_line(out, micro_batches[0].token_lengths)
                _record(line, metrics, board, progress)
                _stop_on_failure(find_failure(line, config.run, len(out.targets)), trainer, folder)
            if stop.signal is not None:
                break
            if due:
                _save(trainer, folder, bad)
        if stop.signal is not None:
            _leave(trainer, folder, bad, stop.signal)
    finally:
        batches.close()  # ends the loader's workers, also when an error is on its way out
        metrics.close()
        board.close()
        progress.close()
    _summarise(trainer, folder, bad)


def _record(line: dict[str, Any], metrics: MetricsFile, board: Board, progress: Progress) -> None:
    metrics.write(line)
    board.write(line)
    progress.show(line)


def _stop_on_failure(failure: str | None, trainer: Trainer, folder: Path) -> None:
    if failure is None:
        return
    kept = latest_checkpoint(folder)
    held = f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"
    raise RunStopped(
        f"training stopped at update {trainer.update}: {failure}; {held}; "
        "try a lower --optim.learning-rate or a smaller --optim.clip"
    )


def _save(trainer: Trainer, folder: Path, bad: BadSamples) -> None:
    """A checkpoint, unless a value since the last line is not finite: a good one is never replaced by a broken one."""
    trainer.window.pause_clock()
    _stop_on_failure(find_failure({"step": 0, **trainer.window.means()}, trainer.config.run, 0), trainer, folder)
    trainer.save(folder, bad)
    write_report(folder, bad)
    trainer.window.resume_clock()


def _leave(trainer: Trainer, folder: Path, bad: BadSamples, number: int) -> None:
    if trainer.update:
        _save(trainer, folder, bad)
    done = f"saved update {trainer.update} in {folder}; the same command resumes it"
    print(f"{signal.Signals(number).name}: {done if trainer.update else 'nothing to save yet'}", file=sys.stderr)
    raise SystemExit(128 + number)


def _summarise(trainer: Trainer, folder: Path, bad: BadSamples) -> None:
    text = f"finished {trainer.update} updates in {folder}"
    if bad.converted:
        text += "; converted: " + ", ".join(f"{n} ({kind})" for kind, n in sorted(bad.converted.items()))
    if left_out := trainer.source.left_out:
        text += "; left out: " + ", ".join(f"{n} {reason}" for reason, n in left_out.items())
    if bad.entries:
        text += f"; {len(bad.entries)} samples could not be decoded, {bad.examples()}"
    print(text, file=sys.stderr)


def write_report(folder: Path, bad: BadSamples) -> None:
    """`data.json`: how many samples there are, how many were bad, what was converted and what was left out."""
    report = {
        "samples": len(bad.source), "bad": len(bad.entries), "converted": bad.converted,
        "left_out": bad.source.left_out,
    }  # fmt: skip
    write_atomically(folder / "data.json", json.dumps(report, indent=1))


def open_data(config: Config) -> tuple[Source, Source | None]:
    """Training and held-out samples of a configuration; reads only. Before use they need `prepare_data`."""
    modality = make_modality(config)
    source = modality.open(config.data.path, option="data.path")
    valid = modality.open(config.data.valid, option="data.valid") if config.data.valid is not None else None
    return source, valid


def prepare_data(source: Source, valid: Source | None, folder: Path, fresh: bool) -> None:
    """Writes what the samples need, a tokenizer and tokens of text for instance, into `folder`."""
    source.prepare(folder, fresh)
    if valid is not None:
        valid.prepare(folder, fresh=False)


def check_run_folder(config: Config) -> Path:
    """The run folder, which is absent, empty, or an earlier run; else `ValueError`."""
    if not config.run.dir:
        raise ValueError("run.dir: expected a folder for the run, got nothing")
    folder = Path(config.run.dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run.dir: expected a folder, got the file {str(folder)!r}")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise ValueError(f"run.dir: expected an empty folder or an earlier run, got {str(folder)!r} with other files")
    return folder


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps a second process out of the run folder; the lock goes with the process, however that ends.

    A POSIX record lock: unlike flock, loader workers do not inherit it and so cannot keep it after a kill.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"run.dir: another process is training in {str(folder)!r}") from None
        yield
