#!/bin/sh
# PyAV 18.1.0: Ogg Opus read a second time, or from the middle.
#
# An Opus stream begins with samples to be dropped (pre-skip, 312 here), and RFC 7845 asks to decode 80 ms before the place
# that is wanted. Seen here, on ten seconds of noise at 48 kHz that PyAV encoded and decodes:
#   the first pass has 480,000 samples, time stamps from 0;
#   after seek(0) there are 480,312, time stamps from -312: the samples to be dropped are there, and the rest is the same;
#   after a seek to 5 s the first frame begins at 239,688, and differs by up to 0.8 from the first pass (noise of 0.3);
#   what comes 80 to 100 ms later still differs by up to 0.24, what comes after 1 s by nothing.
# Crops by seek therefore have to start earlier than the RFC says, and to be cut by time stamps, also at the beginning.
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

COUNT = 480_000
noise = (0.3 * np.random.default_rng(0).standard_normal(COUNT)).astype(np.float32)
file = io.BytesIO()
with av.open(file, "w", format="ogg") as output:
    stream = output.add_stream("libopus", rate=48_000, layout="mono")
    frame = av.AudioFrame.from_ndarray(noise[None], format="fltp", layout="mono")
    frame.rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
    output.mux([*stream.encode(frame), *stream.encode(None)])


def decode(container: av.container.InputContainer) -> tuple[int, np.ndarray]:
    """First time stamp, and samples."""
    frames = list(container.decode(audio=0))
    return frames[0].pts, np.concatenate([frame.to_ndarray().ravel() for frame in frames])


with av.open(io.BytesIO(file.getvalue())) as container:
    first, whole = decode(container)
    container.seek(0)
    again, second = decode(container)
    container.seek(5 * 48_000, stream=container.streams.audio[0])
    start, middle = decode(container)
extra = len(second) - len(whole)
equal = np.array_equal(second[extra:], whole)
off = np.abs(middle - whole[start : start + len(middle)])
early, late, later = float(off[:960].max()), float(off[3_840:4_800].max()), float(off[48_000:].max())
print(f"PyAV {av.__version__}: first pass {len(whole)} samples from {first}, second {len(second)} from {again}, rest equal: {equal}")
print(f"from {start}: first 20 ms off by {early:.3f}, after 80 ms by {late:.3f}, after 1 s by {later:.5f}")
same = (first, len(whole), again, len(second), equal, start) == (0, COUNT, -312, COUNT + 312, True, 239_688)
same = same and early > 0.5 and 0.05 < late < early and later < 1e-4
print("as stated" if same else "changed")
sys.exit(not same)
PY
