#!/bin/sh
# torch 2.13.0 on the CPU: sums over an index in bfloat16 stop at 256.
#
# bfloat16 has 8 bits: 256 + 1 is 256. Sums therefore need a wider sum inside. Seen here, 1,000 ones added up:
#   sum, cumsum, the gradients of expand, gather and index_select, and scatter_add_: 1000;
#   the gradient of nn.Embedding (of a token that occurs 1,000 times), that of x[index], index_add_, index_put_ with
#   accumulate, and segment_reduce: 256.
# In a model in bfloat16 the frequent tokens get too small a gradient, and picking rows in two ways has two gradients.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys

import torch

torch.set_num_threads(1)
print(f"torch {torch.__version__}")
COUNT, KIND = 1_000, torch.bfloat16
index, ones = torch.zeros(COUNT, dtype=torch.long), torch.ones(COUNT, dtype=KIND)


def gradient(pick: object) -> float:
    x = torch.ones(1, 4, dtype=KIND, requires_grad=True)
    pick(x).backward(torch.ones(COUNT, 4, dtype=KIND))
    return float(x.grad[0, 0])


def zero() -> torch.Tensor:
    return torch.zeros(1, dtype=KIND)


wide = {
    "sum": float(ones.sum()), "cumsum": float(ones.cumsum(0)[-1]), "expand": gradient(lambda x: x.expand(COUNT, 4)),
    "gather": gradient(lambda x: x.gather(0, index[:, None].expand(-1, 4))),
    "index_select": gradient(lambda x: x.index_select(0, index)), "scatter_add_": float(zero().scatter_add_(0, index, ones)),
}
narrow = {
    "embedding": gradient(lambda x: torch.nn.functional.embedding(index, x)), "x[index]": gradient(lambda x: x[index]),
    "index_add_": float(zero().index_add_(0, index, ones)),
    "index_put_": float(zero().index_put_((index,), ones, accumulate=True)),
    "segment_reduce": float(torch.segment_reduce(ones, "sum", lengths=torch.tensor([COUNT]))),
}
print(f"{wide}; {narrow}")
same = all(value == 1_000 for value in wide.values()) and all(value == 256 for value in narrow.values())
print("as stated" if same else "changed")
sys.exit(not same)
PY
