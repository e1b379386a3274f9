#!/bin/sh
# torch 2.13.0: what a seed and a length mean for the CPU generator.
#
# Seeds have 64 bits. Seen here:
#   the seeds 5, 2^32 + 5 and 3 * 2^32 + 5 give one stream: the upper 32 bits are dropped, so that (run << 32) + rank is
#   the rank alone; initial_seed() gives back all of them;
#   randn(n) with one seed has other numbers for n = 15 than for n = 16, and randn(17)[1:16] is not randn(16)[1:16]: where
#   the length is no multiple of 16, the last 16 are drawn anew. randn(32)[:16] is randn(16).
# Noise that is to be the same in a larger batch, or after a batch was cut, has to be drawn apart.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys

import torch


def draw(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


print(f"torch {torch.__version__}")
seeds = [5, 2**32 + 5, 3 * 2**32 + 5]
streams = len({tuple(draw(seed, 20).tolist()) for seed in seeds})
kept = [torch.Generator().manual_seed(seed).initial_seed() for seed in seeds] == seeds
short, plain, odd, long = (draw(0, count) for count in (15, 16, 17, 32))
alike = [int((a == b[: len(a)]).sum()) for a, b in ((short, plain), (plain, odd), (plain, long))]
print(f"streams of {seeds}: {streams}; initial_seed() gives the seeds: {kept}")
print(f"equal numbers of randn(15) and (16): {alike[0]}, of (16) and (17): {alike[1]}, of (16) and (32): {alike[2]}")
same = streams == 1 and kept and alike[0] < 15 and alike[1] < 4 and alike[2] == 16
print("as stated" if same else "changed")
sys.exit(not same)
PY
