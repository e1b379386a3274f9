#!/bin/sh
# torch 2.13.0 on the CPU: the gradient of ctc_loss is not that of its argument.
#
# `torch.nn.functional.ctc_loss` takes log-probabilities. Seen here, in float64, against central differences:
#   for any log-probabilities the gradient that it gives is off by up to 0.7: what it gives is the gradient of
#   logits, as if a log_softmax had been applied; it is too large by exp(log_probs), and gradcheck fails;
#   with a log_softmax in front, differences and gradient agree to 1e-7: it takes out what is too much.
# Whoever adds something between log_softmax and the loss (a language model's scores, a temperature, a penalty of blanks)
# trains with a wrong gradient, and the loss still falls.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" torch==2.13.0 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys

import torch
from torch.nn import functional as F

torch.manual_seed(0)
print(f"torch {torch.__version__}")
targets, lengths = torch.tensor([[1, 2]]), (torch.tensor([6]), torch.tensor([2]))


def direct(x: torch.Tensor) -> torch.Tensor:
    return F.ctc_loss(x, targets, *lengths, reduction="sum")


def with_softmax(x: torch.Tensor) -> torch.Tensor:
    return direct(x.log_softmax(-1))


def penalised(x: torch.Tensor) -> torch.Tensor:
    """Blanks made less likely behind the log_softmax."""
    return direct(x.log_softmax(-1) - torch.tensor([0.7, 0.0, 0.0, 0.0], dtype=torch.float64))


def differ(function: object, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient, and central differences."""
    x = x.clone().requires_grad_()
    function(x).backward()
    numeric = torch.zeros_like(x)
    with torch.no_grad():
        for i in range(x.numel()):
            step = torch.zeros(x.numel(), dtype=torch.float64)
            step[i] = 1e-6
            numeric.view(-1)[i] = (function(x + step.view_as(x)) - function(x - step.view_as(x))) / 2e-6
    return x.grad, numeric


logits = torch.randn(6, 1, 4, dtype=torch.float64)
log_probs = logits.log_softmax(-1)
given, right = differ(direct, log_probs)
off = float((given - right).abs().max())
explained = float((given - right - log_probs.exp()).abs().max())
agree = float((torch.sub(*differ(with_softmax, logits))).abs().max())
between = float((torch.sub(*differ(penalised, logits))).abs().max())
checked = torch.autograd.gradcheck(direct, (log_probs.clone().requires_grad_(),), raise_exception=False)
print(f"off by {off:.4f}, all of it exp(log_probs) within {explained:.1e}; gradcheck {checked}")
print(f"with log_softmax off by {agree:.1e}; with a penalty behind it off by {between:.4f}")
same = off > 0.1 and explained < 1e-6 and not checked and agree < 1e-6 and between > 0.01
print("as stated" if same else "changed")
sys.exit(not same)
PY
