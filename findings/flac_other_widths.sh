#!/bin/sh
# soundfile 0.14.0 (libsndfile 1.2.2): FLAC streams of other widths than 8, 16 and 24 bits.
#
# RFC 9639 has samples of 4 to 32 bits; 12, 20 and 32 bits even have a code of their own in each frame's header. Digitised
# tapes are archived in 20 bits. Seen here, on 5,000 samples of noise in streams made of verbatim subframes:
#   4, 10, 12, 14, 18, 20, 22, 28 and 32 bits: refused, "File contains data in an unimplemented format.";
#   8, 16 and 24 bits: read without an error in any bit;
#   PyAV 18.1.0 reads every width without an error in any bit.
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

WIDTHS = (4, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 32)
CODES = {8: 1, 12: 2, 16: 4, 20: 5, 24: 6, 32: 7}
BLOCK = 4096


def crc(data: bytes, width: int, polynomial: int) -> bytes:
    value = 0
    for byte in data:
        value ^= byte << (width - 8)
        for _ in range(8):
            value = (value << 1 ^ polynomial * (value >> (width - 1))) & ((1 << width) - 1)
    return value.to_bytes(width // 8, "big")


def encode(values: np.ndarray, bits: int) -> bytes:
    """A mono stream at 16 kHz: STREAMINFO, then frames of one verbatim subframe each."""
    word = 16_000 << 44 | (bits - 1) << 36 | len(values)
    info = 2 * BLOCK.to_bytes(2, "big") + bytes(6) + word.to_bytes(8, "big") + bytes(16)
    stream = b"fLaC\x80" + len(info).to_bytes(3, "big") + info
    for number, first in enumerate(range(0, len(values), BLOCK)):
        part = values[first : first + BLOCK].tolist()
        head = bytes([0xFF, 0xF8, 0x75, CODES.get(bits, 0) << 1, number]) + (len(part) - 1).to_bytes(2, "big")
        head += crc(head, 8, 0x07)
        digits = "00000010" + "".join(format(value % 2**bits, f"0{bits}b") for value in part)
        digits += "0" * (-len(digits) % 8)
        frame = head + int(digits, 2).to_bytes(len(digits) // 8, "big")
        stream += frame + crc(frame, 16, 0x8005)
    return stream


print(f"soundfile {sf.__version__}, {sf.__libsndfile_version__}, PyAV {av.__version__}")
rng = np.random.default_rng(0)
refused, wrong, wrong_av = [], [], []
for bits in WIDTHS:
    values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 5_000)
    data = encode(values, bits)
    try:
        read, _ = sf.read(io.BytesIO(data), dtype="float64")
        if not np.array_equal(read, values / 2.0 ** (bits - 1)):
            wrong.append(bits)
    except sf.LibsndfileError as error:
        refused.append(bits)
        text = error.error_string
    with av.open(io.BytesIO(data)) as container:
        parts = [frame.to_ndarray().ravel() for frame in container.decode(audio=0)]
    other = np.concatenate(parts) / 2.0 ** (8 * parts[0].dtype.itemsize - 1)
    if not np.array_equal(other, values / 2.0 ** (bits - 1)):
        wrong_av.append(bits)
print(f"refused: {refused} ({text}); read wrongly: {wrong}; read wrongly by PyAV: {wrong_av}")
same = refused == [bits for bits in WIDTHS if bits not in (8, 16, 24)] and "unimplemented" in text and not wrong + wrong_av
print("as stated" if same else "changed")
sys.exit(not same)
PY
