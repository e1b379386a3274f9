"""`d2v evaluate maps`: pictures of what a model has learned.

maps.png: samples with their masks and the similarity of their features; embedding.png: one point a labelled sample.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v.config import Config
from d2v.data import make_modality
from d2v.data.dataset import Collate, EvaluationSamples, Modality
from d2v.data.sources import Rejected, Source
from d2v.evaluate.layers import parse_layers
from d2v.evaluate.pieces import Uncut, list_entries
from d2v.evaluate.probe import encode_batch, standardise_features
from d2v.saved import load_model
from d2v.tools.figures import (
    Picture,
    centre_features,
    compare_patches,
    escape,
    hide_ticks,
    mark_patch,
    new_figure,
    save_figure,
    show_image,
    show_map,
    show_similarity,
    show_spectrogram,
    take_pictures,
)

METHODS = ("pca", "tsne")
MASKS = 2
"""Masked copies of a sample that are shown."""
PATCHES = 3
"""Patches of an image whose similarity to all others is shown."""
LEGEND = 30
"""Most classes that a legend names."""


def draw_maps(
    checkpoint: str,
    output: str,
    *,
    input: str | None = None,
    labelled: str | None = None,
    weights: str = "teacher",
    layer: int | str | None = None,
    image_size: int | None = None,
    frames: int | None = None,
    count: int = 6,
    samples: int = 1000,
    method: str = "pca",
    seed: int = 0,
    batch: int = 64,
    device: str = "auto",
) -> str:
    """Writes maps.png of `count` samples at `input`, embedding.png of up to `samples` at `labelled`; returns a summary.

    Args:
        checkpoint: run folder, checkpoint inside it, or exported folder.
        output: folder for the files.
        input: images, speech or text, as for pre-training; None: no maps.
        labelled: labelled data, as for probes; None: no embedding.
        weights: "student" or "teacher".
        layer: blocks that run before the features are taken; None: all, and the final norm.
        image_size, frames: side of the images in pixels, length of spectrograms; None: that of the model.
        count, samples: as above.
        method: "pca" or "tsne".
        seed: of the choice of labelled samples and of t-SNE.
        batch, device: samples per forward; "auto", "cpu" or "cuda".

    Raises:
        ValueError: neither input nor labelled data, numbers below 1, data that cannot be used.
    """
    if input is None and labelled is None:
        raise ValueError("input: expected --input, --labelled or both, got neither")
    for name, value in (("count", count), ("samples", samples), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    model, config, place = load_model(checkpoint, device, image_size, frames)
    modality, uncut, block = make_modality(config), Uncut(config), parse_layers(layer, model, several=False)
    encoder = model.teacher if weights == "teacher" else model
    folder = Path(output)
    # Both are opened before anything is computed or written.
    source = modality.open_whole(input, option="input") if input is not None else None
    table = uncut.modality.open(labelled, labelled=True, option="labelled") if labelled is not None else None
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if source is not None:
        pictures = take_pictures(config, modality, source, encoder, place, count, masks=True, layer=block)
        if not pictures:
            raise ValueError(f"input: expected {modality.noun} that can be decoded and masked, got none")
        draw = _draw_images if "patches" in config.traits else _draw_sequences
        save_figure(draw(pictures, config, f"{checkpoint}, {weights}"), folder / "maps.png")
        written.append(f"{folder / 'maps.png'}: {len(pictures)} {modality.noun}")
    if table is not None:
        assert table.labels is not None
        rows = choose_rows(table.labels, samples, seed)

        encode = partial(encode_batch, encoder, uncut.modality, device=place, layer=block)
        features, labels = collect_features(table, rows, uncut.modality, encode, batch, uncut)
        points, axes = embed(features, method, seed)
        title = f"{checkpoint}, {weights}: {len(labels)} {modality.noun}, mean features"
        _save_embedding(points, labels, table.classes or [], axes, folder / "embedding.png", title)
        count = len(table.classes or [])
        written.append(f"{folder / 'embedding.png'}: {len(labels)} {modality.noun} of {count} classes")
    return "; ".join(written)


# ---- maps -----------------------------------------------------------------------------------------------------------


def choose_patches(features: Tensor, count: int = PATCHES) -> list[int]:
    """Patches (numbers) of an image that differ most: the one whose feature (T,C) lies farthest from the mean, then
    always the one that is least similar to those chosen."""
    centred = centre_features(features)
    unit = torch.nn.functional.normalize(centred, dim=1)
    chosen = [int(centred.norm(dim=1).argmax())]
    while len(chosen) < min(count, len(features)):
        nearest = (unit @ unit[chosen].T).amax(dim=1)
        nearest[chosen] = math.inf
        chosen.append(int(nearest.argmin()))
    return chosen


def cover_patches(content: np.ndarray, mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """An image (H,W) or (H,W,3) with its masked patches, mask (T,) bool, in mid grey."""
    rows, columns = grid
    side = content.shape[0] // rows
    hidden = np.kron(mask.reshape(rows, columns), np.ones((side, side), dtype=bool))
    covered = content.copy()
    covered[hidden] = 128 if content.dtype == np.uint8 else 0.5
    return covered


def _draw_images(pictures: Sequence[Picture], config: Config, title: str) -> Any:
    copies = min(MASKS, config.mask.copies)
    rows = 1 + copies + PATCHES
    figure = new_figure(1.9 * len(pictures) + 1.6, 1.75 * rows + 0.6, title)
    axes = figure.subplots(rows, len(pictures), squeeze=False)
    image = None
    for column, picture in enumerate(pictures):
        show_image(axes[0, column], picture.content)
        assert picture.mask is not None and config.grid is not None
        for copy in range(copies):
            show_image(axes[1 + copy, column], cover_patches(picture.content, picture.mask[copy], config.grid))
        for number, patch in enumerate(choose_patches(picture.features)):
            place, similarity = compare_patches(picture.features, config, patch)
            axis = axes[1 + copies + number, column]
            mark_patch(axes[0, column], picture.content.shape[0] / similarity.shape[0], place)
            image = show_map(axis, similarity, place)
    names = ["image", *[f"masked, copy {i + 1}" for i in range(copies)], *[f"patch {i + 1}" for i in range(PATCHES)]]
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name, fontsize=8)
    figure.colorbar(image, ax=list(axes[1 + copies :].flatten()), shrink=0.6, label="cosine similarity")
    return figure


def _draw_sequences(pictures: Sequence[Picture], config: Config, title: str) -> Any:
    """A sample a row: what it is, its masks, and beside them the similarity of its features over time."""
    speech = "speech" in config.traits
    figure = new_figure(10.0, 3.2 * len(pictures) + 0.6, title)
    parts = figure.subfigures(len(pictures), 1, squeeze=False)[:, 0]
    for part, picture in zip(parts, pictures, strict=True):
        part.suptitle(escape(picture.name), fontsize=8)
        left, right = part.subfigures(1, 2, width_ratios=(3, 2))
        tops = left.subplots(2 if speech else 1, 1, squeeze=False, height_ratios=(3, 1) if speech else None)[:, 0]
        if speech:
            show_spectrogram(tops[0], picture)
        _show_masks(tops[-1], picture)
        axis = right.subplots()
        image = show_similarity(axis, picture)
        axis.set_xlabel("s" if pictures[0].seconds else "", fontsize=8)
        right.colorbar(image, ax=axis, shrink=0.8, label="cosine similarity")
    return figure


def _show_masks(axis: Any, picture: Picture) -> None:
    """A row a masked copy over seconds, or over the tokens of a text; masked dark."""
    assert picture.mask is not None
    count = len(picture.mask)
    end = picture.seconds or float(picture.mask.shape[1])
    axis.imshow(picture.mask, aspect="auto", cmap="Greys", vmin=0, vmax=1, extent=(0.0, end, float(count), 0.0))
    axis.set_yticks([])
    axis.set_ylabel(f"{count} masks" if count > 1 else "mask", fontsize=8)
    axis.set_xlabel("s" if picture.seconds else "tokens", fontsize=8)
    axis.tick_params(labelsize=6)


# ---- embedding ------------------------------------------------------------------------------------------------------


def choose_rows(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` row numbers, ascending: of every class the same number, as far as there are so many."""
    if len(labels) <= count:
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    # The n-th sample of its class is in round n; early rounds are taken first.
    turn = np.empty(len(order), dtype=np.int64)
    for label in np.unique(labels):
        turn[labels[order] == label] = np.arange((labels == label).sum())
    return np.sort(order[np.argsort(turn, kind="stable")[:count]])


