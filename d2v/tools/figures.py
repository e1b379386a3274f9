"""What the features of single samples look like: images, spectrograms and tokens with the similarity of their features.

All functions draw into matplotlib's (sub)figures; `take_pictures` makes what they draw.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v.config import Config, Stem
from d2v.data.dataset import Batch, Collate, MaskingCollate, Modality, Sample
from d2v.data.sources import Rejected, Source, describe_error
from d2v.evaluate.pieces import list_entries
from d2v.model.stems import LogMelStem
from d2v.model.teacher import Layers

SHOWN_TOKENS, SHOWN_TEXTS, SHOWN_LETTERS = 32, 4, 10
"""Text: tokens of a sample that are drawn, samples, and letters of a token: the first ones."""
_BANDS, _HOP_SECONDS = 64, 0.01
_OF_PAIRS = "cosine similarity of the features of all pairs of tokens"
_LAYOUTS: dict[str, tuple[float, tuple[int, ...], str]] = {
    "vision": (3.4, (1, 1), "images, one patch marked; below, cosine similarity of its feature to the others"),
    "speech": (3.8, (2, 3), f"log-mel spectrograms over seconds; below, {_OF_PAIRS}"),
    "spectrograms": (4.4, (1, 1), "spectrograms, time downwards, a patch marked; below, its similarity to the others"),
    "": (3.4, (1,), _OF_PAIRS),
}
"""Height in inches, ratios of the rows' heights, and title of what `draw_pictures` draws; "": of other kinds."""
_SIMILARITY: dict[str, Any] = {"vmin": -1, "vmax": 1, "cmap": "RdBu_r"}


@dataclass(frozen=True)
class Picture:
    """One sample and the features of its tokens."""

    name: str
    """Of the file or document."""
    content: np.ndarray
    """Images: (H,W) or (H,W,3) in 0 to 1; speech: log-mel spectrogram (bands, frames of 10 ms); others: empty."""
    seconds: float
    """Waveforms: length; others: 0."""
    tokens: tuple[str, ...]
    """Text: the string of each token."""
    features: Tensor
    """(T,C) float32 on the host."""
    mask: np.ndarray | None
    """(M,T) bool of its M masked copies, True = masked; None: not asked for."""


def take_pictures(
    config: Config,
    modality: Modality,
    source: Source,
    encoder: Any,
    device: torch.device,
    count: int,
    *,
    masks: bool = False,
    layer: Layers = None,
) -> list[Picture]:
    """Pictures of `count` samples spread over the source; those that cannot be decoded, or masked, are left out. What
    is left out or cut is named on standard error.

    encoder: a model, or its teacher.
    """
    notes: dict[str, list[Rejected]] = {"left out": [], "cut": []}
    collate = MaskingCollate(config, modality, training=False) if masks else Collate(modality)
    pictures = []
    for index in np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)).tolist():
        name = source.describe(index)
        try:
            value, _ = modality.load(source, index)
            shown = modality.eval_transform(value)
            batch = collate([Sample(index, 0, shown, ())])
        except Exception as error:  # cannot be decoded, or is too short to be masked
            notes["left out"].append(Rejected(name, describe_error(error)))
            continue
        if "waveform" in config.traits and len(shown) < len(value):
            text = f"cut to {len(shown) / modality.rate:g} of {len(value) / modality.rate:g} s"
            notes["cut"].append(Rejected(name, text))
        elif index in source.cut:
            notes["cut"].append(Rejected(name, source.cut[index]))
        pictures.append(_take(config, modality, name, batch, encoder, device, layer))
    for what, found in notes.items():
        if found:
            print(f"pictures: {what} {list_entries(found)}", file=sys.stderr)
    return pictures


def _take(
    config: Config, modality: Modality, name: str, batch: Batch, encoder: Any, device: torch.device, layer: Layers
) -> Picture:
    inputs = modality.prepare(batch.inputs.to(device))
    encoded = encoder.encode(inputs, lengths=batch.lengths, layer=layer)
    features = encoded.features[0][encoded.valid[0]].float().cpu()
    mask = None if batch.masks is None else batch.masks.mask[:, : len(features)].numpy()
    content, seconds = np.empty((0, 0)), 0.0
    tokens: tuple[str, ...] = ()
    if "patches" in config.traits:
        pixels = batch.inputs[0].permute(1, 2, 0).numpy()
        content = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]
        if content.dtype != np.uint8:  # spectrograms
            content = (content - content.min()) / max(float(np.ptp(content)), 1e-6)
    elif "waveform" in config.traits:
        content = draw_spectrogram(batch.inputs[:1].float()) if "speech" in config.traits else content
        seconds = batch.inputs.shape[1] / modality.rate
    elif "ids" in config.traits:
        decode: Callable[[list[int]], str] = modality.tokenizer.decode  # type: ignore[attr-defined]
        tokens = tuple(decode([i]).strip() or "·" for i in batch.inputs[0, : len(features)].tolist())
    return Picture(name, content, seconds, tokens, features, mask)


def draw_spectrogram(waveform: Tensor) -> np.ndarray:
    """Waveform (1,S) at 16 kHz -> (64, frames) log power of mel bands, low ones first, a frame every 10 ms."""
    stem = LogMelStem(replace(Stem(), mel_bins=_BANDS, mel_frames=1), width=1)
    return stem.make_bands(waveform)[0].T.numpy()


