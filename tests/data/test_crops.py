"""Training crops: what they are cut from, and what resizes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.images import encode, make_image

from d2v import recipes
from d2v.data import make_modality
from d2v.data.dataset import random_stream
from d2v.data.decoding.bands import Bands
from d2v.data.vision import ImageSettings, augment_image, centre_image, random_crop_box, read_image


def test_a_crop_does_not_see_what_lies_around_it() -> None:
    """As published; `Image.resize(box=...)` takes in pixels from outside of the box."""
    image = make_image(5, (90, 70))
    settings = ImageSettings(64, 3, False, (0.1, 0.5), False, False)
    for i in range(5):
        box = random_crop_box(random_stream(0, 0, i, 0), 90, 70, settings.crop_scale)
        alone = Image.new("RGB", (90, 70), (255, 0, 255))
        alone.paste(image.crop(box), box)
        found, expected = (augment_image(x, settings, random_stream(0, 0, i, 0)) for x in (image, alone))
        assert np.array_equal(found, expected)


def test_pytorch_resizes_nearly_as_pillow_does() -> None:
    smooth = Image.fromarray(np.asarray(make_image(5, (9, 7)).resize((90, 70), Image.Resampling.BICUBIC)))
    for grey, size in ((False, 64), (True, 64), (False, 7), (False, 224)):
        pillow = ImageSettings(size, 3, grey, (0.1, 1.0), True, True)
        for i in range(5):
            expected = augment_image(smooth, pillow, random_stream(0, 0, i, 0)).astype(int)
            found = augment_image(smooth, pillow._replace(resize="torch"), random_stream(0, 0, i, 0))
            assert found.dtype == np.uint8 and found.shape == expected.shape and found.flags.c_contiguous
            assert abs(found - expected).max() <= 2
    bands = Bands(np.tile(np.asarray(smooth), 2)[:, :, :5])
    five = ImageSettings(24, 5, False, (0.1, 1.0), True, True)
    found, expected = (
        augment_image(bands, five._replace(resize=by), random_stream(0, 0, 1, 0)).astype(int)
        for by in ("torch", "pillow")
    )
    assert found.shape == (5, 24, 24) and abs(found - expected).max() <= 2
    same = ImageSettings(16, 3, False, (1.0, 1.0), False, False, resize="torch")
    image = make_image(5, (16, 16))
    assert np.array_equal(augment_image(image, same, random_stream(0, 0, 0, 0)), np.asarray(image).transpose(2, 0, 1))


def test_simplejpeg_decodes_to_the_values_of_pillow() -> None:
    """Colour alone, sound files alone; what is asked for does not change by it."""
    pytest.importorskip("simplejpeg")
    image = make_image(5, (90, 70))
    exif = Image.Exif()
    exif[274] = 6
    files = [
        encode(image, "JPEG", quality=q, subsampling=s, progressive=p)
        for q in (30, 95)
        for s in (0, 1, 2)
        for p in (0, 1)
    ]
    for data in (*files, encode(image, "JPEG", exif=exif)):
        for turn in (False, True):
            (found, notes), (expected, same) = (read_image(data, turn=turn, arrays=a) for a in (True, False))
            assert isinstance(found, Bands) and found.size == expected.size and notes == same
            assert np.array_equal(np.asarray(found), np.asarray(expected))
            settings = ImageSettings(64, 3, False, (0.1, 0.5), True, True, resize="torch")
            assert np.array_equal(centre_image(found, settings), centre_image(expected, settings))
            both = [augment_image(x, settings, random_stream(0, 0, 3, 0)) for x in (found, expected)]
            assert np.array_equal(*both)
    for other in (encode(image.convert("L"), "JPEG"), encode(image.convert("CMYK"), "JPEG")):
        assert isinstance(read_image(other, arrays=True)[0], Image.Image)
    with pytest.raises(ValueError, match="truncated"):
        read_image(files[0][:-40], arrays=True)


def test_only_models_of_colour_ask_for_it(tmp_path: Path) -> None:
    pytest.importorskip("simplejpeg")
    (tmp_path / "a.jpg").write_bytes(encode(make_image(5, (90, 70)), "JPEG"))
    for changes, arrays in (({"resize": "torch"}, True), ({}, False), ({"resize": "torch", "grey": True}, False)):
        config = recipes.get("vision-tiny").change(data={"path": str(tmp_path), "grey": False, **changes})
        images = make_modality(config)
        assert isinstance(images.load(images.open(str(tmp_path)), 0)[0], Bands) is arrays
