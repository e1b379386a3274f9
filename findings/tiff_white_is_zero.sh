#!/bin/sh
# Pillow 13.0.0: what grey TIFF values mean depends on their width.
#
# A grey TIFF says whether 0 is black or white (PhotometricInterpretation 1 or 0; scanners and X-ray devices use 0), and
# whether values have a sign (SampleFormat). Seen here, on values 0, 1, 2:
#   8 bits where white is 0: 255, 254, 253, as they should be;
#   16 bits and float32 where white is 0: 0, 1, 2, so that these images are negatives; nothing in `info` or the mode says so;
#   signed 16 bits and unsigned 32 bits where white is 0: refused;
#   signed 8 bits: -128, -1, 0, 127 are read as 128, 255, 0, 127 (mode L), while signed 16 bits keep their sign.
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


def read(values: np.ndarray, meaning: str = "minisblack") -> list | str:
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric=meaning)
    try:
        with Image.open(file) as image:
            return np.asarray(image)[0].tolist()
    except PIL.UnidentifiedImageError:
        return "refused"


print(f"Pillow {PIL.__version__}, tifffile {tifffile.__version__}")
kinds = (np.uint8, np.uint16, np.float32, np.int16, np.uint32)
white = {np.dtype(kind).name: read(np.arange(3, dtype=kind)[None].repeat(3, 0), "miniswhite") for kind in kinds}
black = [read(np.arange(3, dtype=kind)[None].repeat(3, 0)) for kind in kinds]
signed = [read(np.array([[-128, -1, 0, 127]] * 3, kind)) for kind in (np.int8, np.int16)]
print(f"white is 0: {white}; black is 0: {black}; signed 8 and 16 bits: {signed}")
same = (
    white == {"uint8": [255, 254, 253], "uint16": [0, 1, 2], "float32": [0, 1, 2], "int16": "refused", "uint32": "refused"}
    and black == [[0, 1, 2]] * 5 and signed == [[128, 255, 0, 127], [-128, -1, 0, 127]]
)
print("as stated" if same else "changed")
sys.exit(not same)
PY
