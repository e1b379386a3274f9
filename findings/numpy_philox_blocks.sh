#!/bin/sh
# numpy 2.4.6: where Philox starts, and where `advance` leads.
#
# Philox4x64-10 (Salmon et al. 2011) makes block c of four numbers from counter c. Seen here, with key 0:
#   Philox(counter=c) starts with block c + 1: block 0 comes last of all, and a kernel that makes block c for itself
#   is one block behind;
#   advance(1) counts blocks, and throws away what is left of the one in use: before any draw it skips 4 numbers, after
#   one draw 7.
# The blocks are compared with an implementation of the paper's few lines.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys

import numpy as np

MASK = 2**64 - 1
MULTIPLIERS, WEYL = (0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def philox(counter: int) -> list[int]:
    """Block `counter` of Philox4x64-10 with key 0."""
    c, key = [counter, 0, 0, 0], [0, 0]
    for _ in range(10):
        p, q = MULTIPLIERS[0] * c[0], MULTIPLIERS[1] * c[2]
        c = [q >> 64 ^ c[1] ^ key[0], q & MASK, p >> 64 ^ c[3] ^ key[1], p & MASK]
        key = [(k + w) & MASK for k, w in zip(key, WEYL, strict=True)]
    return c


def draw(generator: np.random.Philox, count: int) -> list[int]:
    return [int(value) for value in generator.random_raw(count)]


print(f"numpy {np.__version__}")
starts = [[c for c in range(8) if philox(c) == draw(np.random.Philox(key=0, counter=given), 4)] for given in (0, 5)]
numbers = draw(np.random.Philox(key=0, counter=0), 32)
fresh, used = np.random.Philox(key=0, counter=0), np.random.Philox(key=0, counter=0)
fresh.advance(1)
draw(used, 1)
used.advance(1)
places = [numbers.index(draw(fresh, 1)[0]), numbers.index(draw(used, 1)[0])]
last = draw(np.random.Philox(key=0, counter=2**256 - 1), 4) == philox(0)
print(f"counter 0 and 5 start with blocks {starts}; counter 2^256 - 1 with block 0: {last}")
print(f"next number after advance(1), fresh and after one draw: number {places[0]} and number {places[1]}")
same = starts == [[1], [6]] and last and places == [4, 8]
print("as stated" if same else "changed")
sys.exit(not same)
PY
