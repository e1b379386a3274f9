#!/bin/sh
# torch 2.13.0 on the CPU: gradients of layer_norm's weight and bias where the input is bfloat16.
#
# They are sums over all rows, 5,000 here, of terms that are 1 and -1 (the input is 1, -1, 1, -1 in each row, already
# normalised). Seen here:
#   weight and bias in bfloat16, or in float32: 256 and -256, as if rows beyond the 256th did not count: the sum is kept in
#   the type of the input, where 256 + 1 is 256; with two threads 512, as each has a sum of its own;
#   rms_norm, linear, conv1d and group_norm, all in bfloat16: 4,992, the nearest that bfloat16 has below 5,000.
# torch.autocast("cpu", torch.bfloat16) runs into it, as it leaves layer_norm in bfloat16 behind a linear layer: with
# 4,096 random rows of 64 the bias has a quarter of its gradient, an error of 0.75, with no warning.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys

import torch
from torch import nn
from torch.nn import functional as F

ROWS = 5_000
print(f"torch {torch.__version__}")


def grow(kind: torch.dtype, threads: int) -> list[list[int]]:
    """Gradients of weight and bias of one layer norm."""
    torch.set_num_threads(threads)
    x = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.bfloat16).expand(ROWS, 4).contiguous()
    weight, bias = torch.ones(4, dtype=kind, requires_grad=True), torch.zeros(4, dtype=kind, requires_grad=True)
    F.layer_norm(x, (4,), weight, bias).backward(torch.ones_like(x))
    return [[round(value) for value in tensor.grad.tolist()] for tensor in (weight, bias)]


narrow, two, mixed = grow(torch.bfloat16, 1), grow(torch.bfloat16, 2), grow(torch.float32, 1)
torch.set_num_threads(1)
ones = torch.ones(ROWS, 4, dtype=torch.bfloat16)
linear, conv = nn.Linear(4, 1, dtype=torch.bfloat16), nn.Conv1d(4, 1, 1, dtype=torch.bfloat16)
linear(ones).backward(torch.ones(ROWS, 1, dtype=torch.bfloat16))
conv(ones.T[None]).backward(torch.ones(1, 1, ROWS, dtype=torch.bfloat16))
scale, bias = (torch.ones(4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
F.rms_norm(ones, (4,), scale).backward(ones)
F.group_norm(ones.T[None], 4, scale.detach(), bias).backward(ones.T[None])
others = [linear.bias.grad.item(), conv.bias.grad.item(), scale.grad[0].item(), bias.grad[0].item()]

torch.manual_seed(0)
layer, norm, x = nn.Linear(64, 64), nn.LayerNorm(64), torch.randn(4_096, 64)


def train(mixed_precision: bool) -> torch.Tensor:
    """Gradient of the norm's bias."""
    norm.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
        out = norm(layer(x))
    (out.float() - 1.0).square().mean().backward()
    return norm.bias.grad.clone()


full, auto = train(False), train(True)
error = float((auto - full).norm() / full.norm())
print(f"layer_norm in bfloat16: {narrow}, with two threads {two}; with float32 weights: {mixed}")
print(f"linear, conv1d, rms_norm, group_norm: {others}; error of the bias's gradient under autocast: {error:.3f}")
signs = [1, -1, 1, -1]
stuck = [[256 * sign for sign in signs], [256] * 4]
same = narrow == mixed == stuck and two[1] == [512] * 4 and others == [4_992] * 4 and error > 0.5
print("as stated" if same else "changed")
sys.exit(not same)
PY
