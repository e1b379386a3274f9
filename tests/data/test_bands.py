"""Images of any number of channels: arrays, TIFF of bands and pages, and what Pillow reads without conversion."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import encode

from d2v import recipes
from d2v.cli import main
from d2v.config import Config
from d2v.data import vision
from d2v.data.dataset import EvaluationSamples, TrainSamples
from d2v.data.decoding.bands import Bands, find_axis
from d2v.data.vision import Images, augment_image, centre_image, check_image, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 10, 5)).astype(np.uint8)
"""(H,W,c)."""


def config(channels: int = 5, **data: Any) -> Config:
    data = {"grey": False, "standardise": "sample", **data}
    return recipes.vision_tiny().change(stem={"channels": channels, "image_size": 8}, data=data)


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options: Any) -> bytes:
    tifffile = pytest.importorskip("tifffile", reason="reads TIFF of many bands")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def assert_reads(data: bytes, expected: np.ndarray, scale: vision.Range = "auto") -> tuple[str, ...]:
    image, notes = read_image(data, scale, (expected.shape[2],))
    assert isinstance(image, Bands) and np.array_equal(np.asarray(image), expected)
    return notes


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_arrays_have_channels_last_or_first(channels: int) -> None:
    values = PIXELS[:, :, :channels]
    assert assert_reads(npy(values), values) == ()
    assert assert_reads(npy(values.transpose(2, 0, 1)), values) == ()
    square = PIXELS[:channels, :channels, :channels]  # both axes fit: channels are the last
    assert_reads(npy(square), square)


def test_axis_of_the_channels() -> None:
    assert find_axis((7, 8), (1,)) is None and find_axis((7, 8), ()) is None
    assert find_axis((13, 9, 9), (13,)) == 0 and find_axis((9, 9, 4), ()) == 2 and find_axis((4, 9, 9), ()) == 0
    for shape, message in (
        ((8, 8), r"^expected 5 channels \(stem\.channels\), got 1$"),
        (
            (7, 8, 9),
            r"^expected \(height, width\) or 5 channels .* in the last or first of three axes, got .*\(7, 8, 9\)",
        ),
        ((2, 2, 8, 5), r"got an array \(2, 2, 8, 5\)$"),
    ):
        with pytest.raises(ValueError, match=message):
            find_axis(shape, (5,))


@pytest.mark.parametrize(
    "options",
    [{"photometric": "minisblack", "planarconfig": "contig"}, {"photometric": "minisblack", "compression": "zlib"}],
    ids=["bands", "pages"],
)
@pytest.mark.parametrize("pages", [False, True])
def test_tiff_of_bands_and_pages(options: dict[str, Any], pages: bool) -> None:
    values = PIXELS.transpose(2, 0, 1) if "compression" in options else PIXELS
    if pages:
        options = {**options, "bigtiff": True}
    assert assert_reads(tiff(np.ascontiguousarray(values), **options), PIXELS) == ()


def test_deep_channels_follow_the_range() -> None:
    deep = PIXELS.astype(np.uint16) * 4
    deep[0, 0] = 1023
    notes = assert_reads(npy(deep), np.rint(deep / 1023 * 255).astype(np.uint8))
    assert notes == ("16-bit as 10-bit (--data.image-range)",)
    real = (PIXELS / 255.0).astype(np.float32)
    assert assert_reads(tiff(real, photometric="minisblack", planarconfig="contig"), PIXELS)[0].startswith("floating")
    half = np.rint((PIXELS / 255.0).clip(0.0, 0.5) * 510).astype(np.uint8)
    assert np.abs(np.asarray(read_image(npy(real), (0.0, 0.5), (5,))[0]).astype(int) - half).max() <= 1
    apart = real * np.array([1, 10, 100, 1000, 1e4], dtype=np.float32)
    image, notes = read_image(npy(apart), "minmax", (5,))
    assert np.asarray(image).min(axis=(0, 1)).tolist() == [0] * 5
    assert np.asarray(image).max(axis=(0, 1)).tolist() == [255] * 5
    assert notes == ("floating point as minmax (--data.image-range), each channel by itself",)
    apart[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        read_image(npy(apart), "auto", (5,))


def test_files_of_pillow_keep_their_channels() -> None:
    rgba = Image.fromarray(PIXELS[:, :, :4])
    assert assert_reads(encode(rgba, "PNG"), PIXELS[:, :, :4]) == ()
    grey = Image.fromarray(np.ascontiguousarray(PIXELS[:, :, :2]))
    assert assert_reads(encode(grey, "PNG"), PIXELS[:, :, :2]) == ()
    for image, found in ((rgba.convert("RGB"), 3), (rgba.convert("L"), 1), (rgba.convert("P"), 1), (grey, 2)):
        with pytest.raises(ValueError, match=rf"^expected 4 channels \(stem\.channels\), got {found}$"):
            read_image(encode(image, "PNG"), "auto", (4,))


def test_arrays_of_grey_and_colour_are_as_pictures() -> None:
    rgb, grey = PIXELS[:, :, :3], PIXELS[:, :, 0]
    for data in (npy(rgb), npy(rgb.transpose(2, 0, 1)), encode(Image.fromarray(rgb), "PNG")):
        image, notes = read_image(data)
        assert isinstance(image, Image.Image) and np.array_equal(np.asarray(image), rgb) and notes == ()
    for data in (npy(grey), npy(grey[None]), encode(Image.fromarray(grey), "PNG")):
        image, notes = read_image(data, wanted=(1,))
        assert np.array_equal(np.asarray(image), grey[:, :, None].repeat(3, axis=2)) and notes == ("grey",)
    for values, wanted, message in ((grey, (3,), "expected 3 channels"), (rgb, (1,), r"or 1 channels .*\(12, 10, 3\)")):
        with pytest.raises(ValueError, match=message):
            read_image(npy(values), wanted=wanted)


def test_tiff_that_pillow_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    many = tiff(PIXELS, photometric="minisblack", planarconfig="contig")
    with pytest.raises(ValueError, match=r"^expected 3 channels \(stem\.channels\), got 5$"):
        read_image(many)
    real = tiff((PIXELS[:, :, :3] / 255.0).astype(np.float32), photometric="rgb")
    image, notes = read_image(real)
    assert np.array_equal(np.asarray(image), PIXELS[:, :, :3]) and notes == (
        "floating point as 0 to 1 (--data.image-range)",
    )
    with pytest.raises(ValueError, match=r"^cannot identify image file"):
        read_image(many[:40])
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"expected tifffile .*d2v\[tiff\]"):
        read_image(many, wanted=(5,))


def test_a_large_tiff_is_refused_before_its_pixels_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = tiff(PIXELS, photometric="minisblack", planarconfig="contig")
    with pytest.raises(ValueError, match=r"expected at most 100 pixels, got an image \(12, 10, 5\)"):
        read_image(data, wanted=(5,))
    with pytest.raises(ValueError, match=r"expected at most 100 pixels"):
        read_image(npy(PIXELS), wanted=(5,))


def test_what_is_cut_off_is_bad() -> None:
    """Or, where only the list of the pages is cut behind all pixels, read as it is: never other values."""
    pages = np.ascontiguousarray(PIXELS.transpose(2, 0, 1))
    whole = [npy(PIXELS), tiff(pages, photometric="minisblack"), tiff(pages, photometric="minisblack", metadata=None)]
    whole += [tiff(PIXELS, photometric="minisblack", planarconfig="contig", rowsperstrip=4, compression="zlib")]
    for data in whole:
        assert_reads(data, PIXELS)
        with pytest.raises(ValueError, match=r"\w"):
            read_image(data[: int(0.3 * len(data))], wanted=(5,))
        for share in (0.5, 0.7, 0.9, 0.98):
            with contextlib.suppress(ValueError):
                assert_reads(data[: int(share * len(data))], PIXELS)


def test_nothing_is_unpickled() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_image(buffer.getvalue())
    with pytest.raises(ValueError, match="expected real numbers, got complex64"):
        read_image(npy(PIXELS.astype(np.complex64)), wanted=(5,))


def test_crops_are_those_of_each_channel() -> None:
    """Channels of a colour image as an array of five: the first three are as in colour, bit for bit."""
    settings, colour = (vision.ImageSettings.of(config(n, rotate=True, crop_scale=(0.2, 1.0))) for n in (5, 3))
    five, three = Bands(PIXELS), Image.fromarray(PIXELS[:, :, :3])
    for seed in range(8):
        found, expected = (
            augment_image(image, s, np.random.default_rng(seed)) for image, s in ((five, settings), (three, colour))
        )
        assert found.shape == (5, 8, 8) and np.array_equal(found[:3], expected)
    assert np.array_equal(centre_image(five, settings)[:3], centre_image(three, colour))
    prepared = vision.normalise_images(torch.from_numpy(centre_image(five, settings))[None], settings, "sample")
    assert prepared.shape == (1, 5, 8, 8) and abs(float(prepared.mean())) < 1e-5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_where_asked_for(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    colour = encode(Image.fromarray(PIXELS[:, :, :3]), "PNG", exif=exif)
    upright, notes = read_image(colour, turn=True)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(colour))))
    assert np.array_equal(np.asarray(upright), expected)
    assert notes == (("EXIF orientation, applied",) if orientation > 1 else ())
    assert np.array_equal(np.asarray(read_image(colour)[0]), PIXELS[:, :, :3])
    bands = tiff(PIXELS, photometric="minisblack", planarconfig="contig", extratags=[(274, 3, 1, orientation, True)])
    assert np.array_equal(np.asarray(read_image(bands, "auto", (5,), True)[0])[:, :, :3], expected)
    stored, notes = read_image(bands, "auto", (5,))
    assert np.array_equal(np.asarray(stored), PIXELS)
    assert notes == (("EXIF orientation, not applied",) if orientation > 1 else ())


@pytest.mark.parametrize("orientation", [1, 2, 3, 4])
def test_orientation_of_16_bit_tiff(orientation: int) -> None:
    """PyAV does not turn it, where Pillow does."""
    pytest.importorskip("av", reason="reads 16-bit colour")
    values = PIXELS[:, :, :3].astype(np.uint16) * 257
    stored = tiff(values, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    image, notes = read_image(stored)
    assert np.array_equal(np.asarray(image), PIXELS[:, :, :3])
    assert notes == ("16-bit colour", *(["EXIF orientation, not applied"] * (orientation > 1)))
    upright = {1: slice(None), 2: np.s_[:, ::-1], 3: np.s_[::-1, ::-1], 4: np.s_[::-1]}[orientation]
    assert np.array_equal(np.asarray(read_image(stored, turn=True)[0]), PIXELS[:, :, :3][upright])


def test_colour_of_more_channels_is_said() -> None:
    """Pillow leaves them out."""
    data = tiff(PIXELS, photometric="rgb", planarconfig="contig", extrasamples=("unspecified",) * 2)
    image, notes = read_image(data)
    assert np.array_equal(np.asarray(image), PIXELS[:, :, :3]) and notes == ("channels behind the third, not read",)
    assert assert_reads(data, PIXELS) == ()


def write(folder: Path, count: int = 12) -> Path:
    """Arrays of five channels in class folders: the classes differ in the fifth."""
    rng = np.random.default_rng(1)
    for i in range(count):
        place = folder / f"c{i % 2}" / f"{i}.npy"
        place.parent.mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 100, (12, 12, 5)).astype(np.uint8)
        values[:, :, 4] += np.uint8(100 * (i % 2))
        np.save(place, values)
    return folder


def test_what_counts_as_an_image(tmp_path: Path) -> None:
    folder = write(tmp_path / "five")
    source = Images(config()).open(str(folder), labelled=True)
    assert len(source) == 12 and source.classes == ["c0", "c1"]
    assert len(Images(config(3)).open(str(folder))) == 12, "nothing else is there"
    Image.fromarray(PIXELS[:, :, :3]).save(folder / "c0" / "picture.png")
    beside = Images(config(3)).open(str(folder))
    why = "files that end in .npy (read where no other images are, or by models of other than 1 or 3 channels)"
    assert len(beside) == 1 and beside.left_out == {why: 12}
    assert len(Images(config()).open(str(folder))) == 13
    sample = EvaluationSamples(Images(config()).open(str(folder)), Images(config()))[6]
    (note,) = sample.notes
    assert note.kind == "bad" and note.text == "expected 5 channels (stem.channels), got 3"
    assert sample.value.shape == (5, 8, 8)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"expected images under .*found none"):
        Images(config(3)).open(str(tmp_path / "none"))


def test_five_channels_from_shards_to_a_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "five")
    (folder / "c0" / "damaged.npy").write_bytes(b"\x93NUMPY damaged")
    shards, run = tmp_path / "shards", tmp_path / "run"
    assert main(["data", "pack", "--input", str(folder), "--output", str(shards), "--labelled"]) == 0
    assert "1 left out" in capsys.readouterr().out
    images = Images(config())
    source = images.open(str(shards / "*.tar"), labelled=True)
    assert len(source) == 12
    assert TrainSamples(source, images, 0)[(0, 0)].value.shape == (5, 8, 8)
    sizes = ["--stem.image-size", "8", "--stem.channels", "5", "--data.no-grey", "--encoder.depth", "2"]
    sizes += ["--target.top-k", "2", "--data.global-batch", "4", "--run.steps", "2", "--data.workers", "0"]
    data = ["--data.path", str(shards / "*.tar"), "--run.dir", str(run), "--run.device", "cpu"]
    assert main(["pretrain", "vision-tiny", *sizes, *data]) == 0
    warmup = "note: --optim.warmup-steps 600 covers all 2 updates: the learning rate rises to the end\n"
    assert warmup in capsys.readouterr().err
    model = ["--checkpoint", str(run), "--device", "cpu"]
    assert (
        main(["features", *model, "--input", str(folder), "--output", str(tmp_path / "f.npy"), "--pool", "mean"]) == 0
    )
    assert np.load(tmp_path / "f.npy").shape == (12, 64)
    (folder / "c0" / "damaged.npy").unlink()
    both = ["--train", str(folder), "--test", str(shards / "*.tar"), "--labels-per-class", "2"]
    assert main(["evaluate", "probe", *model, *both, "--baselines", "pixels", "power_spectrum"]) == 0
    found = json.loads((run / "probe.json").read_text(encoding="utf-8"))
    assert set(found["knn"]) == {"pretrained", "pixels", "power_spectrum"} and found["train_samples"] == 12
    pictures = ["--input", str(folder), "--output", str(tmp_path / "maps"), "--count", "2"]
    assert main(["evaluate", "maps", "--checkpoint", str(run), "--device", "cpu", *pictures]) == 0
    assert (tmp_path / "maps" / "maps.png").is_file()


def test_pack_takes_what_a_model_of_some_channels_reads() -> None:
    check_image(npy(PIXELS))
    check_image(tiff(PIXELS, photometric="minisblack", planarconfig="contig"))
    check_image(encode(Image.fromarray(PIXELS[:, :, :4]), "PNG"))
    for damaged in (b"II*\0 damaged", b"no image", npy(PIXELS)[:200]):
        with pytest.raises(ValueError, match=r"\w"):
            check_image(damaged)
