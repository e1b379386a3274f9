#!/bin/sh
# soundfile 0.14.0 (libsndfile 1.2.2): two Ogg streams one after the other in one file.
#
# RFC 3533, section 4, calls this chaining: a new logical stream may begin once the one before has ended. Recordings of
# internet radio are such files (a link for each title), and so is `cat a.ogg b.ogg`, given two serial numbers.
# Seen here, on one second and half a second at 16 kHz, for Vorbis and for Opus:
#   info().frames is 16,000, and read() gives 16,000 samples and no error: the second stream is not there;
#   PyAV 18.1.0 decodes both, 1.5 s of Opus (and as much of Vorbis, give or take a block at the ends).
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


def crc(page: bytes) -> int:
    """Ogg's checksum: polynomial 0x04C11DB7, nothing reflected, starting at 0."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7 * (value >> 31)) & 0xFFFFFFFF
    return value


def encode(samples: int, kind: str, serial: int) -> bytes:
    """An Ogg file of one stream with a serial number of its own."""
    file = io.BytesIO()
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(samples) / 16_000)
    sf.write(file, tone.astype(np.float32), 16_000, format="OGG", subtype=kind)
    data, place = bytearray(file.getvalue()), 0
    while place < len(data):
        count = data[place + 26]
        end = place + 27 + count + sum(data[place + 27 : place + 27 + count])
        data[place + 14 : place + 18] = serial.to_bytes(4, "little")
        data[place + 22 : place + 26] = bytes(4)
        data[place + 22 : place + 26] = crc(data[place:end]).to_bytes(4, "little")
        place = end
    return bytes(data)


print(f"soundfile {sf.__version__}, {sf.__libsndfile_version__}, PyAV {av.__version__}")
same = True
for kind, slack in (("VORBIS", 0.1), ("OPUS", 1e-6)):
    data = encode(16_000, kind, 1) + encode(8_000, kind, 2)
    frames, read = sf.info(io.BytesIO(data)).frames, len(sf.read(io.BytesIO(data))[0])
    with av.open(io.BytesIO(data)) as container:
        other = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    print(f"{kind}: frames {frames}, read {read}; PyAV decodes {other:.3f} s")
    same = same and frames == read == 16_000 and abs(other - 1.5) < slack
print("as stated" if same else "changed")
sys.exit(not same)
PY
