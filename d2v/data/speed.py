"""Random speed of utterances: pitch and length change together (Ko et al. 2015, "Audio augmentation for speech
recognition").

A speed is a whole number of percent, so that playing at it is resampling by a ratio of small numbers, and so that the
length of what is played is known before anything is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from d2v.data.dataset import STREAM_SPEED, random_stream

NORMAL = 100
"""Percent of an utterance that is played as it was recorded."""
_WORDS = 4
"""Random numbers that Philox makes at a time, of which one is used."""


@dataclass(frozen=True)
class RandomSpeed:
    """e^u with u uniform in [-spread, spread], a function of (seed, epoch, sample id) only.

    No utterance is played so slowly that it would have to be cropped where it was not before, or so fast that it would
    be too short: transcripts stay those of the whole, and masks find their tokens.
    """

    seed: int
    spread: float
    """s of data.speed, above 0."""
    shortest: int
    """Samples of the shortest utterance."""
    longest: int
    """Samples of the longest crop."""

    @property
    def slowest(self) -> int:
        """Percent."""
        return int(np.rint(NORMAL * np.exp(-self.spread)))

    @property
    def fastest(self) -> int:
        """Percent."""
        return int(np.rint(NORMAL * np.exp(self.spread)))

    def draw(self, epoch: int, first: int, count: int) -> np.ndarray:
        """(count,) int64: percents of the samples `first` to `first + count - 1` in an epoch.

        Sample i has block i of one stream per epoch: those of a whole epoch cost little, and any of them alone, too.
        """
        rng = random_stream(self.seed, epoch, 0, STREAM_SPEED)
        assert isinstance(rng.bit_generator, np.random.Philox)
        rng.bit_generator.advance(first)
        place = rng.random(_WORDS * count)[::_WORDS]
        return np.rint(NORMAL * np.exp(self.spread * (2.0 * place - 1.0))).astype(np.int64)

    def percents(self, lengths: np.ndarray, epoch: int, first: int = 0) -> np.ndarray:
        """(n,) int64: speeds of the samples from `first` on, whose lengths (n,) in samples are these."""
        fast = np.maximum(lengths * NORMAL // self.shortest, NORMAL)
        slow = np.where(lengths <= self.longest, -(-lengths * NORMAL // self.longest), 1)
        return np.clip(self.draw(epoch, first, len(lengths)), slow, fast)

    def lengths(self, lengths: np.ndarray, epoch: int) -> np.ndarray:
        """(n,) int64: samples of the first n utterances as they are played in an epoch, of the lengths (n,) that they
        were recorded with."""
        return -(-lengths * NORMAL // self.percents(lengths, epoch))

    def longest_of(self, length: int) -> int:
        """Most samples that an utterance of at most `length` gives a batch."""
        return min(-(-length * NORMAL // self.slowest), self.longest)

    @property
    def recorded(self) -> int:
        """Samples from which on an utterance fills the longest crop at any speed."""
        return -(-self.longest * self.fastest // NORMAL)
