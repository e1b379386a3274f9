"""Worker processes, batches of updates and of one pass, and the account of bad samples."""

from __future__ import annotations

import json
import signal
import threading
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from d2v.config import Config
from d2v.data import make_modality
from d2v.data.dataset import Batch, Collate, EvaluationSamples, MaskingCollate, Note, TrainSamples
from d2v.data.sampler import UpdateSampler
from d2v.data.sources import ShardLost, Source
from d2v.data.storage.ahead import REMOTE_READERS, with_following
from d2v.files import is_url, write_atomically

TERM_GRACE_SECONDS = 10
"""Life of a loader worker after a SIGTERM."""
LOOK_SECONDS = 5.0
"""While no batch comes, the workers are looked at this often."""
FIRST_VERDICT = 200
"""Samples tried before the share of bad ones is judged (or all, when there are fewer)."""


def outlive_signals(_worker: int) -> None:
    """Ctrl-C and a job scheduler's SIGTERM reach the whole process group; the main process alone decides what follows.

    A worker that died of them would raise in the main process in the middle of an update. Workers leave when told to,
    or within seconds of their parent's end. A SIGTERM may also come from a parent that has crashed and waits for its
    children: a worker that is still there after the grace period leaves by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(TERM_GRACE_SECONDS))


def _loader(
    dataset: Any, collate: Any, workers: int, device: torch.device, patience: float, **kwargs: Any
) -> Generator[Batch, None, None]:
    """The batches of a dataset; `ChildProcessError` where a worker has died, or has given nothing for `patience`
    seconds; `ShardLost` where a shard cannot be read any more."""
    more: dict[str, Any] = {"prefetch_factor": 4, "timeout": LOOK_SECONDS} if workers else {}
    loader = DataLoader(
        dataset,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=outlive_signals,
        generator=torch.Generator(),  # its own: the loader must not advance the run's random state
        **more,
        **kwargs,
    )
    before = signal.getsignal(signal.SIGCHLD)
    batches: Any = iter(loader)
    processes = list(getattr(batches, "_workers", ()))
    if processes and threading.current_thread() is threading.main_thread():
        # The loader's handler would raise in the midst of an update; here its workers are looked at while it waits.
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
    try:
        while (batch := _next_batch(batches, processes, patience)) is not None:
            lost = next((note.text for note in batch.notes if note.kind == "lost"), None)
            if lost is not None:
                raise ShardLost(f"{lost}; put it back, then the same command goes on")
            yield batch
    finally:
        if processes:  # at once, though the traceback of an error may still hold the loader
            batches._shutdown_workers()


def _next_batch(batches: Any, workers: list[Any], patience: float) -> Batch | None:
    """The next batch of a loader's iterator, or None."""
    asked = time.monotonic()
    while True:
        try:
            batch: Batch | None = next(batches, None)
            return batch
        except (RuntimeError, OSError, EOFError) as error:
            # The loader's own words, or the connection over which a dead worker can no longer give its last batches.
            cut_off = not isinstance(error, RuntimeError)
            if not workers or not (cut_off or str(error).startswith("DataLoader")):
                raise
            if cut_off:
                workers[0].join(0.5)
                if all(w.exitcode is None for w in workers):
                    raise
            waited = time.monotonic() - asked
            if waited >= patience or any(w.exitcode is not None for w in workers):
                text = _describe_workers(workers, waited)
                for worker in workers:
                    worker.kill()
                raise ChildProcessError(text) from None


def _describe_workers(workers: list[Any], waited: float) -> str:
    """What has become of the workers of a loader, in one sentence."""
    last = "the last checkpoint is whole, the same command resumes it"
    number, worker = next(((i, w) for i, w in enumerate(workers) if w.exitcode is not None), (0, workers[0]))
    code = worker.exitcode
    if code is None:
        return f"data.workers: no batch came from {len(workers)} loader workers in {waited:.0f} s (run.timeout); {last}"
    how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    hints = {-signal.SIGKILL: ", perhaps for want of memory", -signal.SIGBUS: ", perhaps for want of shared memory"}
    return f"data.workers: loader worker {number} (process {worker.pid}) {how}{hints.get(code, '')}; {last}"


