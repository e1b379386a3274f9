#!/bin/sh
# Pillow 13.0.0: 16-bit colour TIFFs whose planes are stored one after the other.
#
# TIFF has two orders of colour values (PlanarConfiguration): by pixel and by plane. Pillow gives 16-bit colour as 8-bit
# RGB, the upper bytes. Seen here, on 16 x 20 pixels of noise:
#   by plane without compression: no error, and wrong pixels: each plane is read as one byte a pixel, so that both bytes
#   of a value become two pixels, and the second half of each plane is not read;
#   by pixel, and by plane with zlib compression: the upper bytes, as they should be; 8 bits by plane: right.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import io
import sys

import numpy as np
import PIL
import tifffile
from PIL import Image


def read(values: np.ndarray, order: str, compression: str | None) -> np.ndarray:
    """Pixels (H, W, 3) of values (3, H, W)."""
    file = io.BytesIO()
    stored = values if order == "separate" else np.ascontiguousarray(values.transpose(1, 2, 0))
    tifffile.imwrite(file, stored, photometric="rgb", planarconfig=order, compression=compression)
    with Image.open(file) as image:
        return np.asarray(image)


values = np.random.default_rng(0).integers(0, 65_536, (3, 16, 20)).astype(np.uint16)
upper = (values >> 8).astype(np.uint8)
expected = upper.transpose(1, 2, 0)
print(f"Pillow {PIL.__version__}, tifffile {tifffile.__version__}")
wrong = {
    f"{order}, {compression}": int((read(values, order, compression) != expected).sum())
    for order in ("separate", "contig") for compression in (None, "zlib")
}
wrong["separate, None, 8 bits"] = int((read(upper, "separate", None) != expected).sum())
halves = values.astype("<u2").view(np.uint8).reshape(3, -1)[:, : 16 * 20].reshape(3, 16, 20).transpose(1, 2, 0)
explained = np.array_equal(read(values, "separate", None), halves)
print(f"wrong values of {expected.size}: {wrong}; the wrong ones are the first half of the plane's bytes: {explained}")
same = explained and wrong["separate, None"] > 900 and sum(wrong.values()) == wrong["separate, None"]
print("as stated" if same else "changed")
sys.exit(not same)
PY
