"""Convolutions over time as products of views, against PyTorch's convolution in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from d2v.model import layers as module
from d2v.model.layers import convolve

CASES = [  # samples, length, input channels, output channels, kernel, stride, bias
    (2, 37, 16, 8, 3, 2, True), (3, 38, 16, 8, 2, 2, False), (1, 41, 17, 4, 4, 2, True), (2, 5, 16, 4, 4, 3, False),
    (2, 3, 16, 4, 3, 2, False), (1, 30, 16, 4, 1, 1, True),
]  # fmt: skip


def results(conv: nn.Conv1d, x: Tensor, plain: bool) -> tuple[Tensor, ...]:
    """The result, and the gradients of input and parameters."""
    y = conv(x.transpose(1, 2)).transpose(1, 2) if plain else convolve(conv, x)
    return (y, *torch.autograd.grad(y, [x, *conv.parameters()], weights_of(y)))


def weights_of(y: Tensor) -> Tensor:
    return torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view(y.shape)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_the_library(case: tuple[int, int, int, int, int, int, bool]) -> None:
    samples, length, inputs, outputs, kernel, stride, bias = case
    torch.manual_seed(0)
    conv = nn.Conv1d(inputs, outputs, kernel, stride, bias=bias).double()
    x = torch.randn(samples, length, inputs, dtype=torch.double, requires_grad=True)
    assert module._suits_products(conv, x)
    for got, expected in zip(results(conv, x, plain=False), results(conv, x, plain=True), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_sliced_inputs_and_second_use() -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(16, 8, 3, 2).double()
    x = torch.randn(2, 21, 40, dtype=torch.double)[:, 1:, 3:19].requires_grad_()
    for got, expected in zip(results(conv, x, plain=False), results(conv, x, plain=True), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(convolve(conv, x), convolve(conv, x))


@pytest.mark.parametrize(
    "conv",
    [nn.Conv1d(16, 8, 5, 2), nn.Conv1d(16, 8, 3, padding=1), nn.Conv1d(16, 8, 2, groups=2), nn.Conv1d(1, 8, 4, 2)],
    ids=["long kernel", "padding", "groups", "one channel"],
)
def test_others_go_to_the_library(conv: nn.Conv1d) -> None:
    x = torch.randn(2, 20, conv.in_channels)
    assert not module._suits_products(conv, x)
    torch.testing.assert_close(convolve(conv, x), conv(x.transpose(1, 2)).transpose(1, 2))


LAYERS = {
    "first of the front end": nn.Conv1d(1, 32, 10, 5, bias=False),
    "front end": nn.Conv1d(32, 32, 3, 2),
    "positions": nn.Conv1d(32, 32, 5, padding=2, groups=4),
    "spread out": nn.Conv1d(32, 24, 3, padding=1, dilation=2),
    "even kernel": nn.Conv1d(32, 32, 4, padding=2, groups=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_grid_of_one_row_is_a_sequence(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What GPUs get: the numbers of a convolution over time, and no copy that brings channels to another place."""
    monkeypatch.setattr(module, "_suits_products", lambda *_: False)
    monkeypatch.setattr(module, "_keeps_layout", lambda _: True)
    conv = copy.deepcopy(LAYERS[name]).double()
    x = torch.randn(3, 40, conv.in_channels, dtype=torch.double, requires_grad=True)
    got, expected = (results(conv, x, plain) for plain in (False, True))
    assert got[0].is_contiguous()
    if name == "even kernel":
        cut = x.detach().requires_grad_()
        y = conv(cut.mT).mT[:, :-1]
        expected = (y, *torch.autograd.grad(y, [cut, *conv.parameters()], weights_of(y)))
    for mine, library in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, library, rtol=1e-12, atol=1e-12)
    conv.float()
    x = torch.randn(3, 40, conv.in_channels, requires_grad=True)
    y = module.convolve_grid(conv, x)
    assert y.is_contiguous() and x.is_contiguous()
    (of_x,) = torch.autograd.grad(y, [x], torch.randn(y.shape))
    assert of_x.is_contiguous()


