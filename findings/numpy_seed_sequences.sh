#!/bin/sh
# numpy 2.4.6: different lists of numbers that are one seed.
#
# `np.random.default_rng([seed, epoch])` is the advised way to have a stream for each purpose (SeedSequence). The numbers
# become 32-bit words, in a row, in a pool of four that is filled up with zeros. Seen here:
#   [7], [7, 0], [7, 0, 0] and 7 are one stream: epoch 0, or rank 0, has the stream of no epoch at all;
#   [2**32 + 5] and [5, 1] are one stream: a long seed runs into what is listed behind it;
#   from the fifth word on zeros count: [1, 2, 3, 4] and [1, 2, 3, 4, 0] are two streams;
#   spawn_key keeps them apart: SeedSequence(7, spawn_key=(0,)) is none of these.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys

import numpy as np


def first(*args: object, **kwargs: object) -> float:
    return float(np.random.default_rng(np.random.SeedSequence(*args, **kwargs)).random())


print(f"numpy {np.__version__}")
zeros = [first(7), first([7]), first([7, 0]), first([7, 0, 0])]
long, two = first([2**32 + 5]), first([5, 1])
fifth = (first([1, 2, 3, 4]), first([1, 2, 3, 4, 0]))
spawned = first(7, spawn_key=(0,))
print(f"7, [7], [7, 0], [7, 0, 0]: {zeros}")
print(f"[2^32 + 5], [5, 1]: {long}, {two}")
print(f"[1, 2, 3, 4] with and without a 0 behind: {fifth}; 7 with spawn_key (0,): {spawned}")
same = len(set(zeros)) == 1 and long == two and fifth[0] != fifth[1] and spawned not in zeros
print("as stated" if same else "changed")
sys.exit(not same)
PY
