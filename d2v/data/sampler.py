"""Which sample comes when: the stream of a run, and each rank's part of it. A function of the seed and the index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise

import numpy as np

from d2v.config import Config
from d2v.data import make_modality
from d2v.data.dataset import STREAM_ORDER, Group, SampleRef, random_stream
from d2v.data.sources import Source
from d2v.model.stems.speech import SAMPLE_RATE

BUCKET_RATIO = 1.1
"""Lengths within this ratio count as equal when samples are grouped by length."""


class SampleOrder:
    """The stream of samples of a run: one random permutation per epoch, joined without gaps.

    Every batch is full, every sample comes once per epoch, and a position alone tells where a run is. With lengths,
    samples of about equal length stand together in groups of `group` positions that begin at multiples of `group`, in
    random order; the groups at the two ends of an epoch are what is left of a group that straddles it.

    With shards, an epoch takes the shards in random order, `turns` of them in turn, each from a random place to its end
    and on from its beginning, and permutes windows of `buffer` positions of what results: at any time only a short
    stretch of a few shards is read. Without lengths, the samples of an update then stand in the order of the shards, so
    that a rank, whose share is a part of it, reads a part of the shards. Which samples form an update is random; where
    they stand in it means nothing.
    """

    def __init__(
        self, samples: int, seed: int,
        lengths: np.ndarray | Callable[[int], np.ndarray] | None = None, group: int = 1,
        shards: np.ndarray | None = None, buffer: int = 1, turns: int = 1, update: int = 1,
    ) -> None:  # fmt: skip
        """
        Args:
            samples: number of samples.
            seed: of the permutations.
            lengths: (samples,) above 0, to group by, the same in all epochs or a function of the epoch; None: no
                groups.
            group: positions of a group.
            shards: (samples,) number of each sample's shard, ascending; None: permute all samples.
            buffer: positions of a window, at least a group.
            turns: shards that are read in turn.
            update: samples of an update.
        """
        self.samples, self.seed, self.group, self.buffer = samples, seed, group, max(buffer, group)
        self._lengths = lengths if group > 1 else None
        self._shards, self.turns, self.update = shards, turns, update
        self.epoch = lru_cache(maxsize=2)(self._draw)

    def _draw(self, epoch: int) -> np.ndarray:
        """(samples,) int64: sample ids of an epoch in their order."""
        rng, buckets = random_stream(self.seed, epoch, 0, STREAM_ORDER), self._make_buckets(epoch)
        if self._shards is None:
            return self._sort(rng, rng.permutation(self.samples), self._edges(epoch), buckets)
        order, rank = read_in_turn(rng, self._shards, self.turns)
        # Windows begin where groups do, at other places in every epoch.
        edges = self._edges(epoch)
        number = max(self.buffer // self.group, 1)
        chosen = edges[int(rng.integers(number)) :: number]
        windows = np.unique(np.concatenate([[0], chosen, [self.samples]]))
        for start, stop in pairwise(windows.tolist()):
            inner = edges[(edges >= start) & (edges <= stop)] - start
            order[start:stop] = self._sort(rng, rng.permutation(order[start:stop]), inner, buckets)
        if buckets is not None:
            return order
        updates = (epoch * self.samples + np.arange(self.samples)) // self.update
        return order[np.lexsort((rank[order], updates))]

    def _make_buckets(self, epoch: int) -> np.ndarray | None:
        """(samples,) int16: equal for samples of about equal length in an epoch."""
        if self._lengths is None:
            return None
        lengths = self._lengths(epoch) if callable(self._lengths) else self._lengths
        return np.asarray(np.floor(np.log(lengths) / np.log(BUCKET_RATIO)).astype(np.int16))  # sorted by radix

    def _edges(self, epoch: int) -> np.ndarray:
        """Positions of an epoch at which a group begins, and its end."""
        first = -epoch * self.samples % self.group
        return np.concatenate([[0], np.arange(first or self.group, self.samples, self.group), [self.samples]])

    def _sort(
        self, rng: np.random.Generator, order: np.ndarray, edges: np.ndarray, buckets: np.ndarray | None
    ) -> np.ndarray:
        """Samples in random order -> the same, those between two edges of about equal length."""
        if buckets is None:
            return order
        order = order[np.argsort(buckets[order], kind="stable")]
        # The pieces between the edges are dealt out to runs of equal lengths.
        starts, sizes = edges[:-1], np.diff(edges)
        pieces = rng.permutation(len(sizes))
        result = np.empty_like(order)
        taken = 0
        for piece in pieces:
            size = int(sizes[piece])
            result[starts[piece] : starts[piece] + size] = order[taken : taken + size]
            taken += size
        return result

    def take(self, start: int, count: int) -> list[tuple[int, int]]:
        """(sample id, epoch) at the stream positions `start` to `start + count - 1`."""
        positions = (divmod(p, self.samples) for p in range(start, start + count))
        return [(int(self.epoch(epoch)[offset]), epoch) for epoch, offset in positions]


def read_in_turn(rng: np.random.Generator, shards: np.ndarray, turns: int) -> tuple[np.ndarray, np.ndarray]:
    """(samples,) int64: sample ids as they come when shards in random order are read `turns` at a time; and the place
    that each sample would have if they were read one by one.

    Each shard gives its samples in their order, from a random one around to the one before, at a pace that brings those
    read together to their ends together.

    Args:
        rng: draws the order of the shards and their first samples.
        shards: (samples,) number of each sample's shard, ascending.
        turns: 1 or more.
    """
    _, first, number, sizes = np.unique(shards, return_index=True, return_inverse=True, return_counts=True)
    turn = np.empty(len(sizes), dtype=np.int64)
    turn[rng.permutation(len(sizes))] = np.arange(len(sizes))
    begin = rng.integers(sizes)  # else what stands first in a shard would come early in every epoch
    place = ((np.arange(len(shards)) - first[number] - begin[number]) % sizes[number] + 0.5) / sizes[number]
    rank = np.empty(len(shards), dtype=np.int64)
    rank[np.lexsort((place, turn[number]))] = np.arange(len(shards))
    return np.lexsort((turn[number], place, turn[number] // turns)), rank


def split_evenly(start: int, stop: int, pieces: int) -> list[tuple[int, int]]:
    """(start, stop) of `pieces` adjacent ranges whose sizes differ by at most one, the larger ones first."""
    size, more = divmod(stop - start, pieces)
    edges = [start + i * size + min(i, more) for i in range(pieces + 1)]
    return list(pairwise(edges))


def split_update(groups: list[tuple[int, int]], micro: int, ranks: int) -> list[list[tuple[int, int]]]:
    """The micro-batches of every rank as (start, stop) positions of an update.

    Each rank has a contiguous share. A micro-batch never spans two groups and has at most `micro` samples. All ranks
    have the same number of them: the most that one of them needs; the others split their largest further.

    Args:
        groups: (start, stop) of adjacent groups, from 0 to the global batch.
        micro: most samples of a micro-batch.
        ranks: number of ranks.

    Raises:
        ValueError: a share has fewer samples than there must be micro-batches.
    """
    shares = []
    for start, stop in split_evenly(0, groups[-1][1], ranks):
        pieces = [(max(start, low), min(stop, high)) for low, high in groups if low < stop and high > start]
        shares.append([[low, high, -(-(high - low) // micro)] for low, high in pieces])
    needed = max(sum(count for _, _, count in share) for share in shares)
    result = []
    for share in shares:
        samples = share[-1][1] - share[0][0]
        if samples < needed:
            raise ValueError(
                f"data.micro_batch: expected at least as many samples on a rank as the {needed} micro-batches of an "
                f"update, got {samples} ({groups[-1][1]} samples, data.global_batch, on {ranks} ranks); "
                "pass a --data.global-batch that the ranks divide"
            )
        while sum(count for _, _, count in share) < needed:
            max(share, key=lambda piece: (piece[1] - piece[0]) / piece[2])[2] += 1
        result.append([edge for low, high, count in share for edge in split_evenly(low, high, count)])
    return result


class UpdateSampler:
    """Samples of one rank's micro-batches, of the updates `first` to `last - 1` (0-based).

    The stream is the same for any number of ranks: of global batch G, update u takes the positions u*G to (u+1)*G-1.
    """

    def __init__(self, config: Config, source: Source, first: int, last: int, rank: int = 0, ranks: int = 1) -> None:
        """Raises `ValueError` where the ranks cannot share an update, and for settings that do not fit the samples."""
        self.data, self.first, self.last, self.rank, self.ranks = config.data, first, last, rank, ranks
        self.total, self.lengths = config.data.global_batch, source.lengths
        if self.total < ranks:
            raise ValueError(f"data.global_batch: expected at least {ranks}, one a rank, got {self.total}")
        self.modality = make_modality(config)
        self._lengths_in = lru_cache(maxsize=2)(self._draw_lengths)
        self.micro = min(self.data.micro_batch or self.total, self.total)
        # Samples that are forwarded together have about the same length. Groups know nothing of ranks.
        group = self.micro if self.total % self.micro == 0 else self.total
        shards = source.shards if self.data.shuffle == "shards" else None
        if self.data.shuffle == "shards" and shards is None:
            raise ValueError("data.shuffle: expected full unless data.path names .tar shards, got shards")
        lengths = None if self.lengths is None else self._lengths_in
        self.order = SampleOrder(
            len(source), config.run.seed, lengths, group, shards, self.data.shuffle_buffer, self.data.shuffle_shards,
            self.total,
        )  # fmt: skip
        self.limit = self._check_seconds()
        # Only what is cropped or cut to its group must not be forwarded with samples of another.
        self.grouped = self.lengths is not None or "equal-mask-counts" in config.published
        edges = list(range(0, self.total + 1, group)) if self.grouped else [0, self.total]
        self._groups = list(pairwise(edges))
        self._layout = split_update(self._groups, self.micro, ranks)

    def _check_seconds(self) -> int | None:
        """data.batch_seconds as samples of a waveform."""
        seconds = self.data.batch_seconds
        if seconds is None:
            return None
        if self.lengths is None:
            raise ValueError(f"data.batch_seconds: expected speech, got {seconds} for samples without a length")
        longest = self.modality.longest_perturbed(int(self.lengths.max()))
        if seconds < longest / SAMPLE_RATE:
            raise ValueError(
                f"data.batch_seconds: expected at least {longest / SAMPLE_RATE:g}, the longest utterance "
                f"(--data.max-seconds), got {seconds}"
            )
        if self.total % self.ranks:
            raise ValueError(
                f"data.global_batch: expected a multiple of the {self.ranks} ranks with data.batch_seconds, "
                f"got {self.total}"
            )
        return int(seconds * SAMPLE_RATE)

    def __iter__(self) -> Iterator[list[SampleRef]]:
        for update in range(self.first, self.last):
            yield from self.refs(update)

    def count(self, update: int) -> int:
        """Micro-batches of an update, the same on all ranks."""
        if self.limit is None:
            return len(self._layout[self.rank])
        return len(self._split(self._lengths_of(self._places(update)))[1][self.rank])

    def refs(self, update: int) -> list[list[SampleRef]]:
        """This rank's micro-batches of an update."""
        if not self.grouped:
            batches = self._layout[self.rank]
            return [[SampleRef(*place) for place in self._places(update, start, stop)] for start, stop in batches]
        places = self._places(update)
        lengths = self._lengths_of(places)
        groups, layout = self._split(lengths)
        stream: list[SampleRef] = []
        for start, stop in groups:
            known = None if lengths is None else tuple(lengths[start:stop])
            crop = min(known) if known is not None and self.data.unequal == "crop" else None
            group = Group(tuple(places[start:stop]), known, crop)
            stream += [SampleRef(*place, group, number) for number, place in enumerate(group.places)]
        return [stream[start:stop] for start, stop in layout[self.rank]]

    def _places(self, update: int, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        stop = self.total if stop is None else stop
        return self.order.take(update * self.total + start, stop - start)

    def _draw_lengths(self, epoch: int) -> np.ndarray:
        """(samples,) int64: lengths in an epoch; they differ between epochs where speeds are random."""
        assert self.lengths is not None
        return self.modality.perturbed_lengths(self.lengths, epoch)

    def _lengths_of(self, places: list[tuple[int, int]]) -> list[int] | None:
        """Lengths of samples (id, epoch) in those epochs."""
        return None if self.lengths is None else [int(self._lengths_in(epoch)[i]) for i, epoch in places]

    def _split(self, lengths: list[int] | None) -> tuple[list[tuple[int, int]], list[list[tuple[int, int]]]]:
        """Groups of an update of samples of these lengths, and the micro-batches of every rank."""
        if self.limit is None or lengths is None:
            return self._groups, self._layout
        groups = [
            (start + low, start + high)
            for start, stop in self._groups
            for low, high in fill(lengths[start:stop], self.limit, crop=self.data.unequal == "crop")
        ]
        return groups, split_update(groups, self.micro, self.ranks)


def fill(lengths: list[int], limit: int, crop: bool) -> list[tuple[int, int]]:
    """(start, stop) of adjacent batches, each as large as fits into `limit`.

    A batch takes its number of samples times their shortest length (crop) or their longest (padding).
    """
    batches, start = [], 0
    for stop in range(1, len(lengths) + 1):
        part = lengths[start:stop]
        if stop - start > 1 and len(part) * (min(part) if crop else max(part)) > limit:
            batches.append((start, stop - 1))
            start = stop - 1
    return [*batches, (start, len(lengths))]
