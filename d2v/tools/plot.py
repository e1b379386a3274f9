"""`report.png` of a run: monitors over time, probe bars, and what the features of some samples are similar to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2v.config import Config
from d2v.tools.figures import (
    Picture,
    compare_patches,
    draw_pictures,
    new_figure,
    plan_height,
    save_figure,
    take_pictures,
)
from d2v.train.logging import read_metrics

__all__ = ["PANELS", "compare_patches", "draw_report"]

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss", "valid_loss", "regression", "cls")),
    ("probes, accuracy", ("probe_linear", "probe_knn")),
    ("spread", ("target_std", "prediction_std", "content_spread")),
    ("explained variance", ("explained_variance",)),
    ("effective rank", ("stem_rank", "target_rank")),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
    ("EMA decay", ("ema_decay",)),
    ("per second", ("samples_per_second", "tokens_per_second")),
    ("data wait and MFU, shares", ("data_wait", "mfu")),
    ("memory, GiB", ("memory_bytes",)),
)
"""Title and keys of the panels. A key that is in no panel gets one of its own."""
LOGARITHMIC = frozenset({"effective rank", "gradient norm", "per second"})
UNITS = {"memory_bytes": 2.0**-30}
LEFT_OUT = frozenset({"step", "valid_step", "probe_step", "step_seconds"})
"""Keys whose content another key shows."""
COLUMNS = 5
PROBES = (("linear_probe", "linear"), ("knn", "kNN"), ("few_label", "few labels"))


def draw_report(folder: Path, *, images: str | None = None, count: int = 6, output: str | None = None) -> str:
    """Draws the report of a run folder; returns a line that names the file and what was left out.

    Works for runs of any age: without probes, without a checkpoint, cut off in the middle of a line.

    Args:
        folder: of the run.
        images: samples whose features are drawn, in the formats of the run's data; None: the run's own data.
        count: number of these.
        output: file to write; None: report.png in the folder.

    Raises:
        ValueError: `folder` holds no run; `images` are given and cannot be used.
    """
    if count < 1:
        raise ValueError(f"count: expected 1 or more, got {count}")
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"dir: expected a run folder with metrics.jsonl, found none at {str(folder)!r}")
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        raise ValueError(f"dir: expected lines in {str(folder / 'metrics.jsonl')!r}, found none")
    result = _read_probe(folder / "probe.json")
    missing = [] if result is not None else ["no probe.json"]
    pictures, config, reason = _find_pictures(folder, images, count)
    missing += [reason] if reason else []
    path = Path(output) if output is not None else folder / "report.png"
    panels = choose_panels(lines)
    rows = -(-len(panels) // COLUMNS)
    heights = [2.3 * rows] + [2.6] * (result is not None)
    if pictures and config is not None:
        heights.append(plan_height(config.stem.modality))
    figure = new_figure(15, sum(heights) + 0.6, str(folder))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_curves(parts[0], lines, panels, rows)
    if result is not None:
        _draw_bars(parts[1], result)
    if pictures and config is not None:
        draw_pictures(parts[-1], pictures, config)
    save_figure(figure, path)
    return f"{path}" + (f" (left out: {'; '.join(missing)})" if missing else "")


def _read_probe(path: Path) -> dict[str, Any] | None:
    """The result of `d2v evaluate probe`, or None where there is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    needed = {"classes", "labels_per_class", *(key for key, _ in PROBES)}
    return result if isinstance(result, dict) and needed <= set(result) else None


def _find_pictures(folder: Path, images: str | None, count: int) -> tuple[list[Picture], Config | None, str]:
    """Pictures of some samples by the last checkpoint, and its configuration; or a reason for none."""
    from d2v.data import make_modality
    from d2v.folder import latest_checkpoint
    from d2v.saved import load_model

    if latest_checkpoint(folder) is None:
        return [], None, "no checkpoint"
    model, config, device = load_model(str(folder))
    modality = make_modality(config)
    if images is None:
        return [], config, "no --images"
    source = modality.open_whole(images, option="images")
    pictures = take_pictures(config, modality, source, model.teacher, device, count)
    return pictures, config, "" if pictures else f"none of the {modality.noun} could be decoded"


def choose_panels(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """Title and keys of the panels that have something to show: the known ones, then one for every other number, with
    the same number of the held-out data."""
    numbers = (int, float)
    found = dict.fromkeys(k for line in lines for k, v in line.items() if isinstance(v, numbers) or v is None)
    panels = [(title, tuple(key for key in keys if key in found)) for title, keys in PANELS]
    known = {key for _, keys in PANELS for key in keys} | LEFT_OUT
    others: dict[str, list[str]] = {}
    for key in found:
        if key not in known:
            others.setdefault(key.removeprefix("valid_"), []).append(key)
    panels += [(name.replace("_", " "), tuple(keys)) for name, keys in others.items()]
    return [(title, keys) for title, keys in panels if keys]


def _draw_curves(
    part: Any, lines: Sequence[Mapping[str, Any]], panels: Sequence[tuple[str, tuple[str, ...]]], rows: int
) -> None:
    axes = part.subplots(rows, min(COLUMNS, len(panels)), squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, (title, keys) in zip(axes, panels, strict=False):
        for key in keys:
            unit = UNITS.get(key, 1.0)
            points = [(line["step"], line[key] * unit) for line in lines if line.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=key, linewidth=1.2, marker="." if len(points) < 4 else None)
            for line in lines:
                if key in line and line[key] is None:  # it was not finite
                    axis.axvline(line["step"], color="red", linewidth=0.8, linestyle=":")
        values = [line[key] for line in lines for key in keys if line.get(key) is not None]
        if title in LOGARITHMIC and values and all(0 < value < math.inf for value in values):
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(fontsize=7)


def _draw_bars(part: Any, result: dict[str, Any]) -> None:
    axis = part.subplots()
    names = list(result["linear_probe"])
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [k + (i - (len(names) - 1) / 2) * width for k in range(len(PROBES))]
        values = [100 * result[key][name] for key, _ in PROBES]
        bars = axis.bar(places, values, width * 0.92, label=name.replace("_", " "))
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
    labels = [f"{text} ({result['labels_per_class']} a class)" if key == "few_label" else text for key, text in PROBES]
    axis.set_xticks(range(len(PROBES)), labels)
    axis.axhline(100 / result["classes"], color="grey", linewidth=0.8, linestyle=":", label="chance")
    axis.set_ylabel("test accuracy, %", fontsize=9)
    axis.set_ylim(0, 108)
    axis.legend(fontsize=7, ncols=len(names) + 1, loc="upper center", bbox_to_anchor=(0.5, 1.16))
