"""What a run says while it goes: console, `metrics.jsonl`, TensorBoard. Rank 0 alone says it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2v.data.loader import BadSamples
from d2v.train.metrics import Board, MetricsFile
from d2v.train.progress import Progress


class Report:
    """Lines of metrics and notes; on other ranks than the first it is silent."""

    def __init__(self, folder: Path, update: int, steps: int, speak: bool) -> None:
        self.update, self.steps = update, steps
        self._parts: tuple[MetricsFile, Board, Progress] | None = None
        if speak:
            metrics = MetricsFile(folder / "metrics.jsonl", update)
            self._parts = metrics, Board(folder / "tensorboard", update), Progress(update, steps)

    def begin(self, config: Any, bad: BadSamples) -> None:
        """What is worth knowing before the first update."""
        if self.update < self.steps and config.optim.warmup_steps >= self.steps:
            self.say([f"optim.warmup_steps ({config.optim.warmup_steps}) covers all of run.steps"])
        source = bad.source
        self.say(f"left out {count} {reason}" for reason, count in source.left_out.items())
        if source.rejected:
            self.say([f"{len(source.rejected)} of {source.indexed} cannot be used; {bad.examples()}"])

    def say(self, notes: Iterable[str]) -> None:
        """Notes, a line each."""
        if self._parts is not None:
            for note in notes:
                self._parts[2].say(f"note: {note}")

    def advance(self) -> None:
        """One update is done."""
        if self._parts is not None:
            self._parts[2].advance()

    def write(self, line: Mapping[str, Any]) -> None:
        """A line of metrics."""
        if self._parts is not None:
            metrics, board, progress = self._parts
            metrics.write(line)
            board.write(line)
            progress.show(line)

    def close(self) -> None:
        """Closes the files."""
        for part in self._parts or ():
            part.close()

    @staticmethod
    def summarise(folder: Path, update: int, bad: BadSamples) -> None:
        """The last words of a run that reached its end."""
        text = f"finished {update} updates in {folder}"
        if bad.converted:
            text += "; converted: " + ", ".join(f"{n} ({kind})" for kind, n in sorted(bad.converted.items()))
        if left_out := bad.source.left_out:
            text += "; left out: " + ", ".join(f"{n} {reason}" for reason, n in left_out.items())
        if bad.entries:
            text += f"; {len(bad.entries)} samples could not be decoded, {bad.examples()}"
        print(text, file=sys.stderr)
