"""Which settings may change when a run is taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FREE_FIELDS = frozenset(
    {
        "data.path",  # the data may have moved; the samples themselves are compared by name
        "data.valid",
        "data.workers",
        "data.bad_fraction",
        "data.tokenizer",  # the tokens themselves are compared
        "data.cache",
        "data.allow_commands",
        "data.micro_batch",  # memory; with statistics over a batch, numbers too: it is reported
        "run.dir",
        "run.log_every",
        "run.checkpoint_every",
        "run.keep_checkpoints",
        "run.keep_every",
        "run.keep_best",
        "run.best",
        "run.async_checkpoint",
        "run.parallel",
        "run.shard_ranks",
        "run.timeout",
        "run.compile",
        "run.compile_scope",
        "run.teacher_graph",
        "run.activation_checkpointing",
        "run.threads",
        "run.device",
        "run.collapse_after",
        "run.collapse_prediction_std",
        "run.collapse_content_spread",
    }
)
"""Settings that leave the sequence of updates as it is."""


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a configuration's JSON object by dotted name."""
    flat: dict[str, Any] = {}
    for section, value in config.items():
        if isinstance(value, Mapping):
            flat |= {f"{section}.{name}": item for name, item in value.items()}
        else:
            flat[section] = value
    return flat


def compare_configs(stored: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> list[str]:
    """What of the free settings differs from the run that `folder` holds, in words; both as JSON objects.

    `ValueError` names the other settings that differ. Settings that the stored run did not know yet count as equal.
    """
    before, now = flatten_config(stored), flatten_config(given)
    differing = [name for name in now if name in before and before[name] != now[name]]
    texts = {n: f"{n} (stored {before[n]}, given {now[n]})" for n in differing}
    if refused := [texts[n] for n in differing if n not in FREE_FIELDS]:
        raise ValueError(f"run.dir: {str(folder)!r} holds a run with other settings: {', '.join(refused)}")
    return [texts[n] for n in differing]
