"""Ranks that tell each other they are alive, so that a dead or unreachable one is named and nobody waits for ever.

A collective with a dead peer fails with an address, or hangs. Here every rank counts up a number in the job's key-value
store from a thread of its own and watches the numbers of the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

import torch.distributed as dist

EXIT_LOST = 76
"""Exit code of a rank that lost another one."""
_DONE = "done"


class Heartbeat:
    """Beats while the `with` block runs. Others that stay silent for `timeout` seconds end the process."""

    def __init__(self, rank: int, size: int, name: str, timeout: float) -> None:
        """
        Args:
            rank, size: of the run.
            name: what to call this rank in messages.
            timeout: seconds of silence after which another rank counts as lost.
        """
        self.rank, self.size, self.timeout = rank, size, timeout
        self.interval = min(2.0, timeout / 10)
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("d2v-heartbeat", store.clone() if hasattr(store, "clone") else store)
        self._set("name", name)
        self._set("beat", "0")
        dist.barrier()
        peers = [r for r in range(size) if r != rank]
        self.names = {r: self._store.get(f"name-{r}").decode() for r in peers}
        self._beats = dict.fromkeys(peers, b"0")
        self._seen = dict.fromkeys(peers, time.monotonic())
        self._store_seen = time.monotonic()
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
        if not wanted and threading.current_thread() is threading.main_thread():
            # torchrun ends the others as soon as one is dead; this rank has something to say first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not wanted and isinstance(error, (RuntimeError, dist.DistError)) and (lost := self._find_lost()):
            leave(f"{lost}; this rank ({self.rank}) stops at: {first_line(error)}")
        self._leaving.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # the store went first
            self._set("ended", _DONE if wanted else f"{getattr(kind, '__name__', kind)}: {first_line(error)}")

    def _run(self) -> None:
        count = 0
        while not self._leaving.wait(self.interval):
            count += 1
            with contextlib.suppress(RuntimeError):  # the store does not answer: its host is gone or cut off
                self._set("beat", str(count))
                self._look()
                self._store_seen = time.monotonic()
            if (lost := self._describe_lost(self.timeout)) and not self._leaving.is_set():
                leave(f"{lost}; this rank ({self.rank}) stops")

    def _look(self) -> None:
        peers = list(self._beats)
        now = time.monotonic()
        for rank, beat in zip(peers, self._store.multi_get([f"beat-{r}" for r in peers]), strict=True):
            if beat != self._beats[rank]:
                self._beats[rank], self._seen[rank] = beat, now
            elif now - self._seen[rank] > 2 * self.interval and self._store.check([f"ended-{rank}"]):
                self._ended[rank] = self._store.get(f"ended-{rank}").decode()

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
        names = ", ".join(self.names[r] for r in silent[:8]) + (" and others" if len(silent) > 8 else "")
        return f"{names} {'has' if len(silent) == 1 else 'have'} died or cannot be reached"

    def _find_lost(self) -> str | None:
        """Like `_describe_lost`, after a failure: a few missing beats are enough, and they are waited for."""
        end = time.monotonic() + 8 * self.interval
        while time.monotonic() < end:
            time.sleep(self.interval / 2)
            if lost := self._describe_lost(4 * self.interval):
                return lost
        return None


def first_line(error: BaseException | None) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def leave(text: str) -> None:
    """Says why and ends the process at once: other threads may wait for a rank that is gone, and would not let it."""
    print(f"d2v: {text}", file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)
