"""The masking rules in plain Python: the definition that the native sampler reproduces bit for bit.

Arithmetic is that of C: integers truncate, reals are doubles, the random stream is splitmix64 seeded by
(seed, epoch, sample id, copy).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .masks import MaskSampler

_LOW64 = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_ATTEMPTS = 10  # placements tried for one rectangle
_MIN_ASPECT = 0.3


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _LOW64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _LOW64
    return z ^ (z >> 31)


def row_state(seed: int, epoch: int, sample_id: int, copy: int) -> int:
    """Start of a row's stream: each number is absorbed in turn."""
    state = 0
    for word in (seed, epoch, sample_id, copy):
        state = _mix(((state ^ (word & _LOW64)) + _STEP) & _LOW64)
    return state


class Stream:
    """splitmix64 (Steele, Lea, Flood 2014)."""

    def __init__(self, state: int) -> None:
        self.state = state

    def next64(self) -> int:
        self.state = (self.state + _STEP) & _LOW64
        return _mix(self.state)

    def below(self, n: int) -> int:
        """Uniform integer in [0, n), n < 2^32."""
        return ((self.next64() >> 32) * n) >> 32

    def uniform(self) -> float:
        """Uniform double in [0, 1)."""
        return (self.next64() >> 11) * 2.0**-53

    def choose(self, items: list[int], count: int) -> list[int]:
        """`count` distinct items by a partial Fisher-Yates shuffle."""
        for i in range(count):
            j = i + self.below(len(items) - i)
            items[i], items[j] = items[j], items[i]
        return items[:count]


def _positions(mask: list[bool], value: bool) -> list[int]:
    return [t for t, m in enumerate(mask) if m == value]


def _block(s: MaskSampler, stream: Stream, length: int) -> list[bool]:
    p = 1.0 - s.ratio if s.inverse else s.ratio
    target = int(length * p)
    height, width = (s.height, s.width) if s.height else (1, length)
    area = s.span * s.span if s.height else s.span
    mask = [False] * length
    for _ in range(int(length * (p + s.adjust) / area)):
        centre = stream.below(length)
        row, column = divmod(centre, width)
        rows = range(-(s.span // 2), s.span - s.span // 2) if s.height else range(1)
        for dr in rows:
            for dc in range(-(s.span // 2), s.span - s.span // 2):
                r = min(max(row + dr, 0), height - 1)
                mask[r * width + min(max(column + dc, 0), width - 1)] = True
    excess = sum(mask) - target
    for t in stream.choose(_positions(mask, excess > 0), abs(excess)):
        mask[t] = excess < 0
    return [not m for m in mask] if s.inverse else mask


def _random(s: MaskSampler, stream: Stream, length: int) -> list[bool]:
    mask = [False] * length
    for t in stream.choose(list(range(length)), length - int(length * (1.0 - s.ratio))):
        mask[t] = True
    return mask


def _spans(starts: list[int], span: int, length: int) -> list[bool]:
    mask = [False] * length
    for start in starts:
        for t in range(start, min(start + span, length)):
            mask[t] = True
    return mask


def _span(s: MaskSampler, stream: Stream, length: int) -> list[bool]:
    count = max(int(s.ratio * length / s.span + stream.uniform()), 1)
    reserve = s.span if length - s.span > count else length - count - 1
    starts = max(length - max(reserve, 0), 0)
    return _spans(stream.choose(list(range(starts)), min(count, starts)), s.span, length)


def _token_span(s: MaskSampler, stream: Stream, length: int) -> list[bool]:
    count = int(s.ratio * length / s.span + stream.uniform())
    return _spans(stream.choose(list(range(length)), min(count, length)), s.span, length)


def _rectangles(s: MaskSampler, stream: Stream, length: int) -> list[bool]:
    target, smallest = int(s.ratio * length + 0.5), s.span * s.span
    log_low, log_high = math.log(_MIN_ASPECT), math.log(1.0 / _MIN_ASPECT)
    mask = [False] * length
    count = 0
    while count < target:
        cap = target - count
        placed = 0
        for _ in range(_ATTEMPTS):
            area = smallest + stream.uniform() * (cap - smallest)
            aspect = math.exp(log_low + stream.uniform() * (log_high - log_low))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (1 <= h < s.height and 1 <= w < s.width):
                continue
            top, left = stream.below(s.height - h + 1), stream.below(s.width - w + 1)
            cells = [r * s.width + c for r in range(top, top + h) for c in range(left, left + w)]
            new = [t for t in cells if not mask[t]]
            if 0 < len(new) <= cap:
                for t in new:
                    mask[t] = True
                placed = len(new)
                break
        if not placed:
            break
        count += placed
    return mask


_RULES = {"block": _block, "random": _random, "span": _span, "token-span": _token_span, "rectangles": _rectangles}


def draw_rows(
    sampler: MaskSampler, sample_ids: list[int], epoch: int, copies: int, lengths: list[int] | None
) -> list[list[bool]]:
    """One list of T booleans for each (sample, copy)."""
    rows, streams = [], []
    for n, sample_id in enumerate(sample_ids):
        length = sampler.tokens if lengths is None else lengths[n]
        for copy in range(copies):
            stream = Stream(row_state(sampler.seed, epoch, sample_id, copy))
            mask = _RULES[sampler.kind](sampler, stream, length) if length else []
            rows.append(mask + [False] * (sampler.tokens - length))
            streams.append(stream)
    if sampler.equal_counts and rows:
        target = min(sum(mask) for mask in rows)
        for mask, stream in zip(rows, streams, strict=True):
            masked = _positions(mask, True)
            stream.choose(masked, target)  # moves the chosen ones to the front; the others are cleared
            for t in masked[target:]:
                mask[t] = False
    return rows
