"""Linear probe and kNN of the teacher's features while a pre-training run goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from d2v.data.sources import Source, for_example
from d2v.evaluate.pieces import PieceBatch, Uncut, list_entries
from d2v.evaluate.probe import Collected, collect_features, make_extractor, open_pair, score_all_labels
from d2v.runtime import keep_random_state
from d2v.train.distributed import Ranks, gathered
from d2v.train.objective import Objective

Say = Callable[[Iterable[str]], None]
BATCH = 64
"""Most samples of a forward pass."""
WARN_SHARE = 0.1
"""Share of a run's time above which the probes are said to be slow."""


class ProbeFailed(Exception):
    """No probe could be made, on some rank; raised on all of them."""


class RunProbe:
    """What `d2v.train.pretraining.pretrain(config, probe=RunProbe)` calls every `config.probe.every` updates.

    It changes nothing of the run: neither weights nor random numbers nor the order of samples. With several ranks each
    takes a share of the samples, and rank 0 fits. Samples are cut to the length the model is trained on, the teacher
    computes in the precision of the run. A failure is said once; the run goes on, and the next probe is tried.
    """

    def __init__(self, objective: Objective, ranks: Ranks, new: bool) -> None:
        """Opens the labelled data; every rank calls. `ValueError` where those of a `new` run cannot be used."""
        self.objective, self.ranks, self.config = objective, ranks, objective.config
        self._sets: list[tuple[str, Source, list[int]]] = []
        self._notes: list[str] = []
        self._said: set[str] = set()
        self._spent, self._begun = 0.0, time.perf_counter()
        self._is_slow = False
        self._seconds: float | None = None
        try:
            self._open()
        except ProbeFailed as error:
            with ranks.saying_once():
                if new:
                    raise ValueError(f"probe.{error}") from None

    def __call__(self, update: int, say: Say) -> dict[str, float]:
        """Accuracies 0 to 1 of `probe_linear` and `probe_knn`, and `probe_step`; empty where none could be measured.
        Every rank calls, and gets the same. say: takes notes, on rank 0."""
        start, device = time.perf_counter(), self.ranks.device
        scores: dict[str, float] = {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(keep_random_state(device))
            if self.config.run.compile:  # other shapes would change how the blocks are compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            try:
                if not self._sets:
                    self._open()
                stack.enter_context(gathered(self.objective.model))
                scores = self._measure()
            except ProbeFailed as error:
                self._notes.append(f"probe.{error}; the run goes on")
        now = time.perf_counter()
        self._spent += now - start
        if scores:
            self._notes += self._describe_time(now - start, self._spent / (now - self._begun))
        say(note for note in dict.fromkeys(self._notes) if note not in self._said)
        self._said |= set(self._notes)
        self._notes.clear()
        return {f"probe_{name}": value for name, value in {**scores, "step": update}.items()} if scores else {}

    def _describe_time(self, seconds: float, share: float) -> list[str]:
        """Of the first probe its seconds; later, once, that probes take much of the run."""
        if self._seconds is None:
            self._seconds = seconds
            return [f"probe: the first took {seconds:.1f} s"]
        if share <= WARN_SHARE or self._is_slow:
            return []
        self._is_slow = True
        less = "a larger --probe.every or a smaller --probe.samples takes less"
        return [f"probe: {share:.0%} of the run's time so far is spent on it; {less}"]

    # ---- what all ranks do together -----------------------------------------------------------------------------

    def _attempt(self, work: Callable[[], Any]) -> Any:
        """The value of `work`, or the text of its error: one rank's failure is all ranks', which must not wait for
        it."""
        try:
            return work()
        except ProbeFailed:
            raise
        except Exception as error:
            return " ".join(str(error).split()) or type(error).__name__

    def _agree(self, value: Any) -> list[Any]:
        """The values of all ranks; a text says that a rank has failed."""
        values = self.ranks.gather(value)
        for text in (v for v in values if isinstance(v, str)):
            raise ProbeFailed(text)
        return values

    # ---- the measurement ------------------------------------------------------------------------------------------

    def _open(self) -> None:
        found = self._attempt(self._open_sets)
        self._agree(found if isinstance(found, str) else None)
        self._sets = found

    def _open_sets(self) -> list[tuple[str, Source, list[int]]]:
        """Name and samples of either set, and which of them are this rank's."""
        probe, ranks = self.config.probe, self.ranks
        config = self.config.change(data={"min_seconds": 0.0})  # no sample is too short to be evaluated
        self._uncut = Uncut(
            config, config.data.max_seconds if "waveform" in config.traits else None,
            Uncut(config).longest if "ids" in config.traits else None,
        )  # fmt: skip
        pair = open_pair(self._uncut.modality, probe.train, probe.test, self._notes.append)
        self._notes = [note.removeprefix("note: ") for note in self._notes]
        sets: list[tuple[str, Source, list[int]]] = []
        for name, source in zip(("train", "test"), pair, strict=True):
            rows = np.sort(np.random.default_rng(0).permutation(len(source))[: probe.samples])
            if len(rows) < ranks.size:
                raise ValueError(f"{name}: expected a sample for each of {ranks.size} ranks, got {len(rows)}")
            sets.append((name, source, rows[ranks.rank :: ranks.size].tolist()))
        return sets

    def _measure(self) -> dict[str, float]:
        teacher: Any = self.objective.model.teacher
        extract = make_extractor(
            teacher, self._uncut.modality, self.ranks.device, None, self.config.probe.pool, "fp32"
        )  # fmt: skip
        train, test = (self._extract(*one, extract) for one in self._sets)
        found = None
        with self.ranks.first_before_others():  # rank 0 may take longer than a collective waits
            if self.ranks.is_first:
                found = self._attempt(lambda: score_all_labels(train, test))
        scores = self._agree(found)[0]
        return {"linear": scores["linear_probe"], "knn": scores["knn"]}

    def _extract(
        self, name: str, source: Source, rows: list[int], extract: Callable[[PieceBatch], Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Features (n,F) and labels (n,) of all ranks' samples."""
        data = self.config.data
        size = min(BATCH, data.micro_batch or -(-data.global_batch // self.ranks.size))
        batches = self._uncut.batches(source, torch.device("cpu"), size, rows=rows)
        # Where one rank has failed, `_agree` ends the pass on all.
        steps = self.ranks.in_step(batches, self._agree)
        work = lambda: collect_features({"teacher": extract}, source, name, steps)  # noqa: E731
        parts: list[Collected] = self._agree(self._attempt(work))
        bad, cut = ([one for part in parts for one in getattr(part, kind)] for kind in ("bad", "cut"))
        labels = np.concatenate([part.labels for part in parts])
        if len(bad) > data.bad_fraction * (len(labels) + len(bad)):
            total = len(labels) + len(bad)
            raise ProbeFailed(
                f"{name}: expected decodable samples, got {len(bad)} of {total} that are not{for_example(bad)}"
            )
        self._notes += [
            f"probe.{name}: {what} {list_entries(es)}" for what, es in (("left out", bad), ("cut", cut)) if es
        ]
        return np.concatenate([part.rows["teacher"] for part in parts]), labels