def centre_features(features: Tensor) -> Tensor:
    """Features (T,C) less their mean, which is common to all and hides the differences."""
    return features - features.mean(0, keepdim=True)


def compare_patches(features: Tensor, config: Config, patch: int | None = None) -> tuple[tuple[int, int], np.ndarray]:
    """Features (T,C) of one image -> (patch (row, column), cosine similarity (h,w) of its feature to all others).

    The mean over the patches is taken off first. patch: its number; None: the one whose feature lies farthest from the
    mean.
    """
    centred = centre_features(features)
    assert config.grid is not None
    rows, columns = config.grid
    patch = int(centred.norm(dim=1).argmax()) if patch is None else patch
    similarity = torch.nn.functional.cosine_similarity(centred[patch][None], centred, dim=1)
    return (patch // columns, patch % columns), similarity.reshape(rows, columns).numpy()


def compare_tokens(features: Tensor) -> np.ndarray:
    """Features (T,C) of a sequence -> (T,T) cosine similarity of all pairs, their mean taken off first."""
    unit = torch.nn.functional.normalize(centre_features(features), dim=1)
    return (unit @ unit.T).numpy()


# ---- drawing --------------------------------------------------------------------------------------------------------


def plan_height(modality: str) -> float:
    """Height in inches of what `draw_pictures` draws."""
    return _LAYOUTS.get(modality, _LAYOUTS[""])[0]


def draw_pictures(part: Any, pictures: Sequence[Picture], config: Config) -> None:
    """One sample a column: what it is above (but for text), the similarity of its features below."""
    vision, speech, text = (word in config.traits for word in ("patches", "speech", "ids"))
    _, ratios, title = _LAYOUTS.get(config.stem.modality, _LAYOUTS[""])
    pictures = pictures[:SHOWN_TEXTS] if text else pictures
    axes = part.subplots(len(ratios), len(pictures), squeeze=False, height_ratios=ratios)
    image = None
    for column, picture in enumerate(pictures):
        top, bottom = axes[0, column], axes[-1, column]
        if vision:
            place, similarity = compare_patches(picture.features, config)
            show_image(top, picture.content)
            mark_patch(top, picture.content.shape[0] / similarity.shape[0], place)
            image = show_map(bottom, similarity, place)
        else:
            if speech:
                show_spectrogram(top, picture)
            image = show_similarity(bottom, picture)
    part.suptitle(title, fontsize=9)
    part.colorbar(image, ax=list(axes.flatten()), shrink=0.5, anchor=(0.0, 0.5 if len(ratios) == 1 else 0.1))


def show_map(axis: Any, similarity: np.ndarray, place: tuple[int, int]) -> Any:
    """Similarity (h,w) of all patches to the one at (row, column)."""
    image = axis.imshow(similarity, **_SIMILARITY)
    axis.plot(place[1], place[0], marker="x", color="black")
    hide_ticks([axis])
    return image


def show_image(axis: Any, content: np.ndarray) -> None:
    """An image without ticks."""
    values = content / 255.0 if content.dtype == np.uint8 else content
    axis.imshow(values, cmap="gray" if values.ndim == 2 else None, vmin=0, vmax=1)
    hide_ticks([axis])


def mark_patch(axis: Any, side: float, place: tuple[int, int]) -> None:
    """A red frame around a patch of `side` pixels at (row, column)."""
    low, left = place[0] * side - 0.5, place[1] * side - 0.5
    axis.plot([left, left + side, left + side, left, left], [low, low, low + side, low + side, low], color="red")


def show_spectrogram(axis: Any, picture: Picture) -> None:
    """Mel bands over seconds."""
    seconds = picture.content.shape[1] * _HOP_SECONDS
    extent = (0.0, seconds, 0.0, float(_BANDS))
    axis.imshow(picture.content, origin="lower", aspect="auto", extent=extent, cmap="magma")
    axis.set_xlim(0.0, picture.seconds)
    axis.tick_params(labelsize=6)
    axis.set_yticks([])


def show_similarity(axis: Any, picture: Picture) -> Any:
    """Similarity of all pairs of tokens over seconds, or of the first tokens of a text with their words."""
    if not picture.tokens:
        end = picture.seconds or float(len(picture.features))
        extent = (0.0, end, end, 0.0)
        image = axis.imshow(compare_tokens(picture.features), aspect="auto", extent=extent, **_SIMILARITY)
        axis.tick_params(labelsize=6)
        return image
    shown = min(SHOWN_TOKENS, len(picture.tokens))
    image = axis.imshow(compare_tokens(picture.features)[:shown, :shown], **_SIMILARITY)
    words = [escape(word[:SHOWN_LETTERS]) for word in picture.tokens[:shown]]
    axis.set_yticks(range(shown), words, fontsize=5)
    axis.set_xticks(range(shown), words, fontsize=5, rotation=90)
    return image


def new_figure(width: float, height: float, title: str) -> Any:
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(escape(title), fontsize=10)
    return figure


def escape(text: str) -> str:
    """Text with the characters that matplotlib would take for mathematics as they are."""
    return text.replace("$", r"\$")


def save_figure(figure: Any, path: Path) -> None:
    """Writes a PNG."""
    with warnings.catch_warnings():
        # Tokens may hold characters that matplotlib's font lacks; it draws a box for those.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path, dpi=110, format="png")


def hide_ticks(axes: Iterable[Any]) -> None:
    """No ticks and numbers."""
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
