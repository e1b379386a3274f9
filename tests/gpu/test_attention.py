"""Attention on the GPU: the Triton operator against float64, and every engine that runs against it."""

from __future__ import annotations

import math

import pytest
import torch
from gpu.conftest import FLOATS, both, compare
from support import reference
from torch import Tensor

from d2v_kernels import Alibi, alibi_slopes, attend, pack_lengths, use_backend
from d2v_kernels.ops import attention

ops = torch.ops.d2v
SHAPES = [(1, 130, 2, 64), (1, 65, 2, 80), (3, 37, 1, 16), (1, 97, 2, 128)]


def views(projected: Tensor) -> list[Tensor]:
    """Query, key and value (N,T,H,D) as they lie in one projection (N,T,3,H,D)."""
    return [*projected.unbind(2)]


def on_device(place, inputs: list[Tensor]) -> list[Tensor]:
    return views(place.put(torch.stack(inputs, 2)))


def make(n: int, t: int, h: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], tuple, Tensor]:
    """Views of one projection, the bias and the lengths, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    inputs = views(torch.randn(n, t, 3, h, d, generator=generator).to(dtype))
    positions = torch.randint(0, 3 * t, (n, t - 1), generator=generator).sort(1).values.int()
    lengths = torch.randint(1, t + 1, (n,), generator=generator)
    grad = torch.randn(n, t, h, d, generator=generator).to(dtype)
    return inputs, (0.2 * torch.rand(h, generator=generator), positions, lengths, None), grad


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_operator(place, dtype, shape, dropout) -> None:
    place.need("attention", "triton", dtype, str(shape[3]))
    if place.emulated and (not dropout or (shape[1] > 100) == (dtype == torch.float32)):
        pytest.skip("few cases in the interpreter")
    inputs, bias, grad = make(*shape, dtype)
    keys = torch.arange(shape[0]) * 12345 + 3
    rest = (*bias, keys, dropout, shape[3] ** -0.5)
    moved = [None if x is None else place.put(x) if isinstance(x, Tensor) else x for x in rest]
    there = on_device(place, inputs)
    with use_backend("triton"):
        out, log_sum = ops.attention(*there, *moved)
        gradients = ops.attention_backward(place.put(grad), *there, out, log_sum, *moved)
        again = ops.attention_backward(place.put(grad), *there, out, log_sum, *moved)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    compare([out, log_sum], *both(reference.attention, *inputs, *rest), factor=12.0)
    # The gradient is that of the rounded result: give the reference the same one.
    given = (out.cpu(), log_sum.cpu())
    compare(gradients, *both(reference.attention_backward, grad, *inputs, *given, *rest), factor=20.0)


def test_rows_without_keys(place) -> None:
    place.need("attention", "triton", torch.float32, "64")
    inputs, bias, grad = make(2, 70, 2, 64, torch.float32)
    rest = (*bias[:2], torch.tensor([0, 5]), None, None, 0.0, 0.125)
    moved = [None if x is None else place.put(x) if isinstance(x, Tensor) else x for x in rest]
    there = on_device(place, inputs)
    with use_backend("triton"):
        out, log_sum = ops.attention(*there, *moved)
        gradients = ops.attention_backward(place.put(grad), *there, out, log_sum, *moved)
    assert not out[0].any()
    assert log_sum[0].eq(math.inf).all()
    assert not any(g[0].any() for g in gradients[:3])
    assert not gradients[1][1, 5:].any()


def near(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert float((a.float() - b.float()).abs().max() / b.float().abs().max()) < 0.02


def leaves(inputs: list[Tensor], device: torch.device) -> list[Tensor]:
    return [x.to(device).contiguous().requires_grad_() for x in inputs]


@pytest.mark.parametrize("engine", ["xformers", "sdpa", "triton"])
def test_packed_engines(gpu, engine) -> None:
    """Against float32 on the CPU."""
    request = attention.Request("cuda", torch.bfloat16, 64, packed=True)
    if reasons := attention.why_not_engine(engine, request):
        pytest.skip("; ".join(reasons))
    inputs, _, grad = make(1, 200, 2, 64, torch.bfloat16)
    results = []
    for device, dtype, name in ((gpu, torch.bfloat16, engine), (torch.device("cpu"), torch.float32, "auto")):
        x = [t[0].to(dtype).detach().requires_grad_() for t in leaves(inputs, device)]
        y = attend(*x, packed=pack_lengths([3, 0, 117, 80], device), engine=name)
        results.append([y.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(y, x, grad[0].to(device, dtype)))])
    near(*results)


@pytest.mark.parametrize("engine", ["triton", "flex"])
def test_engines_with_a_bias(gpu, engine) -> None:
    """Against float32 on the CPU; a negative scale has no gradient."""
    request = attention.Request("cuda", torch.bfloat16, 64, alibi=True, masked=True)
    if reasons := attention.why_not_engine(engine, request):
        pytest.skip("; ".join(reasons))
    inputs, bias, grad = make(2, 130, 4, 64, torch.bfloat16)
    results = []
    for device, dtype, name in ((gpu, torch.bfloat16, engine), (torch.device("cpu"), torch.float32, "auto")):
        x = [t.to(dtype).detach().requires_grad_() for t in leaves(inputs, device)]
        scale = torch.linspace(-0.5, 1.0, 4, device=device).requires_grad_()
        alibi = Alibi(alibi_slopes(4, device), bias[1].to(device), scale)
        y = attend(*x, alibi=alibi, valid=bias[2].to(device), engine=name)
        gradients = torch.autograd.grad(y, [*x, scale], grad.to(device, dtype))
        results.append([y.detach().cpu(), *(g.cpu() for g in gradients)])
    near(*results)
    assert results[0][-1][0] == 0.0


def test_dense_is_pytorchs(gpu) -> None:
    inputs, bias, _ = make(2, 130, 4, 64, torch.bfloat16)
    x, valid = leaves(inputs, gpu), bias[2].to(gpu)
    near([attend(*x, valid=valid).detach()], [attend(*x, valid=valid, engine="triton").detach()])


def test_choice_on_a_gpu(gpu) -> None:
    """The operator with a bias is Triton's wherever Triton runs; nothing else makes a T x T tensor."""
    assert attention.choose_engine(attention.Request("cuda", torch.bfloat16, 64)) == "sdpa"
    name = attention.choose_engine(attention.Request("cuda", torch.bfloat16, 64, alibi=True, dropout=True))
    assert name == "triton"
