"""average_layers: both forms of the instance norm, all pairs of norms, many layers, layers of different strides.

Not shown: the order of sums over lanes and warps, so bounds, not bits; a GPU's rsqrt.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from support import reference
from support.accuracy import assert_accurate
from support.tensors import FLOATS, in_layout, random_rows
from torch import Tensor

from d2v_kernels import average_layers, use_backend
from d2v_kernels.triton import layers as kernels
from d2v_kernels.triton.runtime import Tile, power_of_two

NORMS = ["none", "layer", "instance", "batch"]


@pytest.fixture(params=["one read", "two passes"])
def form(request, monkeypatch) -> str:
    """Two passes, as for samples too long for registers, with several blocks of time and of channels."""
    if request.param == "two passes":
        monkeypatch.setattr(kernels, "ONE_READ_TOKENS", 0)
        monkeypatch.setattr(kernels, "statistics_tile", lambda channels: Tile(8, 16, 1))
        monkeypatch.setattr(Tile, "columns", lambda channels: Tile(2, 32, 1))
        monkeypatch.setattr(
            kernels, "combine_tile", lambda c, whole_rows: Tile(8, power_of_two(c, 16) if whole_rows else 16, 1)
        )
    return request.param


def check(
    layers: list[Tensor], norm: str, out_norm: str, lengths: Tensor | None, factor: float = 8.0, out=None
) -> None:
    with use_backend("triton"):
        result = average_layers(layers, norm=norm, out_norm=out_norm, lengths=lengths, out_dtype=out)
    arguments = (norm, out_norm, lengths, 1e-5)
    careful = reference.average_layers([x.float() for x in layers], *arguments, torch.float32).to(result.dtype)
    truth = reference.average_layers([x.double() for x in layers], *arguments, torch.float64)
    assert_accurate(result, careful, truth, factor=factor)


@pytest.mark.parametrize(("norm", "out_norm"), list(itertools.product(NORMS, NORMS)))
def test_all_pairs(form, norm, out_norm) -> None:
    layers = [random_rows((3, 21, 37), torch.bfloat16, i, offset=2.0) for i in range(2)]
    check(layers, norm, out_norm, torch.tensor([21, 0, 9]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out", FLOATS)
def test_dtypes(form, dtype, out) -> None:
    check([random_rows((2, 17, 33), dtype, i) for i in range(3)], "instance", "layer", None, out=out)


def test_large_offset_keeps_variance(form) -> None:
    layers = [torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(i)) + 1000.0 for i in range(2)]
    check(layers, "instance", "none", None, factor=3.0)


def test_batch_of_samples_with_far_means() -> None:
    """Chan's merge across samples: each has its own mean, far from the others'."""
    x = torch.randn(5, 12, 16, generator=torch.Generator().manual_seed(0))
    x += torch.arange(5.0)[:, None, None] * 300.0
    check([x], "batch", "none", torch.tensor([12, 1, 7, 0, 12]), factor=3.0)


@pytest.mark.parametrize("norm", ["instance", "layer"])
def test_many_layers(form, norm) -> None:
    check([random_rows((1, 9, 20), torch.float16, i) for i in range(33)], norm, "none", None)


@pytest.mark.parametrize("norm", ["instance", "layer", "batch"])
def test_layers_of_different_strides(form, norm) -> None:
    layouts = ["contiguous", "offset", "sliced", "rows_apart", "transposed"]
    layers = [in_layout(random_rows((2, 10, 18), torch.bfloat16, i), layout) for i, layout in enumerate(layouts)]
    assert len({x.stride() for x in layers}) > 1
    check(layers, norm, "none", torch.tensor([10, 3]))


def test_expanded_layer(form) -> None:
    """All samples at one address: stride 0."""
    check([random_rows((1, 11, 16), torch.float32, 0).expand(3, 11, 16)], "instance", "none", None)


@pytest.mark.parametrize("norm", NORMS)
def test_nan_stays_and_what_is_beyond_a_length_is_not_read(form, norm) -> None:
    layers = [random_rows((3, 12, 16), torch.float32, i) for i in range(2)]
    layers[1][1, 4, 3] = float("nan")
    layers[0][2, 6:] = float("nan")
    check(layers, norm, "none", torch.tensor([12, 12, 6]))


def test_nothing_is_launched_for_nothing(monkeypatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(InterpretedFunction, "run", fail)
    with use_backend("triton"):
        for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
            assert average_layers([torch.zeros(shape)]).shape == shape
