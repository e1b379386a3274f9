"""Images: decoding, random crops, and batches with their masks.

Everything random about a sample - crop, mirror, turn, masks, decoder noise - is a function of (seed, epoch, sample id),
so a run does not depend on the number of loader workers and can be resumed exactly.

A sample that cannot be decoded is replaced, within its slot, by another one chosen by the same rule; shapes and order
stay as they were. The slot keeps its own crop, masks and noise.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2v.config import Config
from d2v.data.sources import Source
from d2v.data2vec import make_mask_sampler
from d2v_kernels import Masks, masks_from_bool

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Decoders that may run. Others are left out on purpose: EPS, for one, starts an external program."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ATTEMPTS = 64
"""Replacements tried for one slot before the data counts as unusable."""

STREAM_CROP, STREAM_REPLACE, STREAM_ORDER = 0, 1, 2
_U64 = 0xFFFFFFFFFFFFFFFF


def random_stream(seed: int, epoch: int, sample_id: int, purpose: int) -> np.random.Generator:
    """Philox generator keyed by (seed, epoch), with sample id and purpose in the counter: independent streams."""
    key = np.array([seed & _U64, epoch & _U64], dtype=np.uint64)
    counter = np.array([0, 0, purpose, sample_id & _U64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class Note(NamedTuple):
    """What the loader has to say about a sample. `kind`: "bad", "converted" or "fatal"."""

    sample_id: int
    epoch: int
    kind: str
    text: str


def decode_image(data: bytes) -> tuple[Image.Image, str | None]:
    """Encoded bytes -> (RGB image of the first frame, what was converted or None).

    Alpha is laid over white, 16-bit values are scaled to 8 bits, CMYK, palette and grey become RGB. EXIF orientation is
    not applied, as in the published pipelines. Raises `ValueError` with the reason for whatever cannot be decoded;
    images above Pillow's pixel limit are refused before their pixels are read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
            return _to_rgb(image)
        except MemoryError:
            raise
        except Exception as error:  # a decoder fed with damaged bytes may raise anything
            text = str(error) or type(error).__name__
            raise ValueError(text.replace("<_io.BytesIO object at ", "<").split("<", 1)[0].strip() or text) from None


def _to_rgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image, None
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB"), "palette" if mode == "P" else "alpha"
    if mode == "F":
        raise ValueError("floating-point images have no fixed range")
    if mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integer values outside 0 to 65535")
        return Image.fromarray((values.astype(np.uint32) * 255 // 65535).astype(np.uint8)).convert("RGB"), "16-bit"
    kinds = {"L": "grey", "1": "grey", "P": "palette", "CMYK": "CMYK"}
    return image.convert("RGB"), kinds.get(mode, mode)


def random_crop_box(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float]
) -> tuple[float, float, float, float]:
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

    @staticmethod
    def of(config: Config) -> ImageSettings:
        """Settings of `config`; `ValueError` for a channel count that images do not have."""
        if config.stem.channels not in (1, 3):
            raise ValueError(f"stem.channels: expected 1 or 3 for images, got {config.stem.channels}")
        low, high = config.data.crop_scale
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"data.crop_scale: expected 0 < low <= high <= 1, got {config.data.crop_scale}")
        stem, data = config.stem, config.data
        grey = data.grey or stem.channels == 1
        return ImageSettings(stem.image_size, stem.channels, grey, data.crop_scale, data.flip, data.rotate)


def to_pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """Image -> uint8 (c,H,W), c = 1 for grey settings, else 3."""
    values = np.asarray(image.convert("L") if settings.grey else image)
    return np.ascontiguousarray(values[None] if settings.grey else values.transpose(2, 0, 1))


def augment_image(image: Image.Image, settings: ImageSettings, rng: np.random.Generator) -> np.ndarray:
    """Random resized crop (bicubic), mirror, turn -> uint8 (c,size,size). Draws are made whether used or not."""
    box = random_crop_box(rng, *image.size, settings.crop_scale)
    mirror, turns = rng.random() < 0.5, int(rng.integers(4))
    size = (settings.size, settings.size)
    if box != (0, 0, *size) or image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC, box=box)
    pixels = to_pixels(image, settings)
    if settings.flip and mirror:
        pixels = pixels[:, :, ::-1]
    if settings.rotate:
        pixels = np.rot90(pixels, turns, axes=(1, 2))
    return np.ascontiguousarray(pixels)


