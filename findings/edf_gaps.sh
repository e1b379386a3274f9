#!/bin/sh
# edfio 0.4.18: EDF+ recordings with gaps (EDF+D).
#
# In EDF+D each data record has its own time, and there may be gaps between them. Seen here, on twenty records of one
# second at 256 Hz, of which the last ten begin at 90 s:
#   edfio reads the file without an error or a warning: 5,120 samples in a row, duration 20 s, so that what was measured
#   at 90 s stands at 10 s; annotations keep their real times (92 s) and point behind the end;
#   pyedflib 0.1.42 refuses it: "The file is discontinuous and cannot be read".
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" edfio==0.4.18 pyedflib==0.1.42 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys
import warnings
from pathlib import Path

import edfio
import numpy as np
import pyedflib

path = Path(sys.argv[1]) / "gaps.edf"
values = np.random.default_rng(0).uniform(-100.0, 100.0, 20 * 256)
edfio.Edf([edfio.EdfSignal(values, 256)], annotations=[edfio.EdfAnnotation(12.0, None, "late")]).write(path)
data = path.read_bytes()
for second in range(10, 20):  # a record's time, and that of an annotation, as text
    data = data.replace(f"+{second}\x14".encode(), f"+{second + 80}\x14".encode())
path.write_bytes(data[:192] + b"EDF+D" + data[197:])

with warnings.catch_warnings():
    warnings.simplefilter("error")
    edf = edfio.read_edf(path)
    signal, notes = edf.signals[0], [(note.onset, note.text) for note in edf.annotations]
print(f"edfio {edfio.__version__}: {edf.reserved}, {len(signal.data)} samples, {edf.duration} s, annotations {notes}")
try:
    pyedflib.EdfReader(str(path))
    refused = ""
except OSError as error:
    refused = str(error).rpartition(": ")[2]
print(f"pyedflib {pyedflib.__version__}: {refused}")
same = len(signal.data) == 5_120 and edf.duration == 20 and notes == [(92.0, "late")] and "discontinuous" in refused
print("as stated" if same else "changed")
sys.exit(not same)
PY
