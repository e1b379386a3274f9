#!/bin/sh
# PyAV 18.1.0: the length that a stream names and the samples that decoding it gives.
#
# One second of a tone, 48,000 samples, is encoded and decoded again by PyAV. Seen here:
#   AAC in MP4: stream.duration is 48,000, decoded are 48,128: the priming samples are cut, those behind the end are not;
#   AAC in Matroska: 48,128 as well, and no duration; AAC in ADTS: 49,152, as the format has no place for priming samples,
#   so that the tone begins 1,024 samples late;
#   Opus in Ogg: stream.duration is 48,312, which counts the pre-skip; decoded are 48,000;
#   FLAC and ALAC in MP4: 48,000 and 48,000.
# An index of lengths that was made from durations fits neither AAC nor Opus.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" av==18.1.0 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import io
import sys
from fractions import Fraction

import av
import numpy as np

tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)).astype(np.float32)
print(f"PyAV {av.__version__}")
found = {}
for container, codec in (
    ("mp4", "aac"), ("matroska", "aac"), ("adts", "aac"), ("ogg", "libopus"), ("mp4", "flac"), ("ipod", "alac")
):
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        frame.rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
        output.mux([*stream.encode(frame), *stream.encode(None)])
    with av.open(io.BytesIO(file.getvalue())) as source:
        stream = source.streams.audio[0]
        duration = None if container in ("matroska", "adts") else stream.duration * stream.time_base * 48_000
        values = np.concatenate([part.to_ndarray().ravel().astype(np.float64) for part in source.decode(stream)])
    onset = int(np.argmax(np.abs(values) > 0.05 * np.abs(values).max()))
    found[container, codec] = (duration, len(values), onset > 1_000)
    print(f"{codec} in {container}: duration {duration}, decoded {len(values)}, the tone begins at {onset}")
same = found == {
    ("mp4", "aac"): (48_000, 48_128, False), ("matroska", "aac"): (None, 48_128, False),
    ("adts", "aac"): (None, 49_152, True), ("ogg", "libopus"): (48_312, 48_000, False),
    ("mp4", "flac"): (48_000, 48_000, False), ("ipod", "alac"): (48_000, 48_000, False),
}
print("as stated" if same else "changed")
sys.exit(not same)
PY
