#!/bin/sh
# soundfile 0.14.0 (libsndfile 1.2.2): the last block of ADPCM files.
#
# ADPCM is coded in blocks of so many samples; the last block is filled up. A WAV file says in its fact chunk how many
# samples there are. Seen here, on 10,001 samples of a tone:
#   MS ADPCM in WAV: the fact chunk says 10,001, info().frames and read() give 10,120;
#   IMA ADPCM in WAV: the fact chunk itself says 10,170, whole blocks;
#   IMA ADPCM in AIFF: 10,048 samples, of which the last 47 are those of the block before once more: the encoder fills
#   the block with what was in its buffer, so that a piece of sound is heard twice.
# PyAV 18.1.0 decodes as many samples; its duration of the MS ADPCM stream is 10,001.
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

COUNT = 10_001
tone = (0.5 * np.sin(0.1 * np.arange(COUNT))).astype(np.float32)
print(f"soundfile {sf.__version__}, {sf.__libsndfile_version__}, PyAV {av.__version__}")
found, values = {}, {}
for kind, subtype in (("WAV", "MS_ADPCM"), ("WAV", "IMA_ADPCM"), ("AIFF", "IMA_ADPCM")):
    file = io.BytesIO()
    sf.write(file, tone, 16_000, format=kind, subtype=subtype)
    data = file.getvalue()
    place = data.find(b"fact")
    fact = int.from_bytes(data[place + 8 : place + 12], "little") if place > 0 else None
    values[kind, subtype], _ = sf.read(io.BytesIO(data))
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.audio[0]
        duration, decoded = stream.duration, sum(frame.samples for frame in container.decode(stream))
    read = len(values[kind, subtype])
    found[kind, subtype] = (fact, sf.info(io.BytesIO(data)).frames, read, decoded, duration)
    print(f"{kind} {subtype}: fact {fact}, frames {found[kind, subtype][1]}, read {read}, PyAV {decoded} of {duration}")
tail = values["AIFF", "IMA_ADPCM"][COUNT:]
earlier = values["AIFF", "IMA_ADPCM"][COUNT - 64 : COUNT - 64 + len(tail)]
print(f"AIFF: {len(tail)} samples behind the last, up to {np.abs(tail).max():.3f}; {np.abs(tail - earlier).max():.3f} from those 64 before")
same = found == {
    ("WAV", "MS_ADPCM"): (10_001, 10_120, 10_120, 10_120, 10_001),
    ("WAV", "IMA_ADPCM"): (10_170, 10_170, 10_170, 10_170, 10_170),
    ("AIFF", "IMA_ADPCM"): (None, 10_048, 10_048, 10_048, 10_048),
} and len(tail) == 47 and np.abs(tail).max() > 0.45 and np.abs(tail - earlier).max() < 0.02
print("as stated" if same else "changed")
sys.exit(not same)
PY
