#!/bin/sh
# soundfile 0.14.0 (libsndfile 1.2.2): ALAC of noise at full scale. PyAV 18.1.0 reads the same files, to tell who errs.
#
# ALAC is lossless; blocks that do not get smaller are stored as they are. White noise at full scale has such blocks, in
# each of the sample widths that ALAC has. Seen here, on 10,000 samples in a CAF file, wrong samples as soundfile and as
# PyAV read them:
#   16 bits: none and none, mono and stereo; 24 bits mono: none and none;
#   24 bits stereo: all and all, so the file is wrong;
#   32 bits mono: all and none, so the file is right and only reading it is wrong.
# A sine of half of the scale comes back whole in all of them.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" soundfile==0.14.0 av==18.1.0 numpy==2.4.6 cffi
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import io
import sys

import av
import numpy as np
import soundfile as sf


def count_wrong(values: np.ndarray, bits: int) -> tuple[int, int]:
    """Wrong samples of (S, channels) int32, as soundfile and as PyAV read them."""
    file = io.BytesIO()
    sf.write(file, values, 16_000, format="CAF", subtype=f"ALAC_{bits}")
    read, _ = sf.read(io.BytesIO(file.getvalue()), dtype="int32", always_2d=True)
    with av.open(io.BytesIO(file.getvalue())) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    other = np.concatenate(frames, axis=1).T.astype(np.int64)
    other <<= 32 - 8 * frames[0].dtype.itemsize
    return int((read != values).sum()), int((other != values).sum())


rng = np.random.default_rng(0)
print(f"soundfile {sf.__version__}, {sf.__libsndfile_version__}, PyAV {av.__version__}")
found = {}
for bits, channels in ((16, 1), (16, 2), (24, 1), (24, 2), (32, 1)):
    values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 10_000) << (32 - bits)
    found[bits, channels] = count_wrong(values.astype(np.int32).reshape(-1, channels), bits)
    print(f"noise, {bits} bits, {channels} channels: wrong samples of 10000 by soundfile, by PyAV: {found[bits, channels]}")
sine = 0.5 * np.sin(0.1 * np.arange(10_000))
sines = []
for (bits, channels) in found:
    values = np.rint(sine * 2 ** (bits - 1)).astype(np.int64) << (32 - bits)
    sines.append(count_wrong(values.astype(np.int32).reshape(-1, channels), bits))
print(f"sine: {sines}")
expected = {(16, 1): (0, 0), (16, 2): (0, 0), (24, 1): (0, 0), (24, 2): (10_000, 10_000), (32, 1): (10_000, 0)}
same = found == expected and sines == [(0, 0)] * 5
print("as stated" if same else "changed")
sys.exit(not same)
PY
