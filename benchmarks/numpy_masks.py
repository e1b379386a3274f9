"""NumPy samplers of the published mask rules: what a data loader runs without native code.

`plain_*` go through starts and blocks in Python, as the published samplers do; `vector_*` use array operations
throughout, the best NumPy we could write.
"""

from __future__ import annotations

import numpy as np


def vector_block_masks(
    rows: int, shape: tuple[int, ...], ratio: float, adjust: float, span: int, inverse: bool, rng: np.random.Generator
) -> np.ndarray:
    """(rows, T) bool: blocks around random centres, then an exact count (1-D and 2-D, data2vec 2.0)."""
    size = int(np.prod(shape))
    p = 1 - ratio if inverse else ratio
    target, blocks = int(size * p), int(size * (p + adjust) / span ** len(shape))
    offsets = np.stack(np.meshgrid(*[np.arange(span) - span // 2] * len(shape), indexing="ij"), -1).reshape(
        -1, len(shape)
    )
    limits = np.array(shape) - 1
    masks = np.zeros((rows, size), dtype=bool)
    for mask in masks:
        centres = np.stack(np.unravel_index(rng.integers(size, size=blocks), shape), -1)
        cells = np.clip(centres[:, None] + offsets, 0, limits).reshape(-1, len(shape))
        mask[np.ravel_multi_index(tuple(cells.T), shape)] = True
        excess = int(mask.sum()) - target
        if excess:
            mask[rng.choice(np.flatnonzero(mask == (excess > 0)), abs(excess), replace=False)] = excess < 0
    return ~masks if inverse else masks


def vector_span_masks(rows: int, tokens: int, ratio: float, span: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, T) bool: distinct starts of fixed spans (data2vec 1.0 speech)."""
    masks = np.zeros((rows, tokens), dtype=bool)
    for mask in masks:
        count = int(ratio * tokens / span + rng.random())
        starts = rng.choice(tokens - span, count, replace=False)
        mask[(starts[:, None] + np.arange(span)).ravel()] = True
    return masks


def plain_block_masks(
    rows: int, shape: tuple[int, ...], ratio: float, adjust: float, span: int, inverse: bool, rng: np.random.Generator
) -> np.ndarray:
    """The rule of `vector_block_masks`, block by block."""
    size = int(np.prod(shape))
    p = 1 - ratio if inverse else ratio
    target, blocks = int(size * p), int(size * (p + adjust) / span ** len(shape))
    masks = np.zeros((rows, *shape), dtype=bool)
    for mask in masks:
        for centre in rng.integers(size, size=blocks):
            place = np.unravel_index(centre, shape)
            for offset in np.ndindex(*[span] * len(shape)):
                cell = [min(max(c + o - span // 2, 0), n - 1) for c, o, n in zip(place, offset, shape, strict=True)]
                mask[tuple(cell)] = True
        flat = mask.reshape(-1)
        excess = int(flat.sum()) - target
        if excess:
            flat[rng.choice(np.flatnonzero(flat == (excess > 0)), abs(excess), replace=False)] = excess < 0
    masks = masks.reshape(rows, size)
    return ~masks if inverse else masks


def plain_span_masks(rows: int, tokens: int, ratio: float, span: int, rng: np.random.Generator) -> np.ndarray:
    """The rule of `vector_span_masks`, span by span."""
    masks = np.zeros((rows, tokens), dtype=bool)
    for mask in masks:
        count = int(ratio * tokens / span + rng.random())
        starts = rng.choice(tokens - span, count, replace=False)
        mask[np.asarray([start + offset for start in starts for offset in range(span)])] = True
    return masks


def list_masks(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """keep, restore and masked rows of a mask, as the published code derives them."""
    order = np.argsort(mask, axis=1, kind="stable")
    visible = mask.shape[1] - int(mask[0].sum())
    return order[:, :visible], np.argsort(order, axis=1), np.flatnonzero(mask)
