"""Recordings that are normalised where they are sliced. Long ones are decoded as a whole once, for the index; a crop of
one later decodes no more than it needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import numpy as np

from d2v.data.decoding.sound import (
    REACH,
    count_resampled,
    find_level,
    normalise_waveform,
    read_frames,
    read_header,
    read_whole,
    to_waveform,
)
from d2v.data.sources import check_size
from d2v.model.stems.speech import SAMPLE_RATE

LONG = 60 * SAMPLE_RATE
"""Samples of a minute: more are read in parts."""


class Level(NamedTuple):
    """What the index knows about a long recording, besides its length."""

    samples: int
    """At 16 kHz."""
    mean: float
    """This and the deviation are those of the whole, as `find_level` returns them."""
    deviation: float
    channels: int
    rate: int
    """Hz."""


def measure_recording(file: BinaryIO) -> int | Level:
    """Samples at 16 kHz of an encoded recording, as many as decoding gives; of one above a minute its `Level`.

    A header is believed only where `read_header` is certain. Raises `ValueError` for what cannot be decoded.
    """
    samples = read_header(file)
    if samples is not None and samples <= LONG:
        return samples
    file.seek(0)
    data = file.read()
    check_size(len(data), "file")
    values, rate = read_whole(data)
    if (samples := count_resampled(len(values), rate)) <= LONG:
        return samples
    return Level(samples, *find_level(to_waveform(values, rate)), values.shape[1], rate)


class Utterance:
    """A recording (S,) at 16 kHz, normalised as a whole, but where it is sliced: of a crop no more than that."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.level = values, find_level(values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, piece: slice) -> np.ndarray:
        """float32."""
        return normalise_waveform(self.values[piece], self.level)


class Recording:
    """A long recording (S,) at 16 kHz, normalised as a whole. A slice is decoded when it is asked for, to the same bits
    as that slice of the whole."""

    def __init__(self, open_file: Callable[[], BinaryIO], level: Level) -> None:
        self.open_file, self.level = open_file, level

    def __len__(self) -> int:
        return self.level.samples

    def __getitem__(self, piece: slice) -> np.ndarray:
        """float32; `ValueError` or `OSError` where the file is not what it was."""
        start, stop, step = piece.indices(len(self))
        if step != 1 or stop <= start:
            raise IndexError(f"expected start:stop with samples between them, got {piece}")
        first, last, before = find_frames(start, stop, self.level.rate)
        with self.open_file() as file:
            values, rate = read_frames(file, first, last)
        waveform = to_waveform(values, rate)[before : before + stop - start]
        found = (len(waveform), values.shape[1], rate)
        if found != (expected := (stop - start, self.level.channels, self.level.rate)):
            raise ValueError(f"expected {expected} samples, channels and Hz, as when it was indexed, got {found}")
        if not np.isfinite(waveform).all():
            raise ValueError("samples that are not finite")
        return normalise_waveform(waveform, (self.level.mean, self.level.deviation))


def find_frames(start: int, stop: int, rate: int) -> tuple[int, int, int]:
    """The frames, from first to before last, which samples `start` to `stop` at 16 kHz depend on; and samples that
    these frames give before `start`.

    The first is one with a sample at its very place, so that the low-pass falls on these frames as on the whole.
    """
    if rate == SAMPLE_RATE:
        return start, stop, 0
    factor = math.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // factor, rate // factor
    reach = REACH * max(up, down)
    block = max((start * down - reach) // (up * down), 0)
    return block * down, ((stop - 1) * down + reach) // up + 2, start - block * up