def centre_image(image: Image.Image, settings: ImageSettings) -> np.ndarray:
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


class Sample(NamedTuple):
    """One decoded and cropped image (uint8 (c,H,W)) and what happened on the way."""

    sample_id: int
    epoch: int
    pixels: np.ndarray
    notes: tuple[Note, ...]


class TrainImages(torch.utils.data.Dataset[Sample]):
    """Map from (sample id, epoch) to an augmented sample."""

    def __init__(self, source: Source, settings: ImageSettings, seed: int) -> None:
        self.source, self.settings, self.seed = source, settings, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Sample:
        sample_id, epoch = index
        notes: list[Note] = []
        picks = random_stream(self.seed, epoch, sample_id, STREAM_REPLACE)
        candidate = sample_id
        for _ in range(ATTEMPTS):
            try:
                image, converted = decode_image(self.source.read(candidate))
            except (ValueError, OSError) as error:
                notes.append(Note(candidate, epoch, "bad", _reason(error)))
                candidate = int(picks.integers(len(self.source)))
                continue
            if converted is not None and not (converted == "grey" and self.settings.grey):
                notes.append(Note(candidate, epoch, "converted", converted))
            rng = random_stream(self.seed, epoch, sample_id, STREAM_CROP)
            return Sample(sample_id, epoch, augment_image(image, self.settings, rng), tuple(notes))
        notes.append(Note(sample_id, epoch, "fatal", f"{ATTEMPTS} samples in a row cannot be decoded"))
        blank = np.zeros((1 if self.settings.grey else 3, self.settings.size, self.settings.size), dtype=np.uint8)
        return Sample(sample_id, epoch, blank, tuple(notes))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


class EvaluationImages(torch.utils.data.Dataset[Sample]):
    """Map from a sample id to its centre crop; an unreadable image gives zeros and a "bad" note."""

    def __init__(self, source: Source, settings: ImageSettings) -> None:
        self.source, self.settings = source, settings

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            image, _ = decode_image(self.source.read(index))
            return Sample(index, 0, centre_image(image, self.settings), ())
        except (ValueError, OSError) as error:
            size = self.settings.size
            blank = np.zeros((1 if self.settings.grey else 3, size, size), dtype=np.uint8)
            return Sample(index, 0, blank, (Note(index, 0, "bad", _reason(error)),))


@dataclass(frozen=True)
class Batch:
    """One micro-batch. images uint8 (B,c,H,W); masks of B*M rows; noise_keys int64 (B*M,); notes of its samples."""

    images: Tensor
    masks: Masks | None
    noise_keys: Tensor | None
    notes: tuple[Note, ...]

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """Copies for asynchronous transfer; called by the loader."""
        masks = None if self.masks is None else self.masks.pin_memory()
        keys = None if self.noise_keys is None else self.noise_keys.pin_memory()
        return replace(self, images=self.images.pin_memory(), masks=masks, noise_keys=keys)


def stack_pixels(samples: list[Sample]) -> Tensor:
    """Samples -> uint8 (B,c,H,W)."""
    return torch.from_numpy(np.stack([s.pixels for s in samples]))


def collate_evaluation(samples: list[Sample]) -> Batch:
    """Samples -> batch without masks."""
    return Batch(stack_pixels(samples), None, None, tuple(n for s in samples for n in s.notes))


class MaskingCollate:
    """Samples -> batch with masks and noise keys. Runs in the loader workers, so masks cost the GPU nothing."""

    def __init__(self, config: Config) -> None:
        self.copies = config.mask.copies
        self.sampler = make_mask_sampler(config)

    def __call__(self, samples: list[Sample]) -> Batch:
        masks: list[Masks] = []
        keys: list[Tensor] = []
        start = 0
        while start < len(samples):  # a batch may straddle the end of an epoch
            epoch = samples[start].epoch
            stop = next((i for i in range(start, len(samples)) if samples[i].epoch != epoch), len(samples))
            ids = [s.sample_id for s in samples[start:stop]]
            masks.append(self.sampler.draw(ids, epoch, copies=self.copies))
            keys.append(self.sampler.noise_keys(ids, epoch, copies=self.copies))
            start = stop
        joined = masks[0] if len(masks) == 1 else masks_from_bool(torch.cat([m.mask for m in masks]))
        notes = tuple(n for s in samples for n in s.notes)
        return Batch(stack_pixels(samples), joined, torch.cat(keys), notes)
