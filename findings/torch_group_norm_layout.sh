#!/bin/sh
# torch 2.13.0 on the CPU: group_norm of one tensor in two memory formats.
#
# Values are the same, only the strides differ. Seen here, float32 standard normal values (2, 32, 16, 16) in 2 groups with
# a mean added, largest error against float64:
#   contiguous: 0.00004 at a mean of 1,000, 0.001 at 10,000;
#   channels_last: 0.4 at 1,000, 1,363 at 10,000: the variance is lost, as in E[x^2] - E[x]^2.
# layer_norm and batch_norm of the same channels_last tensor stay at or below 0.01.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys

import torch
from torch.nn import functional as F

torch.set_num_threads(1)
torch.manual_seed(0)
print(f"torch {torch.__version__}")
normal = torch.randn(2, 32, 16, 16)
errors = {}
for mean in (0, 1_000, 10_000):
    x = normal + mean
    last = x.contiguous(memory_format=torch.channels_last)
    group, batch = F.group_norm(x.double(), 2), F.batch_norm(x.double(), None, None, training=True)
    layer = F.layer_norm(x.double(), (32, 16, 16))
    errors[mean] = [
        float((found - expected).abs().max())
        for found, expected in (
            (F.group_norm(x, 2), group), (F.group_norm(last, 2), group),
            (F.batch_norm(last, None, None, training=True), batch), (F.layer_norm(last, (32, 16, 16)), layer),
        )
    ]
    print(f"mean {mean}: group_norm contiguous, channels_last; batch_norm, layer_norm channels_last: {errors[mean]}")
same = errors[0][1] < 1e-5 and errors[1_000][1] > 0.1 and errors[10_000][1] > 10
same = same and all(e[0] < limit for e, limit in zip(errors.values(), (1e-5, 1e-3, 1e-2), strict=True))
same = same and all(max(e[2:]) < 0.05 for e in errors.values())
print("as stated" if same else "changed")
sys.exit(not same)
PY
