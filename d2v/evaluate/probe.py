"""Probes of frozen features: linear, k nearest neighbours, linear on few labels, with baselines treated alike."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2v.config import Config
from d2v.data.dataset import Batch, Collate, Modality
from d2v.data.sources import Rejected, Source, check_classes, describe_rare, number_classes
from d2v.evaluate.layers import mix_layers, parse_layers
from d2v.evaluate.multilabel import mean_average_precision, split_labels, stack_labels
from d2v.evaluate.pieces import PieceBatch, Uncut, list_entries, list_missing, passed_over
from d2v.files import write_atomically
from d2v.model.data2vec import build_model
from d2v.model.teacher import Encoded, Layers
from d2v.saved import load_model
from d2v.train.objective import autocast


def encode_batch(
    encoder: Any,
    modality: Modality,
    batch: Batch,
    device: torch.device,
    layer: Layers = None,
    pool: str = "mean",
) -> Tensor:
    """(B,F) float32 on the host, of K layers (B,K,F): `encoder.encode`, a model's or its teacher's, made one row a
    sample by a pool."""
    if isinstance(batch, PieceBatch) and len(batch.inputs) > len(batch):
        samples = encode_pieces(encoder, modality, batch, device, layer, class_token=pool == "class")
        if pool == "class":
            return torch.stack(samples)
        return torch.cat([_pool(pool, f[None], torch.ones(1, len(f), dtype=torch.bool)) for f in samples])
    encoded = encoder.encode(modality.prepare(batch.inputs.to(device)), lengths=batch.lengths, layer=layer)
    if pool == "class":
        return _class_token(encoded).float().cpu()
    return _pool(pool, encoded.features.float(), encoded.valid).cpu()


def _pool(pool: str, features: Tensor, valid: Tensor) -> Tensor:
    """Features (B,T,C) or (B,T,K,C) -> (B,F) or (B,K,F)."""
    if features.dim() == 3:
        return POOLS[pool](features, valid)
    return torch.stack([POOLS[pool](layer, valid) for layer in features.unbind(2)], dim=1)


def encode_pieces(
    encoder: Any,
    modality: Modality,
    batch: PieceBatch,
    device: torch.device,
    layer: Layers = None,
    class_token: bool = False,
) -> list[Tensor]:
    """Features (T,C) of the tokens of each sample, float32 on the host, or its class token (C,)."""

    def forward(inputs: Tensor, lengths: Tensor | None) -> list[Tensor]:
        encoded = encoder.encode(modality.prepare(inputs.to(device)), lengths=lengths, layer=layer)
        if class_token:
            return list(_class_token(encoded).float().cpu())
        return [f[v] for f, v in zip(encoded.features.float().cpu(), encoded.valid.cpu(), strict=True)]

    return batch.run(forward)


def _class_token(encoded: Encoded) -> Tensor:
    if encoded.class_token is None:
        raise ValueError("pool: expected another than class, the model has no class token")
    return encoded.class_token


def make_extractor(
    encoder: Any, modality: Modality, device: torch.device, layer: Layers, pool: str, precision: str
) -> Callable[[PieceBatch], Tensor]:
    """`encode_batch` of an encoder in a precision."""

    def extract(part: PieceBatch) -> Tensor:
        with autocast(precision, device):
            return encode_batch(encoder, modality, part, device, layer, pool)

    return extract


def raw_features(modality: Modality, name: str, part: PieceBatch) -> Tensor:
    """Baseline features (B,F) of whole samples."""
    if len(part.inputs) == len(part):
        return modality.raw_features(name, part)
    return torch.cat([modality.raw_features(name, Collate(modality)([sample])) for sample in part.samples])


SEGMENTS = 4


def pool_mean(features: Tensor, valid: Tensor) -> Tensor:
    """(B,C): mean of features (B,T,C) over the valid tokens, valid (B,T)."""
    weight = valid.unsqueeze(-1).float()
    return (features * weight).sum(1) / weight.sum(1)


def pool_mean_std(features: Tensor, valid: Tensor) -> Tensor:
    """(B,2C): mean and biased standard deviation over the valid tokens."""
    mean = pool_mean(features, valid)
    deviation = pool_mean((features - mean[:, None]).square(), valid).sqrt()
    return torch.cat([mean, deviation], dim=1)


def pool_segments(features: Tensor, valid: Tensor) -> Tensor:
    """(B,4C): means over four equal parts of the valid tokens, in order, which a mean over all forgets; valid tokens
    come first. Where there are fewer than four, parts share them."""
    count = valid.sum(1, keepdim=True)
    position = torch.arange(features.shape[1], device=features.device)[None]
    parts = []
    for i in range(SEGMENTS):
        first = count * i // SEGMENTS
        last = torch.maximum(count * (i + 1) // SEGMENTS, first + 1)
        parts.append(pool_mean(features, (position >= first) & (position < last)))
    return torch.cat(parts, dim=1)


POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": pool_mean,
    "mean-std": pool_mean_std,
    "segments": pool_segments,
}


@torch.no_grad()
def extract_features(
    extractors: Mapping[str, Callable[[PieceBatch], Tensor]],
    config: Config,
    source: Source,
    option: str,
    *,
    batch: int = 64,
    uncut: Uncut | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features by every extractor, in one pass over a labelled source.

    uncut: how long samples are read; None: whole, as the configuration says.

    Returns:
        float32 (n,F) for each name, and labels int64 (n,), both without the samples that cannot be decoded.

    Raises:
        ValueError: more samples than data.bad_fraction cannot be decoded; features that are not finite.
    """
    batches = (uncut or Uncut(config)).batches(source, torch.device("cpu"), batch)
    rows, labels, bad, cut = collect_features(extractors, source, option, ((part, True) for part in batches))
    check_lost(config, source, option, len(bad))
    entries = [*list_missing(source), *bad]
    for reason, count in passed_over(source).items():
        print(f"{option}: left out {count} {reason}")
    for what, found in (("left out", entries), ("cut", cut)):
        if found:
            print(f"{option}: {what} {list_entries(found)}")
    return rows, labels


