#!/bin/sh
# Pillow 13.0.0: grey JPEG 2000 images of 10, 12 and 14 bits, and signed ones.
#
# Microscopes and scanners store 12 bits, losslessly. imagecodecs 2026.3.6 writes the files and reads them back whole.
# Seen here, on values 0, 60, 120 ...:
#   10, 12 and 14 bits come as mode I;16 with values 64, 16 and 4 times as large (a TIFF of 12 bits in 16 keeps them);
#   signed 16 bits come as unsigned ones, 32,768 larger.
# Nothing in the image says by how much, so that thresholds and calibrations in the file's units do not fit any more.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" pillow==13.0.0 imagecodecs==2026.3.6 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import io
import sys

import imagecodecs
import numpy as np
import PIL
from PIL import Image


def read(values: np.ndarray, **settings: object) -> tuple[str, np.ndarray, bool]:
    """Mode and values as Pillow reads them, and whether imagecodecs gives them back."""
    data = imagecodecs.jpeg2k_encode(values, level=0, reversible=True, codecformat="j2k", **settings)
    with Image.open(io.BytesIO(data)) as image:
        return image.mode, np.asarray(image).astype(np.int64), bool(np.array_equal(imagecodecs.jpeg2k_decode(data), values))


print(f"Pillow {PIL.__version__}, imagecodecs {imagecodecs.__version__}")
grey = (np.arange(64).reshape(8, 8) * 60).astype(np.uint16)
same = True
for bits, factor in ((10, 64), (12, 16), (14, 4)):
    values = grey % 2**bits
    mode, found, whole = read(values, bitspersample=bits)
    print(f"{bits} bits: mode {mode}, {values[0, 1:4].tolist()} read as {found[0, 1:4].tolist()}; whole by imagecodecs: {whole}")
    same = same and mode == "I;16" and whole and np.array_equal(found, values.astype(np.int64) * factor)
signed = grey.astype(np.int16) - 2_000
mode, found, whole = read(signed)
print(f"signed 16 bits: mode {mode}, {signed[0, :3].tolist()} read as {found[0, :3].tolist()}; whole by imagecodecs: {whole}")
same = same and whole and np.array_equal(found, signed.astype(np.int64) + 32_768)
print("as stated" if same else "changed")
sys.exit(not same)
PY
