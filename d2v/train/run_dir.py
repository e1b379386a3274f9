"""The run folder: whose it is, what it holds, and who may write into it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from d2v.files import write_atomically
from d2v.folder import CONFIG, clean_folder, latest_checkpoint, load_json
from d2v.train.distributed import World
from d2v.train.resume import compare_configs
from d2v.train.signals import EXIT_REQUEUE

REQUEUE = "requeue"
"""File in the run folder of a run that was stopped from outside and can be started again."""


class RunFolder:
    """The folder of a run that begins or goes on; nothing is written before `begin`."""

    def __init__(self, config: Any, world: World) -> None:
        """Raises `ValueError` where `run.dir` is no place for this run."""
        self.world, self.path = world, Path(config.run.dir)
        self.changed: list[str] = []
        found = None
        with world.first_before_others():
            if world.is_first:
                check_run_folder(config.run.dir)
                found = latest_checkpoint(self.path)
            if found is not None:
                self.changed = compare_configs(load_json(self.path / CONFIG), json.loads(config.to_json()), self.path)
        self.resumed: Path | None = world.share(found)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second run out of the folder, which exists from here on."""
        with contextlib.ExitStack() as stack:
            if self.world.is_first:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_folder(self.path))
            yield

    def begin(self, config: Any) -> None:
        """Rank 0: writes the configuration, removes what a killed run left half done."""
        clean_folder(self.path / "checkpoints")
        (self.path / REQUEUE).unlink(missing_ok=True)
        write_atomically(self.path / CONFIG, config.to_json())

    def describe_resume(self, state: Mapping[str, Any], config: Any, world: World) -> None:
        """Says where the run goes on and what is different now."""
        print(f"resuming {self.path} after update {state['step']} of {config.run.steps}", file=sys.stderr)
        for text in self.changed:
            print(f"note: changed {text}", file=sys.stderr)
        for name, before, now in (
            ("ranks", state["ranks"], world.size),
            ("torch", state["torch"], torch.__version__),
        ):
            if before != now:
                print(f"note: {name} {before} before, {now} now: equal up to rounding from here", file=sys.stderr)

    def mark_stopped(self, update: int, number: int, code: int) -> None:
        """Rank 0: tells a batch script whether to start the run again."""
        if code == EXIT_REQUEUE:
            write_atomically(self.path / REQUEUE, json.dumps({"step": update, "signal": number}))


def check_run_folder(folder: str) -> None:
    """`ValueError` unless the run folder is absent, empty, or an earlier run."""
    if not folder:
        raise ValueError("run.dir: expected a folder for the run, got nothing")
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"run.dir: expected a folder, got the file {folder!r}")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).is_file():
        raise ValueError(f"run.dir: expected an empty folder or an earlier run, got {folder!r} with other files")


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
