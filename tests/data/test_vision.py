"""Decoding, augmentation, masks: functions of (seed, epoch, sample id) and nothing else."""

from __future__ import annotations

import dataclasses
import io
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import encode, make_image

from d2v import recipes
from d2v.config import Config
from d2v.data import vision
from d2v.data.dataset import MaskingCollate, TrainSamples, random_stream
from d2v.data.decoding.colour import find_depth
from d2v.data.index import IMAGES, open_source
from d2v.data.loader import BadSamples
from d2v.data.vision import (
    Images,
    ImageSettings,
    augment_image,
    centre_image,
    decode_image,
    normalise_images,
    parse_range,
    random_crop_box,
    read_image,
)

SETTINGS = ImageSettings(16, 3, False, (0.2, 1.0), True, True)


def config(**data: object) -> Config:
    base = recipes.vision_tiny()
    return dataclasses.replace(base, data=dataclasses.replace(base.data, **data))  # type: ignore[arg-type]


def small(**data: object) -> Config:
    """16 x 16 images with every augmentation."""
    changed = config(crop_scale=(0.2, 1.0), grey=False, **data)
    return dataclasses.replace(changed, stem=dataclasses.replace(changed.stem, image_size=16))


def test_an_orientation_that_is_not_applied_is_said() -> None:
    image, exif = make_image(3, (8, 6)), Image.Exif()
    for orientation, notes in ((1, ()), (6, ("EXIF orientation, not applied",))):
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG", "WEBP"):
            buffer = io.BytesIO()
            image.save(buffer, kind, exif=exif)
            read, said = read_image(buffer.getvalue())
            assert read.size == (8, 6) and said == notes


def test_every_mode_becomes_rgb() -> None:
    rgb = make_image(3, (8, 6))
    cases = {
        "RGB": (encode(rgb), None),
        "L": (encode(rgb.convert("L")), "grey"),
        "1": (encode(rgb.convert("1")), "grey"),
        "P": (encode(rgb.convert("P")), "palette"),
        "RGBA": (encode(rgb.convert("RGBA")), "alpha"),
        "LA": (encode(rgb.convert("LA")), "alpha"),
        "CMYK": (encode(rgb.convert("CMYK"), "JPEG"), "CMYK"),
        "GIF": (encode(rgb.convert("L"), "GIF"), None),
    }
    for name, (data, kind) in cases.items():
        image, converted = decode_image(data)
        assert image.mode == "RGB"
        assert image.size == (8, 6)
        if name != "GIF":
            assert converted == kind, name
    assert np.array_equal(np.asarray(decode_image(cases["RGB"][0])[0]), np.asarray(rgb))


def test_alpha_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 10, 10, 0))
    assert np.asarray(decode_image(encode(clear))[0]).min() == 255


