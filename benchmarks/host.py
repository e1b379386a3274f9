"""Host overhead with pytest-benchmark: `python -m pytest benchmarks/host.py --benchmark-columns=min,median`.

Inputs are tiny, so that a call costs its dispatch. Instruction counts, which do not drift: `benchmarks.instructions`.
"""

from __future__ import annotations

import pytest
import torch

import d2v_kernels as dk


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_average_layers(benchmark) -> None:
    layers = [torch.ones(1, 2, 8)] * 8
    benchmark(lambda: dk.average_layers(layers))


def test_gather_tokens(benchmark) -> None:
    x, index = torch.ones(1, 4, 8), torch.zeros(1, 2, dtype=torch.int32)
    benchmark(lambda: dk.gather_tokens(x, index))


def test_gather_tokens_with_gradient(benchmark) -> None:
    x, index = torch.ones(1, 4, 8, requires_grad=True), torch.zeros(1, 2, dtype=torch.int32)
    grad = torch.ones(1, 2, 8)
    benchmark(lambda: torch.autograd.grad(dk.gather_tokens(x, index), x, grad))


def test_restore_tokens(benchmark) -> None:
    kept, restore = torch.ones(1, 2, 8), torch.tensor([[0, 2, 1]], dtype=torch.int32)
    noise = dk.Noise(0.01, torch.tensor([1]))
    benchmark(lambda: dk.restore_tokens(kept, restore, fill=noise))


def test_masked_regression_loss(benchmark) -> None:
    x, y = torch.ones(4, 8), torch.zeros(4, 8)
    benchmark(lambda: dk.masked_regression_loss(x, y))


@pytest.mark.parametrize("tensors", [1, 400])
@pytest.mark.parametrize("route", ["list", "plan"])
def test_update_ema(benchmark, tensors: int, route: str) -> None:
    averages, sources = [torch.zeros(8) for _ in range(tensors)], [torch.ones(8) for _ in range(tensors)]
    plan = dk.EmaPlan(averages, sources)
    if route == "plan":
        benchmark(lambda: plan.step(0.9))
    else:
        benchmark(lambda: dk.update_ema_(averages, sources, 0.9))


@pytest.mark.parametrize(("rows", "copies"), [(16, 16), (1, 1)])
def test_mask_sampler(benchmark, rows: int, copies: int) -> None:
    sampler = dk.MaskSampler("block", grid=(14, 14), ratio=0.8, adjust=0.07, span=3, inverse=True)
    ids = torch.arange(rows)
    benchmark(lambda: sampler.draw(ids, 0, copies=copies))
