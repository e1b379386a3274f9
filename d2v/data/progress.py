"""Progress of work on data that may take long: a line on standard error every few seconds, none for quick work."""

from __future__ import annotations

import sys
import threading
import time

from d2v.runtime import format_seconds

INTERVAL = 5.0
"""Seconds between two lines."""


class Reporter:
    """Counts done work and says how fast it goes."""

    def __init__(self, what: str, total: float, unit: str) -> None:
        """
        Args:
            what: "tokenising", "reading headers".
            total: amount of work.
            unit: "MB", "files".
        """
        self.what, self.total, self.unit = what, total, unit
        self.start = self.said = time.monotonic()
        self.done = 0.0
        self._lock = threading.Lock()

    def add(self, done: float) -> None:
        """Counts more work as done; for work by several threads."""
        with self._lock:
            self.done += done
            self.show(self.done)

    def show(self, done: float) -> None:
        """Says how much is done, unless it just did."""
        now = time.monotonic()
        if now - self.said >= INTERVAL:
            self.said = now
            rate = done / (now - self.start)
            left = format_seconds((self.total - done) / rate) if rate else "?"
            self._print(f"{done:,.0f} of {self.total:,.0f} {self.unit}, {rate:,.1f} {self.unit}/s, {left} left")

    def finish(self, done: float) -> None:
        """Says how long it took, where anything was said before."""
        if self.said != self.start:
            seconds = time.monotonic() - self.start
            rate = done / max(seconds, 1e-9)
            self._print(f"{done:,.0f} {self.unit} in {format_seconds(seconds)}, {rate:,.1f} {self.unit}/s")

    def _print(self, text: str) -> None:
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)
