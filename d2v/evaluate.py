"""Probes of frozen features: linear, k nearest neighbours, linear on few labels, with baselines treated alike."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v.checkpoint import MODEL, copy_into, find_checkpoint, load_config, load_tensors, write_atomically
from d2v.config import Config
from d2v.data.loader import evaluation_batches
from d2v.data.sources import Source, open_source
from d2v.data.vision import ImageSettings, normalise_images
from d2v.data2vec import Data2Vec
from d2v.train import build_model, choose_device

PIXEL_SIDE = 32
"""Pixel baselines see larger images averaged down to this side: a linear probe on 150 528 pixels says little."""


def load_model(checkpoint: str, device: str = "auto") -> tuple[Data2Vec, Config, torch.device]:
    """The model of a checkpoint, in evaluation mode, with its configuration and device."""
    folder = find_checkpoint(checkpoint)
    config = load_config(folder)
    config = replace(config, run=replace(config.run, device=device))  # type: ignore[arg-type]
    place = choose_device(config)
    model = build_model(config)
    copy_into(model.state_dict(), load_tensors(folder, MODEL), f"checkpoint {str(folder)!r}")
    return model.to(place).eval(), config, place


def read_images(config: Config, source: Source, option: str, batch: int = 64) -> tuple[Tensor, np.ndarray]:
    """All images of a labelled source: (uint8 (n,c,H,W), labels int64 (n,)) without those that cannot be decoded."""
    images: list[Tensor] = []
    bad: set[int] = set()
    for part in evaluation_batches(config, source, torch.device("cpu"), batch=batch):
        images.append(part.images)
        bad.update(note.sample_id for note in part.notes)
    if len(bad) > config.data.bad_fraction * len(source):
        raise ValueError(f"{option}: expected decodable images, got {len(bad)} of {len(source)} that are not")
    if bad:
        print(f"{option}: left out {len(bad)} of {len(source)} images that cannot be decoded")
    kept = np.array([i for i in range(len(source)) if i not in bad])
    assert source.labels is not None
    return torch.cat(images)[torch.from_numpy(kept)], source.labels[kept]


@torch.no_grad()
def extract_features(
    encoder: Any, images: Tensor, config: Config, device: torch.device, *, batch: int = 64, layer: int | None = None
) -> np.ndarray:
    """Mean over the valid tokens of `encoder.encode` -> float32 (n,C). `encoder`: a model or its teacher."""
    settings = ImageSettings.of(config)
    rows = []
    for part in images.split(batch):
        inputs = normalise_images(part.to(device), settings, config.data.standardise)
        encoded = encoder.encode(inputs, layer=layer)
        weight = encoded.valid.unsqueeze(-1).float()
        rows.append(((encoded.features.float() * weight).sum(1) / weight.sum(1)).cpu())
    return torch.cat(rows).numpy()


def _shrink(images: Tensor, config: Config) -> Tensor:
    """Normalised images (n,c,h,w) at no more than PIXEL_SIDE pixels a side; one channel for grey data."""
    settings = ImageSettings.of(config)
    values = normalise_images(images, settings, config.data.standardise)
    if settings.grey:
        values = values[:, :1]
    if values.shape[-1] > PIXEL_SIDE:
        values = torch.nn.functional.adaptive_avg_pool2d(values, PIXEL_SIDE)
    return values


def pixel_features(images: Tensor, config: Config) -> np.ndarray:
    """The normalised pixels themselves."""
    return _shrink(images, config).flatten(1).numpy()


def sorted_pixel_features(images: Tensor, config: Config) -> np.ndarray:
    """The normalised pixels of each channel in ascending order: the grey-value distribution without any structure."""
    return _shrink(images, config).flatten(2).sort(dim=-1).values.flatten(1).numpy()


def power_spectrum_features(images: Tensor, config: Config) -> np.ndarray:
    """Log power of the 2-D Fourier transform, averaged over channels, without phase."""
    spectrum = torch.fft.rfft2(_shrink(images, config)).abs().square().mean(dim=1)
    return (spectrum + 1e-3).log().flatten(1).numpy()


PIXEL_BASELINES: dict[str, Callable[[Tensor, Config], np.ndarray]] = {
    "pixels": pixel_features,
    "sorted_pixels": sorted_pixel_features,
    "power_spectrum": power_spectrum_features,
}


def standardise_features(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zero mean and unit variance per feature, by the training set; constant features become 0."""
    mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    scale = np.where(std > 1e-8, std, np.inf)
    return (train - mean) / scale, (test - mean) / scale


