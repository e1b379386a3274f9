"""Training crops: what they are cut from, and what resizes them."""

from __future__ import annotations

import numpy as np
from PIL import Image
from support.images import make_image

from d2v.data.dataset import random_stream
from d2v.data.vision import ImageSettings, augment_image, random_crop_box


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
    same = ImageSettings(16, 3, False, (1.0, 1.0), False, False, resize="torch")
    image = make_image(5, (16, 16))
    assert np.array_equal(augment_image(image, same, random_stream(0, 0, 0, 0)), np.asarray(image).transpose(2, 0, 1))
