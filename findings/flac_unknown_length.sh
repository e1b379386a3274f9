#!/bin/sh
# soundfile 0.14.0 (libsndfile 1.2.2): a FLAC stream whose header leaves the number of samples open.
#
# RFC 9639, section 8.2: 0 samples in STREAMINFO means that the number is unknown, as encoders that write into a pipe leave
# it. `flac -d` decodes such a stream to its end. Seen here, on 16,000 samples in blocks of 4096:
#   info().frames is 2^63 - 1, which is no length to plan memory or a training index by;
#   reading block by block gives 12,288 samples and then LibsndfileError "Internal psf_fseek() failed.": the last,
#   shorter block cannot be had this way, though its samples were decoded (a buffer that was filled before the call
#   holds them after the error).
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" soundfile==0.14.0 numpy==2.4.6 cffi
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys
from pathlib import Path

import numpy as np
import soundfile as sf

path = Path(sys.argv[1]) / "open.flac"
tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)
sf.write(path, tone, 16_000, format="FLAC", subtype="PCM_16")
data = bytearray(path.read_bytes())
word = int.from_bytes(data[18:26], "big")  # sample rate, channels, bits, and 36 bits of the number of samples
data[18:26] = (word >> 36 << 36).to_bytes(8, "big")
path.write_bytes(data)

print(f"soundfile {sf.__version__}, {sf.__libsndfile_version__}")
frames = sf.info(path).frames
blocks, error = [], None
last = np.full(4096, np.nan, dtype=np.float32)
with sf.SoundFile(path) as file:
    try:
        while len(block := file.read(out=last)):
            blocks.append(len(block))
            last = np.full(4096, np.nan, dtype=np.float32)
    except sf.LibsndfileError as caught:
        error = caught
decoded = int(np.isfinite(last).sum())
print(f"frames in the header's eyes: {frames}; blocks read: {blocks}; then {error!r}; samples in the last buffer: {decoded}")
same = frames == 2**63 - 1 and sum(blocks) == 12_288 and error is not None and decoded == 16_000 - 12_288
print("as stated" if same else "changed")
sys.exit(not same)
PY