@pytest.mark.parametrize("keeps", [True, False])
def test_the_front_end_makes_no_copies(monkeypatch: pytest.MonkeyPatch, keeps: bool) -> None:
    """Of one sample's activations, forward and backward; PyTorch's way, on the other hand, is seen to make them."""
    monkeypatch.setattr(module, "_suits_products", lambda *_: False)
    monkeypatch.setattr(module, "_keeps_layout", lambda _: keeps)
    convs = nn.ModuleList([nn.Conv1d(1, 32, 10, 5), nn.Conv1d(32, 32, 3, 2), nn.Conv1d(32, 32, 5, padding=2, groups=4)])
    copies: list[str] = []
    largest = max(conv.weight.numel() for conv in convs)  # their gradients may come in another order

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name.split("::")[1]
            if name in ("clone", "copy_", "_to_copy") and args[0].numel() > largest:
                copies.append(name)
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, 400, 1)
    with Watch():
        for conv in convs:
            x = module.norm_gelu(convolve(conv, x))
        x.backward(torch.ones_like(x))
    assert bool(copies) != keeps


def relative_error(x: Tensor, truth: Tensor) -> float:
    return float((x.detach().double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("case", [(2, 401, 64, 48, 3, 2), (5, 200, 32, 64, 2, 2), (3, 301, 17, 40, 5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("around", [True, False])
def test_autocast_errs_as_the_library_does(case, dtype, around) -> None:
    """around: the backward pass is inside the autocast, too."""
    samples, length, inputs, outputs, kernel, stride = case
    torch.manual_seed(0)
    conv, exact = (nn.Conv1d(inputs, outputs, kernel, stride) for _ in range(2))
    exact.load_state_dict({name: t.bfloat16().float() for name, t in conv.state_dict().items()})
    x = torch.randn(samples, length, inputs).bfloat16().to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y = exact.double()(wide.mT).mT
    grad = torch.randn(y.shape).bfloat16()
    truth = (y.detach(), *torch.autograd.grad(y, [wide, *exact.parameters()], grad.double()))
    found = []
    for plain in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module._suits_products(conv, x)
            y = conv(x.mT).mT if plain else convolve(conv, x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            found.append((y, *torch.autograd.grad(y, [x, *conv.parameters()], grad)))
    for mine, library, true in zip(*found, truth, strict=True):
        assert mine.dtype == library.dtype
        assert relative_error(mine, true) <= 1.5 * relative_error(library, true)


def test_what_autocast_leaves_alone() -> None:
    x = torch.randn(2, 20, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolve(nn.Conv1d(16, 8, 3, 2).double(), x.double()).dtype == torch.float64
        assert not module._suits_products(nn.Conv1d(16, 8, 3, 2), x.double())
    with torch.autocast("cpu", dtype=torch.float16):
        assert not module._suits_products(nn.Conv1d(16, 8, 3, 2), x)


def test_autocast_gives_nan_to_the_windows_that_hold_it_alone_and_the_same_bits_again() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv1d(64, 48, 3, 2), torch.randn(2, 301, 64)
    x[1, 100] = float("nan")
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = convolve(conv, x)
            runs.append([y, *torch.autograd.grad(y[0].float().square().sum(), [*conv.parameters()])])
    finally:
        torch.set_num_threads(before)
    assert y.isnan().any(2).nonzero().tolist() == [[1, 49], [1, 50]]
    assert y.isnan().all(2).sum() == 2
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(runs[0], runs[2], strict=True))


@pytest.mark.parametrize("length", [0, 1, 2])
def test_an_input_that_is_shorter_than_the_kernel_is_refused(length: int) -> None:
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        convolve(nn.Conv1d(16, 4, 3, 2), torch.randn(1, length, 16))


def test_memory_is_the_input_only() -> None:
    conv, x = nn.Conv1d(16, 8, 3, 2, bias=False), torch.randn(2, 21, 16, requires_grad=True)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        convolve(conv, x)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), conv.weight.data_ptr()}
    kept.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        convolve(conv, x)
    assert [t.dtype for t in kept if t.data_ptr() != conv.weight.data_ptr()] == [torch.bfloat16]
