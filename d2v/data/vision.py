"""Images: decoding, random crops, normalisation."""

from __future__ import annotations

import importlib.util
import io
import math
import re
import warnings
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from d2v.config import Config
from d2v.data.dataset import Batch, Modality, Sample
from d2v.data.decoding.bands import Bands, Unfit, check_channels, decode_jpeg, is_array, is_tiff, read_bands
from d2v.data.decoding.colour import AV_HINT, describe_loss, find_depth, read_colour
from d2v.data.index import BANDS, open_images
from d2v.data.sources import Kind, Source
from d2v.model.stems.vision import make_stem

_WANTED = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "DIB", "AVIF", "JPEG2000", "JXL")
Image.init()
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)
"""Decoders that may run. Others are left out on purpose: EPS, for one, starts an external program."""
RANGES = ("auto", "dtype", "minmax", "percentile")
PERCENTILES = (0.5, 99.5)
DEPTHS = range(8, 35, 2)
"""Bits that integer images use."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
COLOUR = (1, 3)
"""Channels of models whose images become RGB or grey; those of others keep the channels of their files."""
_TURNS = dict(enumerate(
    (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
     Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90), 2,
))  # fmt: skip
"""What makes an image upright, by its EXIF orientation."""
PIXEL_SIDE = 32
"""Pixel baselines see larger images averaged down to this side: a linear probe on 150 528 pixels says little."""


Range = str | tuple[float, float]
"""Which values become 0 to 255: a name of `RANGES`, or the lowest and the highest of them."""


def decode_image(data: bytes, scale: Range = "auto") -> tuple[Image.Image, str | None]:
    """Encoded bytes -> (RGB image of the first frame, what was converted or None). See `read_image`."""
    image, notes = read_image(data, scale)
    assert isinstance(image, Image.Image)
    return image, notes[0] if notes else None


def check_image(data: bytes) -> None:
    """`ValueError` for an image that no model can read, of any number of channels."""
    try:
        read_image(data)
    except Unfit:
        read_image(data, wanted=())


def read_image(
    data: bytes, scale: Range = "auto", wanted: Collection[int] = (3,), turn: bool = False, arrays: bool = False
) -> tuple[Image.Image | Bands, tuple[str, ...]]:
    """Encoded bytes -> (image of the first page or frame, what was converted or left out).

    Args:
        data: of a format that Pillow reads, a `.npy` array, or a TIFF of several bands or pages.
        scale: data.image_range, by which values of more than 8 bits are scaled.
        wanted: numbers of channels. With 1 or 3 among them the image becomes RGB: alpha and transparent colours are
            laid over white, CMYK, palette and grey converted; arrays, and TIFF that Pillow cannot read, have one of
            these numbers. Otherwise nothing is converted. Empty: any number.
        turn: apply the EXIF orientation; the published pipelines do not.
        arrays: colour JPEG may become `Bands`, by simplejpeg where it is installed; the values are the same.

    Raises:
        ValueError: the reason for whatever cannot be decoded, or has other channels; images above Pillow's pixel limit
            are refused before their pixels are read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            if is_array(data) or (is_tiff(data) and not set(COLOUR) & set(wanted)):
                image, kind, orientation, left = _use_bands(*read_bands(data, wanted), scale, wanted)
            else:
                image, kind, orientation, left = _read_pillow(data, scale, wanted, arrays)
        except Unfit:
            raise
        except MemoryError:
            raise ValueError(f"not enough memory for {len(data)} bytes") from None
        except Exception as error:  # a decoder fed with damaged bytes may raise anything
            text = str(error) or type(error).__name__
            raise ValueError(text.replace("<_io.BytesIO object at ", "<").split("<", 1)[0].strip() or text) from None
    turned = None if orientation == 1 else "EXIF orientation, not applied"
    if turn and orientation in _TURNS:
        image, turned = image.transpose(_TURNS[orientation]), "EXIF orientation, applied"
    return image, tuple(note for note in (kind, left, turned) if note)


_Read = tuple[Image.Image | Bands, str | None, int, str | None]
"""Image, what was converted, EXIF orientation that is not yet applied, what was left out."""


