#!/bin/sh
# torch 2.13.0: torchrun --max-restarts, and the key-value store of the job.
#
# After a worker has died, torchrun starts all again, on the store of the attempt before, whose keys are still there and which
# init_process_group names as before. A worker that is there earlier than another one reads the address that the other's
# predecessor had and is refused: "Gloo connectFullMesh failed". Whether a restart works is a matter of milliseconds; here the
# second attempt of rank 0 comes 3 s late. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or names of their own for each attempt
# (PrefixStore), it works. Keys of a user's own are old ones in the same way.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 numpy==2.4.6
cat > "$folder/worker.py" <<'PY'
import datetime
import os
import sys
import time

import torch
import torch.distributed as dist

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt and rank == 0:
    time.sleep(3)
options = {}
if "own" in sys.argv:
    store, _, size = next(iter(dist.rendezvous("env://")))
    options = {"store": dist.PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": size}
try:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=10), **options)
except RuntimeError as error:
    print("attempt", attempt, "rank", rank, str(error)[:31], flush=True)
    sys.exit(1)
total = torch.ones(1)
dist.all_reduce(total)
print("attempt", attempt, "rank", rank, "sum", int(total), flush=True)
dist.barrier()
if attempt == 0 and rank == 1:
    sys.exit(1)
if attempt == 0:
    time.sleep(60)  # until torchrun ends it
dist.destroy_process_group()
PY
run() {
    echo "-- $1"
    shift
    env PYTHONPATH="$folder/site" OMP_NUM_THREADS=1 "$@" 2>/dev/null | grep '^attempt' | sort || true
}
{
    run "as it is" python3 -m torch.distributed.run --standalone --max-restarts=1 --nproc-per-node=2 "$folder/worker.py"
    run "a store for each attempt" TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \
        python3 -m torch.distributed.run --standalone --max-restarts=1 --nproc-per-node=2 "$folder/worker.py"
    run "names for each attempt" \
        python3 -m torch.distributed.run --standalone --max-restarts=1 --nproc-per-node=2 "$folder/worker.py" own
} > "$folder/found"
cat > "$folder/stated" <<'TEXT'
-- as it is
attempt 0 rank 0 sum 2
attempt 0 rank 1 sum 2
attempt 1 rank 1 Gloo connectFullMesh failed wit
-- a store for each attempt
attempt 0 rank 0 sum 2
attempt 0 rank 1 sum 2
attempt 1 rank 0 sum 2
attempt 1 rank 1 sum 2
-- names for each attempt
attempt 0 rank 0 sum 2
attempt 0 rank 1 sum 2
attempt 1 rank 0 sum 2
attempt 1 rank 1 sum 2
TEXT
cat "$folder/found"
if diff "$folder/stated" "$folder/found"; then echo "as stated"; else echo "changed"; exit 1; fi
