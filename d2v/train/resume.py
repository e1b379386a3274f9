"""Which settings may change when a run is taken up again, and how it becomes longer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2v.config import Config
from d2v.config.fields import flat_fields, shorten
from d2v.train.optim import learning_rate_at

FREE_FIELDS = frozenset(name for name, field in flat_fields(Config).items() if field.metadata.get("free"))
"""Settings that leave the sequence of updates as it is."""
LENGTH = ("run.steps", "run.extend")


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a configuration's JSON object by dotted name."""
    flat: dict[str, Any] = {}
    for section, value in config.items():
        flat |= {f"{section}.{n}": v for n, v in value.items()} if isinstance(value, Mapping) else {section: value}
    return flat


def compare_configs(stored: Mapping[str, Any], config: Config, folder: Path, update: int) -> list[str]:
    """What of the free settings differs from the run that `folder` holds, in words.

    `ValueError` names the other settings that differ. Settings that the stored run did not know yet count as equal. The
    length may differ where the `update` updates so far had the same learning rates and decays.
    """
    before, now = flatten_config(stored), flatten_config(json.loads(config.to_json()))
    texts = {
        n: f"{n} (stored {shorten(before[n])}, given {now[n]})" for n in now if n in before and before[n] != now[n]
    }
    refused = [name for name in texts if name not in FREE_FIELDS]
    if not set(refused) <= set(LENGTH):
        listed = ", ".join(texts[name] for name in refused)
        raise ValueError(f"run.dir: {str(folder)!r} holds a run with other settings: {listed}")
    if refused:
        steps, extend = (before.get(name, now[name]) for name in LENGTH)
        past = replace(config, run=replace(config.run, steps=steps, extend=extend if "run.extend" in before else 0))
        if config.run.last < update or not _equal_so_far(past, config, update):
            changed = ", ".join(texts[name] for name in refused)
            raise ValueError(
                f"run.dir: {str(folder)!r} holds a run with other settings: {changed}; the rates of its {update} "
                f"updates follow from its length: --run.steps {steps} --run.extend N goes on for N updates with a "
                f"schedule of their own, --model.init {folder} with another --run.dir begins a new run from its weights"
            )
    return list(texts.values())


def _equal_so_far(one: Config, other: Config, update: int) -> bool:
    """Whether learning rates and decays of the first `update` updates are the same."""

    def rates(config: Config, number: int) -> tuple[float, float]:
        run = config.run
        return learning_rate_at(config.optim, number, run.steps, run.extend), config.ema.decay(number, run.steps)

    return all(rates(one, number) == rates(other, number) for number in range(1, update + 1))
