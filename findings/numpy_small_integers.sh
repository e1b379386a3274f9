#!/bin/sh
# numpy 2.4.6: draws of small integers depend on how they are split into calls.
#
# Generator.integers cuts numbers of 8 and 16 bits, and booleans, out of one word of 32 bits, and throws away the rest of
# the word when the call ends. Seen here, on 8 numbers drawn at once, in two calls (3 + 5), and one by one:
#   int64, uint32, and random() of float32: the same numbers each way;
#   uint8, uint16 and bool: other numbers each way.
# A run that goes on in the middle of such draws, or draws a batch in other parts, has other numbers from there on.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys

import numpy as np


def draw(kind: type, parts: tuple[int, ...]) -> list[float]:
    rng = np.random.default_rng(0)
    if kind is np.float32:
        return np.concatenate([rng.random(n, dtype=kind) for n in parts]).tolist()
    return np.concatenate([rng.integers(0, 2 if kind is bool else 200, n, dtype=kind) for n in parts]).tolist()


print(f"numpy {np.__version__}")
found = {}
for kind in (np.int64, np.uint32, np.float32, np.uint16, np.uint8, bool):
    ways = [draw(kind, parts) for parts in ((8,), (3, 5), (1,) * 8)]
    found[kind.__name__] = (ways[0] == ways[1], ways[0] == ways[2])
    print(f"{kind.__name__}: at once as in two calls {found[kind.__name__][0]}, as one by one {found[kind.__name__][1]}")
same = [all(pair) for pair in found.values()] == [True, True, True, False, False, False]
same = same and not any(any(found[name]) for name in ("uint16", "uint8", "bool"))
print("as stated" if same else "changed")
sys.exit(not same)
PY