def train_updates(
    config: Config, source: Source, first: int, device: torch.device, rank: int = 0, ranks: int = 1
) -> Generator[list[Batch], None, None]:
    """Lists of a rank's micro-batches, one list per update, from update `first` (0-based) to the end of the run.

    All ranks have the same number of micro-batches in an update; `ValueError` where they cannot.
    """
    modality = make_modality(config)
    dataset, collate = TrainSamples(source, modality, config.run.seed), MaskingCollate(config, modality)
    sampler = UpdateSampler(config, source, first, config.run.last, rank, ranks)
    return load_updates(config, dataset, collate, sampler, device)


def load_updates(
    config: Config, dataset: TrainSamples, collate: Any, sampler: UpdateSampler, device: torch.device
) -> Generator[list[Batch], None, None]:
    """Lists of micro-batches that `collate` makes of the sampler's samples, one list per update."""
    workers, patience = config.data.workers, config.run.timeout
    if config.data.shuffle == "shards":
        dataset.source.read_ahead()
    readers = config.data.readers
    if readers is None:
        readers = REMOTE_READERS if is_url(config.data.path) else 0
    order: Any = sampler
    if readers and dataset.source.threads_may_read:
        dataset.read_ahead(readers)
        order = with_following(sampler, workers)
    batches = _loader(dataset, collate, workers, device, patience, batch_sampler=order)
    for update in range(sampler.first, sampler.last):
        yield [next(batches) for _ in range(sampler.count(update))]


