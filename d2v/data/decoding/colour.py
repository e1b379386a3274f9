"""Colour images of more than 8 bits a value, of which Pillow keeps 8."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import numpy as np

AV_HINT = "pip install 'd2v[av]' keeps their range"
_FORMATS = {"PNG": "png_pipe", "TIFF": "tiff_pipe"}
"""FFmpeg's names. It is told the name: left to guess, it would take a list of other files for an image."""
_CHANNELS = {"rgb48": 3, "rgba64": 4, "ya16": 2, "gbrp16": 3, "gbrap16": 4}
"""Channels of FFmpeg's pixel formats, without the order of bytes."""
_COLOUR = ("RGB", "RGBA", "RGBX", "RGBa", "LA", "CMYK", "YCbCr", "LAB")
"""Pillow's modes with several channels."""
_BITS = 258
"""TIFF's tag BitsPerSample."""


def find_depth(image: Any, data: bytes) -> int:
    """Bits of a value of a colour image that was opened and not loaded; 8 where it is grey or has no more."""
    if image.format == "PPM":
        largest = _largest_value(image)
        return largest.bit_length() if image.mode == "RGB" and largest > 255 else 8
    if image.format == "TIFF" and image.mode in _COLOUR:
        return max(image.tag_v2.get(_BITS, (8,)))
    if image.format == "PNG" and any(";16" in str(tile[3]) for tile in image.tile):
        return 16 if image.mode in _COLOUR else 8
    if image.format == "AVIF" and (box := data.find(b"av1C")) >= 0:  # marker, profile, then the depth
        flags = data[box + 6 : box + 7] or b"\0"
        return 8 if not flags[0] & 0x40 else 12 if flags[0] & 0x20 else 10
    if image.format == "JPEG2000" and image.mode in _COLOUR:
        size = data.find(b"\xff\x4f\xff\x51")  # the image's size comes first, then what the components are
        return (data[size + 42] & 0x7F) + 1 if 0 <= size < len(data) - 42 else 8
    return 8


def describe_loss(image: Any, depth: int) -> str:
    """What becomes of an image that `read_colour` did not read, and what to do about it."""
    hint = "" if image.format not in _FORMATS or importlib.util.find_spec("av") else f" ({AV_HINT})"
    return f"{depth}-bit colour to 8 bits{hint}"


def _largest_value(image: Any) -> int:
    """That of a PNM image by its header."""
    arguments = image.tile[0][3] if image.tile else ()
    return int(arguments[1]) if isinstance(arguments, tuple) and isinstance(arguments[1], int) else 0


def read_colour(image: Any, data: bytes) -> np.ndarray | None:
    """All values (H,W,c) uint16 of 16-bit colour, c = 2 (grey and alpha), 3 or 4 (colour and alpha); None where no
    reader of them is installed, or it does not know this kind."""
    width, height = image.size
    if image.format == "PPM" and data[:2] == b"P6":
        values = np.frombuffer(data, ">u2", width * height * 3, image.tile[0][2])
        return values.reshape(height, width, 3).astype(np.uint16)
    try:
        import av
    except ImportError:
        return None
    if image.format not in _FORMATS:
        return None
    try:
        with av.open(io.BytesIO(data), format=_FORMATS[image.format]) as opened:
            frame = next(opened.decode(video=0))
    except (av.FFmpegError, StopIteration):
        return None
    return _values_of(frame, width, height)


def _values_of(frame: Any, width: int, height: int) -> np.ndarray | None:
    """Those of PyAV's frame as `read_colour` returns them."""
    name, order = frame.format.name[:-2], ">u2" if frame.format.name.endswith("be") else "<u2"
    if name not in _CHANNELS or (frame.width, frame.height) != (width, height):
        return None
    planes = [np.frombuffer(plane, order).reshape(-1, plane.line_size // 2)[:height] for plane in frame.planes]
    if len(planes) == 1:
        return planes[0][:, : width * _CHANNELS[name]].reshape(height, width, -1).astype(np.uint16)
    green, blue, red, *alpha = (plane[:, :width] for plane in planes)
    return np.stack([red, green, blue, *alpha], axis=2).astype(np.uint16)
