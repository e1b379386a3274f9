"""`report.png` of a run: monitors over time, probe bars, and what one patch's feature is similar to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v.config import Config
from d2v.data.sources import open_source
from d2v.data.vision import ImageSettings, centre_image, decode_image, normalise_images
from d2v.metrics import read_metrics

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss", "valid_loss")),
    ("spread", ("target_std", "prediction_std", "content_spread")),
    ("explained variance", ("explained_variance",)),
    ("learning rate", ("learning_rate",)),
)
PROBES = (("linear_probe", "linear"), ("knn", "kNN"), ("few_label", "few labels"))


def draw_report(folder: Path, *, images: str | None = None, count: int = 6, output: str | None = None) -> str:
    """Draws the report of a run folder; returns a line that names the file and what was left out.

    Raises `ValueError` where `folder` holds no run.
    """
    if count < 1:
        raise ValueError(f"count: expected 1 or more, got {count}")
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"dir: expected a run folder with metrics.jsonl, found none at {str(folder)!r}")
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        raise ValueError(f"dir: expected lines in {str(folder / 'metrics.jsonl')!r}, found none")
    result = json.loads((folder / "probe.json").read_text()) if (folder / "probe.json").is_file() else None
    missing = [] if result is not None else ["no probe.json"]
    similarities, reason = _similarities(folder, images, count)
    missing += [reason] if reason else []
    path = Path(output) if output is not None else folder / "report.png"
    figure = _draw(lines, result, similarities, str(folder))
    figure.savefig(path, dpi=110)
    return f"{path}" + (f" (left out: {'; '.join(missing)})" if missing else "")


def _similarities(folder: Path, images: str | None, count: int) -> tuple[list[tuple[np.ndarray, Any, Any]], str]:
    """[(picture (H,W[,3]) in 0 to 1, marked patch (row, column), similarity (h,w))], or a reason for none."""
    from d2v.checkpoint import latest_checkpoint
    from d2v.evaluate import load_model

    if latest_checkpoint(folder) is None:
        return [], "no checkpoint"
    model, config, device = load_model(str(folder))
    path = images if images is not None else config.data.path
    try:
        source = open_source(path, option="images")
    except ValueError as error:
        if images is not None:
            raise
        return [], str(error)
    settings = ImageSettings.of(config)
    chosen = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
    panels = []
    for index in chosen:
        try:
            image, _ = decode_image(source.read(int(index)))
        except (ValueError, OSError):
            continue
        pixels = torch.from_numpy(centre_image(image, settings).copy())
        inputs = normalise_images(pixels[None].to(device), settings, config.data.standardise)
        patch, similarity = compare_patches(model.teacher.encode(inputs).features[0].float().cpu(), config)
        picture = pixels.permute(1, 2, 0).numpy()
        panels.append((picture[..., 0] if settings.grey else picture, patch, similarity))
    return panels, "" if panels else "no image could be decoded"


def compare_patches(features: Tensor, config: Config) -> tuple[tuple[int, int], np.ndarray]:
    """Features (T,C) of one image -> (patch (row, column), cosine similarity (h,w) of its feature to all others).

    The mean over the patches is taken off first: it is common to all and hides the differences. The patch is the one
    whose feature lies farthest from the mean.
    """
    centred = features - features.mean(0, keepdim=True)
    rows, columns = config.stem.grid
    patch = int(centred.norm(dim=1).argmax())
    similarity = torch.nn.functional.cosine_similarity(centred[patch][None], centred, dim=1)
    return (patch // columns, patch % columns), similarity.reshape(rows, columns).numpy()


def _draw(lines: Sequence[dict[str, Any]], result: dict[str, Any] | None, pictures: Sequence[Any], title: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = 1 + (result is not None) + (2 if pictures else 0)
    heights = [2.6] + [2.6] * (result is not None) + ([1.7, 1.7] if pictures else [])
    figure = Figure(figsize=(13, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(rows, 1, height_ratios=heights, squeeze=False)[:, 0]
    figure.suptitle(title)
    _draw_curves(parts[0], lines)
    if result is not None:
        _draw_bars(parts[1], result)
    if pictures:
        _draw_pictures(parts[-2], parts[-1], pictures)
    return figure


def _draw_curves(part: Any, lines: Sequence[dict[str, Any]]) -> None:
    for axis, (name, keys) in zip(part.subplots(1, len(PANELS)), PANELS, strict=True):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=key, linewidth=1.2, marker="." if len(points) < 4 else None)
        axis.set_title(name, fontsize=10)
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


def _draw_pictures(upper: Any, lower: Any, pictures: Sequence[Any]) -> None:
    tops, bottoms = (p.subplots(1, len(pictures), squeeze=False)[0] for p in (upper, lower))
    upper.suptitle("images, one patch marked; below, cosine similarity of its feature to the others", fontsize=9)
    image = None
    for top, bottom, (picture, (row, column), similarity) in zip(tops, bottoms, pictures, strict=True):
        side = picture.shape[0] / similarity.shape[0]
        top.imshow(picture, cmap="gray" if picture.ndim == 2 else None)
        left, low = column * side - 0.5, row * side - 0.5
        top.plot([left, left + side, left + side, left, left], [low, low, low + side, low + side, low], color="red")
        image = bottom.imshow(similarity, vmin=-1, vmax=1, cmap="RdBu_r")
        bottom.plot(column, row, marker="x", color="black")
        for axis in (top, bottom):
            axis.set_xticks([])
            axis.set_yticks([])
    if image is not None and math.isfinite(float(pictures[0][2].max())):
        lower.colorbar(image, ax=list(bottoms), shrink=0.8)
