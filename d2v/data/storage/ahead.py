"""Reads that are begun before their samples are asked for: they wait for a slow storage side by side."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from d2v.data.sources import Source

REMOTE_READERS = 16
"""Reads in flight of a loader worker where samples lie at URLs and data.readers is unset."""


class Following(list[Any]):
    """References of a batch, and the numbers of the samples of the one that the same worker makes next."""

    following: Sequence[int] = ()


def with_following(batches: Iterable[list[Any]], workers: int) -> Iterator[list[Any]]:
    """The batches with what follows them: the loader gives them to its workers in turn."""
    source = iter(batches)
    held = list(islice(source, max(workers, 1)))
    while held:
        batch = Following(held.pop(0))
        held += islice(source, 1)
        if len(held) == max(workers, 1):
            batch.following = [reference[0] for reference in held[-1]]
        yield batch


class ReadAhead:
    """Stands for `Source.read` of a source: threads of this process read what it has been told will be wanted."""

    def __init__(self, source: Source, threads: int) -> None:
        self.threads, self._source = threads, source
        self._process = -1
        self._futures: dict[int, Future[bytes]] = {}

    def _read(self, sample: int) -> bytes:
        return type(self._source).read(self._source, sample)  # `read` of the object is that of this one

    def ask(self, samples: Iterable[int]) -> None:
        """Begins to read these samples, those first that were asked for first."""
        if self._process != os.getpid():  # threads do not survive a fork
            self._process, self._futures = os.getpid(), {}
            self._pool = ThreadPoolExecutor(self.threads)
        for sample in samples:
            if sample not in self._futures:
                self._futures[sample] = self._pool.submit(self._read, sample)

    def read(self, index: int) -> bytes:
        """Encoded bytes of a sample; what reading it raises is raised here."""
        future = self._futures.pop(index, None) if self._process == os.getpid() else None
        return self._read(index) if future is None else future.result()

    def __getstate__(self) -> dict[str, Any]:
        return {"threads": self.threads, "_source": self._source, "_process": -1, "_futures": {}}
