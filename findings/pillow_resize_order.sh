#!/bin/sh
# Pillow 12.3.0 and 13.0.0: Image.resize of an RGB image, and the order of its two passes.
#
# Bicubic overshoots, and between the pass along rows and that along columns values are rounded and cut to 0..255, so the order
# shows in the result. Until 12.3 rows came first for every size; 13.0 does columns first where that is less work, as from
# 70 x 90 to 64 x 64: the same call gives other pixels, in noise up to 16 levels off in 29 % of the values; of random crops of
# photographs to 224 x 224 four in ten change, by up to 16 levels at edges. Features, and the samples of a training run that
# goes on, then depend on Pillow's version.
# torch 2.13.0 (interpolate with antialias, uint8) does rows first always, within 1 level of Pillow 12.3.
# In both versions resize(box=...) takes in pixels from around the box, up to the reach of the filter: it is not crop and resize.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 12.3.0 13.0.0; do
    python3 -m pip install --quiet --disable-pip-version-check --target "$folder/$version" "pillow==$version" numpy==2.4.6
done
cat > "$folder/look.py" <<'PY'
import sys

import numpy as np
import PIL
from PIL import Image

BICUBIC = Image.Resampling.BICUBIC
noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))


def pixels(image):
    return np.asarray(image).astype(int)


found = pixels(noise.resize((64, 64), BICUBIC))
rows_first = pixels(noise.resize((64, 90), BICUBIC).resize((64, 64), BICUBIC))
columns_first = pixels(noise.resize((70, 64), BICUBIC).resize((64, 64), BICUBIC))
difference = abs(rows_first - columns_first)
order = "rows" if (found == rows_first).all() else "columns" if (found == columns_first).all() else "neither"
box = (10, 20, 50, 60)
around = abs(pixels(noise.resize((224, 224), BICUBIC, box=box)) - pixels(noise.crop(box).resize((224, 224), BICUBIC)))
print(f"Pillow {PIL.__version__}: {order} first; orders differ by up to {difference.max()} in "
      f"{100 * (difference > 0).mean():.0f} % of the values; box against crop: up to {around.max()}")
expected = {"12.3.0": "rows", "13.0.0": "columns"}[PIL.__version__]
sys.exit(int(order != expected or difference.max() < 10 or around.max() < 50))
PY
for version in 12.3.0 13.0.0; do
    PYTHONPATH="$folder/$version" python3 "$folder/look.py" || exit 1
done
# Seen on 2026-12-01 (Python 3.11):
# Pillow 12.3.0: rows first; orders differ by up to 16 in 29 % of the values; box against crop: up to 151
# Pillow 13.0.0: columns first; orders differ by up to 16 in 29 % of the values; box against crop: up to 151
