#!/bin/sh
# soundfile 0.14.0 (libsndfile 1.2.2): MP3 of a variable rate.
#
# The number of frames stands in the first, silent frame of an MP3 ("Xing"), if it stands anywhere: encoders that write into
# a pipe leave it out. Seen here, on 96,000 samples at 16 kHz of which one half is noise and the other nearly silent:
#   without that frame, quiet first: info().frames is far too large, and read() gives fewer than that;
#   without it, loud first: info().frames is far too small, and read() stops there, without an error: most of it is lost;
#   with it: 96,000 frames, all read; but block by block (SoundFile.blocks) the values differ from those of the whole at
#   the onset, because soundfile seeks behind every read. With `file.seekable = lambda: False` they do not.
# PyAV 18.1.0 decodes all of each.
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

COUNT = 96_000


def encode(first: float, second: float, tag: bool) -> bytes:
    values = np.random.default_rng(0).standard_normal(COUNT).astype(np.float32)
    values *= np.repeat(np.float32([first, second]), COUNT // 2)
    file = io.BytesIO()
    options = {"write_xing": str(int(tag)), "id3v2_version": "0"}
    with av.open(file, "w", format="mp3", options=options) as output:
        stream = output.add_stream("libmp3lame", rate=16_000, layout="mono", format="fltp")
        stream.codec_context.qscale, stream.codec_context.global_quality = True, 2 * 118
        frame = av.AudioFrame.from_ndarray(values[None], format="fltp", layout="mono")
        frame.sample_rate, fifo = 16_000, av.AudioFifo()
        fifo.write(frame)
        while (part := fifo.read(stream.codec_context.frame_size or 576, partial=True)) is not None:
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return file.getvalue()


def read(data: bytes, seek: bool) -> np.ndarray:
    with sf.SoundFile(io.BytesIO(data)) as file:
        if not seek:
            file.seekable = lambda: False
        blocks = []
        while len(block := file.read(5_000, dtype="float32")):
            blocks.append(block)
    return np.concatenate(blocks)


print(f"soundfile {sf.__version__}, {sf.__libsndfile_version__}, PyAV {av.__version__}")
found = {}
for name, first, second, tag in (("quiet", 1e-5, 0.3, False), ("loud", 0.3, 1e-5, False), ("tagged", 0.3, 1e-5, True)):
    data = encode(first, second, tag)
    frames, values = sf.info(io.BytesIO(data)).frames, sf.read(io.BytesIO(data), dtype="float32")[0]
    with av.open(io.BytesIO(data), format="mp3") as container:
        decoded = sum(frame.samples for frame in container.decode(audio=0))
    found[name] = frames, len(values), decoded
    print(f"{name}: frames {frames}, read {len(values)}, PyAV {decoded}")
blocks, straight = read(data, True), read(data, False)
off, rest = float(np.abs(blocks - values).max()), float(np.abs(straight - values).max())
print(f"tagged, by blocks: off by up to {off:.3f}; without seeks by {rest:.1e}")
same = found["quiet"][0] > 1.3 * found["quiet"][1] > COUNT and found["loud"][0] == found["loud"][1] < COUNT // 3
same = same and found["tagged"] == (COUNT,) * 3 and found["quiet"][2] == found["loud"][2] > COUNT and off > 0.05 and rest < 1e-6
print("as stated" if same else "changed")
sys.exit(not same)
PY
