"""Features of several layers: which are meant, and weights of their sum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from d2v.model.data2vec import Data2Vec

STEPS = 100
"""Most steps of L-BFGS."""


def parse_layers(layer: int | str | None, model: Data2Vec, several: bool = True) -> int | tuple[int, ...] | None:
    """What `Data2Vec.encode` takes: of a number itself, of "1,5,9" these, of "all" 0 to the number of blocks.

    Raises:
        ValueError: something else; a layer that the model does not have; more than one unless there may be several.
    """
    blocks = len(model.context.blocks) + len(model.blocks.blocks)
    expected = f"0 to {blocks}" + (", numbers separated by commas, or all" if several else "")
    if layer is None:
        return None
    texts = [str(n) for n in range(blocks + 1)] if layer == "all" else str(layer).split(",")
    if (
        not all(text.strip().isdecimal() and int(text) <= blocks for text in texts)
        or len(set(texts)) < len(texts) or (len(texts) > 1 and not several)
    ):  # fmt: skip
        raise ValueError(f"layer: expected {expected}, got {layer}")
    return tuple(int(text) for text in texts) if len(texts) > 1 else int(texts[0])


def check_weights(weights: Sequence[float], layers: int | tuple[int, ...] | None) -> np.ndarray:
    """(K,) float32 of as many weights as layers; `ValueError` otherwise."""
    count = len(layers) if isinstance(layers, tuple) else 0
    if len(weights) != count or not np.isfinite(weights).all():
        raise ValueError(f"layer-weights: expected a number for each of {count} layers (--layer), got {list(weights)}")
    return np.array(weights, dtype=np.float32)


def learn_layer_weights(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (K,) float32, sum 1, of the sum of layers from which a linear classifier predicts the labels best; and
    the factors (K,) that give each layer a standard deviation of 1 before.

    As in SUPERB (Yang et al. 2021) the softmax of numbers that are trained together with the classifier, here by L-BFGS
    on the cross entropy with the penalty of the linear probe, on all samples at once. Without the factors a penalty
    would prefer the layer with the largest numbers.

    Args:
        features: float32 (n,K,F), one vector of each layer a sample.
        labels: int64 (n,) classes, or bool (n,L) of several labels a sample.
    """
    x = torch.from_numpy(features) - torch.from_numpy(features.mean(0))
    factors = 1.0 / x.square().mean((0, 2)).sqrt().clamp(min=1e-8)
    x *= factors[:, None]
    several = labels.ndim == 2
    truth = torch.from_numpy(labels).float() if several else torch.from_numpy(labels)
    outputs = labels.shape[1] if several else int(labels.max()) + 1
    scores = torch.zeros(x.shape[1], requires_grad=True)
    matrix, bias = torch.zeros(outputs, x.shape[2], requires_grad=True), torch.zeros(outputs, requires_grad=True)
    optimiser = torch.optim.LBFGS([scores, matrix, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        mixed = torch.einsum("nkf,k->nf", x, scores.softmax(0))
        logits = F.linear(mixed, matrix, bias)
        error = F.binary_cross_entropy_with_logits(logits, truth) if several else F.cross_entropy(logits, truth)
        loss = error + 0.5 / len(x) * matrix.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return scores.detach().softmax(0).numpy(), factors.numpy()


def mix_layers(
    train: dict[str, np.ndarray], test: dict[str, np.ndarray], labels: np.ndarray
) -> dict[str, list[float]]:  # fmt: skip
    """Features (n,K,F) of several layers become their sum (n,F), in place, with weights that `learn_layer_weights`
    finds on the training samples; returns these (K,) by the name of the features."""
    learned = {}
    for name in [name for name, rows in train.items() if rows.ndim == 3]:
        weights, factors = learn_layer_weights(train[name], labels)
        train[name], test[name] = (np.tensordot(rows[name], weights * factors, (1, 0)) for rows in (train, test))
        learned[name] = [round(float(weight), 6) for weight in weights]
    return learned