def collect_features(
    source: Source, rows: np.ndarray, modality: Modality, encode: Callable[[Any], Tensor], size: int,
    uncut: Uncut | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Features (n,C) and labels (n,) of those of the given rows of a labelled source that can be decoded.

    uncut: how whole samples are read, whose modality this is; None: as long as training takes them.
    """
    assert source.labels is not None
    samples = EvaluationSamples(source, modality)
    collate = Collate(modality) if uncut is None else partial(uncut.collate, rows=size)
    features, kept, bad = [], list[int](), list[Rejected]()
    for start in range(0, len(rows), size):
        read = [samples[int(row)] for row in rows[start : start + size]]
        notes = [note for sample in read for note in sample.notes if note.kind == "bad"]
        bad += [Rejected(source.describe(note.sample_id), note.text) for note in notes]
        read = [sample for sample in read if not any(note.kind == "bad" for note in sample.notes)]
        if read:
            features.append(encode(collate(read)).numpy())
            kept += [sample.sample_id for sample in read]
    if bad:
        print(f"labelled: left out {list_entries(bad)}", file=sys.stderr)
    if len(kept) < 3:
        raise ValueError(f"labelled: expected at least 3 {modality.noun} that can be decoded, got {len(kept)}")
    return np.concatenate(features), source.labels[kept]


def embed(features: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    """Features (n,C), standardised -> points (n,2) and the names of the two axes."""
    standard, _ = standardise_features(features, features)
    if method == "pca":
        points, shares = project_pca(standard)
        return points, (f"component 1 ({shares[0]:.0%})", f"component 2 ({shares[1]:.0%})")
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3.0)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(standard.astype(np.float32))
    return np.asarray(points), ("t-SNE 1", "t-SNE 2")


def project_pca(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features (n,C), C > 1 -> coordinates (n,2) along the two directions of largest variance, and their shares of it.

    Signs: the entry of a direction that is largest in magnitude is positive.
    """
    centred = features - features.mean(0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    top = directions[:2]
    top = top * np.sign(top[np.arange(2), np.abs(top).argmax(1)])[:, None]
    variances = values**2
    return centred @ top.T, variances[:2] / max(variances.sum(), np.finfo(np.float64).tiny)


def _choose_colours(count: int) -> np.ndarray:
    from matplotlib import colormaps

    if count > 20:
        return np.asarray(colormaps["turbo"](np.linspace(0, 1, count)))
    return np.asarray(colormaps["tab10" if count <= 10 else "tab20"](np.arange(count)))


def _save_embedding(
    points: np.ndarray, labels: np.ndarray, classes: Sequence[str], axes: tuple[str, str], path: Path, title: str
) -> None:
    figure = new_figure(8.5, 6.5, title)
    axis = figure.subplots()
    colours = _choose_colours(len(classes))
    for number, name in enumerate(classes):
        chosen = points[labels == number]
        if len(chosen):
            axis.scatter(chosen[:, 0], chosen[:, 1], s=10, color=colours[number], label=escape(name), linewidths=0)
    axis.set_xlabel(axes[0], fontsize=9)
    axis.set_ylabel(axes[1], fontsize=9)
    hide_ticks([axis])
    if len(classes) <= LEGEND:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2)
    save_figure(figure, path)