def test_sixteen_bit_values_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image, kind = decode_image(encode(Image.fromarray(values), "PNG"))
    assert kind == "16-bit"
    assert np.array_equal(np.asarray(image)[..., 0], (values.astype(np.uint32) * 255 // 65535).astype(np.uint8))
    with pytest.raises(ValueError, match="no fixed range"):
        decode_image(encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "dtype")


def ramp(low: float, high: float, dtype: type) -> np.ndarray:
    return np.linspace(low, high, 256).astype(dtype).reshape(16, 16)


@pytest.mark.parametrize(
    ("values", "scale", "kind"),
    [
        (ramp(0, 4095, np.uint16), "auto", "16-bit as 12-bit"),
        (ramp(0, 1023, np.uint16), "auto", "16-bit as 10-bit"),
        (ramp(0, 255, np.uint16), "auto", "16-bit as 8-bit"),
        (ramp(0, 2**18 - 1, np.int32), "auto", "32-bit as 18-bit"),
        (ramp(-1000, 3000, np.int32), "auto", "32-bit as minmax"),
        (ramp(-(2**15), 2**15 - 1, np.int32), "dtype", "32-bit as 16-bit"),
        (ramp(0, 1, np.float32), "auto", "floating point as 0 to 1"),
        (ramp(-20, 7, np.float32), "auto", "floating point as minmax"),
        (ramp(500, 900, np.uint16), "minmax", "16-bit as minmax"),
        (ramp(500, 900, np.uint16), (500.0, 900.0), "16-bit as 500 to 900"),
    ],
)
def test_deep_images_keep_their_range(values: np.ndarray, scale: Any, kind: str) -> None:
    image, notes = read_image(encode(Image.fromarray(values), "TIFF"), scale)
    grey = np.asarray(image)[..., 0].ravel()
    assert notes == (f"{kind} (--data.image-range)",)
    assert (grey[0], grey[-1]) == (0, 255)
    assert len(np.unique(grey)) >= 200


def test_ranges() -> None:
    values = ramp(0, 65535, np.uint16)
    values[0, 0], values[-1, -1] = 0, 4095
    few = np.asarray(read_image(encode(Image.fromarray(np.minimum(values, 4095))), "dtype")[0])
    assert few.max() == 15
    data = encode(Image.fromarray(values))
    assert np.array_equal(np.asarray(read_image(data, "dtype")[0]), np.asarray(read_image(data)[0]))
    robust = np.asarray(read_image(data, "percentile")[0])[..., 0]
    assert (robust == 0).sum() >= 2 and (robust == 255).sum() >= 2
    nan = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(ValueError, match="not finite"):
        read_image(encode(Image.fromarray(nan), "TIFF"))
    assert parse_range(("3", "9.5")) == (3.0, 9.5)
    for bad in (("wide",), ("1",), ("2", "1"), ("0", "nan"), (), ("1", "2", "3")):
        with pytest.raises(ValueError, match=r"data\.image_range: expected auto, dtype"):
            parse_range(bad)


def tiff(values: np.ndarray, meaning: int, sign: int = 1, order: int = 2) -> bytes:
    """A TIFF of grey values (H, W), or of colour by plane (3, H, W), not compressed."""
    planes = values.reshape(-1, *values.shape[-2:])
    count, height, width = planes.shape
    tags = {
        256: [width], 257: [height], 258: [8 * values.itemsize] * count, 259: [1], 262: [meaning], 273: [0] * count,
        277: [count], 278: [height], 279: [planes[0].nbytes] * count, 284: [order], 339: [sign] * count,
    }  # fmt: skip
    more = 8 + 2 + 12 * len(tags) + 4
    tags[273] = [more + 12 * len(tags) + i * planes[0].nbytes for i in range(count)]
    fields, lists = b"", b""
    for tag, numbers in tags.items():
        content = struct.pack(f"<{len(numbers)}L", *numbers)
        place = content if len(numbers) == 1 else struct.pack("<L", more + len(lists))
        fields += struct.pack("<HHL", tag, 4, len(numbers)) + place
        lists += content.ljust(12, b"\0") if len(numbers) > 1 else b""
    lists = lists.ljust(12 * len(tags), b"\0")
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + fields + bytes(4) + lists + planes.tobytes()


@pytest.mark.parametrize(
    ("kind", "sign", "order"), [(np.uint8, 1, 1), (np.uint8, 1, 2), (np.uint16, 1, 1), (np.float32, 3, 1)]
)
def test_zero_is_white_where_a_tiff_says_so(kind: type, sign: int, order: int) -> None:
    values = np.array([[0.0, 0.25, 1.0]] * 2)
    stored = values.astype(kind) if sign == 3 else np.rint(values * np.iinfo(kind).max).astype(kind)
    black, white = (np.asarray(read_image(tiff(stored, meaning, sign, order))[0]) for meaning in (1, 0))
    assert black[0, :, 0].tolist() in ([0, 64, 255], [0, 63, 255])
    assert np.array_equal(white, 255 - black)
    assert ("0 is white" in str(read_image(tiff(stored, 0, sign, order))[1])) == (kind is not np.uint8)


def test_tiffs_that_pillow_reads_wrongly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    colour = np.arange(3 * 4 * 5, dtype=np.uint16).reshape(3, 4, 5) * 1000
    with pytest.raises(ValueError, match="16-bit colour in separate planes: expected it by pixel"):
        read_image(tiff(colour, 2))
    plain = (colour >> 8).astype(np.uint8)
    assert np.array_equal(np.asarray(read_image(tiff(plain, 2))[0]), plain.transpose(1, 2, 0))
    with pytest.raises(ValueError, match="signed 8-bit values"):
        read_image(tiff(np.array([[-1, 0, 1]], np.int8), 1, 2))


def png(depth: int, colour: int, row: bytes, key: bytes) -> bytes:
    """A PNG of one row of two pixels with a transparent colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0)) + chunk(b"tRNS", key)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "second"),
    [
        (png(8, 0, b"\x05\x06", b"\0\x05"), 6),
        (png(4, 0, b"\x34", b"\0\x03"), 4 * 17),
        (png(2, 0, b"\x60", b"\0\x01"), 2 * 85),
        (png(16, 0, b"\x03\xe8\x08\0", b"\x03\xe8"), 128),
        (png(8, 2, bytes(range(6)), bytes([0, 0, 0, 1, 0, 2])), 3),
    ],
)
def test_transparent_colours_are_laid_over_white(data: bytes, second: int) -> None:
    image, _ = read_image(data)
    assert np.asarray(image)[0, 0].tolist() == [255] * 3
    assert np.asarray(image)[0, 1, 0] == second


# ---- 16-bit colour --------------------------------------------------------------------------------------------------

DEEP = np.random.default_rng(0).integers(0, 1 << 16, (5, 7, 4)).astype(np.uint16)


def deep_png(values: np.ndarray, key: bytes | None = None) -> bytes:
    """(H,W,c) uint16 as PNG; c = 2 and 4: the last is alpha."""
    height, width, channels = values.shape
    rows = [b"\0" + row.astype(">u2").tobytes() for row in values]
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", head), *([(b"tRNS", key)] if key else []), (b"IDAT", zlib.compress(b"".join(rows)))]
    parts = [
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in [*chunks, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep_tiff(values: np.ndarray, **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
    file = io.BytesIO()
    if options.get("planarconfig") == "separate":
        values = np.ascontiguousarray(values.transpose(2, 0, 1))
    tifffile.imwrite(file, values, photometric="rgb", **options)
    return file.getvalue()


def expected_colour(values: np.ndarray) -> np.ndarray:
    """RGB over white of values with the whole range of 16 bits."""
    colours = values[:, :, :3].astype(np.uint32) if values.shape[2] > 2 else values[:, :, :1].repeat(3, 2)
    colours = (colours.astype(np.uint32) * 255 // 65535).astype(np.float64)
    if values.shape[2] % 2:
        return colours
    alpha = values[:, :, -1:] / 65535.0
    return colours * alpha + 255.0 * (1.0 - alpha)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_png_keeps_its_range(channels: int) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    values = DEEP[:, :, :channels].copy()
    values[0, 0] = 65535
    image, notes = read_image(deep_png(values))
    assert notes == ("16-bit colour",)
    assert np.abs(np.asarray(image) - expected_colour(values)).max() <= (0 if channels == 3 else 2)
    # 12 bits in the file: all of 0 to 255, where the upper 8 bits would leave 16 grey levels.
    colours = channels - (channels % 2 == 0)
    values[:, :, :colours] >>= 4
    values[:, :, colours:] = 65535
    image, notes = read_image(deep_png(values))
    assert notes == ("16-bit colour as 12-bit (--data.image-range)",)
    assert np.array_equal(np.asarray(image)[:, :, 0], np.rint(values[:, :, 0] * (255.0 / 4095.0)))
    image, _ = read_image(deep_png(values), (0.0, 1000.0))
    assert np.array_equal(np.asarray(image)[:, :, 0], np.rint(values[:, :, 0].clip(0, 1000) * 0.255))
    with pytest.raises(ValueError, match="truncated"):
        read_image(deep_png(values)[:-40])


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}, {"planarconfig": "separate"}])
def test_16_bit_tiff_keeps_its_range(options: dict[str, Any]) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    values = DEEP[:, :, :3].copy()
    values[0, 0] = 65535
    image, notes = read_image(deep_tiff(values, **options))
    assert notes == ("16-bit colour",)
    assert np.array_equal(np.asarray(image), expected_colour(values))


@pytest.mark.parametrize("largest", [65535, 4095, 1000])
def test_deep_pnm_keeps_its_range(largest: int) -> None:
    values = (DEEP[:, :, :3].astype(np.uint32) % (largest + 1)).astype(np.uint16)
    values[0, 0] = largest
    image, _ = read_image(b"P6\n7 5\n%d\n" % largest + values.astype(">u2").tobytes())
    full = 2 ** largest.bit_length() - 1
    assert np.abs(np.asarray(image) - values * (255.0 / full)).max() < 1.0
    plain = b"P3\n1 1\n%d\n%d 0 0\n" % (largest, largest)
    assert read_image(plain)[1] == (f"{largest.bit_length()}-bit colour to 8 bits",)


def test_what_loses_range_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    hint = r" \(pip install 'd2v\[av\]' keeps their range\)"
    for data in (deep_png(DEEP[:, :, :3]), deep_png(DEEP), deep_tiff(DEEP[:, :, :3])):
        image, (note,) = read_image(data)
        assert re.fullmatch(rf"16-bit colour to 8 bits({hint})?", note)
        assert np.asarray(image).shape == (5, 7, 3)
    # Pillow would take every other byte for a value.
    with pytest.raises(ValueError, match="16-bit colour in separate planes"):
        read_image(deep_tiff(DEEP[:, :, :3], planarconfig="separate"))


def test_depth_of_other_formats() -> None:
    def depth(data: bytes) -> int:
        return find_depth(Image.open(io.BytesIO(data)), data)

    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000"):
        file = io.BytesIO()
        Image.fromarray((DEEP[:, :, :3] >> 8).astype(np.uint8)).resize((32, 32)).save(file, kind)
        data = file.getvalue()
        assert depth(data) == 8, kind
        if kind == "AVIF":
            place = data.index(b"av1C") + 6
            for flags, bits in ((0x40, 10), (0x60, 12)):
                changed = data[:place] + bytes([data[place] | flags]) + data[place + 1 :]
                assert find_depth(Image.open(io.BytesIO(data)), changed) == bits
        if kind == "JPEG2000":
            place = data.index(b"\xff\x4f\xff\x51") + 42
            assert find_depth(Image.open(io.BytesIO(data)), data[:place] + b"\x0f" + data[place + 1 :]) == 16


@pytest.mark.parametrize("installed", [True, False])
def test_a_transparent_deep_colour_is_laid_over_white(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed:
        pytest.importorskip("av", reason="PyAV is not installed")
    else:
        monkeypatch.setitem(sys.modules, "av", None)
    values = np.array([[[1, 515, 1029], [60_000, 30_000, 6_000]]], np.uint16)
    image, _ = read_image(deep_png(values, values[0, 0].astype(">u2").tobytes()))
    assert np.asarray(image)[0, 0].tolist() == [255] * 3
    assert np.abs(np.asarray(image)[0, 1] - values[0, 1] / 257.0).max() <= 1.0


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG"])
def test_pages_behind_the_first_are_counted(kind: str, tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)) for i in range(5)]
    for name in "ab":
        pages[0].save(tmp_path / f"{name}.{kind.lower()}", save_all=True, append_images=pages[1:])
    images = Images(small())
    source = images.open(str(tmp_path))
    account = BadSamples(source, 0.0, None)
    for index in range(2):
        sample = TrainSamples(source, images, 0)[index, 0]
        assert sample.value.max() <= 2
        account.add(sample.notes)
    assert account.converted["pages or frames behind the first, not read"] == 8


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 100 000 x 100 000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_damaged_bytes_give_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    good = encode(make_image(0, (64, 64)), "JPEG")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    cases = (b"", b"not an image", good[: len(good) // 2], encode(make_image(0))[:60], bomb(), script)
    for data in cases:
        with pytest.raises(ValueError, match=r"\w") as error:
            decode_image(data)
        assert "\n" not in str(error.value)
        assert "0x" not in str(error.value)
    # Just above the limit Pillow only warns; here that is an error too.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(ValueError, match="exceeds limit"):
        decode_image(good)


def test_crop_boxes_have_the_published_distribution() -> None:
    areas, aspects = [], []
    for i in range(2000):
        left, top, right, bottom = random_crop_box(random_stream(0, 0, i, 0), 200, 150, (0.2, 1.0))
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 150
        areas.append((right - left) * (bottom - top) / 30000)
        aspects.append((right - left) / (bottom - top))
    assert 0.19 < min(areas) < 0.22
    assert 0.45 < np.mean(areas) < 0.6
    assert 0.74 < min(aspects) < 0.78
    assert 1.28 < max(aspects) < 1.35
    assert random_crop_box(random_stream(0, 0, 0, 0), 400, 10, (1.0, 1.0)) == (193, 0, 206, 10)


def test_augmentation_options() -> None:
    image = make_image(5, (16, 16))
    plain = np.asarray(image).transpose(2, 0, 1)
    still = ImageSettings(16, 3, False, (1.0, 1.0), False, False)
    for i in range(4):
        assert np.array_equal(augment_image(image, still, random_stream(0, 0, i, 0)), plain)
    flips, turns = set(), set()
    for i in range(40):
        flip = augment_image(image, still._replace(flip=True), random_stream(0, 0, i, 0))
        flips.add((np.array_equal(flip, plain), np.array_equal(flip, plain[:, :, ::-1])))
        turn = augment_image(image, still._replace(rotate=True), random_stream(0, 0, i, 0))
        turns.update(k for k in range(4) if np.array_equal(turn, np.rot90(plain, k, (1, 2))))
    assert flips == {(True, False), (False, True)}
    assert turns == {0, 1, 2, 3}
    assert augment_image(image, still._replace(grey=True), random_stream(0, 0, 0, 0)).shape == (1, 16, 16)
    assert centre_image(make_image(1, (40, 17)), still).shape == (3, 16, 16)


def test_normalisation() -> None:
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    images[1] = 7
    values = normalise_images(images, SETTINGS, "sample")
    assert values[1].abs().max() == 0
    assert values[0].mean().abs() < 1e-6
    assert abs(float(values[0].square().mean()) - 1) < 1e-5
    stock = normalise_images(images, SETTINGS, "imagenet")
    expected = (images[0, 1] / 255.0 - vision.IMAGENET_MEAN[1]) / vision.IMAGENET_STD[1]
    torch.testing.assert_close(stock[0, 1], expected)
    grey = normalise_images(images[:, :1], SETTINGS._replace(grey=True), "sample")
    assert grey.shape == (3, 3, 8, 8)
    assert torch.equal(grey[:, 0], grey[:, 2])


def test_a_sample_depends_on_seed_epoch_and_id_only(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    first, second = (TrainSamples(source, Images(small()), 1) for _ in range(2))
    draws = {(i, e): first[(i, e)].value for i in range(4) for e in range(3)}
    for key in reversed(list(draws)):
        assert np.array_equal(second[key].value, draws[key])
    assert not np.array_equal(draws[(0, 0)], draws[(0, 1)])
    assert not np.array_equal(draws[(0, 0)], TrainSamples(source, Images(small()), 2)[(0, 0)].value)


def test_unreadable_samples_are_replaced_in_their_slot(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    Path(source.describe(3)).write_bytes(b"broken")
    data = TrainSamples(source, Images(small()), 0)
    sample = data[(3, 0)]
    assert sample.sample_id == 3
    assert sample.value.shape == (3, 16, 16)
    assert [(n.sample_id, n.kind) for n in sample.notes] == [(3, "bad")]
    assert np.array_equal(sample.value, data[(3, 0)].value)
    for i in range(len(source)):
        Path(source.describe(i)).write_bytes(b"broken")
    assert data[(0, 0)].notes[-1].kind == "fatal"


def test_masks_follow_the_samples_across_an_epoch_end(image_folder: Path) -> None:
    images = Images(config())
    data = TrainSamples(open_source(str(image_folder)), images, 0)
    collate = MaskingCollate(config(), images)
    copies = config().mask.copies
    slots = [(2, 0), (5, 0), (1, 1), (2, 1), (4, 1)]
    together = collate([data[s] for s in slots])
    assert together.masks is not None
    assert together.noise_keys is not None
    assert together.inputs.shape == (5, 1, 32, 32)
    for i, slot in enumerate(slots):
        alone = collate([data[slot]])
        assert alone.masks is not None
        rows = slice(copies * i, copies * i + copies)
        assert torch.equal(alone.masks.mask, together.masks.mask[rows])
        assert torch.equal(alone.noise_keys, together.noise_keys[rows])  # type: ignore[arg-type]
    assert torch.equal(together.masks.rows, together.masks.mask.flatten().nonzero()[:, 0])
    first, again = (together.masks.mask[copies * i : copies * i + copies] for i in (0, 3))
    assert not torch.equal(first, again), "sample 2 has other masks in the next epoch"


def test_settings_that_images_do_not_have() -> None:
    base = config()
    for data, message in (
        ({}, r"data\.grey: expected False with stem\.channels 4 \(--data\.no-grey\), got True"),
        (
            {"grey": False, "standardise": "imagenet"},
            r"data\.standardise: expected sample with stem\.channels 4 .*got im",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ImageSettings.of(base.change(stem={"channels": 4}, data=data))
    with pytest.raises(ValueError, match=r"data\.crop_scale: expected"):
        ImageSettings.of(config(crop_scale=(0.0, 1.0)))


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("L", (4, 4), v) for v in (10, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode_image(buffer.getvalue())[0]).max() == 10


def test_every_ending_that_counts_is_decoded(tmp_path: Path) -> None:
    """Endings follow the installed Pillow."""
    suffixes = {s: Image.registered_extensions().get(s, "JPEG") for s in sorted(IMAGES.suffixes)}
    for suffix, kind in suffixes.items():
        data = encode(make_image(1, (16, 16)), kind if kind != "MPO" else "JPEG")
        (tmp_path / f"image{suffix}").write_bytes(data)
    images = Images(small())
    source = images.open(str(tmp_path))
    assert len(source) == len(suffixes)
    assert {".jfif", ".jpe", ".pnm"} <= set(suffixes)
    assert source.left_out == {}
    for index in range(len(source)):
        assert images.load(source, index)[0].size == (16, 16)