def _use_bands(values: np.ndarray, orientation: int, left: str | None, scale: Range, wanted: Collection[int]) -> _Read:
    """What `read_bands` found."""
    colour = values.shape[2] in COLOUR and bool(set(COLOUR) & set(wanted))
    scaled, kind = _scale_bands(values, scale, apart=not colour)
    image: Image.Image | Bands = Bands(scaled)
    if colour:
        image = Image.fromarray(scaled if scaled.shape[2] == 3 else scaled.repeat(3, axis=2))
        kind = kind or ("grey" if scaled.shape[2] == 1 else None)
    return image, kind, orientation, left


def _scale_bands(values: np.ndarray, scale: Range, apart: bool) -> tuple[np.ndarray, str | None]:
    """(H,W,c) -> uint8, how; 8 bits stay as they are. apart: minmax and percentile are those of each channel."""
    if values.dtype == np.uint8:
        return values, None
    if not apart or scale not in ("minmax", "percentile"):
        return scale_values(values, scale)
    parts, kinds = zip(*(scale_values(channel, scale) for channel in np.moveaxis(values, 2, 0)), strict=True)
    return np.stack(parts, axis=2), f"{kinds[0]}, each channel by itself"


def _read_pillow(data: bytes, scale: Range, wanted: Collection[int], arrays: bool) -> _Read:
    """What Pillow reads, and colour of more bits."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        if not is_tiff(data) or importlib.util.find_spec("tifffile") is None:
            raise
        try:
            found = read_bands(data, wanted)
        except Unfit:
            raise
        except Exception:  # damaged
            raise error from None
        return _use_bands(*found, scale, wanted)
    if arrays and (decoded := decode_jpeg(image, data)) is not None:
        return decoded, None, _find_orientation(image), None
    pages = _count_pages(image)
    raw = " ".join(str(tile[3]) for tile in getattr(image, "tile", ()))
    depth = find_depth(image, data)
    values = read_colour(image, data) if depth > 8 else None
    negative = values is None and _check_tiff(image, raw)
    kind = describe_loss(image, depth) if depth > 8 and values is None else None
    orientation = 1 if values is None else _find_orientation(image)  # before Pillow turns TIFF
    image.load()
    if values is None:
        orientation = _find_orientation(image)
    result: Image.Image | Bands
    if set(COLOUR) & set(wanted):
        result, how = _to_rgb(image, raw, scale, negative) if values is None else _scale_colour(values, scale)
    else:
        values = np.asarray(image) if values is None else values
        values = values[:, :, None] if values.ndim == 2 else values
        if wanted:
            check_channels(values.shape[2], wanted)
        scaled, how = _scale_bands(values, scale, apart=True)
        result = Bands(scaled)
    left = f"{pages - 1} pages or frames behind the first, not read" if pages > 1 else None
    return result, kind or how, orientation, left


def _find_orientation(image: Image.Image) -> int:
    """How a viewer would turn or mirror the image; Pillow does so itself when it loads TIFF."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF of a whole image
        return 1


def _count_pages(image: Image.Image) -> int:
    """Pages or frames of a file, which is then at its first one."""
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # the later ones are damaged; the first may be whole
        return 1
    finally:
        image.seek(0)


