"""Replays a stretch of a run from its checkpoint and compares it with what the run wrote about itself."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from d2v.config import Config
from d2v.data.cache import CACHE
from d2v.data.text import TOKENIZER
from d2v.files import PARTIAL
from d2v.folder import list_checkpoints, step_of
from d2v.runtime import Reporter, prepare_process
from d2v.train.digests import first_difference
from d2v.train.distributed import Ranks, open_ranks
from d2v.train.logging import DIGESTS, read_metrics
from d2v.train.pretraining import Pretraining, open_data
from d2v.train.run_dir import read_run
from d2v.train.trainer import Trainer

COMPARED = ("loss", "grad_norm")
"""Entries of a line of metrics that follow from the updates alone."""


@dataclass
class Verdict:
    """What a replay found."""

    first: int
    last: int
    lines: int = 0
    """Lines of metrics that were compared."""
    digests: int = 0
    """Lines of digests that were compared."""
    largest_difference: float = 0.0
    """Largest relative difference of a loss or gradient norm."""
    differing: list[str] = field(default_factory=list)
    """What was not the same bits, in the order of the updates."""
    conditions: list[str] = field(default_factory=list)
    """What is different now from when the run was made."""

    def describe(self, limit: float) -> str:
        """A sentence, and a JSON object on a line of its own."""
        what = f"updates {self.first + 1} to {self.last}: {self.lines} lines of metrics, {self.digests} of digests"
        if not self.differing:
            found = "same bits"
        else:
            equal = self.largest_difference <= limit
            verdict = f"equal within {limit:g}, not the same bits" if equal else "DIFFERENT"
            found = f"{verdict} (largest relative difference {self.largest_difference:.2g}); first {self.differing[0]}"
        notes = "".join(f"\nnote: {text}" for text in self.conditions)
        record = {"same_bits": not self.differing, "equal": self.largest_difference <= limit, **vars(self)}
        return f"{what}: {found}{notes}\n{json.dumps({**record, 'differing': self.differing[:100]})}"

    def compare(self, stored: dict[str, Any], found: dict[str, float]) -> None:
        """A line of metrics; null, which stands for NaN and infinity, equals those."""
        self.lines += 1
        for name in COMPARED:
            old = math.nan if stored.get(name) is None else float(stored[name])
            new = found[name]
            if old == new or not (math.isfinite(old) or math.isfinite(new)):
                continue
            relative = abs(new - old) / max(abs(old), 1e-30)
            self.largest_difference = max(self.largest_difference, relative if math.isfinite(relative) else math.inf)
            self.differing.append(f"{name} at update {stored['step']}: expected {old!r}, got {new!r}")


def audit(
    folder: Path, steps: str, path: str | None, threads: int | None, device: str, parallel: str | None,
    allow_commands: bool, limit: float,
) -> str | None:  # fmt: skip
    """Replays updates of a pre-training run and says whether they come out as it stored them; writes nothing.

    Under torchrun on as many ranks as that starts, whatever the run had.

    Args:
        folder: of the run; it needs a checkpoint at or before the first update, or none for those from 0 on.
        steps: "FIRST:LAST": from FIRST updates done to LAST.
        path: training data where they lie now; None: where they lay.
        threads: as `run.threads`; None: as the run.
        device: as `run.device`.
        parallel: as `run.parallel`; None: as the run.
        allow_commands: as `data.allow_commands`.
        limit: largest relative difference of losses and gradient norms that counts as equal.

    Raises:
        ValueError: nothing to compare, or a run that cannot be replayed.
        SystemExit: 1, once the verdict is printed, where they differ by more.
    """
    first, last = _parse_steps(steps)
    config = read_run(str(folder))
    data: dict[str, Any] = {"allow_commands": allow_commands, **({"path": path} if path is not None else {})}
    run: dict[str, Any] = {
        "device": device,
        "threads": threads or config.run.threads,
        "parallel": parallel or config.run.parallel,
    }
    lines = {line["step"]: line for line in read_metrics(folder / "metrics.jsonl") if first < line["step"] <= last}
    digests = {line["step"]: line for line in read_metrics(folder / DIGESTS) if first < line["step"] <= last}
    if not lines and not digests:
        raise ValueError(f"steps: expected updates of which {str(folder)!r} holds metrics, found none in {steps}")
    found = [c for c in list_checkpoints(folder / "checkpoints") if step_of(c) <= first]
    checkpoint = found[-1] if found else None
    prepare_process(run["threads"], config.run.keep_pages, config.run.products)
    with open_ranks(config.change(run=run).run) as ranks, _scratch(folder, ranks) as scratch:
        if (scratch / TOKENIZER).is_dir():
            data["tokenizer"] = None  # the one that the run has kept
        config = config.change(data=data, run={**run, "dir": str(scratch), "digest_every": 1 if digests else None})
        verdict = Verdict(first, last)
        _replay(config, ranks, checkpoint, lines, digests, verdict)
        text = verdict.describe(limit)
        if verdict.largest_difference > limit:
            if ranks.is_first:
                print(text, flush=True)
            raise SystemExit(1)
        return text if ranks.is_first else None


def _parse_steps(steps: str) -> tuple[int, int]:
    first, _, last = steps.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ValueError(f"steps: expected FIRST:LAST, two numbers of updates, the first below the last; got {steps!r}")
    return int(first), int(last)


@contextlib.contextmanager
def _scratch(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """A folder, on the storage that all ranks see, with what a run keeps of its data; removed at the end."""
    with ranks.first_before_others():
        made = tempfile.mkdtemp(prefix=f"{PARTIAL}audit-", dir=folder) if ranks.is_first else None
        for name in (CACHE, TOKENIZER):
            if made is not None and (folder / name).is_dir():
                shutil.copytree(folder / name, Path(made) / name)
    scratch = Path(str(ranks.share(made)))
    try:
        yield scratch
        ranks.wait()
    finally:
        if ranks.is_first:
            shutil.rmtree(scratch, ignore_errors=True)


def _replay(
    config: Config, ranks: Ranks, checkpoint: Path | None, lines: dict[int, Any], digests: dict[int, Any],
    verdict: Verdict,
) -> None:  # fmt: skip
    source, _ = open_data(config)
    objective = Pretraining(config, source, None, ranks.device)
    with ranks.first_before_others():
        source.prepare(Path(config.run.dir), fresh=False)
    trainer = Trainer(objective, ranks)
    if checkpoint is not None:
        state = trainer.load(checkpoint)
        for name, now in (("ranks", ranks.size), ("torch", torch.__version__)):
            if state[name] != now:
                verdict.conditions.append(f"{name} {state[name]} then, {now} now")
    progress = Reporter("replay", verdict.last - trainer.update, "updates")
    updates = objective.updates(trainer.update, ranks)
    with contextlib.closing(updates):
        for batches in updates:
            trainer.run_update(batches)
            step = trainer.update
            if step in lines:
                verdict.compare(lines[step], trainer.window.means(ranks.sum_))
            if trainer.is_due(config.run.log_every, step):
                trainer.window.reset()
            if step in digests and trainer.digests is not None:
                verdict.digests += 1
                line, odd = trainer.digests.collect(step, trainer.model)
                texts = [odd, first_difference(digests[step], line)]
                verdict.differing += [f"digests after update {step}: {text}" for text in texts if text is not None]
            if ranks.is_first:
                progress.add()
            if step >= verdict.last:
                break
    if checkpoint is None and verdict.differing:
        verdict.conditions.append("began with new weights; a run that --model.init began needs a checkpoint")
    ranks.wait()
