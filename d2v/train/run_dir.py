"""The run folder: whose it is, what it holds, who may write into it, which settings may change when it goes on; and
the signals that end a run in order, with an exit code that says whether to start it again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from d2v.config import Config
from d2v.config.fields import OF_CALLS, flat_fields, flatten_config, replace_fields, shorten
from d2v.config.finetune import SECTION
from d2v.data.sources import Source
from d2v.files import PARTIAL, is_url, write_atomically
from d2v.folder import (
    CONFIG,
    LOST,
    PLAN,
    check_layers,
    clean_folder,
    damaged,
    latest_checkpoint,
    load_json,
    load_plan,
    read_index,
    step_of,
)
from d2v.runtime import find_decoders
from d2v.train.distributed import Ranks
from d2v.train.optim import learning_rate_at
from d2v.train.ranks.local import LocalCheckpoints

EXIT_REQUEUE = 75
"""Exit code after SIGTERM and SIGUSR1 (EX_TEMPFAIL): the job was stopped from outside; started again, it goes on."""
EXIT_INTERRUPTED = 128 + signal.SIGINT
REQUEUE = "requeue"
"""File in the run folder of a run that was stopped from outside and can be started again."""
_ECHO_SECONDS = 1.0
FREE_FIELDS = frozenset(name for name, field in flat_fields(Config).items() if field.metadata.get("free"))
"""Settings that leave the sequence of updates as it is."""
LENGTH = ("run.steps", "run.extend", "ema.freeze_after")
LOCK = ".lock"
"""File that is locked; all that a first start leaves which is killed before it writes the configuration."""


class RunFolder:
    """The folder of a run that begins or goes on; nothing is written before `begin`."""

    def __init__(self, config: Any, ranks: Ranks, plan: str | None = None) -> None:
        """plan: file of `d2v plan` for the folder. `ValueError` where `run.dir` is no place for this run."""
        self.path = Path(config.run.dir)
        self.changed: list[str] = []
        self.plan: dict[str, Any] | None = None
        found = None
        with ranks.first_before_others():
            if ranks.is_first:
                check_run_folder(config.run.dir)
                self.plan = load_plan(Path(plan)) if plan is not None else None
                found = latest_checkpoint(self.path)
            if found is not None:
                read_index(found)  # compares checksums
                self.changed = compare_configs(load_json(found / CONFIG), config, self.path, step_of(found))
        self.newest: Path | None = ranks.share(found)
        """Newest checkpoint in the folder."""
        self.resumed = self.newest
        """Where the run goes on: on each node a checkpoint of its own, where that is newer."""
        self.local: LocalCheckpoints | None = None
        if config.run.local_checkpoint is not None:
            self.local = LocalCheckpoints(config.run.local_checkpoint, self.path, ranks)
            if local := self.local.find(step_of(self.newest) if self.newest else 0):
                self.resumed = local
                with ranks.saying_once():
                    self.changed = compare_configs(load_json(local / CONFIG), config, self.path, step_of(local))

    def begin(self, config: Any) -> None:
        """Rank 0, under the folder's lock: writes the configuration, removes what a killed run left half done.

        `ValueError` where another process has trained in the folder since it was looked at.
        """
        if (now := latest_checkpoint(self.path)) != self.newest:
            raise ValueError(
                f"run.dir: another process has trained in {str(self.path)!r} while this one started: its newest "
                f"checkpoint is {now and now.name}, it was {self.newest and self.newest.name}; give the command again"
            )
        clean_folder(self.path / "checkpoints")
        for name in (REQUEUE, LOST):
            (self.path / name).unlink(missing_ok=True)
        write_atomically(self.path / CONFIG, config.to_json())
        if self.plan is not None:
            write_atomically(self.path / PLAN, json.dumps(self.plan, indent=1))

    def compare_files(self, source: Source, option: str, allowed: float) -> None:
        """Rank 0: keeps sizes and times of the files that a run begins with; of one that goes on, says which changed.

        `ValueError` where more than the `allowed` share has another size: the run would go on with other data.
        """
        record = source.record_files(self.path / f"{option}.files")
        if self.resumed is None:
            record.write()
            return
        if not (changed := record.find_changed()):
            return
        resized = [one for one in changed if one.resized]
        first = (resized or changed)[0]
        example = f"for example {source.file_path(first.number)} {first.text}"
        if len(resized) > allowed * len(record.names):
            raise ValueError(
                f"{option}: expected the files that the run in {str(self.path)!r} began with, got {len(resized)} of "
                f"{len(record.names)} of another size, {example}; put them back or begin a run in another run.dir"
            )
        count = f"{len(changed)} of {len(record.names)} files"
        print(f"note: {option}: {count} changed since the run began, {example}", file=sys.stderr)

    def describe_resume(self, state: Mapping[str, Any], config: Any, ranks: Ranks) -> None:
        """Says where the run goes on and what is different now."""
        where = f" from {self.resumed}" if self.resumed != self.newest else ""
        print(f"resuming {self.path}{where} after update {state['step']} of {config.run.last}", file=sys.stderr)
        for text in self.changed:
            print(f"note: changed {text}", file=sys.stderr)
        for name, now in (("ranks", ranks.size), ("torch", torch.__version__)):
            if state[name] != now:
                print(f"note: {name} {state[name]} before, {now} now: equal up to rounding from here", file=sys.stderr)
        here, before = find_decoders(), state.get("decoders")
        for name, version in before.items() if isinstance(before, dict) else ():
            if name in here and version != here[name]:
                print(f"note: {name} {version} before, {here[name]} now: samples may have other bits", file=sys.stderr)

    def mark_stopped(self, update: int, number: int, code: int) -> None:
        """Rank 0: tells a batch script whether to start the run again."""
        if code == EXIT_REQUEUE:
            write_atomically(self.path / REQUEUE, json.dumps({"step": update, "signal": number}))


def compare_configs(stored: Mapping[str, Any], config: Config, folder: Path, update: int) -> list[str]:
    """What of the free settings differs from the run that `folder` holds, in words.

    `ValueError` names the other settings that differ. Settings that the stored run did not know yet count as equal. The
    length may differ where the `update` updates so far had the same learning rates and decays.
    """
    before, now = flatten_config(stored), flatten_config(json.loads(config.to_json()))
    before |= {name: None for name in ("ema.freeze_after",) if name in now and name not in before}
    texts = {
        n: f"{n} (stored {shorten(before[n])}, given {now[n]})" for n in now if n in before and before[n] != now[n]
    }
    refused = [name for name in texts if name not in FREE_FIELDS]
    if not set(refused) <= set(LENGTH):
        listed = ", ".join(texts[name] for name in refused)
        raise ValueError(f"run.dir: {str(folder)!r} holds a run with other settings: {listed}")
    if refused:
        steps, extend, freeze_after = (before.get(name, now[name]) for name in LENGTH)
        run = replace(config.run, steps=steps, extend=extend if "run.extend" in before else 0)
        past = replace(config, run=run, ema=replace(config.ema, freeze_after=freeze_after))
        if config.run.last < update or not _equal_so_far(past, config, update):
            changed = ", ".join(texts[name] for name in refused)
            raise ValueError(
                f"run.dir: {str(folder)!r} holds a run with other settings: {changed}; the rates and decays of its "
                f"{update} updates follow from them: --run.steps {steps} --run.extend N goes on for N updates with a "
                f"schedule of their own, --model.init {folder} with another --run.dir begins a new run from its weights"
            )
    return list(texts.values())


def _equal_so_far(one: Config, other: Config, update: int) -> bool:
    """Whether learning rates and decays of the first `update` updates are the same."""

    def rates(config: Config, number: int) -> tuple[float, float]:
        run = config.run
        return learning_rate_at(config.optim, number, run.steps, run.extend), config.ema.decay(number, run.steps)

    return all(rates(one, number) == rates(other, number) for number in range(1, update + 1))


def read_run(folder: str) -> Config:
    """The settings of the run in a folder, but for `OF_CALLS` and URLs, which each call has to give: a folder made by
    somebody else neither runs anything nor chooses where to write or whom to ask."""
    path = Path(folder)
    checkpoint = latest_checkpoint(path)
    stored = load_json(file := (checkpoint or path) / CONFIG)
    if SECTION in stored:
        raise ValueError(f"run.dir: expected a pre-training run, got one of d2v finetune at {folder!r}")
    try:
        config = Config.from_json(json.dumps(stored))
    except (ValueError, ArithmeticError, TypeError) as error:
        raise damaged(file, error) from None
    if checkpoint is not None:
        check_layers(config, len(read_index(checkpoint)), f"checkpoint {str(checkpoint)!r}")
    for name in OF_CALLS:
        if isinstance(value := attrgetter(name)(config), str):
            print(f"note: {name} counts on the command line only; it was {value!r}", file=sys.stderr)
    left = list(OF_CALLS)
    for name, field in flat_fields(Config).items():
        if field.metadata.get("outside") and isinstance(value := attrgetter(name)(config), str) and is_url(value):
            print(f"note: {name} counts on the command line only where it is a URL; it was {value!r}", file=sys.stderr)
            left.append(name)
    return replace_fields(config, {n: flat_fields(Config)[n].default for n in left} | {"run.dir": folder})


def check_run_folder(folder: str) -> None:
    """`ValueError` unless the run folder is absent, empty, or an earlier run."""
    if not folder:
        raise ValueError("run.dir: expected a folder for the run, got nothing")
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"run.dir: expected a folder, got the file {folder!r}")
    if (
        path.is_dir()
        and not (path / CONFIG).is_file()
        and latest_checkpoint(path) is None
        and any(not entry.name.startswith((LOCK, PARTIAL)) for entry in path.iterdir())
    ):
        raise ValueError(f"run.dir: expected an empty folder or an earlier run, got {folder!r} with other files")


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Makes the run folder and keeps a second process out of it; the lock goes with the process, however that ends.

    A POSIX record lock: unlike flock, loader workers do not inherit it and so cannot keep it after a kill.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"run.dir: another process is training in {str(folder)!r}") from None
        yield


class StopRequest:
    """Remembers the first SIGTERM, SIGUSR1 or SIGINT; a second SIGINT interrupts at once.

    Ctrl-C under torchrun reaches a rank twice, from the terminal and from torchrun: an echo within a second is none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.signal == signal.SIGINT and now - self._since > _ECHO_SECONDS:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._since = number, now

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def exit_code(number: int) -> int:
    """Exit code of a run that signal `number` stopped."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE
