"""Linear layers of float32 rows on CPUs: the same numbers by either library, and who multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_kernels import choose_products, gelu_linear, linear, multiply_into, products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def onednn() -> Iterator[None]:
    choose_products("onednn")
    yield
    choose_products("auto")


def used_onednn(x: Tensor, weight: Tensor) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear(x, weight)
    return any("_linear_pointwise" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24), (24,), (0, 24), (3, 0, 24)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_and_gradients_are_those_of_float64(shape: tuple[int, ...], with_bias: bool) -> None:
    x, weight = torch.randn(shape), torch.randn(40, 24)
    bias = torch.randn(40) if with_bias else None
    inputs = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    got, want = linear(*inputs), F.linear(*wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    grad = torch.randn(got.shape)
    for a, b in zip(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, wide, grad.double()), strict=True
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [None, torch.arange(32.0)])
def test_products_of_any_strides(bias: Tensor | None) -> None:
    a, b = torch.randn(40, 30), torch.randn(64, 20)
    for left in (a[:, :20], a[::2, 10:], a.t()[:20].t(), torch.randn(5)[:, None].expand(5, 20)):
        for right in (b.t()[:, ::2], b.t()[:, :32], torch.randn(20, 32), torch.randn(32, 1).t().expand(20, 32)):
            want = left.double() @ right.double() + (0 if bias is None else bias)
            got = products.product(left, right, bias).double()
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_products_into_a_tensor() -> None:
    a, b, bias = torch.randn(6, 8), torch.randn(8, 5), torch.randn(5)
    out = torch.ones(6, 10)[:, ::2]
    for choice in ("onednn", "library"):
        choose_products(choice)
        multiply_into(out, a, b, bias)
        torch.testing.assert_close(out, a @ b + bias)
        multiply_into(out, a, b)
        multiply_into(out, a, b, add=True)
        torch.testing.assert_close(out, 2 * a @ b)


def test_gelu_linear_by_either_library() -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((9, 24), (40, 24), (40,)))
    results = []
    for choice in ("onednn", "library"):
        choose_products(choice)
        y = gelu_linear(x, weight, bias)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_only_float32_on_a_cpu_outside_autocast_and_compilation() -> None:
    x, weight = torch.randn(4, 24), torch.randn(8, 24)
    assert used_onednn(x, weight)
    assert not used_onednn(x.double(), weight.double())
    assert not used_onednn(x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu"):
        assert linear(x, weight).dtype == torch.bfloat16
    choose_products("library")
    assert not used_onednn(x, weight)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_compiles_as_one_graph() -> None:
    x, weight = torch.randn(4, 24), torch.randn(8, 24, requires_grad=True)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))


def test_what_does_not_fit_is_pytorchs_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(4, 23), torch.randn(8, 24))
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.randn(4, 24), torch.randn(8, 24).double())
    with pytest.raises(ValueError, match="expected one of auto, library, onednn, got 'mkl'"):
        choose_products("mkl")


def test_nan_comes_through() -> None:
    x = torch.randn(4, 24)
    x[1, 3] = float("nan")
    out = linear(x, torch.randn(8, 24))
    assert bool(out[1].isnan().all()) and not bool(out[[0, 2, 3]].isnan().any())


@pytest.mark.parametrize(
    ("vendor", "family", "capability", "wanted"),
    [
        ("AuthenticAMD", "26", "AVX512", True),
        ("AuthenticAMD", "25", "AVX512", False),
        ("AuthenticAMD", "26", "AVX2", False),
        ("GenuineIntel", "26", "AVX512", False),
        ("", "", "AVX512", False),
    ],
)
def test_auto_goes_by_the_processor(
    monkeypatch: pytest.MonkeyPatch, vendor: str, family: str, capability: str, wanted: bool
) -> None:
    choose_products("auto")
    text = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\n\nprocessor\t: 1\n" if vendor else "flags"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    products._onednn_is_quicker.cache_clear()
    try:
        assert products.takes_onednn(torch.randn(2, 2)) is wanted
    finally:
        products._onednn_is_quicker.cache_clear()
