#!/bin/sh
# torch 2.13.0 on x86-64 CPUs: the linear operator of oneDNN with a weight that is part of a wider one.
#
# torch.ops.mkldnn._linear_pointwise is what torch.compile makes of linear layers on CPUs when weights are frozen. A float32
# weight whose rows have gaps between them (columns 0 to 255 of a matrix with 512) is valid, and the result is right, but
# the call takes hundreds to thousands of times as long as the same call with a copy of the weight: 1.9 s against 0.6 ms
# for 500 rows, 256 inputs and 512 outputs on one core of an AMD EPYC (Zen 5). Gaps in the rows of the input cost next to
# nothing, and torch.nn.functional.linear takes the weight with gaps without any loss.
# Ends with 0 while the weight with gaps takes more than 20 times as long, with 1 when that has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - <<'PY'
import sys
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def milliseconds(call, x: torch.Tensor, weight: torch.Tensor) -> float:
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        call(x, weight)
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


wide, x = torch.randn(512, 512), torch.randn(500, 256)
gaps, dense = wide[:, :256], wide[:, :256].contiguous()
rows = torch.randn(500, 512)[:, :256]
error = (onednn(x, gaps) - F.linear(x, dense)).abs().max().item()
times = {
    "weight with gaps": milliseconds(onednn, x, gaps), "dense weight": milliseconds(onednn, x, dense),
    "rows with gaps": milliseconds(onednn, rows, dense), "F.linear, weight with gaps": milliseconds(F.linear, x, gaps),
}
print(f"torch {torch.__version__}; largest difference {error:.1e};", {name: round(ms, 2) for name, ms in times.items()}, "ms")
slow = times["weight with gaps"] / times["dense weight"]
same = slow > 20 and times["rows with gaps"] < 5 * times["dense weight"] and error < 1e-3
print("as stated" if same else "changed")
sys.exit(not same)
PY
