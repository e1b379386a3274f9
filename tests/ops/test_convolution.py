"""conv_layer_norm_gelu: accuracy of result and gradients, one axis and two, odd and empty shapes, messages."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import reference
from support.accuracy import assert_accurate
from support.tensors import BACKENDS, FLOATS, dtypes, random_rows
from torch import Tensor
from torch.library import opcheck

from d2v_kernels import conv_layer_norm_gelu, use_backend

ops = torch.ops.d2v
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
# x, weight: groups of 24 and 48 channels, an even kernel, one longer than the grid, one group, channels of no power of
# two, more output channels of a group than a block has; grids of images.
SHAPES = [
    ((2, 70, 96), (96, 24, 7)),
    ((1, 33, 96), (48, 48, 3)),
    ((3, 9, 12), (12, 3, 4)),
    ((2, 5, 8), (8, 4, 19)),
    ((2, 1, 16), (16, 1, 3)),
    ((1, 20, 7), (5, 7, 1)),
    ((1, 20, 6), (132, 3, 3)),
    ((2, 5, 4, 12), (12, 3, 3, 3)),
    ((1, 4, 6, 10), (20, 5, 5, 2)),
]


def inputs(shape, taps, dtype, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight rounded to its dtype, bias."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(size, generator=generator) for size in (shape, taps, taps[:1]))
    return (x + 0.5).to(dtype), (weight / math.prod(taps[1:]) ** 0.5).to(dtype), bias


def of_torch(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool = False) -> Tensor:
    """A layer of data2vec 2.0's decoder in PyTorch, with the surplus of an even kernel cut."""
    outputs, narrow, *kernel = weight.shape
    convolve, padding = F.conv1d if len(kernel) == 1 else F.conv2d, [k // 2 for k in kernel]
    y = convolve(x.movedim(-1, 1), weight, bias, padding=padding, groups=x.shape[-1] // narrow).movedim(1, -1)
    y = y[:, : x.shape[1]] if len(kernel) == 1 else y[:, : x.shape[1], : x.shape[2]]
    y = F.gelu(F.layer_norm(y, (outputs,)))
    return y + x if residual else y


def check(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> None:
    """The convolution, the result of it, and the gradients against float64."""
    with use_backend(backend):
        out, y = ops.conv_layer_norm_gelu(x, weight, bias, residual, 1e-5)
        grad = random_rows(out.shape, x.dtype, 7)
        got = ops.conv_layer_norm_gelu_backward(grad, x, y, weight, bias, residual, 1e-5)
    assert out.is_contiguous() and y.is_contiguous() and all(g.is_contiguous() for g in got)
    compute = F64 if x.dtype == F64 else F32
    results = []
    for dtype in (compute, F64):
        a, w, b, g = (None if t is None else t.to(dtype) for t in (x, weight, bias, grad))
        z = reference.conv_layer_norm_gelu(a, w, b, residual, 1e-5)[1]
        normed = reference.layer_norm_gelu(y.to(dtype).flatten(0, -2), None, None, 1e-5).view(y.shape)
        gradients = reference.conv_layer_norm_gelu_backward(g, a, y.to(dtype), w, b, residual, 1e-5)
        results.append([z, normed + a if residual else normed, *gradients])
    for result, careful, truth in zip([y, out, *got], *results, strict=True):
        # The products' operand, the norm's gradient, is rounded to the dtype of x: so good is that of the weight, too.
        kind = max(x.dtype, result.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        assert_accurate(result.to(kind), careful.to(kind), truth, factor=8.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "taps"), SHAPES)
def test_shapes(backend, dtype, shape, taps) -> None:
    x, weight, bias = inputs(shape, taps, dtype)
    check(backend, x, weight, bias, residual=shape[-1] == taps[0])
    check(backend, x, weight, None, residual=False)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(0, 3), t=st.integers(0, 40), groups=st.sampled_from([1, 2, 3, 4]), narrow=st.integers(1, 9),
    wide=st.integers(1, 9), k=st.integers(1, 20), dtype=dtypes, weight_dtype=dtypes, seed=st.integers(0, 99),
    residual=st.booleans(),
)  # fmt: skip
def test_accuracy(backend, n, t, groups, narrow, wide, k, dtype, weight_dtype, seed, residual) -> None:
    wide = narrow if residual else wide
    assume(groups * wide > 2)  # the norm of two channels is 1 and -1, and its gradient rounding noise
    x, weight, bias = inputs((n, t, groups * narrow), (groups * wide, narrow, k), dtype, seed)
    if weight_dtype.itemsize < dtype.itemsize:
        weight = weight.to(weight_dtype)  # otherwise float64 would not see the rounding of the products' operand
    check(backend, x, weight.to(weight_dtype), bias, residual)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("shape", "taps"), SHAPES)
def test_reference_is_the_formula_of_torch(dtype, shape, taps) -> None:
    leaves = [t.to(dtype).requires_grad_() for t in inputs(shape, taps, dtype)]
    residual = shape[-1] == taps[0]
    with use_backend("reference"):
        y, z = conv_layer_norm_gelu(*leaves, residual=residual), of_torch(*leaves, residual)
        grad = torch.randn_like(y)
        got, want = (torch.autograd.grad(result, leaves, grad) for result in (y, z))
    torch.testing.assert_close((y, *got), (z, *want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 0, 3, 8)])
