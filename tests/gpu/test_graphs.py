"""Every operator in a CUDA graph: captured once, replayed on new values of its inputs, equal to a plain call."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.small import flat, make_calls, why_not
from d2v_kernels import EmaPlan, registry, update_ema_


def capture(call):
    """A graph of the call and its result; run outside a capture before, as every kernel must be compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def inputs_of(call) -> list[torch.Tensor]:
    """The floating tensors that a call of `make_calls` takes."""
    tensors = [t for t in tree_leaves(call.args) if isinstance(t, torch.Tensor)]
    return [t for t in tensors if t.is_floating_point() and t.numel() > 100]


@pytest.mark.parametrize("op", [op for op in registry.OPERATORS if not op.endswith("ema_")])
def test_capture_and_replay(gpu, backend, op) -> None:
    if reasons := why_not(op, backend, gpu.type):
        pytest.skip("; ".join(reasons))
    call = make_calls(gpu)[op]
    graph, result = capture(call)
    for seed in (1, 2):
        torch.manual_seed(seed)
        for x in inputs_of(call):
            x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = [t.clone() for t in flat(result)]
        for a, b in zip(replayed, flat(call()), strict=True):
            assert torch.equal(a, b)
    assert all(t.isfinite().all() for t in replayed)


@pytest.mark.parametrize("by_plan", [False, True])
def test_ema_with_a_weight_on_the_device(gpu, backend, by_plan) -> None:
    """The weight changes from replay to replay; weight 0 changes nothing."""
    if reasons := why_not("update_ema_", backend, gpu.type):
        pytest.skip("; ".join(reasons))
    averages, sources = [torch.zeros(40001, device=gpu)], [torch.ones(40001, device=gpu)]
    copies = [torch.zeros(40001, device=gpu, dtype=torch.bfloat16)]
    weight = torch.zeros((), dtype=torch.float64, device=gpu)
    plan = EmaPlan(averages, sources, copies)

    def step() -> None:
        if by_plan:
            plan.step(weight)
        else:
            update_ema_(averages, sources, weight, copies=copies)

    graph, _ = capture(step)
    averages[0].zero_()
    wanted = torch.zeros((), dtype=torch.float64)
    for w in (0.5, 0.25, 0.0, 1.0):
        weight.fill_(w)
        graph.replay()
        wanted += w * (1.0 - wanted)
        assert torch.equal(averages[0].cpu(), wanted.float().expand(40001))
        assert torch.equal(copies[0], averages[0].bfloat16())


def test_a_moved_tensor_stops_a_capture(gpu, backend) -> None:
    if reasons := why_not("update_ema_", backend, gpu.type):
        pytest.skip("; ".join(reasons))
    averages, sources = [torch.zeros(100, device=gpu)], [torch.ones(100, device=gpu)]
    plan = EmaPlan(averages, sources)
    plan.step(0.5)
    sources[0].data = sources[0].data.clone()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="EmaPlan: a tensor has moved"), torch.cuda.graph(graph):
        plan.step(0.5)
    plan.step(0.5)
    assert averages[0].eq(0.75).all()