def _check_tiff(image: Image.Image, raw: str) -> bool:
    """Whether 0 is white in a TIFF and stays so when Pillow reads it, as with more than 8 bits; `ValueError` for values
    that Pillow reads wrongly without an error. `raw` names how values are stored in the file."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    tags = image.tag_v2
    bits, stored = max(tags.get(258, (1,))), [tile[0] for tile in image.tile]
    if tags.get(284) == 2 and tags.get(277, 1) > 1 and bits > 8 and "raw" in stored:
        hint = "" if importlib.util.find_spec("av") else f" ({AV_HINT})"
        raise ValueError(f"{bits}-bit colour in separate planes: expected it by pixel, or compressed{hint}")
    if bits == 8 and 2 in tags.get(339, (1,)):
        raise ValueError("signed 8-bit values: expected unsigned ones, or 16 bits")
    return tags.get(262) == 0 and not re.search(r";\d?I", raw)


def _to_rgb(image: Image.Image, raw: str, scale: Range, negative: bool) -> tuple[Image.Image, str | None]:
    """`raw` names how values are stored in the file; `negative`: dark and light are to be exchanged."""
    if negative and image.mode in ("1", "L"):
        image = ImageOps.invert(image.convert("L"))
    mode = image.mode
    key = image.info.get("transparency")
    if mode == "F" or mode.startswith("I"):
        values, kind = scale_values(np.asarray(image), scale)
        if mode != "F" and isinstance(key, int):
            values = np.where(np.asarray(image) == key, np.uint8(255), values)
        if negative:
            values, kind = 255 - values, f"{kind}, 0 is white"
        return Image.fromarray(values).convert("RGB"), kind
    if mode == "RGB" and key is None:
        return image, "channels behind the third, not read" if "RGBX" in raw else None
    if isinstance(key, int) and (match := re.search(r"\bL;([24])\b", raw)):
        image.info["transparency"] = key * (255 // (2 ** int(match[1]) - 1))  # as the grey values have been scaled
    if isinstance(key, tuple) and ";16" in raw:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or key is not None:
        rgba = image.convert("RGBA")
        return _lay_over_white(rgba), "palette" if mode == "P" else "alpha"
    kinds = {"L": "grey", "1": "grey", "P": "palette", "CMYK": "CMYK"}
    return image.convert("RGB"), kinds.get(mode, mode)


def _lay_over_white(rgba: Image.Image) -> Image.Image:
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _scale_colour(values: np.ndarray, scale: Range) -> tuple[Image.Image, str]:
    """16-bit colour (H,W,c), all channels by one range; c = 2 and 4: the last is alpha."""
    colours = values.shape[2] - (values.shape[2] % 2 == 0)
    scaled, how = scale_values(values[:, :, :colours], scale)
    if colours == 1:
        scaled = scaled.repeat(3, axis=2)
    how = how.replace("16-bit", "16-bit colour", 1)
    if colours == values.shape[2]:
        return Image.fromarray(scaled), how
    alpha = np.rint(values[:, :, colours:] * (255.0 / 65535.0)).astype(np.uint8)
    return _lay_over_white(Image.fromarray(np.concatenate([scaled, alpha], axis=2))), how


def scale_values(values: np.ndarray, scale: Range) -> tuple[np.ndarray, str]:
    """Values of more than 8 bits -> (uint8, how): the range that `scale` means becomes 0 to 255, others are cut off.

    auto: 0 to the largest value of as many bits (8, 10, 12 and so on) as the image uses; floating point: 0 to 1,
    where all values are; otherwise the smallest to the largest. `ValueError` for values that are not finite.
    """
    real = values.dtype.kind == "f"
    name = "floating point" if real else f"{max(values.dtype.itemsize * 8, 16)}-bit"
    if not np.isfinite(values).all():
        raise ValueError("values that are not finite")
    low, high = float(values.min()), float(values.max())
    how = scale if isinstance(scale, str) else f"{scale[0]:g} to {scale[1]:g}"
    if not isinstance(scale, str):
        low, high = scale
    elif scale == "percentile":
        low, high = (float(v) for v in np.percentile(values, PERCENTILES))
    elif scale == "dtype" and real:
        raise ValueError("floating-point images have no fixed range: --data.image-range LO HI, minmax or percentile")
    elif not real and (scale == "dtype" or (scale == "auto" and low >= 0.0)):
        signed, depths = low < 0.0, DEPTHS if scale == "auto" else (16, 32)
        depth = next(d for d in depths if max(high, -low - 1) < 2 ** (d - signed))
        low, high, how = -float(signed * 2 ** (depth - 1)), float(2 ** (depth - signed) - 1), f"{depth}-bit"
    elif scale == "auto" and low >= 0.0 and high <= 1.0:
        low, high, how = 0.0, 1.0, "0 to 1"
    elif scale == "auto":
        how = "minmax"
    if low == 0.0 and high == 65535.0 and not real:  # the published scaling, bit for bit
        return (values.clip(0, 65535).astype(np.uint32) * 255 // 65535).astype(np.uint8), "16-bit"
    scaled = (values.astype(np.float64) - low) * (255.0 / max(high - low, 1e-30))
    return np.rint(scaled.clip(0.0, 255.0)).astype(np.uint8), f"{name} as {how} (--data.image-range)"


def parse_range(words: tuple[str, ...]) -> Range:
    """The value of data.image_range; `ValueError` for another."""
    if len(words) == 1 and words[0] in RANGES:
        return words[0]
    try:
        low, high = (float(word) for word in words)
        if math.isfinite(low) and math.isfinite(high) and low < high:
            return low, high
    except ValueError:
        pass
    raise ValueError(f"data.image_range: expected {', '.join(RANGES)} or two rising numbers, got {' '.join(words)!r}")


def random_crop_box(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop: area uniform in `scale`, aspect log-uniform in 3/4 to 4/3.

    Ten tries, then the largest centred crop within the aspect limits (the published RandomResizedCrop).
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class ImageSettings(NamedTuple):
    """The part of a configuration that decides a sample's pixels."""

    size: int
    channels: int
    grey: bool
    crop_scale: tuple[float, float]
    flip: bool
    rotate: bool
    scale: Range = "auto"
    turn: bool = False
    resize: str = "pillow"

    @property
    def wanted(self) -> tuple[int, ...]:
        """Channels that a file may have which is not converted: of an array or a TIFF of bands."""
        return (1, 3) if self.grey and self.channels == 3 else (self.channels,)

    @staticmethod
    def of(config: Config) -> ImageSettings:
        """Settings of `config`; `ValueError` for those that do not go with the number of channels."""
        low, high = config.data.crop_scale
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"data.crop_scale: expected 0 < low <= high <= 1, got {config.data.crop_scale}")
        stem, data = config.stem, config.data
        if stem.channels not in COLOUR:
            images = f"with stem.channels {stem.channels}"
            if data.grey:
                raise ValueError(f"data.grey: expected False {images} (--data.no-grey), got True")
            if data.standardise == "imagenet":
                raise ValueError(
                    f"data.standardise: expected sample {images} (--data.standardise sample), got imagenet"
                )
        grey = data.grey or stem.channels == 1
        scale = parse_range(data.image_range)
        turn = data.exif_orientation == "apply"
        augment = (data.crop_scale, data.flip, data.rotate)
        return ImageSettings(stem.image_size, stem.channels, grey, *augment, scale, turn, data.resize)


