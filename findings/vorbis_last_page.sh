#!/bin/sh
# soundfile 0.14.0 (libsndfile 1.2.2): reading Ogg Vorbis from a place near the end of the file.
#
# Seen here, on 40,000 samples of noise at 16 kHz, encoded by soundfile itself; the last page holds those from 28,288 on:
#   read(start=...) gives the slice of the whole for 20,000, and for 28,288;
#   for 39,000 it gives 1,000 samples, but those from 39,192 on, with others behind them.
# Reading from the beginning and dropping what comes before gives the slice.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" soundfile==0.14.0 numpy==2.4.6 cffi
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import io
import sys

import numpy as np
import soundfile as sf

file = io.BytesIO()
noise = (0.3 * np.random.default_rng(0).standard_normal(40_000)).astype(np.float32)
sf.write(file, noise, 16_000, format="OGG", subtype="VORBIS")
data = file.getvalue()
whole, _ = sf.read(io.BytesIO(data), dtype="float32")
page = data.rfind(b"OggS", 0, data.rfind(b"OggS"))
last = int.from_bytes(data[page + 6 : page + 14], "little")
print(f"soundfile {sf.__version__}, {sf.__libsndfile_version__}: {len(whole)} samples, the last page from {last}")
found = {}
for start in (20_000, last, 39_000):
    part, _ = sf.read(io.BytesIO(data), start=start, dtype="float32")
    head = part[:200]
    late = [n for n in range(601) if np.abs(head - whole[start + n : start + n + 200]).max() < 1e-6]
    found[start] = len(part), late
    print(f"from {start}: {len(part)} samples, those of the whole {late} samples later")
same = found == {20_000: (20_000, [0]), 28_288: (11_712, [0]), 39_000: (1_000, [192])}
print("as stated" if same else "changed")
sys.exit(not same)
PY