class Collected(NamedTuple):
    """What a pass over labelled samples gives: features float32 (n,F) by extractor and labels int64 (n,), both without
    the samples that cannot be decoded; these; and those that were cut."""

    rows: dict[str, np.ndarray]
    labels: np.ndarray
    bad: list[Rejected]
    cut: list[Rejected]


@torch.no_grad()
def collect_features(
    extractors: Mapping[str, Callable[[PieceBatch], Tensor]],
    source: Source,
    option: str,
    batches: Iterable[tuple[PieceBatch, bool]],
) -> Collected:
    """Features of batches of a source; False beside one: its forward runs, and what it gives does not count.

    `ValueError`, beginning with `option`, for features that are not finite.
    """
    assert source.labels is not None
    rows: dict[str, list[np.ndarray]] = {name: [] for name in extractors}
    read: list[int] = []
    bad: dict[int, str] = {}
    cut: list[Rejected] = []
    for part, counted in batches:
        found = {name: extract(part).numpy() for name, extract in extractors.items()}
        if not counted:
            continue
        bad |= {note.sample_id: note.text for note in part.notes if note.kind == "bad"}
        cut += [Rejected(source.describe(n.sample_id), n.text) for n in part.notes if n.kind == "cut"]
        kept = [i for i, sample in enumerate(part.samples) if sample.sample_id not in bad]
        read += [part.samples[i].sample_id for i in kept]
        for name, values in found.items():
            rows[name].append(values[kept])
            finite = np.isfinite(rows[name][-1])
            odd = np.flatnonzero(~finite.all(axis=tuple(range(1, finite.ndim))))
            if len(odd):
                first = source.describe(part.samples[kept[odd[0]]].sample_id)
                raise ValueError(f"{option}: expected finite features, got {len(odd)} of {name} that are not; {first}")
    lost = [Rejected(source.describe(i), text) for i, text in bad.items()]
    joined = {name: np.concatenate(parts) for name, parts in rows.items()}
    return Collected(joined, source.labels[np.array(read, dtype=np.int64)], lost, cut)


def check_lost(config: Config, source: Source, option: str, bad: int = 0) -> None:
    """`ValueError` where more than the share data.bad_fraction of a source cannot be used: `bad` samples and those that
    its index rejected."""
    lost = bad + len(source.rejected)
    if lost > config.data.bad_fraction * source.indexed:
        first = f"; for example {source.rejected[0].name}: {source.rejected[0].reason}" if source.rejected else ""
        raise ValueError(f"{option}: expected decodable samples, got {lost} of {source.indexed} that are not{first}")


