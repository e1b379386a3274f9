"""Order of samples, worker processes, and the account of bad samples."""

from __future__ import annotations

import json
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from d2v.checkpoint import write_atomically
from d2v.config import Config
from d2v.data import make_modality
from d2v.data.samples import (
    STREAM_ORDER,
    Batch,
    Collate,
    EvaluationSamples,
    MaskingCollate,
    Note,
    TrainSamples,
    random_stream,
)
from d2v.data.sources import Source

TERM_GRACE_SECONDS = 10
"""Life of a loader worker after a SIGTERM."""
FIRST_VERDICT = 200
"""Samples tried before the share of bad ones is judged (or all, when there are fewer)."""


BUCKET_RATIO = 1.1
"""Lengths within this ratio count as equal when samples are grouped by length."""


class SampleOrder:
    """The stream of samples of a run: one random permutation per epoch, joined without gaps.

    Every batch is full, every sample comes once per epoch, and a position alone tells where a run is. With lengths,
    samples of about equal length stand together in groups of `group` positions that begin at multiples of `group`, in
    random order; the groups at the two ends of an epoch are what is left of a group that straddles it.
    """

    def __init__(self, samples: int, seed: int, lengths: np.ndarray | None = None, group: int = 1) -> None:
        """
        Args:
            samples: number of samples.
            seed: of the permutations.
            lengths: (samples,) above 0, to group by; None: no groups.
            group: positions of a group.
        """
        self.samples, self.seed, self.group = samples, seed, group
        self._buckets = None
        if lengths is not None and group > 1:
            self._buckets = np.floor(np.log(lengths) / np.log(BUCKET_RATIO)).astype(np.int64)
        self._epochs: dict[int, np.ndarray] = {}

    def epoch(self, epoch: int) -> np.ndarray:
        """(samples,) int64: sample ids of an epoch in their order."""
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._draw(epoch)
        return self._epochs[epoch]

    def _draw(self, epoch: int) -> np.ndarray:
        rng = random_stream(self.seed, epoch, 0, STREAM_ORDER)
        order = rng.permutation(self.samples)
        if self._buckets is None:
            return order
        order = order[np.argsort(self._buckets[order], kind="stable")]
        # Positions of this epoch at which a group begins; the pieces between are dealt out to runs of equal lengths.
        first = -epoch * self.samples % self.group
        edges = np.concatenate([[0], np.arange(first or self.group, self.samples, self.group), [self.samples]])
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


