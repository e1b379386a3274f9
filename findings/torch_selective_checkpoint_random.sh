#!/bin/sh
# torch 2.13.0: selective activation checkpointing (create_selective_checkpoint_contexts) that saves a random operation.
#
# A checkpointed function runs again in the backward pass, with the random state of its first run. What the policy saves is
# not run again, so a random operation that is saved does not advance the random state, and the random operations behind it
# draw other numbers than in the forward pass. Seen here, for two masks of 4,096 numbers drawn one after the other, each of
# which keeps a half, compared with the gradient without a checkpoint:
#   nothing saved, the second mask saved, both saved: the same gradient;
#   the first mask saved, as a policy or as a list of operations: the same output, and a fourth of the gradients is wrong
#   (about 1,024: the second mask is another one, which counts where the first keeps), with no warning.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - <<'PY'
import sys
from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

COUNT = 4_096
FIRST, SECOND = torch.ops.aten.rand_like.default, torch.ops.aten.bernoulli.default
print(f"torch {torch.__version__}")


def twice_masked(x: torch.Tensor) -> torch.Tensor:
    first = torch.rand_like(x) < 0.5
    y = torch.sin(x) * first
    second = torch.bernoulli(torch.full_like(x, 0.5))
    return torch.sin(y + 1.0) * second


def train(saved) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient; saved: a policy or a list of operations, None: without a checkpoint."""
    torch.manual_seed(0)
    x = torch.linspace(0.5, 1.0, COUNT, requires_grad=True)
    if saved is None:
        out = twice_masked(x)
    else:
        contexts = partial(create_selective_checkpoint_contexts, saved)
        out = checkpoint(twice_masked, x, use_reentrant=False, context_fn=contexts)
    out.sum().backward()
    return out.detach(), x.grad


def policy(*operations):
    """Saves these and computes all others again."""
    must, rather_not = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    return lambda context, operation, *arguments, **named: must if operation in operations else rather_not


out, gradient = train(None)
cases = {"nothing": policy(), "second": policy(SECOND), "both": policy(FIRST, SECOND), "first": policy(FIRST),
         "first, as a list": [FIRST]}
wrong = {}
for name, saved in cases.items():
    again, other = train(saved)
    wrong[name] = int((other != gradient).sum()) if torch.equal(out, again) else -1
print(f"wrong gradients of {COUNT}, by what is saved: {wrong}")
fourth = COUNT // 4
same = wrong["nothing"] == wrong["second"] == wrong["both"] == 0
same = same and all(abs(wrong[name] - fourth) < 100 for name in ("first", "first, as a list"))
print("as stated" if same else "changed")
sys.exit(not same)
PY