def to_pixels(image: Image.Image | Bands, settings: ImageSettings) -> np.ndarray:
    """Image -> uint8 (c,H,W), c = 1 for grey settings, else the channels of the image."""
    if settings.grey and isinstance(image, Image.Image):
        return np.ascontiguousarray(np.asarray(image.convert("L"))[None])
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _resize_by_torch(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H,W) or (H,W,c) -> (1 or c,h,w), both uint8."""
    pixels = np.require(pixels, requirements="W")  # Pillow's cannot be written to, of which PyTorch warns
    image = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)[None]
    return interpolate(image, size[::-1], mode="bicubic", antialias=True)[0].numpy()


def augment_image(image: Image.Image | Bands, settings: ImageSettings, rng: np.random.Generator) -> np.ndarray:
    """Random resized crop (bicubic), mirror, turn -> uint8 (c,size,size). Draws are made whether used or not."""
    box = random_crop_box(rng, *image.size, settings.crop_scale)
    mirror, turns = rng.random() < 0.5, int(rng.integers(4))
    size = (settings.size, settings.size)
    if box != (0, 0, *size) or image.size != size:
        # Cropped first, as published: resizing a box of an image takes in what lies around the box.
        image = image.crop(box)
        if settings.resize == "torch":
            image = image.convert("L") if settings.grey and isinstance(image, Image.Image) else image
            pixels = _resize_by_torch(np.asarray(image), size)
        else:
            pixels = to_pixels(image.resize(size, Image.Resampling.BICUBIC), settings)
    else:
        pixels = to_pixels(image, settings)
    if settings.flip and mirror:
        pixels = pixels[:, :, ::-1]
    if settings.rotate:
        pixels = np.rot90(pixels, turns, axes=(1, 2))
    return np.ascontiguousarray(pixels)


def centre_image(image: Image.Image | Bands, settings: ImageSettings) -> np.ndarray:
    """Short side resized to `size` (bicubic), centre cropped -> uint8 (c,size,size). For evaluation."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if (width, height) != (settings.size, settings.size):
        box = (left, top, left + side, top + side)
        image = image.resize((settings.size, settings.size), Image.Resampling.BICUBIC, box=box)
    return to_pixels(image, settings)


