"""Interleaved timing: every contender once per round, in one process, outputs checked equal first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender over all rounds."""

    minimum: float
    median: float
    rounds: int


def time_interleaved(
    contenders: dict[str, Callable[[], Any]], *, rounds: int = 25, budget_s: float = 12.0
) -> dict[str, Timing]:
    """Times each contender once per round, in turn, so that drift of the machine hits all alike.

    Args:
        contenders: name -> call that allocates its own output.
        rounds: rounds wanted; at least 20 are run whatever the budget.
        budget_s: no further round is started after this many seconds.
    """
    for call in contenders.values():
        call()
        call()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 20 and time.perf_counter() - start > budget_s:
            break
        for name, call in contenders.items():
            before = time.perf_counter()
            result = call()
            seconds[name].append(time.perf_counter() - before)
            del result
    return {name: Timing(min(s), statistics.median(s), len(s)) for name, s in seconds.items()}