def standardise_features(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zero mean and unit variance per feature, by the training set; constant features become 0."""
    mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    scale = np.where(std > 1e-8, std, np.inf)
    return (train - mean) / scale, (test - mean) / scale


def _logistic(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    model: Any = LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged after 1000 iterations is close enough, and the same for all
        if labels.ndim == 1:
            return float(model.fit(train, labels).score(test, truth))
        return mean_average_precision(truth, OneVsRestClassifier(model).fit(train, labels).predict_proba(test))


def _score_all(x: np.ndarray, y: np.ndarray, z: np.ndarray, truth: np.ndarray, neighbours: int) -> dict[str, float]:
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(n_neighbors=min(neighbours, len(x))).fit(x, y)
    if y.ndim == 2:
        shares = y[classifier.kneighbors(z, return_distance=False)].mean(1)
        return {"linear_probe": _logistic(x, y, z, truth), "knn": mean_average_precision(truth, shares)}
    return {"linear_probe": _logistic(x, y, z, truth), "knn": float(classifier.score(z, truth))}


def score_all_labels(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], neighbours: int = 5
) -> dict[str, float]:
    """The two of `score_features` that take all labels: linear_probe and knn."""
    x, z = standardise_features(train[0], test[0])
    return _score_all(x, train[1], z, test[1], neighbours)


def score_features(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    neighbours: int,
    labels_per_class: int,
    draws: int,
    seed: int,
) -> dict[str, float]:
    """Accuracies 0 to 1 of the three probes on standardised features; of several labels a sample mean average
    precisions, of a logistic regression for each label, or of its share among the neighbours.

    train, test: (features (n,C), labels (n,), or bool (n,L)). Linear: multinomial logistic regression, L2 with C = 1.
    kNN: Euclidean.
    Few-label: the linear probe on `labels_per_class` images a class, mean and standard deviation over `draws` draws,
    the same draws for all features.
    """
    x, z = standardise_features(train[0], test[0])
    y, truth = train[1], test[1]
    few = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        members = [y[:, c] for c in range(y.shape[1])] if y.ndim == 2 else [y == c for c in np.unique(y)]
        chosen = [rng.permutation(np.flatnonzero(own))[:labels_per_class] for own in members]
        rows = np.concatenate(chosen) if y.ndim == 1 else np.unique(np.concatenate(chosen))
        few.append(_logistic(x[rows], y[rows], z, truth))
    return {
        **_score_all(x, y, z, truth, neighbours),
        "few_label": float(np.mean(few)),
        "few_label_std": float(np.std(few, ddof=1)) if draws > 1 else 0.0,
    }


def align_label_sets(train: Source, test: Source) -> tuple[list[str], tuple[np.ndarray, np.ndarray]]:
    """Names of the labels in texts of several (`split_labels`, of each source by itself), and bool (n,L): those of each
    class of the training and of the test source; `ValueError` as `align_labels`."""
    first = split_labels(train.classes or [])
    names = number_classes([name for one in first for name in one])[1]
    second = split_labels(test.classes or [], names)
    numbers = {name: i for i, name in enumerate(names)}
    if unknown := sorted({name for one in second for name in one}.difference(numbers)):
        raise ValueError(f"test: expected the labels {', '.join(names[:20])}, got {unknown[0]!r}")
    tables = [stack_labels([[numbers[name] for name in one] for one in part], len(names)) for part in (first, second)]
    return names, (tables[0], tables[1])


def align_labels(train: Source, test: Source) -> np.ndarray:
    """Test labels in the numbering of the training classes; `ValueError` for a class that was never trained on."""
    assert train.classes is not None and test.classes is not None and test.labels is not None
    numbers = {name: i for i, name in enumerate(train.classes)}
    unknown = [name for name in test.classes if name not in numbers]
    if unknown:
        raise ValueError(f"test: expected the classes {', '.join(train.classes[:20])}, got {unknown[0]!r}")
    return np.array([numbers[name] for name in test.classes], dtype=np.int64)[test.labels]


def _print_error(text: str) -> None:
    print(text, file=sys.stderr)


def open_pair(
    modality: Modality, train: str, test: str, say: Callable[[str], None] = _print_error, several: bool = False
) -> tuple[Source, Source]:
    """Labelled training and test samples with the same numbers of classes, unless a sample has several labels;
    `ValueError` for those that no probe can use."""
    first, second = (modality.open(p, labelled=True, option=o) for p, o in ((train, "train"), (test, "test")))
    if several:
        align_label_sets(first, second)
    else:
        second.labels, second.classes = align_labels(first, second), first.classes
        check_classes(first, "train")
    if len(first.classes or []) < 2:
        raise ValueError(f"train: expected at least 2 classes, got {first.classes}")
    assert first.labels is not None
    for text in [] if several else describe_rare(first.labels.tolist(), first.classes or [], first.describe):
        say(text)
    for name, source in (("train", first), ("test", second)):
        check_lost(modality.config, source, name)  # what the index has rejected already costs no features
    return first, second


def probe(
    checkpoint: str,
    train: str,
    test: str,
    *,
    weights: str = "teacher",
    baselines: Sequence[str] = (),
    layer: int | str | None = None,
    image_size: int | None = None,
    frames: int | None = None,
    pool: str = "mean",
    multi_label: bool = False,
    neighbours: int = 5,
    labels_per_class: int = 10,
    draws: int = 5,
    seed: int = 0,
    batch: int = 64,
    device: str = "auto",
    output: str | None = None,
    precision: str = "fp32",
    max_seconds: float | None = None,
    max_tokens: int | None = None,
    allow_commands: bool = False,
) -> dict[str, Any]:
    """Probes a checkpoint and baselines; prints a table and, as the last line, one JSON object, which it returns.

    layer: as of `parse_layers`; several are summed by `mix_layers`. The result is also written to `output`, or to
    `probe.json` of the run folder that `checkpoint` names.
    """
    for name, value in (("neighbours", neighbours), ("labels-per-class", labels_per_class), ("draws", draws)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    if pool not in (*POOLS, "class"):
        raise ValueError(f"pool: expected one of {', '.join(POOLS)}, class, got {pool!r}")
    model, config, place = load_model(checkpoint, device, image_size, frames)
    config = config.change(data={"allow_commands": allow_commands})
    if pool == "class" and not config.encoder.extra_tokens:
        raise ValueError(f"pool: expected one of {', '.join(POOLS)} for a model without a class token, got class")
    uncut = Uncut(config, max_seconds, max_tokens)
    modality, layers = uncut.modality, parse_layers(layer, model)
    _check_baselines(baselines, modality)
    train_source, test_source = open_pair(modality, train, test, several=multi_label)

    extractors: dict[str, Callable[[PieceBatch], Tensor]] = {}
    for name in ("pretrained", *baselines):
        extractors[name] = partial(raw_features, modality, name)
        if name in ("pretrained", "random_init"):
            used = model if name == "pretrained" else build_model(config, place)
            encoder = used.teacher if weights == "teacher" else used
            extractors[name] = make_extractor(encoder, modality, place, layers, pool, precision)
    first, y = extract_features(extractors, config, train_source, "train", batch=batch, uncut=uncut)
    second, truth = extract_features(extractors, config, test_source, "test", batch=batch, uncut=uncut)
    names = train_source.classes or []
    if multi_label:
        names, tables = align_label_sets(train_source, test_source)
        y, truth = tables[0][y], tables[1][truth]
    mixes = mix_layers(first, second, y)
    options = {"neighbours": neighbours, "labels_per_class": labels_per_class, "draws": draws, "seed": seed}
    scores = {name: score_features((first[name], y), (second[name], truth), **options) for name in extractors}
    result: dict[str, Any] = {
        key: {name: round(values[key], 6) for name, values in scores.items()}
        for key in ("linear_probe", "knn", "few_label", "few_label_std")
    }
    result |= {"weights": weights, "pool": pool, "classes": len(names)}
    result |= {"train_samples": len(y), "test_samples": len(truth), **options}
    result |= {"chance": round(float(truth[:, truth.any(0)].mean()), 6)} if multi_label else {}
    result |= {"layers": list(layers), "layer_weights": mixes} if isinstance(layers, tuple) else {}
    _write_result(result, checkpoint, output, modality.noun)
    return result


def _check_baselines(baselines: Sequence[str], modality: Modality) -> None:
    known = ("random_init", *modality.baselines)
    if unknown := [name for name in baselines if name not in known]:
        raise ValueError(f"baselines: expected of {', '.join(known)} for {modality.noun}, got {unknown[0]}")


def _write_result(result: dict[str, Any], checkpoint: str, output: str | None, noun: str) -> None:
    print_table(result, noun)
    folder = Path(checkpoint)
    if output is not None:
        write_atomically(Path(output), json.dumps(result, indent=1))
    elif (folder / "metrics.jsonl").is_file():
        write_atomically(folder / "probe.json", json.dumps(result, indent=1))
    print(json.dumps(result))


def print_table(result: dict[str, Any], noun: str) -> None:
    """Accuracies or mean average precisions in percent, a row per kind of features."""
    chance, score = 100 / result["classes"], "accuracy"
    if "chance" in result:
        chance, score = 100 * result["chance"], "mean average precision"
    print(
        f"test {score} in %, {result['classes']} classes (chance {chance:.1f}), "
        f"{result['train_samples']} training and {result['test_samples']} test {noun}"
    )
    neighbours = f"kNN (k={result['neighbours']})"
    few = f"{result['labels_per_class']} labels per class"
    print(f"{'features':<16}{'linear':>8}{neighbours:>12}{few:>22}")
    for name in result["linear_probe"]:
        spread = f"{100 * result['few_label'][name]:.1f} ± {100 * result['few_label_std'][name]:.1f}"
        row = f"{100 * result['linear_probe'][name]:>8.1f}{100 * result['knn'][name]:>12.1f}{spread:>22}"
        print(f"{name:<16}{row}")
    for name, weights in result.get("layer_weights", {}).items():
        shown = ", ".join(f"{layer}: {w:.3f}" for layer, w in zip(result["layers"], weights, strict=True))
        print(f"weights of the layers of {name}: {shown}")