def normalise_images(images: Tensor, settings: ImageSettings, standardise: str) -> Tensor:
    """uint8 (B,c,H,W) -> float32 (B,channels,H,W), on the images' device.

    "imagenet": (x / 255 - mean) / std per channel. "sample": zero mean, unit variance over each image; the deviation is
    at least one grey level, so that a flat image gives zeros.
    """
    values = images.float() / 255.0
    if standardise == "sample":
        centred = values - values.mean(dim=(1, 2, 3), keepdim=True)
        deviation = centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        values = centred / deviation.clamp_min(1.0 / 255.0)
    values = values.expand(-1, settings.channels, -1, -1)
    if standardise == "imagenet":
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        if settings.channels == 1:
            mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
        values = (values - mean.to(values.device)[:, None, None]) / std.to(values.device)[:, None, None]
    return values


class Images(Modality):
    """Images of one size, as uint8 (c,H,W) until they are on the device; c = 1 for grey settings, else
    stem.channels."""

    name, noun, words = "vision", "images", ("channels", "patches", "pixels", "projected")
    make_stem = staticmethod(make_stem)
    baselines = ("pixels", "sorted_pixels", "power_spectrum")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.settings = ImageSettings.of(config)

    def open(self, path: str, *, labelled: bool = False, option: str = "data.path") -> Source:
        """A folder of images, of class folders, or .tar shards."""

        def opened(kind: Kind) -> Source:
            return self.open_encoded(path, kind, labelled, option, measure=None)

        return open_images(opened) if self.settings.channels in COLOUR else opened(BANDS)

    def load(self, source: Source, index: int) -> tuple[Image.Image | Bands, tuple[str, ...]]:
        """An RGB image, or for models of other than 1 or 3 channels these."""
        settings = self.settings
        arrays = settings.resize == "torch" and settings.wanted == (3,)
        image, converted = read_image(source.read(index), settings.scale, settings.wanted, settings.turn, arrays)
        return image, tuple(note for note in converted if not (note == "grey" and self.settings.grey))

    def train_transform(self, value: Image.Image | Bands, rng: np.random.Generator) -> np.ndarray:
        """Random crop, mirror, turn."""
        return augment_image(value, self.settings, rng)

    def eval_transform(self, value: Image.Image | Bands) -> np.ndarray:
        """Centre crop."""
        return centre_image(value, self.settings)

    def describe_cut(self, value: Image.Image | Bands) -> str | None:
        """What the centre crop leaves out."""
        width, height = value.size
        side = min(width, height)
        return None if width == height else f"cut to the middle {side} x {side} of {width} x {height}"

    def placeholder(self) -> np.ndarray:
        """Zeros."""
        channels = 1 if self.settings.grey else self.settings.channels
        return np.zeros((channels, self.settings.size, self.settings.size), dtype=np.uint8)

    def stack(self, samples: list[Sample], training: bool) -> tuple[Tensor, None]:
        """uint8 (B,c,H,W)."""
        return torch.from_numpy(np.stack([s.value for s in samples])), None

    def measure(self, inputs: Tensor, lengths: Tensor | None) -> tuple[None, None]:
        """The grid of the stem says it all."""
        return None, None

    def prepare(self, inputs: Tensor) -> Tensor:
        """float32 (B,channels,H,W), normalised."""
        return normalise_images(inputs, self.settings, self.config.data.standardise)

    def raw_features(self, name: str, batch: Batch) -> Tensor:
        """pixels: the normalised pixels. sorted_pixels: those of each channel in ascending order, the distribution of
        grey values without any structure. power_spectrum: log power of the 2-D Fourier transform, averaged over
        channels, without phase."""
        values = self._shrink(batch.inputs)
        if name == "pixels":
            return values.flatten(1)
        if name == "sorted_pixels":
            return values.flatten(2).sort(dim=-1).values.flatten(1)
        spectrum = torch.fft.rfft2(values).abs().square().mean(dim=1)
        return (spectrum + 1e-3).log().flatten(1)

    def _shrink(self, images: Tensor) -> Tensor:
        """Normalised images (B,c,h,w) at no more than PIXEL_SIDE pixels a side; one channel for grey data."""
        values = self.prepare(images)
        if self.settings.grey:
            values = values[:, :1]
        if values.shape[-1] > PIXEL_SIDE:
            values = torch.nn.functional.adaptive_avg_pool2d(values, PIXEL_SIDE)
        return values