class UpdateSampler:
    """Index lists of the micro-batches of the updates `first` to `last - 1` (0-based)."""

    def __init__(self, config: Config, samples: int, first: int, last: int, lengths: np.ndarray | None = None) -> None:
        self.first, self.last = first, last
        self.share = config.data.global_batch
        self.micro = min(config.data.micro_batch or self.share, self.share)
        # Samples that are forwarded together have about the same length.
        group = self.micro if self.share % self.micro == 0 else self.share
        self.order = SampleOrder(samples, config.run.seed, lengths, group)

    @property
    def per_update(self) -> int:
        """Micro-batches of an update."""
        return -(-self.share // self.micro)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for update in range(self.first, self.last):
            indices = self.order.take(update * self.share, self.share)
            for start in range(0, self.share, self.micro):
                yield indices[start : start + self.micro]


def outlive_signals(_worker: int) -> None:
    """Ctrl-C and a job scheduler's SIGTERM reach the whole process group; the main process alone decides what follows.

    A worker that died of them would raise in the main process in the middle of an update. Workers leave when told to,
    or within seconds of their parent's end. A SIGTERM may also come from a parent that has crashed and waits for its
    children: a worker that is still there after the grace period leaves by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(TERM_GRACE_SECONDS))


def _loader(dataset: Any, collate: Any, workers: int, device: torch.device, **kwargs: Any) -> DataLoader[Batch]:
    more: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
    return DataLoader(
        dataset,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=outlive_signals,
        generator=torch.Generator(),  # its own: the loader must not advance the run's random state
        **more,
        **kwargs,
    )


def train_updates(
    config: Config, source: Source, first: int, device: torch.device
) -> Generator[list[Batch], None, None]:
    """Lists of micro-batches, one list per update, from update `first` (0-based) to the end of the run."""
    modality = make_modality(config)
    sampler = UpdateSampler(config, len(source), first, config.run.steps, source.lengths)
    dataset = TrainSamples(source, modality, config.run.seed)
    collate = MaskingCollate(config, modality)
    batches = iter(_loader(dataset, collate, config.data.workers, device, batch_sampler=sampler))
    for _ in range(first, config.run.steps):
        yield [next(batches) for _ in range(sampler.per_update)]


def validation_batches(config: Config, source: Source, device: torch.device) -> Generator[Batch, None, None]:
    """One pass over held-out samples without augmentation, with the masks of epoch 0."""
    modality = make_modality(config)
    size = min(config.data.micro_batch or config.data.global_batch, len(source))
    collate = MaskingCollate(config, modality, training=False)
    yield from _loader(
        EvaluationSamples(source, modality), collate, config.data.workers, device, batch_size=size
    )  # fmt: skip


def evaluation_batches(
    config: Config, source: Source, device: torch.device, batch: int = 64, workers: int = 0
) -> Iterator[Batch]:
    """One pass over the source in order, without augmentation and masks."""
    modality = make_modality(config)
    yield from _loader(EvaluationSamples(source, modality), Collate(modality), workers, device, batch_size=batch)


class BadSamples:
    """Counts what could not be decoded, lists it in `bad_samples.jsonl`, and says when it is too much.

    A sample counts once however often it comes. The verdict falls once `FIRST_VERDICT` samples, or all, were tried.
    """

    def __init__(self, source: Source, allowed: float, file: Path | None) -> None:
        self.source, self.allowed, self.file = source, allowed, file
        self.entries: list[dict[str, Any]] = [{"id": None, "path": n, "reason": r} for n, r in source.rejected]
        self.converted: dict[str, int] = {}
        self._ids: set[int] = set()
        self._written = 0
        self._fatal: str | None = None

    def add(self, notes: tuple[Note, ...]) -> list[str]:
        """Takes the notes of a batch; returns sentences about conversions of a kind that was not met before.

        Conversions are counted in epoch 0, where every sample comes exactly once.
        """
        news = []
        for note in notes:
            if note.kind == "converted" and note.epoch == 0:
                if note.text not in self.converted:
                    news.append(f"converted: {note.text}, first in {self.source.describe(note.sample_id)}")
                self.converted[note.text] = self.converted.get(note.text, 0) + 1
            elif note.kind == "bad" and note.sample_id not in self._ids:
                self._ids.add(note.sample_id)
                path = self.source.describe(note.sample_id)
                self.entries.append({"id": note.sample_id, "path": path, "reason": note.text})
            elif note.kind == "fatal":
                self._fatal = note.text
        return news

    def check(self, drawn: int) -> None:
        """Raises `ValueError` with a summary where more than the allowed share is bad: of what the index looked at, or
        of the `drawn` samples tried."""
        allowed, fatal = self.allowed, f"; {self._fatal}" if self._fatal else ""
        rejected, indexed = len(self.source.rejected), self.source.indexed
        if rejected > allowed * indexed:
            self._refuse(rejected, indexed, fatal)
        tried, total = min(drawn, len(self.source)), len(self.source)
        bad = len(self._ids)
        if self._fatal or (tried >= min(FIRST_VERDICT, total) and bad > allowed * tried):
            self._refuse(bad, tried, fatal)

    def _refuse(self, bad: int, tried: int, fatal: str) -> None:
        raise ValueError(
            f"data.bad_fraction: expected at most {self.allowed:.1%} of the samples to be undecodable, got "
            f"{bad} of {tried} ({bad / max(tried, 1):.1%}){fatal}; {self.examples()}"
        )

    def examples(self, count: int = 3) -> str:
        """A few entries as text."""
        shown = "; ".join(f"{e['path']}: {e['reason']}" for e in self.entries[:count])
        rest = len(self.entries) - count
        where = f" ({rest} more{f' in {self.file}' if self.file else ''})" if rest > 0 else ""
        return f"for example {shown}{where}"

    def write(self) -> None:
        """Appends the entries that are new since the last call."""
        if self.file is None or self._written == len(self.entries):
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(e) + "\n" for e in self.entries[self._written :])
        self._written = len(self.entries)

    def state(self) -> dict[str, Any]:
        """Counters for a checkpoint (JSON)."""
        return {"entries": self.entries, "converted": self.converted}

    def restore(self, state: dict[str, Any]) -> None:
        """Counters of a checkpoint; rewrites the file, which may hold entries from after it."""
        self.entries, self.converted = list(state["entries"]), dict(state["converted"])
        self._ids = {e["id"] for e in self.entries if e["id"] is not None}
        self.start_file()

    def start_file(self) -> None:
        """Writes the file anew: a run without bad samples has an empty one."""
        if self.file is not None:
            write_atomically(self.file, "".join(json.dumps(e) + "\n" for e in self.entries))
        self._written = len(self.entries)
