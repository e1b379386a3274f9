"""Augmentation of labelled images on the device: mixup, CutMix, random erasing, label smoothing."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v.config.finetune import TaskOptions

ERASED_AREA = (0.02, 1.0 / 3.0)
"""Area of an erased rectangle over that of the image (Zhong et al. 2020)."""
ERASED_ASPECT = (0.3, 1.0 / 0.3)
_TRIES = 10


def smooth_targets(targets: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,K) float32 of classes (B,), or of 1 for each label (B,K): 1 - s + s / K for these, s / K for the others
    (Szegedy et al. 2016)."""
    hot = targets if targets.dim() == 2 else F.one_hot(targets, classes).float()
    return hot * (1.0 - smoothing) + smoothing / classes


def mix_images(images: Tensor, soft: Tensor, options: TaskOptions, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Each image mixed with the one at the mirrored place of its batch, and the targets alike.

    mixup (Zhang et al. 2018): x = l x + (1 - l) x'. CutMix (Yun et al. 2019): a rectangle of area 1 - l comes from x',
    and l is what is left after its edges are cut at the image's. l ~ Beta(alpha, alpha), one a batch.

    Args:
        images: (B,c,H,W) float.
        soft: (B,K) targets.
        options: alphas and probabilities.
        rng: draws on the host; the same number of them whatever is chosen.

    Returns:
        Images and targets, new tensors where something was mixed.
    """
    mixes, switches, place_y, place_x = rng.random(4)
    draws = [rng.beta(a, a) if a > 0.0 else 1.0 for a in (options.mixup, options.cutmix)]
    if mixes >= options.mix_probability or len(images) < 2 or not (options.mixup > 0.0 or options.cutmix > 0.0):
        return images, soft
    cuts = options.cutmix > 0.0 and (options.mixup <= 0.0 or switches < options.switch_probability)
    share = float(draws[1] if cuts else draws[0])
    if cuts:
        height, width = images.shape[-2:]
        side = math.sqrt(1.0 - share)
        top, bottom = _edges(place_y, side, height)
        left, right = _edges(place_x, side, width)
        images = images.clone()
        images[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
        share = 1.0 - (bottom - top) * (right - left) / (height * width)
    else:
        images = share * images + (1.0 - share) * images.flip(0)
    return images, share * soft + (1.0 - share) * soft.flip(0)


def _edges(place: float, side: float, size: int) -> tuple[int, int]:
    """A stretch of `side` * size around a random centre, cut at the ends."""
    centre, half = int(place * size), int(side * size) // 2
    return max(0, centre - half), min(size, centre + half)


def erase_rectangles(images: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """Random erasing (Zhong et al. 2020): in each image, with a probability, a rectangle of normal noise.

    images (B,c,H,W) -> a new tensor where something was erased.
    """
    if probability <= 0.0:
        return images
    height, width = images.shape[-2:]
    erased = images.clone()
    for image in erased:
        if rng.random() >= probability:
            continue
        for _ in range(_TRIES):
            area = rng.uniform(*ERASED_AREA) * height * width
            aspect = math.exp(rng.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < height and 0 < w < width:
                top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                noise = torch.from_numpy(rng.standard_normal((image.shape[0], h, w), dtype=np.float32))
                image[:, top : top + h, left : left + w] = noise.to(image)
                break
    return erased
