"""How ranks notice that one of them is gone, or does not come where the others wait for it."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from d2v.config import Run
from d2v.folder import LOST

EXIT_LOST = 76
"""Exit code of a rank that lost another one."""
_DONE = "done"


class Heartbeat:
    """Ranks that tell each other they are alive, so that a dead or unreachable one is named and nobody waits for ever.

    A collective with a dead peer fails with an address, or hangs. Here every rank counts up a number in the job's
    key-value store, from a thread of its own while the `with` block runs, and watches the numbers of the others; one
    that stays silent for `timeout` seconds counts as lost and ends the process. A rank that lives but does not come to
    a collective, for which the others waited in vain, is named by those that did.
    """

    def __init__(self, rank: int, size: int, store: Any, run: Run) -> None:
        """rank, size: of the run; store: of the job; run: timeout and folder, which gets `LOST`."""
        self.rank, self.timeout, self.folder = rank, run.timeout, Path(run.dir) if run.dir else None
        self.interval = min(2.0, run.timeout / 10)
        self._store = dist.PrefixStore("d2v-heartbeat", store.clone() if hasattr(store, "clone") else store)
        self._set("name", f"rank {rank} on {socket.gethostname()}")
        self._set("beat", "0")
        dist.barrier()
        peers = [r for r in range(size) if r != rank]
        self.names = {r: self._store.get(f"name-{r}").decode() for r in peers}
        self._beats = dict.fromkeys(peers, b"0")
        self._store_seen = time.monotonic()
        self._seen = dict.fromkeys(peers, self._store_seen)
        self._ended: dict[int, str] = {}
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="d2v-heartbeat", daemon=True)

    def _set(self, kind: str, value: str) -> None:
        self._store.set(f"{kind}-{self.rank}", value)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Tells the others how it ended; where it ended because another rank is gone, names that one and leaves."""
        wanted = error is None or isinstance(error, (SystemExit, KeyboardInterrupt))
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not wanted and threading.current_thread() is threading.main_thread():
            # torchrun ends the others as soon as one is dead; this rank has something to say first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not wanted and isinstance(error, (RuntimeError, dist.DistError)):
            late, where = "timed out" in str(error).lower(), f" at: {first_line}"
            with contextlib.suppress(RuntimeError):
                self._set("failed", "late" if late else "otherwise")
            # A few missing beats are enough after a failure, and they are waited for.
            end = time.monotonic() + 8 * self.interval
            while time.monotonic() < end:
                time.sleep(self.interval / 2)
                self._leave_if_lost(4 * self.interval, where)
            try:
                self._leave_if_awaited(late, where)
            except RuntimeError:  # the store went with rank 0
                if told := self._read_lost():
                    self._leave(told, where)
        self._leaving.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # the store went first
            self._set("ended", _DONE if wanted else f"{getattr(kind, '__name__', kind)}: {first_line}")

    def _run(self) -> None:
        for count in itertools.count(1):
            if self._leaving.wait(self.interval):
                return
            with contextlib.suppress(RuntimeError):  # the store does not answer: its host is gone or cut off
                self._set("beat", str(count))
                self._look()
                self._store_seen = time.monotonic()
            self._leave_if_lost(self.timeout)

    def _look(self) -> None:
        now, peers = time.monotonic(), list(self._beats)
        for rank, beat in zip(peers, self._store.multi_get([f"beat-{r}" for r in peers]), strict=True):
            if beat != self._beats[rank]:
                self._beats[rank], self._seen[rank] = beat, now
            elif now - self._seen[rank] > 2 * self.interval and self._store.check([f"ended-{rank}"]):
                self._ended[rank] = self._store.get(f"ended-{rank}").decode()

    def _leave_if_awaited(self, late: bool, where: str) -> None:
        """Where ranks waited for others in vain, says who has not failed: that one is somewhere else."""
        failed = {r: self._store.get(f"failed-{r}") for r in self.names if self._store.check([f"failed-{r}"])}
        if (late or b"late" in failed.values()) and (absent := [r for r in self.names if r not in failed]):
            verb = "has" if len(absent) == 1 else "have"
            lost = f"{self._list(absent)} {verb} not come in {self.timeout:.0f} s where the others wait"
            self._set("ended", f"a wait in vain: {lost}")
            end = time.monotonic() + 4 * self.interval
            while self.rank == 0 and failed and time.monotonic() < end:  # the store goes with this rank
                if self._store.check([f"ended-{r}" for r in failed]):
                    break
                time.sleep(self.interval / 4)
            self._leave(lost, where)

    def _leave_if_lost(self, silence: float, where: str = "") -> None:
        """Says who is gone and ends the process at once: other threads may wait for that rank, and would not let it."""
        if (lost := self._describe_lost(silence)) and not self._leaving.is_set():
            self._leave(lost, where)

    def _leave(self, lost: str, where: str) -> None:
        print(f"d2v: {lost}; this rank ({self.rank}) stops{where}", file=sys.stderr, flush=True)
        if self.folder is not None and self.folder.is_dir():
            # What the first one saw: the others may miss those that left.
            with contextlib.suppress(OSError), (self.folder / LOST).open("x", encoding="utf-8") as file:
                file.write(lost)
        os._exit(EXIT_LOST)

    def _read_lost(self) -> str:
        """What the first rank saw that left because others are gone; "" where none did."""
        with contextlib.suppress(OSError):
            return (self.folder / LOST).read_text(encoding="utf-8") if self.folder is not None else ""
        return ""

    def _list(self, ranks: list[int]) -> str:
        return ", ".join(self.names[r] for r in ranks[:8]) + (" and others" if len(ranks) > 8 else "")

    def _describe_lost(self, silence: float) -> str | None:
        """The ranks that are gone, in one sentence, or None."""
        now = time.monotonic()
        for rank, reason in list(self._ended.items()):
            if reason != _DONE:
                return f"{self.names[rank]} stopped with {reason}"
        if (quiet := now - self._store_seen) > silence:
            place = self.names.get(0, "this rank")
            return f"the job's key-value store, beside {place}, has not answered for {quiet:.0f} s"
        silent = [r for r, seen in self._seen.items() if r not in self._ended and now - seen > silence]
        if not silent:
            return None
        return f"{self._list(silent)} {'has' if len(silent) == 1 else 'have'} died or cannot be reached"