def validation_batches(
    config: Config, source: Source, device: torch.device, rank: int = 0, ranks: int = 1
) -> Generator[Batch, None, None]:
    """One pass over held-out samples without augmentation, with the masks of epoch 0; of `ranks` ranks each takes every
    `ranks`-th sample, so that the number of batches may differ."""
    modality = make_modality(config)
    size = config.data.micro_batch or -(-config.data.global_batch // ranks)
    size = min(size, max(len(range(rank, len(source), ranks)), 1))
    samples, collate = EvaluationSamples(source, modality), MaskingCollate(config, modality, training=False)
    return load_pass(config, samples, collate, device, size, rank, ranks, config.data.workers)


def evaluation_batches(
    config: Config, source: Source, device: torch.device, batch: int = 64, workers: int = 0
) -> Iterator[Batch]:
    """One pass over the source in order, without augmentation and masks."""
    modality = make_modality(config)
    samples, collate = EvaluationSamples(source, modality), Collate(modality)
    return load_pass(config, samples, collate, device, batch, workers=workers)


def load_pass(
    config: Config, samples: EvaluationSamples, collate: Any, device: torch.device, batch: int, rank: int = 0,
    ranks: int = 1, workers: int = 0, rows: Sequence[int] | None = None,
) -> Generator[Batch, None, None]:  # fmt: skip
    """One pass over samples in order, or over those of the numbers `rows`, in batches that `collate` makes; of `ranks`
    ranks each takes every `ranks`-th sample."""
    share = (range(len(samples)) if rows is None else rows)[rank::ranks]
    return _loader(samples, collate, workers, device, config.run.timeout, batch_size=batch, sampler=share)


class BadSamples:
    """Counts what could not be decoded, lists it in `bad_samples.jsonl`, and says when it is too much.

    A sample counts once however often it comes. The verdict falls once `FIRST_VERDICT` samples, or all, were tried.
    With several ranks each counts its own; what `take` returns on each is given to `add_entries` of all the others,
    after which all come to the same verdict.
    """

    def __init__(self, source: Source, allowed: float, file: Path | None) -> None:
        self.source, self.allowed, self.file = source, allowed, file
        self.entries: list[dict[str, Any]] = [{"id": None, "path": n, "reason": r} for n, r in source.rejected]
        self.converted: dict[str, int] = {}
        self._ids: set[int] = set()
        self._written = 0
        self._origin = uuid.uuid4().hex[:12]
        self._taken = len(self.entries)
        self._converted_taken: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, notes: tuple[Note, ...]) -> list[str]:
        """Takes the notes of a batch; returns sentences about conversions of a kind that was not met before.

        Conversions are counted in epoch 0, where every sample comes exactly once. Raises `ValueError` for what no run
        survives: before the batch is trained on, and without the other ranks, which are told why this one ends.
        """
        news = []
        for note in notes:
            if note.kind == "converted" and note.epoch == 0:
                news += self._count(note.text, note.number, self.source.describe(note.sample_id))
            elif note.kind == "bad" and note.sample_id not in self._ids:
                self._ids.add(note.sample_id)
                path = self.source.describe(note.sample_id)
                self.entries.append({"id": note.sample_id, "path": path, "reason": note.text})
            elif note.kind == "fatal":
                raise ValueError(f"data.path: {note.text}; {self.examples()}")
        return news

    def _count(self, text: str, number: int, path: str) -> list[str]:
        """Counts conversions; a sentence where they are the first of their kind."""
        news = [] if text in self.converted else [f"converted: {text}, first in {path}"]
        self._first.setdefault(text, path)
        self.converted[text] = self.converted.get(text, 0) + number
        return news

    def take(self) -> list[dict[str, Any]]:
        """What this rank has found since the last call, JSON values for `add_entries` of the other ranks."""
        found: list[dict[str, Any]] = [{"kind": "bad", **entry} for entry in self.entries[self._taken :]]
        for text, number in self.converted.items():
            if more := number - self._converted_taken.get(text, 0):
                found.append({"kind": "converted", "text": text, "number": more, "path": self._first.get(text, "")})
        self._mark_taken()
        return [{"from": self._origin, **entry} for entry in found]

    def _mark_taken(self) -> None:
        self._taken, self._converted_taken = len(self.entries), dict(self.converted)

    def add_entries(self, entries: list[dict[str, Any]]) -> list[str]:
        """Takes what other ranks found; what came from here is passed over. Returns sentences like `add`.

        Raises `ValueError` where something was found here that was not taken yet: it would be lost to the others.
        """
        if self._taken != len(self.entries) or self._converted_taken != self.converted:
            raise ValueError("BadSamples.add_entries: expected take to come first, got entries that were not taken")
        news = []
        for entry in entries:
            if entry["from"] == self._origin:
                continue
            if entry["kind"] == "converted":
                news += self._count(entry["text"], entry["number"], entry["path"])
            elif entry["id"] not in self._ids:
                self._ids.add(entry["id"])
                self.entries.append({name: entry[name] for name in ("id", "path", "reason")})
        self._mark_taken()
        return news

    def check(self, drawn: int) -> None:
        """Raises `ValueError` with a summary where more than the allowed share is bad: of what the index looked at, or
        of the `drawn` samples tried."""
        rejected, indexed = len(self.source.rejected), self.source.indexed
        if rejected > self.allowed * indexed:
            self._refuse(rejected, indexed)
        tried, total = min(drawn, len(self.source)), len(self.source)
        bad = len(self._ids)
        if tried >= min(FIRST_VERDICT, total) and bad > self.allowed * tried:
            self._refuse(bad, tried)

    def _refuse(self, bad: int, tried: int) -> None:
        raise ValueError(
            f"data.bad_fraction: expected at most {self.allowed:.1%} of the samples to be undecodable, got "
            f"{bad} of {tried} ({bad / max(tried, 1):.1%}); {self.examples()}"
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
        self._mark_taken()
        self.start_file()

    def start_file(self) -> None:
        """Writes the file anew: a run without bad samples has an empty one."""
        if self.file is not None:
            write_atomically(self.file, "".join(json.dumps(e) + "\n" for e in self.entries))
        self._written = len(self.entries)
