"""Progress for people: a bar on a terminal, a line per log interval elsewhere. Both on standard error."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from d2v.runtime import format_seconds
from d2v.train.monitors import find_low_ranks


class Progress:
    """Rate, time left, loss, content spread and share of time spent waiting for data."""

    def __init__(self, update: int, steps: int) -> None:
        self.steps = steps
        self._said: set[str] = set()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=update, unit="update", dynamic_ncols=True, file=sys.stderr)

    def advance(self) -> None:
        """One update is done."""
        if self._bar is not None:
            self._bar.update()

    def show(self, line: Mapping[str, Any]) -> None:
        """Shows a line of metrics; says once that an effective rank has collapsed."""
        values = describe_line(line)
        if self._bar is not None:
            self._bar.set_postfix_str(values, refresh=False)
        else:
            left = (self.steps - line["step"]) * line["step_seconds"]
            self.say(f"update {line['step']}/{self.steps}: {values}, {format_seconds(left)} left")

        for name, text in find_low_ranks(line).items():
            if name not in self._said:
                self.say(f"note: {text}")
            self._said.add(name)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def describe_line(line: Mapping[str, Any]) -> str:
    """Loss, spread, rate and data wait of a line of metrics in a few words; what the line lacks is left out."""
    words = [f"loss {line['loss']:.4f}"]
    if "valid_loss" in line:
        words.append(f"valid {line['valid_loss']:.4f}")
    if "content_spread" in line:
        words.append(f"spread {line['content_spread']:.3f}")
    words.append(f"{line['samples_per_second']:.0f} samples/s")
    if "data_wait" in line:
        words.append(f"data wait {line['data_wait']:.0%}")
    return ", ".join(words)
