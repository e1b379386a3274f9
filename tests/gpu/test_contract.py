"""What every operator promises on a device: streams, no waiting for it, clear errors, empty tensors, torch.compile."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.small import flat, make_calls, why_not
from d2v_kernels import (
    EmaPlan,
    Noise,
    attend,
    average_layers,
    gather_tokens,
    layer_norm_gelu,
    masked_regression_loss,
    registry,
    restore_tokens,
    update_ema_,
)

ops = torch.ops.d2v
every_operator = pytest.mark.parametrize("op", registry.OPERATORS)
SLEEP = 200_000_000  # cycles: about a tenth of a second


def skip_unless(op: str, backend: str, device: torch.device) -> None:
    if reasons := why_not(op, backend, device.type):
        pytest.skip("; ".join(reasons))


@every_operator
def test_runs_on_the_current_stream(gpu, backend, op) -> None:
    """Inputs that a slow stream still has to write; an operator on another stream would read the old ones."""
    skip_unless(op, backend, gpu)
    torch.manual_seed(0)
    wanted = [t.clone() for t in flat(make_calls(gpu)[op]())]
    torch.cuda.synchronize()
    torch.manual_seed(0)
    side = torch.cuda.Stream(gpu)
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        results = flat(make_calls(gpu)[op]())
    side.synchronize()
    for a, b in zip(results, wanted, strict=True):
        assert torch.equal(a, b)


def test_ema_runs_on_the_current_stream(gpu, backend) -> None:
    skip_unless("update_ema_", backend, gpu)
    averages, sources = [torch.zeros(70001, device=gpu)], [torch.zeros(70001, device=gpu)]
    plan = EmaPlan(averages, sources)
    torch.cuda.synchronize()
    for step in (lambda: update_ema_(averages, sources, 0.5), lambda: plan.step(0.5)):
        averages[0].zero_()
        sources[0].zero_()
        side = torch.cuda.Stream(gpu)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP)
            sources[0].fill_(2.0)
            step()
        torch.cuda.synchronize()
        assert averages[0].eq(1.0).all()


def test_ema_plan_on_another_stream_than_its_table_came_by(gpu, backend) -> None:
    """The table is uploaded behind a slow kernel; the memory of a dropped plan is not reused while a step reads it."""
    skip_unless("update_ema_", backend, gpu)
    averages, sources = [torch.zeros(70001, device=gpu)], [torch.full((70001,), 2.0, device=gpu)]
    slow, side = torch.cuda.Stream(gpu), torch.cuda.Stream(gpu)
    torch.cuda.synchronize()
    with torch.cuda.stream(slow):
        torch.cuda._sleep(SLEEP)
        plan = EmaPlan(averages, sources)
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        plan.step(0.5)
    del plan
    with torch.cuda.stream(slow):  # takes the table's memory, if it is free
        for size in (32, 512, 4096):
            torch.zeros(size, dtype=torch.uint8, device=gpu)
    torch.cuda.synchronize()
    assert averages[0].eq(1.0).all()


@every_operator
def test_never_waits_for_the_device(gpu, backend, op) -> None:
    skip_unless(op, backend, gpu)
    call = make_calls(gpu)[op]
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_plan_and_lengths_never_wait(gpu, backend) -> None:
    skip_unless("update_ema_", backend, gpu)
    tensors = [torch.ones(1000, device=gpu) for _ in range(3)]
    plan = EmaPlan(tensors, [t.clone() for t in tensors])
    layers, lengths = [torch.randn(3, 50, 64, device=gpu)] * 2, torch.tensor([50, 0, 7])
    average_layers(layers, lengths=lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan.step(0.9)
        average_layers(layers, lengths=lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_operator
def test_result_lies_on_the_device(place, backend, op) -> None:
    skip_unless(op, backend, place.device)
    for t in flat(make_calls(place.device, 16, 32)[op]()):
        assert t.device.type == place.device.type
        assert t.isfinite().all()


def test_empty_tensors(place, backend) -> None:
    device = place.device
    empty = torch.zeros(0, 5, 8, device=device)
    lists = torch.zeros(0, 3, dtype=torch.int32, device=device)
    if not why_not("average_layers", backend, device.type):
        assert average_layers([empty] * 2).shape == (0, 5, 8)
        update_ema_([empty], [empty.clone()], 0.5)
        update_ema_([], [], 0.5)
    if not why_not("gather_tokens", backend, device.type):
        assert gather_tokens(empty, lists).shape == (0, 3, 8)
        x = torch.zeros(2, 5, 8, device=device, requires_grad=True)
        gather_tokens(x, torch.zeros(2, 0, dtype=torch.int32, device=device)).sum().backward()
        assert not x.grad.any()
        keys = torch.zeros(0, dtype=torch.int64, device=device)
        assert restore_tokens(empty, lists, fill=Noise(1.0, keys)).shape == (0, 3, 8)
    if not why_not("masked_regression_loss", backend, device.type):
        x = torch.zeros(0, 8, device=device, requires_grad=True)
        loss = masked_regression_loss(x, x.detach())
        assert float(loss.loss.detach()) == 0.0
        assert loss.prediction_std.isnan()
        assert layer_norm_gelu(x).shape == (0, 8)
        assert attend(*[torch.zeros(0, 5, 2, 16, device=device)] * 3, engine="triton").shape == (0, 5, 2, 16)


def test_errors_name_the_operator(gpu, backend) -> None:
    x, index = torch.ones(2, 5, 8, device=gpu), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"gather_tokens: device of index: expected cuda:\d, got cpu"):
        gather_tokens(x, index)
    with pytest.raises(ValueError, match="average_layers: last stride of"):
        torch.ops.d2v.average_layers([x.transpose(1, 2)], "none", "none", None, 1e-5, torch.float32)
    with pytest.raises(ValueError, match=r"update_ema_: device of sources\[0\]: expected cuda:\d, got cpu"):
        update_ema_([x], [x.cpu()], 0.5)
    with pytest.raises(TypeError, match="restore_tokens: dtype of restore"):
        restore_tokens(x, torch.zeros(2, 3, device=gpu), fill=x[0, 0])


def test_another_device_keeps_the_current_one(gpu, backend) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    other = torch.device("cuda", 1 - (gpu.index or 0))
    for op, call in make_calls(other).items():
        if not why_not(op, backend, other.type):
            assert all(t.device == other for t in flat(call()))
    assert torch.cuda.current_device() == (gpu.index or 0)


@pytest.mark.parametrize("compiler", ["inductor"])
def test_compiles_whole(gpu, compiler) -> None:
    """All operators of a training step in one graph, under the compiler that users have."""
    torch.manual_seed(0)
    layers = [torch.randn(4, 32, 64, device=gpu) for _ in range(2)]
    index = torch.stack([torch.randperm(32, device=gpu)[:10] for _ in range(8)]).int()
    order, keys = torch.stack([torch.randperm(32, device=gpu) for _ in range(8)]).int(), torch.arange(8, device=gpu)
    x = torch.randn(4, 32, 64, device=gpu, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        target = average_layers(layers, norm="instance", out_norm="layer").flatten(0, 1)
        kept = layer_norm_gelu(gather_tokens(x * 2, index, clones=2))
        heads = kept.view(8, 10, 4, 16)
        kept = kept + attend(heads, heads, heads, dropout=0.1, dropout_keys=keys).flatten(2)
        full = restore_tokens(kept, order, fill=Noise(0.1, keys)).view(4, 2, 32, 64)[:, 0].flatten(0, 1)
        return masked_regression_loss(full, target).loss

    wanted = torch.autograd.grad(step(x), x)[0]
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend=compiler)(x), x)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
