"""Schedule, optimiser groups, clipping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from d2v.config import Ema, Optim
from d2v.train.optim import (
    build_optimiser,
    clip_gradients,
    decay_groups,
    learning_rate_at,
    make_state,
    optimiser_tensors,
    set_learning_rate,
)


def test_schedule_is_evaluated_at_the_completed_updates() -> None:
    optim = Optim(learning_rate=2.0, warmup_steps=4)
    assert [learning_rate_at(optim, u, 12) for u in range(1, 6)] == [0.0, 0.5, 1.0, 1.5, 2.0]
    for u in range(5, 13):
        assert learning_rate_at(optim, u, 12) == pytest.approx(1 + math.cos(math.pi * (u - 5) / 8))
    assert learning_rate_at(optim, 13, 12) == pytest.approx(0.0)
    assert learning_rate_at(Optim(learning_rate=1.0, warmup_steps=0), 1, 10) == 1.0
    assert learning_rate_at(Optim(learning_rate=1.0, warmup_steps=10), 10, 10) == pytest.approx(0.9)


def test_teacher_decay_starts_at_update_one() -> None:
    ema = Ema(start=0.9, end=1.0)
    assert ema.decay(1, 10) == pytest.approx(0.91)
    assert ema.decay(10, 10) == 1.0


def test_first_update_changes_no_weight() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optim = Optim(learning_rate=0.1, warmup_steps=10)
    optimiser = build_optimiser(decay_groups(model, optim), optim)
    model(torch.ones(1, 3)).sum().backward()
    set_learning_rate(optimiser, learning_rate_at(optim, 1, 100))
    optimiser.step()
    assert torch.equal(model.weight, before)
    assert optimiser.state[model.weight]["exp_avg"].abs().sum() > 0


@pytest.mark.parametrize("decay_all", [True, False])
def test_decay_groups(decay_all: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[0].bias.requires_grad_(False)
    optim = Optim(weight_decay=0.3, decay_all=decay_all)
    optimiser = build_optimiser(decay_groups(model, optim), optim)
    decay = {id(p): g["weight_decay"] for g in optimiser.param_groups for p in g["params"]}
    assert id(model[0].bias) not in decay
    assert decay[id(model[0].weight)] == 0.3
    assert decay[id(model[1].weight)] == (0.3 if decay_all else 0.0)
    assert optimiser.defaults["fused"]


def test_clipping_has_no_epsilon() -> None:
    def gradients(limit: float | None, *values: list[float]) -> tuple[float, list[list[float]]]:
        parameters = [nn.Parameter(torch.zeros(len(v), dtype=torch.float64)) for v in values]
        for p, v in zip(parameters, values, strict=True):
            p.grad = torch.tensor(v, dtype=torch.float64)
        norm = float(clip_gradients(parameters, limit))
        return norm, [p.grad.tolist() for p in parameters if p.grad is not None]

    assert gradients(1.0, [3.0], [0.0, 4.0]) == (5.0, [[3.0 * (1 / 5.0)], [0.0, 4.0 * (1 / 5.0)]])
    assert gradients(6.0, [3.0], [0.0, 4.0]) == (5.0, [[3.0], [0.0, 4.0]])
    assert gradients(None, [30.0, 40.0]) == (50.0, [[30.0, 40.0]])
    assert gradients(1.0, [0.0]) == (0.0, [[0.0]])
    assert math.isnan(gradients(1.0, [math.nan, 1.0])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_of_16_bit_gradients(dtype: torch.dtype) -> None:
    """In bfloat16 the norm of 257 ones in two tensors would be 16, and clipping by it too weak."""
    parameters = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (200, 57)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    norm = clip_gradients(parameters, 8.0)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(257**0.5, rel=1e-6)
    assert all(torch.equal(p.grad, torch.full_like(p, 8.0 / 257**0.5)) for p in parameters if p.grad is not None)
    large = [nn.Parameter(torch.zeros(4, dtype=torch.float16))]
    large[0].grad = torch.full_like(large[0], 60_000.0)  # the norm is beyond float16
    assert float(clip_gradients(large, None)) == pytest.approx(120_000.0, rel=1e-3)


def test_optimiser_state_round_trip() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimisers = [build_optimiser(decay_groups(m, Optim(learning_rate=0.1)), Optim(learning_rate=0.1)) for m in models]

    def step(i: int) -> None:
        models[i](torch.ones(1, 3)).square().sum().backward()
        optimisers[i].step()
        optimisers[i].zero_grad()

    step(0)
    models[1].load_state_dict(models[0].state_dict())
    stored = optimiser_tensors(models[0], optimisers[0])
    for name, place in make_state(models[1], optimisers[1], stored).items():
        place.copy_(stored[name])
    for i in (0, 1):
        step(i)
    assert torch.equal(models[0].weight, models[1].weight)
    with pytest.raises(ValueError, match="does not fit the model"):
        make_state(models[1], optimisers[1], ["optim.exp_avg.other"])


def test_groups_have_rates_of_their_own() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "rate": 0.5}, {"params": [nn.Parameter(torch.zeros(1))]}]
    optimiser = build_optimiser(groups, Optim())
    set_learning_rate(optimiser, 0.2)
    assert [g["lr"] for g in optimiser.param_groups] == [0.1, 0.2]
