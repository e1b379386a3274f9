"""NumPy samplers of the published mask rules: what a data loader runs without native code.

`plain_*` go through starts and blocks in Python, as the published samplers do; `vector_*` use array operations
throughout, the best NumPy we could write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Generator = np.random.Generator


def _block_masks(
    cover: Callable[[np.ndarray, np.ndarray, Shape, int], None], rows: int, shape: Shape, ratio: float, adjust: float,
    span: int, rng: Generator, inverse: bool = False,
) -> np.ndarray:  # fmt: skip
    """(rows, T) bool: blocks around random centres, then an exact count (1-D and 2-D, data2vec 2.0)."""
    size = int(np.prod(shape))
    p = 1 - ratio if inverse else ratio
    target, blocks = int(size * p), int(size * (p + adjust) / span ** len(shape))
    masks = np.zeros((rows, size), dtype=bool)
    for mask in masks:
        cover(mask, rng.integers(size, size=blocks), shape, span)
        excess = int(mask.sum()) - target
        if excess:
            mask[rng.choice(np.flatnonzero(mask == (excess > 0)), abs(excess), replace=False)] = excess < 0
    return ~masks if inverse else masks


def vector_block_masks(*arguments: Any, **options: Any) -> Any:
    """All blocks of a row at once."""

    def cover(mask: np.ndarray, centres: np.ndarray, shape: Shape, span: int) -> None:
        axes = [np.arange(span) - span // 2] * len(shape)
        offsets = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(shape))
        places = np.stack(np.unravel_index(centres, shape), -1)
        cells = np.clip(places[:, None] + offsets, 0, np.array(shape) - 1).reshape(-1, len(shape))
        mask[np.ravel_multi_index(tuple(cells.T), shape)] = True

    return _block_masks(cover, *arguments, **options)


def plain_block_masks(*arguments: Any, **options: Any) -> Any:
    """The same rule, block by block."""

    def cover(mask: np.ndarray, centres: np.ndarray, shape: Shape, span: int) -> None:
        for centre in centres:
            place = np.unravel_index(centre, shape)
            for offset in np.ndindex(*[span] * len(shape)):
                cell = [min(max(c + o - span // 2, 0), n - 1) for c, o, n in zip(place, offset, shape, strict=True)]
                mask.reshape(shape)[tuple(cell)] = True

    return _block_masks(cover, *arguments, **options)


def vector_span_masks(
    rows: int, tokens: int, *, ratio: float, span: int, rng: Generator, plain: bool = False
) -> np.ndarray:
    """(rows, T) bool: distinct starts of fixed spans (data2vec 1.0 speech)."""
    masks = np.zeros((rows, tokens), dtype=bool)
    for mask in masks:
        count = int(ratio * tokens / span + rng.random())
        starts = rng.choice(tokens - span, count, replace=False)
        if plain:
            mask[np.asarray([start + offset for start in starts for offset in range(span)])] = True
        else:
            mask[(starts[:, None] + np.arange(span)).ravel()] = True
    return masks


def plain_span_masks(*arguments: Any, **options: Any) -> Any:
    """The same rule, span by span."""
    return vector_span_masks(*arguments, **options, plain=True)


def list_masks(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """keep, restore and masked rows of a mask, as the published code derives them."""
    order = np.argsort(mask, axis=1, kind="stable")
    visible = mask.shape[1] - int(mask[0].sum())
    return order[:, :visible], np.argsort(order, axis=1), np.flatnonzero(mask)
