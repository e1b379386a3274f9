#!/bin/sh
# rapidfuzz 3.14.6 and editdistance 0.8.1: distances between lists of tokens compare hashes, not tokens.
#
# In CPython hash(-1) == hash(-2), and hash(2**61 - 1) == hash(0). Seen here, distances that should be 1:
#   editdistance.eval([-1], [-2]) is 0, and so is [2**61 - 1] to [0];
#   rapidfuzz: lists of int -1 and -2 are 1, as they should be, but NumPy arrays, floats and tuples of these are 0;
#   rapidfuzz: [97] to ["a"] is 0, as a string of one letter counts as its code.
# Error rates over labels where -1 and -2 mean different things (padding, unknown) come out too small.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" rapidfuzz==3.14.6 editdistance==0.8.1 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys

import editdistance
import numpy as np
from rapidfuzz import __version__ as version
from rapidfuzz.distance import Levenshtein

print(f"rapidfuzz {version}, editdistance 0.8.1")
pairs = {
    "int -1, -2": ([-1], [-2]),
    "int 2^61 - 1, 0": ([2**61 - 1], [0]),
    "array -1, -2": (np.array([3, -1, 4]), np.array([3, -2, 4])),
    "float -1, -2": ([-1.0], [-2.0]),
    "tuple (1, -1), (1, -2)": ([(1, -1)], [(1, -2)]),
    "97, 'a'": ([97], ["a"]),
    "int 1, 2": ([1], [2]),
}
found = {name: (Levenshtein.distance(a, b), editdistance.eval(list(a), list(b))) for name, (a, b) in pairs.items()}
for name, distances in found.items():
    print(f"{name}: rapidfuzz {distances[0]}, editdistance {distances[1]}")
same = list(found.values()) == [(1, 0), (0, 0), (0, 0), (0, 0), (0, 0), (0, 1), (1, 1)]
print("as stated" if same else "changed")
sys.exit(not same)
PY
