"""Which settings may change when a run is taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2v.config import Config
from d2v.config.fields import flat_fields

FREE_FIELDS = frozenset(name for name, field in flat_fields(Config).items() if field.metadata.get("free"))
"""Settings that leave the sequence of updates as it is."""


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a configuration's JSON object by dotted name."""
    flat: dict[str, Any] = {}
    for section, value in config.items():
        flat |= {f"{section}.{n}": v for n, v in value.items()} if isinstance(value, Mapping) else {section: value}
    return flat


def compare_configs(stored: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> list[str]:
    """What of the free settings differs from the run that `folder` holds, in words; both as JSON objects.

    `ValueError` names the other settings that differ. Settings that the stored run did not know yet count as equal.
    """
    before, now = flatten_config(stored), flatten_config(given)
    texts = {n: f"{n} (stored {before[n]}, given {now[n]})" for n in now if n in before and before[n] != now[n]}
    if refused := [text for name, text in texts.items() if name not in FREE_FIELDS]:
        raise ValueError(f"run.dir: {str(folder)!r} holds a run with other settings: {', '.join(refused)}")
    return list(texts.values())
