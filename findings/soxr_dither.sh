#!/bin/sh
# soxr 1.1.0: resampling of 16-bit samples adds noise (dither).
#
# The arrays that `soxr.resample` gives have the input's type, so that int16 must be rounded. Seen here, 48 to 16 kHz:
#   digital silence comes back as -1, 0 and 1;
#   a constant of 1234 comes back as 1233, 1234 and 1235, where the float32 way is 1234.0 within 0.001;
#   a second run has the same noise: it is a function of the place, and two channels of one call have different noise.
# What tells silence from sound by zeros (cutting, voice activity, masks of padding) stops working after it.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" soxr==1.1.0 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys

import numpy as np
import soxr

print(f"soxr {soxr.__version__}")
silence = soxr.resample(np.zeros(48_000, np.int16), 48_000, 16_000)
again = soxr.resample(np.zeros(48_000, np.int16), 48_000, 16_000)
level = np.full(48_000, 1234)
level_int = soxr.resample(level.astype(np.int16), 48_000, 16_000)[2000:-2000]
level_float = soxr.resample(level.astype(np.float32), 48_000, 16_000)[2000:-2000]
stereo = soxr.resample(np.zeros((48_000, 2), np.int16), 48_000, 16_000)
print("silence:", dict(zip(*(v.tolist() for v in np.unique(silence, return_counts=True)), strict=True)))
print("1234 as int16:", np.unique(level_int).tolist(), "as float32, off by:", float(np.abs(level_float - 1234).max()))
print("same again:", np.array_equal(silence, again), "channels alike:", np.array_equal(stereo[:, 0], stereo[:, 1]))
same = (
    np.unique(silence).tolist() == [-1, 0, 1] and np.unique(level_int).tolist() == [1233, 1234, 1235]
    and np.abs(level_float - 1234).max() < 1e-3 and np.array_equal(silence, again)
    and not np.array_equal(stereo[:, 0], stereo[:, 1])
)
print("as stated" if same else "changed")
sys.exit(not same)
PY
