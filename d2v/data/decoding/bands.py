"""Images of any number of channels as arrays: those of NumPy, TIFF of several bands or pages, JPEG in less time."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from PIL import Image

_HAS_SIMPLEJPEG = importlib.util.find_spec("simplejpeg") is not None
HINT = "pip install 'd2v[tiff]'"
_ARRAY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 274
"""TIFF's tag Orientation, whose values are those of EXIF."""


class Unfit(ValueError):
    """A sound file of an image that is not used."""


class Bands:
    """An image of 8-bit channels, any number of them, with those of Pillow's methods that crops and turns use."""

    def __init__(self, values: np.ndarray) -> None:
        """Of uint8 (H,W,c)."""
        self.values = values
        self.size: tuple[int, int] = (values.shape[1], values.shape[0])
        """Width and height."""

    def crop(self, box: tuple[int, int, int, int]) -> Bands:
        """A box (left, top, right, bottom) of each channel."""
        left, top, right, bottom = box
        return Bands(self.values[top:bottom, left:right])

    def resize(self, *args: Any, **kwargs: Any) -> Bands:
        """Each channel as `PIL.Image.Image.resize` makes it."""
        return self._each(lambda channel: channel.resize(*args, **kwargs))

    def transpose(self, method: Any) -> Bands:
        """Each channel turned or mirrored."""
        return self._each(lambda channel: channel.transpose(method))

    def _each(self, change: Callable[[Image.Image], Image.Image]) -> Bands:
        channels = (Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(self.values, 2, 0))
        return Bands(np.stack([np.asarray(change(channel)) for channel in channels], axis=2))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """uint8 (H,W,c)."""
        return self.values.copy() if copy else self.values


def decode_jpeg(image: Image.Image, data: bytes) -> Bands | None:
    """A colour JPEG that Pillow has opened, with Pillow's values; None for others and what simplejpeg finds fault with,
    of which Pillow knows more."""
    if image.format != "JPEG" or image.mode != "RGB" or not _HAS_SIMPLEJPEG:
        return None
    import simplejpeg

    try:
        size = simplejpeg.decode_jpeg_header(data)[1::-1]  # what Pillow's limit allows, and no other
        return Bands(simplejpeg.decode_jpeg(data)) if size == image.size else None
    except ValueError:
        return None


def is_array(data: bytes) -> bool:
    """Whether these are the bytes of a .npy file."""
    return data.startswith(_ARRAY)


def is_tiff(data: bytes) -> bool:
    """Whether these are the bytes of a TIFF or BigTIFF."""
    return data[:4] in _TIFF


def read_bands(data: bytes, wanted: Collection[int]) -> tuple[np.ndarray, int, str | None]:
    """A .npy file or a TIFF -> (values (H,W,c) as stored, EXIF orientation, what was not read or None).

    Args:
        wanted: numbers of channels that the image may have; none: any.

    Raises:
        ValueError: no real numbers, no tifffile; `Unfit`: another number of channels, more pixels than Pillow's limit;
            damaged files raise what their readers do.
    """
    if is_array(data):
        values = np.load(io.BytesIO(data), allow_pickle=False)
        axis = find_axis(values.shape, wanted)
        _check_pixels(values.shape, axis)
        return _arrange(values, axis), 1, None
    try:
        import tifffile
    except ImportError:
        raise ValueError(f"expected tifffile for TIFF of such channels ({HINT}), found none") from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        first, others = file.series[0], len(file.series) - 1
        samples = first.axes.find("S") if len(first.shape) == 3 else -1
        if samples >= 0 and wanted:
            check_channels(first.shape[samples], wanted)
        axis = samples if samples >= 0 else find_axis(first.shape, wanted)
        _check_pixels(first.shape, axis)
        values = _arrange(first.asarray(maxworkers=1), axis)
        tag = first.pages[0].tags.get(_ORIENTATION)
    left = f"{others} pages or frames behind the first, not read" if others else None
    return values, int(tag.value) if tag is not None else 1, left


def check_channels(found: int, wanted: Collection[int]) -> None:
    """`Unfit` for a number of channels that is not wanted."""
    if found not in wanted:
        raise Unfit(f"expected {' or '.join(map(str, wanted))} channels (stem.channels), got {found}")


def find_axis(shape: tuple[int, ...], wanted: Collection[int]) -> int | None:
    """The axis of the channels: none of two, which are one channel; of three the last where it has as many entries as
    are wanted, else the first; `Unfit` where neither has. With nothing wanted: the shorter of the two."""
    if len(shape) == 2:
        check_channels(1, wanted or (1,))
        return None
    if len(shape) == 3 and not wanted:
        return 2 if shape[2] <= shape[0] else 0
    if len(shape) == 3 and (axes := [axis for axis in (2, 0) if shape[axis] in wanted]):
        return axes[0]
    expected = f"{' or '.join(map(str, wanted))} channels (stem.channels)" if wanted else "channels"
    raise Unfit(f"expected (height, width) or {expected} in the last or first of three axes, got an array {shape}")


def _check_pixels(shape: tuple[int, ...], axis: int | None) -> None:
    """`Unfit` for more pixels than Pillow decodes, or many channels of nearly as many."""
    limit, size = Image.MAX_IMAGE_PIXELS, math.prod(shape)
    if limit is not None and max(size // (1 if axis is None else max(shape[axis], 1)), size // 16) > limit:
        raise Unfit(f"expected at most {limit} pixels, got an image {shape}")


def _arrange(values: np.ndarray, axis: int | None) -> np.ndarray:
    """(H,W,c) of an array whose axis of channels is known."""
    if values.dtype.kind not in "fiu" or not values.size:
        raise ValueError(f"expected real numbers, got {values.dtype} of shape {values.shape}")
    return values[:, :, None] if axis is None else np.moveaxis(values, axis, 2)
