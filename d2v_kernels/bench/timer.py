"""Timing in turn: every contender once a round, so that drift of the machine hits all alike."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
REPLAY_SECONDS = 4e-4  # a graph is at least this long, so that its launch does not count


def take_turns(
    samplers: Mapping[str, Callable[[], T]], *, rounds: int, least: int, budget_s: float
) -> dict[str, list[T]]:
    """One sample of each in every round.

    Args:
        samplers: name -> call that measures one sample.
        rounds: rounds wanted; at least `least` are run whatever the budget.
        budget_s: no further round is started after this many seconds.
    """
    samples: dict[str, list[T]] = {name: [] for name in samplers}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - start > budget_s:
            break
        for name, sample in samplers.items():
            samples[name].append(sample())
    return samples


def seconds_of(call: Callable[[], Any]) -> float:
    """One call, which allocates its own output."""
    before = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - before
    del result
    return seconds


def summarise(seconds: Sequence[float], **more: Any) -> dict[str, Any]:
    """What a row keeps of its samples; the spread is the distance of the quartiles."""
    low, middle, high = statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {"minimum": min(seconds), "median": middle, "spread": high - low, "rounds": len(seconds), **more}


def time_interleaved(
    contenders: dict[str, Callable[[], Any]], *, rounds: int = 25, budget_s: float = 12.0
) -> dict[str, Any]:
    """Seconds of calls on a CPU, after two of each that do not count."""
    for call in contenders.values():
        call()
        call()
    samplers = {name: functools.partial(seconds_of, call) for name, call in contenders.items()}
    samples = take_turns(samplers, rounds=rounds, least=20, budget_s=budget_s)
    return {name: summarise(seconds) for name, seconds in samples.items()}


class Captured:
    """A contender's calls on all input sets in one CUDA graph."""

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        # As many results stay alive as there are inputs: a buffer written again and again would not leave the cache.
        self.results: list[Any] = [None] * len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2] * 2:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph, self.calls = self._capture(calls), len(calls)
        once = self.seconds()
        rounds = math.ceil(REPLAY_SECONDS / max(once * self.calls, 1e-7))
        if rounds > 1:
            calls = calls * min(rounds, 200)
            self.graph, self.calls = self._capture(calls), len(calls)

    def _capture(self, calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self.results = [None] * len(self.results)
        with torch.cuda.graph(graph):
            for i, call in enumerate(calls):
                self.results[i % len(self.results)] = call()
        return graph

    def seconds(self) -> float:
        """One replay, per call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.calls
