"""AdamW, the cosine schedule with warm-up, and gradient clipping as the published runs had them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from d2v.config import Optim

PREFIX = "optim."
"""Begins the names of the optimiser's tensors in a checkpoint."""


def learning_rate_at(optim: Optim, update: int, steps: int, extend: int = 0) -> float:
    """Learning rate of optimiser update number `update` (1-based) of a run of `steps` updates.

    The schedule is evaluated at the count u = update - 1 of completed updates, so the first update of a cosine has rate
    0. With W warm-up updates, f = final_rate * lr: u < W: lr * u / W; else f + (lr - f) / 2 * (1 + cos(pi * (u - W) /
    (steps - W))). (data2vec 2.0.) Tri-stage, with H hold updates: from f to lr over W, lr over H, then down to f
    exponentially over the rest. (data2vec 1.0, speech.) Linear: a straight line from lr to f after the warm-up.
    `extend` updates after `steps` have the schedule of a run of that length, W and H shortened in proportion.
    """
    if update > steps and extend:
        share = extend / max(steps, 1)
        shorter = replace(optim, warmup_steps=int(optim.warmup_steps * share), hold_steps=int(optim.hold_steps * share))
        return learning_rate_at(shorter, update - steps, extend)
    count, warmup, peak = update - 1, optim.warmup_steps, optim.learning_rate
    final = optim.final_rate * peak
    if optim.schedule == "tri-stage":
        if count < warmup:
            return final + (peak - final) * count / warmup
        rest = steps - warmup - optim.hold_steps
        progress = min(1.0, max(0.0, (count - warmup - optim.hold_steps) / max(1, rest)))
        return peak * optim.final_rate**progress
    if count < warmup:
        return peak * count / warmup
    progress = min(1.0, (count - warmup) / max(1, steps - warmup))
    if optim.schedule == "linear":
        return final + (peak - final) * (1.0 - progress)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def decay_groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """The parameters that require gradients in two groups, with weight decay and without.

    With `decay_all` off, parameters with fewer than two dimensions (biases, norm gains) are not decayed.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[optim.decay_all or parameter.dim() >= 2].append(parameter)
    return [{"params": p, "weight_decay": optim.weight_decay if decayed else 0.0} for decayed, p in groups.items()]


def build_optimiser(groups: Sequence[dict[str, Any]], optim: Optim) -> torch.optim.AdamW:
    """AdamW over groups of parameters, fused where every one is floating point on CPU or CUDA."""
    groups = [g for g in groups if g["params"]]
    parameters = [p for g in groups for p in g["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, fused=fused)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every parameter group, times its own factor `rate` where it has one."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scales gradients by min(1, limit / norm), norm = global L2 norm; returns the norm (0-D float32 or float64, on the
    device).

    Nothing is read from the device. Without a limit only the norm is computed. Of sharded gradients every rank scales
    its shards by the norm of the whole.
    """
    from torch.distributed.tensor import DTensor  # takes more than a second, which what trains nothing is spared

    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    # The norm of 16-bit gradients would have their 8 or 11 bits.
    norm = torch.nn.utils.get_total_norm([g.float() if g.itemsize < 4 else g for g in gradients])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if limit is not None:
        shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        torch._foreach_mul_(shards, (limit / norm).clamp(max=1.0))
    return norm


def optimiser_tensors(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of the optimiser as `optim.<entry>.<parameter name>` -> tensor, sharded as the parameter is."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for entry, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{PREFIX}{entry}.{name}"] = torch.as_tensor(value)
    return tensors


def make_state(model: nn.Module, optimiser: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """State of the optimiser for `names` of `optimiser_tensors`, zero, to be filled in place from a checkpoint.

    `ValueError` where a name does not fit the model.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    step_on_device = optimiser.defaults.get("fused") or optimiser.defaults.get("capturable")
    for key in names:
        entry, _, name = key.removeprefix(PREFIX).partition(".")
        if name not in named or entry not in ("step", "exp_avg", "exp_avg_sq"):
            raise ValueError(f"checkpoint: optimiser state {key!r} does not fit the model")
        value = torch.zeros_like(named[name], memory_format=torch.preserve_format).detach()
        if entry == "step":
            value = torch.zeros((), dtype=torch.float32, device=value.device if step_on_device else "cpu")
        optimiser.state[named[name]][entry] = value
    return optimiser_tensors(model, optimiser)
