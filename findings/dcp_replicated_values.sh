#!/bin/sh
# torch 2.13.0: which rank's values torch.distributed.checkpoint saves of plain tensors.
#
# Plain tensors (no DTensor) count as equal on all ranks, and each is written by one of them. Seen here, two ranks with
# gloo whose tensors a, b, c are filled with the rank's number, saved without an error or a warning and loaded again:
#   state dict in the order a, b, c: a and c are those of rank 0, b is that of rank 1;
#   in the order b, a, c: b and c are those of rank 0, a that of rank 1;
#   with a large a: a is that of rank 0, b and c those of rank 1.
# So "rank 0 saves" does not hold: statistics, counters or random states that differ between ranks come back as a mixture,
# which changes with the order of the dict and the sizes of its tensors.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

ORDERS = ({"a": 10, "b": 10, "c": 10}, {"b": 10, "a": 10, "c": 10}, {"a": 1_000, "b": 10, "c": 10})
folder = Path(sys.argv[1])
torch.set_num_threads(1)
warnings.simplefilter("ignore")
rank = 0 if (child := os.fork()) else 1  # two ranks, which meet at a file
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
for i, sizes in enumerate(ORDERS):
    dcp.save({name: torch.full((size,), float(rank)) for name, size in sizes.items()}, checkpoint_id=folder / str(i))
dist.barrier()
dist.destroy_process_group()
if rank:
    os._exit(0)
os.waitpid(child, 0)

print(f"torch {torch.__version__}")
found = []
for i, sizes in enumerate(ORDERS):
    loaded = {name: torch.full((size,), -1.0) for name, size in sizes.items()}
    dcp.load(loaded, checkpoint_id=folder / str(i), no_dist=True)
    found.append({name: sorted(set(value.tolist())) for name, value in loaded.items()})
    print(f"sizes {sizes}: values {found[-1]}")
same = found == [
    {"a": [0.0], "b": [1.0], "c": [0.0]}, {"b": [0.0], "a": [1.0], "c": [0.0]}, {"a": [0.0], "b": [1.0], "c": [1.0]}
]
print("as stated" if same else "changed")
sys.exit(not same)
PY