def _logistic(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged after 1000 iterations is close enough, and the same for all
        return float(LogisticRegression(max_iter=1000).fit(train, labels).score(test, truth))


def score_features(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    neighbours: int,
    labels_per_class: int,
    draws: int,
    seed: int,
) -> dict[str, float]:
    """Accuracies 0 to 1 of the three probes on standardised features.

    train, test: (features (n,C), labels (n,)). Linear: multinomial logistic regression, L2 with C = 1. kNN: Euclidean.
    Few-label: the linear probe on `labels_per_class` images a class, mean and standard deviation over `draws` draws,
    the same draws for all features.
    """
    from sklearn.neighbors import KNeighborsClassifier

    x, z = standardise_features(train[0], test[0])
    y, truth = train[1], test[1]
    classifier = KNeighborsClassifier(n_neighbors=min(neighbours, len(x)))
    few = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        chosen = [rng.permutation(np.flatnonzero(y == c))[:labels_per_class] for c in np.unique(y)]
        rows = np.concatenate(chosen)
        few.append(_logistic(x[rows], y[rows], z, truth))
    return {
        "linear_probe": _logistic(x, y, z, truth),
        "knn": float(classifier.fit(x, y).score(z, truth)),
        "few_label": float(np.mean(few)),
        "few_label_std": float(np.std(few, ddof=1)) if draws > 1 else 0.0,
    }


def align_labels(train: Source, test: Source) -> np.ndarray:
    """Test labels in the numbering of the training classes; `ValueError` for a class that was never trained on."""
    assert train.classes is not None and test.classes is not None and test.labels is not None
    numbers = {name: i for i, name in enumerate(train.classes)}
    unknown = [name for name in test.classes if name not in numbers]
    if unknown:
        raise ValueError(f"test: expected the classes {', '.join(train.classes[:20])}, got {unknown[0]!r}")
    return np.array([numbers[name] for name in test.classes], dtype=np.int64)[test.labels]


def probe(
    checkpoint: str,
    train: str,
    test: str,
    *,
    weights: str = "teacher",
    baselines: Sequence[str] = (),
    layer: int | None = None,
    neighbours: int = 5,
    labels_per_class: int = 10,
    draws: int = 5,
    seed: int = 0,
    batch: int = 64,
    device: str = "auto",
    output: str | None = None,
) -> dict[str, Any]:
    """Probes a checkpoint and baselines; prints a table and, as the last line, one JSON object, which it returns.

    The result is also written to `output`, or to `probe.json` of the run folder that `checkpoint` names.
    """
    for name, value in (("neighbours", neighbours), ("labels-per-class", labels_per_class), ("draws", draws)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    train_source = open_source(train, labelled=True, option="train")
    test_source = open_source(test, labelled=True, option="test")
    model, config, place = load_model(checkpoint, device)
    test_source.labels, test_source.classes = align_labels(train_source, test_source), train_source.classes
    if len(train_source.classes or []) < 2:
        raise ValueError(f"train: expected at least 2 classes, got {train_source.classes}")
    train_images, y = read_images(config, train_source, "train")
    test_images, truth = read_images(config, test_source, "test")

    def encode(encoder: Any) -> tuple[np.ndarray, np.ndarray]:
        parts = (train_images, test_images)
        first, second = (extract_features(encoder, p, config, place, batch=batch, layer=layer) for p in parts)
        return first, second

    features = {"pretrained": encode(model.teacher if weights == "teacher" else model)}
    for name in baselines:
        if name == "random_init":
            fresh = build_model(config, place)
            features[name] = encode(fresh.teacher if weights == "teacher" else fresh)
        else:
            function = PIXEL_BASELINES[name]
            features[name] = function(train_images, config), function(test_images, config)
    options = {"neighbours": neighbours, "labels_per_class": labels_per_class, "draws": draws, "seed": seed}
    scores = {
        name: score_features((a, y), (b, truth), **options) for name, (a, b) in features.items()
    }  # fmt: skip
    result: dict[str, Any] = {
        key: {name: round(values[key], 6) for name, values in scores.items()}
        for key in ("linear_probe", "knn", "few_label", "few_label_std")
    }
    result |= {
        "weights": weights, "classes": len(train_source.classes or []), "train_samples": len(y),
        "test_samples": len(truth), **options,
    }  # fmt: skip
    print_table(result)
    _write_result(result, checkpoint, output)
    print(json.dumps(result))
    return result


def _write_result(result: dict[str, Any], checkpoint: str, output: str | None) -> None:
    folder = Path(checkpoint)
    if output is not None:
        write_atomically(Path(output), json.dumps(result, indent=1))
    elif (folder / "metrics.jsonl").is_file():
        write_atomically(folder / "probe.json", json.dumps(result, indent=1))


def print_table(result: dict[str, Any]) -> None:
    """Accuracies in percent, a row per kind of features."""
    chance = 100 / result["classes"]
    print(
        f"test accuracy in %, {result['classes']} classes (chance {chance:.1f}), "
        f"{result['train_samples']} training and {result['test_samples']} test images"
    )
    neighbours = f"kNN (k={result['neighbours']})"
    few = f"{result['labels_per_class']} labels per class"
    print(f"{'features':<16}{'linear':>8}{neighbours:>12}{few:>22}")
    for name in result["linear_probe"]:
        spread = f"{100 * result['few_label'][name]:.1f} ± {100 * result['few_label_std'][name]:.1f}"
        row = f"{100 * result['linear_probe'][name]:>8.1f}{100 * result['knn'][name]:>12.1f}{spread:>22}"
        print(f"{name:<16}{row}")
