#!/bin/sh
# soundfile 0.14.0 (libsndfile 1.2.2): a Core Audio file (CAF) whose data chunk leaves its size open.
#
# Apple's specification lets the audio data chunk have the size -1, "unknown", where it is the last chunk of the file, so
# that a recorder need not come back to the header. Seen here, on 16,000 samples of 16-bit PCM:
#   soundfile refuses the file: "Supported file format but file is malformed.";
#   PyAV 18.1.0 reads all of them.
# An AU file that leaves its size open (0xFFFFFFFF) is read by soundfile to its end.
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

tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)


def encode(kind: str) -> bytearray:
    file = io.BytesIO()
    sf.write(file, tone, 16_000, format=kind, subtype="PCM_16")
    return bytearray(file.getvalue())


caf, au = encode("CAF"), encode("AU")
place = 8  # behind "caff", version and flags
while caf[place : place + 4] != b"data":
    place += 12 + int.from_bytes(caf[place + 4 : place + 12], "big")
last = place + 12 + int.from_bytes(caf[place + 4 : place + 12], "big") == len(caf)
caf[place + 4 : place + 12] = (-1).to_bytes(8, "big", signed=True)
au[8:12] = b"\xff" * 4

print(f"soundfile {sf.__version__}, {sf.__libsndfile_version__}, PyAV {av.__version__}; the data chunk is the last: {last}")
error = ""
try:
    print("CAF frames by soundfile:", len(sf.read(io.BytesIO(caf))[0]))
except sf.LibsndfileError as caught:
    error = caught.error_string
    print("CAF by soundfile:", error)
with av.open(io.BytesIO(caf)) as container:
    frames = sum(frame.samples for frame in container.decode(audio=0))
open_au = len(sf.read(io.BytesIO(au))[0])
print(f"CAF frames by PyAV: {frames}; AU frames by soundfile: {open_au}")
same = last and "malformed" in error and frames == open_au == 16_000
print("as stated" if same else "changed")
sys.exit(not same)
PY
