"""Signals that end a run in order: finish the update, save, leave with a code that says whether to start it again."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

EXIT_REQUEUE = 75
"""Exit code after SIGTERM and SIGUSR1 (EX_TEMPFAIL): the job was stopped from outside; started again, it goes on."""
EXIT_INTERRUPTED = 128 + signal.SIGINT
_ECHO_SECONDS = 1.0


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
