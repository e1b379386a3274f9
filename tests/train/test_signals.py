"""Signals become requests; a second Ctrl-C is an order, its echo through a launcher is not."""

from __future__ import annotations

import os
import signal
import time

import pytest

from d2v.train import run_dir
from d2v.train.run_dir import EXIT_INTERRUPTED, EXIT_REQUEUE, StopRequest, exit_code


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # a handler runs between two instructions of the interpreter


def test_the_first_signal_counts() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert stop.signal == 0
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        assert stop.signal == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before
    assert [exit_code(n) for n in (signal.SIGUSR1, signal.SIGTERM)] == [EXIT_REQUEUE, EXIT_REQUEUE]
    assert exit_code(signal.SIGINT) == EXIT_INTERRUPTED


def test_a_second_interrupt_stops_at_once_but_its_echo_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(run_dir.time, "monotonic", lambda: now[0])
    with StopRequest() as stop:
        send(signal.SIGINT)
        now[0] += 0.5
        send(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        now[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
