"""conv_layer_norm_gelu: parts of the rows, of the columns of its windows and of the channels of a group.

Not shown: what tensor cores make of float32 operands that are split in three; the order of sums inside a product.
"""

from __future__ import annotations

import pytest
import torch
from support import reference
from support.accuracy import assert_accurate, worst_error
from support.tensors import FLOATS

from d2v_kernels import use_backend
from d2v_kernels.triton import convolution
from d2v_kernels.triton.convolution import ConvolutionTile

ops = torch.ops.d2v


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("grid", "taps"), [((50,), (48, 12, 5)), ((7, 5), (48, 12, 3, 3)), ((5,), (48, 24, 16))])
def test_parts(dtype, grid, taps, monkeypatch) -> None:
    """Several of each; a grid that is no multiple of a block, and one that is smaller, so that a block has samples."""
    monkeypatch.setattr(convolution, "LEAST_ROWS", 1)
    monkeypatch.setattr(convolution, "PROGRAMS", 20)  # two or three parts of several blocks of rows
    monkeypatch.setattr(convolution, "convolution_tile", lambda *_: ConvolutionTile(16, 32, 16, 1, 1))
    monkeypatch.setattr(convolution, "weights_tile", lambda *_: ConvolutionTile(16, 32, 16, 1, 1))
    generator = torch.Generator().manual_seed(0)
    size = (3, *grid, 48)
    x, y, grad, weight = (torch.randn(s, generator=generator).to(dtype) for s in (size, size, size, taps))
    weight, bias = weight / 8.0, torch.randn(48, generator=generator)
    with use_backend("triton"):
        out, got = ops.conv_layer_norm_gelu(x, weight, bias, True, 1e-5)
        results = [got, *ops.conv_layer_norm_gelu_backward(grad, x, y, weight, bias, True, 1e-5)]
    assert torch.isfinite(out).all()
    wanted = []
    for kind in (torch.float32, torch.float64):
        a, b, g, w, s = (t.to(kind) for t in (x, y, grad, weight, bias))
        result = reference.conv_layer_norm_gelu(a, w, s, True, 1e-5)[1]
        wanted.append([result, *reference.conv_layer_norm_gelu_backward(g, a, b, w, s, True, 1e-5)])
    for result, careful, truth in zip(results, *wanted, strict=True):
        # The bias' gradient is float32, but in bfloat16 sums rows of GELU's short form.
        kind = max(dtype, result.dtype, key=lambda t: torch.finfo(t).eps)
        assert_accurate(result.to(kind), careful.to(kind), truth, factor=8.0)
    if dtype == torch.bfloat16:
        assert worst_error(results[-1], wanted[1][-1]) <= 3e-4 * float(wanted[1][-1].abs().max())
