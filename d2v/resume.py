"""Which settings may change when a run is taken up again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from d2v.config import Config

FREE_FIELDS = frozenset(
    {
        "data.path",  # the data may have moved; the samples themselves are compared by name
        "data.valid",
        "data.workers",
        "data.bad_fraction",
        "data.tokenizer",  # the tokens themselves are compared
        "data.cache",
        "data.allow_commands",
        "run.dir",
        "run.log_every",
        "run.checkpoint_every",
        "run.keep_checkpoints",
        "run.threads",
        "run.device",
        "run.collapse_after",
        "run.collapse_prediction_std",
        "run.collapse_content_spread",
    }
)
"""Settings that leave the sequence of updates as it is."""


def flatten_config(config: Config) -> dict[str, Any]:
    """Settings by dotted name."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            flat |= {f"{field.name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
        else:
            flat[field.name] = value
    return flat


def compare_configs(stored: Config, given: Config, folder: Path) -> None:
    """Raises `ValueError` naming the settings in which a run differs from the one that `folder` holds."""
    before, now = flatten_config(stored), flatten_config(given)
    differing = [name for name in now if name not in FREE_FIELDS and before.get(name) != now[name]]
    if differing:
        listed = ", ".join(f"{n} (stored {before.get(n)}, given {now[n]})" for n in differing)
        raise ValueError(f"run.dir: {str(folder)!r} holds a run with other settings: {listed}")