def test_empty(backend, shape) -> None:
    x, weight, bias = inputs(shape, (8, 4, *[9] * (len(shape) - 2)), F32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with use_backend(backend):
        y = conv_layer_norm_gelu(*leaves, residual=True)
        y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_and_expanded_gradients(backend) -> None:
    """Any strides of the inputs give the numbers that contiguous ones give."""
    x, weight, bias = inputs((4, 9, 24), (12, 6, 3), F32)
    views = (x.expand(2, *x.shape)[1, ::2, :, :12], weight[:, ::2], torch.stack([bias, bias], 1)[:, 0])
    views = (views[0], views[1].contiguous().mT.contiguous().mT, views[2])
    leaves = [[t.clone().contiguous().requires_grad_() for t in views], [t.detach().requires_grad_() for t in views]]
    with use_backend(backend):
        results = []
        for x, weight, bias in leaves:
            y = conv_layer_norm_gelu(x, weight, bias)
            y.sum().backward()  # an expanded gradient
            results.append((y.detach(), x.grad, weight.grad, bias.grad))
    assert not leaves[1][0].is_contiguous() and not leaves[1][1].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_takes_any_order_of_axes(backend) -> None:
    """As a compiler may keep them; a forward of the operator itself does not."""
    x, weight, bias = inputs((2, 9, 8), (8, 4, 3), F32)
    given, order = [x + 1, x, x + 2, weight], lambda t: t.mT.contiguous().mT
    with use_backend(backend):
        want = ops.conv_layer_norm_gelu_backward(*given, bias, True, 1e-5)
        got = ops.conv_layer_norm_gelu_backward(*map(order, given), bias, True, 1e-5)
        with pytest.raises(ValueError, match="layout of x: expected contiguous"):
            ops.conv_layer_norm_gelu(order(x), weight, bias, True, 1e-5)
    assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_its_neighbours_only(backend) -> None:
    x, weight, bias = inputs((2, 12, 8), (8, 4, 3), F32)
    x[1, 5, 2] = math.nan
    x.requires_grad_()
    with use_backend(backend):
        y = conv_layer_norm_gelu(x, weight, bias)
        y.sum().backward()
    near = [[False] * 12, [t in (4, 5, 6) for t in range(12)]]
    assert y.isnan().any(2).tolist() == y.isnan().all(2).tolist() == near
    assert x.grad.isnan().any(2).tolist() == [[False] * 12, [t in range(3, 8) for t in range(12)]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_repeat_bitwise(backend) -> None:
    x, weight, bias = inputs((2, 150, 32), (32, 8, 5), F32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with use_backend(backend):
        y = conv_layer_norm_gelu(*leaves)
        runs = [torch.autograd.grad(y, leaves, y.detach(), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own", [F32, BF16])
def test_under_autocast(backend, own) -> None:
    """Products in bfloat16; gradients have the dtypes of the leaves."""
    x, weight, bias = inputs((2, 20, 8), (8, 4, 3), BF16)
    leaves = [t.to(own).requires_grad_() for t in (x, weight, bias)]
    with use_backend(backend):
        with torch.autocast("cpu", BF16):
            y = conv_layer_norm_gelu(*leaves)
        assert y.dtype == BF16
        assert torch.equal(y, conv_layer_norm_gelu(x, weight, bias.to(own)))
        y.sum().backward()
    assert [t.grad.dtype for t in leaves] == [own] * 3
    assert conv_layer_norm_gelu(leaves[0].double(), weight).dtype == F64  # autocast leaves float64 alone


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("taps", [(4, 2, 3), (4, 2, 2), (4, 2, 3, 2)])
def test_gradcheck(backend, bias, taps) -> None:
    shape = (2, 4, 4) if len(taps) == 3 else (1, 3, 2, 4)
    leaves = [t.double().requires_grad_() for t in inputs(shape, taps, F64)][: 3 if bias else 2]
    for residual in (False, True):
        with use_backend(backend):
            assert torch.autograd.gradcheck(lambda *t, r=residual: conv_layer_norm_gelu(*t, residual=r), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(backend, grad) -> None:
    x, weight, bias = (t.requires_grad_(grad) for t in inputs((2, 5, 8), (8, 4, 3), F32))
    images, kernels, _ = (t.requires_grad_(grad) for t in inputs((1, 3, 2, 4), (6, 2, 3, 3), F32))
    with use_backend(backend):
        opcheck(ops.conv_layer_norm_gelu.default, (x, weight, bias, True, 1e-5))
        opcheck(ops.conv_layer_norm_gelu.default, (images, kernels, None, False, 1e-5))
        if not grad:
            opcheck(ops.conv_layer_norm_gelu_backward.default, (x + 1, x, x + 2, weight, bias, True, 1e-5))
            opcheck(ops.conv_layer_norm_gelu_backward.default, (x + 1, x, x + 2, weight, None, False, 1e-5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend) -> None:
    leaves = [t.requires_grad_() for t in inputs((2, 5, 8), (8, 4, 3), F32)]

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv_layer_norm_gelu(x * 2, weight, bias, residual=True).square().sum()

    with use_backend(backend):
        want = torch.autograd.grad(run(*leaves), leaves)
        got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    torch.testing.assert_close(got, want)


def test_double_backward_is_refused() -> None:
    x, weight, _ = inputs((1, 3, 4), (4, 2, 3), F32)
    x.requires_grad_()
    (g,) = torch.autograd.grad(conv_layer_norm_gelu(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        g.sum().backward()


X, W = torch.ones(2, 3, 8), torch.ones(8, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((X[0], W), {}, ValueError, r"x: expected shape \(N, T, C\) or \(N, H, W, C\)"),
        ((X, W[0]), {}, ValueError, "weight: expected 3 dimensions"),
        ((X[None], W), {}, ValueError, "weight: expected 4 dimensions"),
        ((X[..., :6], W), {}, ValueError, "channels of x: expected a multiple of 4, got 6"),
        ((X, W[:7]), {}, ValueError, "rows of weight: expected a multiple of 2 groups, got 7"),
        ((X, W[:4]), {"residual": True}, ValueError, "rows of weight with residual: expected 8, got 4"),
        ((X, W[..., :0]), {}, ValueError, "weight: expected channels and taps"),
        ((X, W, torch.ones(4)), {}, ValueError, r"shape of bias: expected \(8,\), got \(4,\)"),
        ((X.int(), W), {}, TypeError, "dtype of x.*got int32"),
        ((X, W.int()), {}, TypeError, "dtype of weight.*got int32"),
        ((X, W), {"eps": 0.0}, ValueError, "eps: expected above 0, got 0.0"),
        ((X, W.to("meta")), {}, ValueError, "device of weight"),
    ],
)
def test_messages(arguments, options, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        conv_layer_norm_gelu(*arguments, **options)
    assert str(caught.value).startswith("conv_layer_norm_gelu")
