"""The CUDA average_layers, run on the CPU in several thread orders, against float64 and the reference."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference
from support.accuracy import assert_accurate
from support.tensors import dtypes, in_layout, layouts, random_rows
from torch import Tensor

emu = torch.ops.d2v_emu
LOW = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["none", "layer", "instance", "batch"]
# Shared memory of a block, multiprocessors, blocks of a cluster (0: no bulk copies either).
H200, A100, SMALL = (227 << 10, 132, 8), (163 << 10, 108, 0), (48 << 10, 1, 0)
DEVICES = [H200, A100, SMALL]
# Only the forms of instance norm depend on the device.
NORMS_ON_DEVICES = [(norm, d) for norm in NORMS for d in (DEVICES if norm == "instance" else [H200])]


@pytest.fixture(scope="module")
def device(emulated: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    emulated.d2v_emu_set_device.argtypes = [ctypes.c_uint64, ctypes.c_int32, ctypes.c_int32]
    yield emulated
    emulated.d2v_emu_set_device(*H200)


def careful_and_truth(
    layers: list[Tensor], norm: str, out_norm: str, lengths: Tensor | None, out: torch.dtype
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if layers[0].dtype == torch.float64 else torch.float32
    careful = reference.average_layers([x.to(compute) for x in layers], norm, out_norm, lengths, 1e-5, compute)
    truth = reference.average_layers([x.double() for x in layers], norm, out_norm, lengths, 1e-5, torch.float64)
    return careful.to(out), truth


def check(layers, norm: str, out_norm: str, lengths: Tensor | None, out: torch.dtype, factor: float = 4.0) -> Tensor:
    result = emu.average_layers(layers, norm, out_norm, lengths, 1e-5, out)
    assert result.is_contiguous()
    assert_accurate(result, *careful_and_truth(layers, norm, out_norm, lengths, out), factor=factor)
    return result


@settings(deadline=None, max_examples=60)
@given(
    k=st.integers(1, 5), b=st.integers(0, 3), t=st.sampled_from([0, 1, 2, 7, 33, 40, 65]),
    c=st.sampled_from([1, 3, 8, 16, 33, 64, 100, 264]), dtype=dtypes, layout=layouts, norm=st.sampled_from(NORMS),
    out_norm=st.sampled_from(NORMS), out=dtypes, seed=st.integers(0, 99), cut=st.booleans(), order=st.integers(0, 3),
    limits=st.sampled_from(DEVICES),
)  # fmt: skip
def test_accuracy(device, k, b, t, c, dtype, layout, norm, out_norm, out, seed, cut, order, limits) -> None:
    device.d2v_emu_set_order(order)
    device.d2v_emu_set_device(*limits)
    layers = [in_layout(random_rows((b, t, c), dtype, seed + i), layout) for i in range(k)]
    lengths = torch.tensor([(seed * 7 + i * 5) % (t + 1) for i in range(b)], dtype=torch.int64) if cut else None
    # A norm of a norm of constant channels divides rounding noise by sqrt(eps): both computations show it.
    check(layers, norm, out_norm, lengths, out, factor=8.0)


# Every tile of the one-read forms, its edges, and lengths beyond it: (limits, T, C).
FEW, FEW_BULK = (227 << 10, 1, 0), (227 << 10, 1, 8)
TILES = [
    (SMALL, 32, 64), (SMALL, 97, 40), (A100, 224, 64), (A100, 257, 72), (A100, 500, 64), (FEW, 224, 96),
    (FEW, 300, 64), (FEW, 448, 64), (FEW, 513, 64), (FEW, 896, 32), (FEW, 897, 32), ((99 << 10, 1, 0), 500, 64),
    (FEW_BULK, 256, 72), (FEW_BULK, 257, 72), (FEW_BULK, 513, 40), (FEW_BULK, 1025, 16), (H200, 128, 40),
    (H200, 300, 24), (H200, 512, 16), ((227 << 10, 1, 1), 513, 16), ((99 << 10, 1, 1), 256, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("limits", "t", "c"), TILES, ids=str)
def test_instance_tiles(device, limits, t, c, dtype) -> None:
    device.d2v_emu_set_order(t % 4)
    device.d2v_emu_set_device(*limits)
    layers = [random_rows((2, t, c), dtype, i, offset=3.0) for i in range(5)]
    check(layers, "instance", "none", torch.tensor([t, t - 1]), torch.float32)


@pytest.mark.parametrize("c", [8, 768, 776, 1024, 3072, 3080, 771])
@pytest.mark.parametrize("dtype", LOW)
def test_rows(device, dtype, c) -> None:
    device.d2v_emu_set_order(c % 4)
    layers = [random_rows((2, 3, c), dtype, i, offset=3.0) for i in range(3)]
    check(layers, "layer", "none", None, torch.float32)
    check(layers, "layer", "layer", torch.tensor([3, 1]), dtype)
    check(layers, "none", "layer", None, torch.bfloat16)


# Pieces of batch norm: several samples, the last of them fewer; slices of one; one number a channel.
@pytest.mark.parametrize("shape", [(5, 100, 24), (300, 3, 8), (2, 600, 40), (4, 1, 16), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_pieces(device, dtype, shape) -> None:
    device.d2v_emu_set_order(sum(shape) % 4)
    layers = [random_rows(shape, dtype, i, offset=3.0) for i in range(3)]
    check(layers, "batch", "none", None, torch.float32)
    lengths = torch.arange(shape[0]) * 7 % (shape[1] + 1)
    check(layers, "batch", "none", lengths, torch.float32)
    check(layers, "none", "batch", lengths, dtype)


def test_batch_of_the_longest_lists(device) -> None:
    """More samples than a launch has lengths for: pieces of several launches are merged."""
    layers = [random_rows((700, 2, 8), torch.float32, i) for i in range(2)]
    lengths = torch.arange(700) % 3
    check(layers, "batch", "batch", lengths, torch.float32, factor=8.0)


@pytest.mark.parametrize(
    ("norm", "out_norm"),
    [("instance", "layer"), ("layer", "instance"), ("instance", "instance"), ("batch", "layer"), ("layer", "batch")],
)
@pytest.mark.parametrize("out", [*LOW, torch.float64])
def test_two_steps_round_once(device, norm, out_norm, out) -> None:
    device.d2v_emu_set_device(*H200)
    layers = [random_rows((2, 50, 48), torch.bfloat16, i) for i in range(3)]
    whole = emu.average_layers(layers, norm, out_norm, None, 1e-5, torch.float32)
    assert torch.equal(check(layers, norm, out_norm, None, out, factor=8.0), whole.to(out))


@pytest.mark.parametrize(("norm", "limits"), NORMS_ON_DEVICES, ids=str)
def test_large_offset_keeps_variance(device, norm, limits) -> None:
    """mean / std = 1000: E[x^2] - E[x]^2 would lose 40 % of the variance in float32."""
    device.d2v_emu_set_device(*limits)
    layers = [torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(i)) + 1000.0 for i in range(2)]
    check(layers, norm, "none", None, torch.float32, factor=3.0)


@pytest.mark.parametrize("limits", [SMALL, A100, H200], ids=str)
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_outlier_first_costs_few_digits(device, dtype, norm, limits) -> None:
    """20 standard deviations, as far as one of 400 time steps can lie: sums about it cost some 400 units."""
    device.d2v_emu_set_device(*limits)
    layers = [random_rows((1, 400, 16), dtype, i) for i in range(2)]
    for x in layers:
        x[:, 0] = 1000.0
    got = emu.average_layers(layers, norm, "none", None, 1e-5, torch.float32)
    truth = reference.average_layers([x.double() for x in layers], norm, "none", None, 1e-5, torch.float64)
    assert float(truth.max()) > 19.9
    worst = float((got.double() - truth).abs().max() / truth.max())
    assert worst < (1e-6 if dtype == torch.float32 else 2 * 400 * 2.0**-24), worst


@pytest.mark.parametrize(("norm", "limits"), NORMS_ON_DEVICES, ids=str)
@pytest.mark.parametrize("c", [16, 15])
def test_nan_stays_and_does_not_spread(device, norm, c, limits) -> None:
    device.d2v_emu_set_device(*limits)
    layers = [random_rows((3, 120, c), torch.float32, i) for i in range(2)]
    layers[1][1, 4, 3] = float("nan")
    assert check(layers, norm, "none", None, torch.float32).isnan().any()


@pytest.mark.parametrize(("norm", "limits"), NORMS_ON_DEVICES, ids=str)
@pytest.mark.parametrize("out_norm", NORMS)
@pytest.mark.parametrize("c", [16, 15])
def test_nan_beyond_the_length_is_not_read(device, norm, out_norm, c, limits) -> None:
    device.d2v_emu_set_device(*limits)
    layers = [random_rows((2, 100, c), torch.float32, i) for i in range(2)]
    for layer in layers:
        layer[1, 6:] = float("nan")
        layer[0] = float("nan")
    result = check(layers, norm, out_norm, torch.tensor([0, 6]), torch.float32, factor=8.0)
    assert not result.isnan().any()
    assert not result[0].any()
    assert not result[1, 6:].any()


@pytest.mark.parametrize(("norm", "limits"), NORMS_ON_DEVICES, ids=str)
@pytest.mark.parametrize("c", [64, 33])
def test_same_bits_in_every_order(device, norm, c, limits) -> None:
    device.d2v_emu_set_device(*limits)
    layers = [random_rows((3, 131, c), torch.bfloat16, i) for i in range(4)]
    results = []
    for order in range(4):
        device.d2v_emu_set_order(order)
        results.append(emu.average_layers(layers, norm, "layer", None, 1e-5, torch.float32))
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_more_samples_than_one_launch_has_lengths_for(device) -> None:
    device.d2v_emu_set_device(*H200)
    layers = [random_rows((600, 3, 8), torch.float32, i) for i in range(2)]
    lengths = torch.arange(600) % 4
    for norm in ("none", "layer", "instance"):
        check(layers, norm, "none", lengths, torch.float32)


def test_a_form_can_be_ruled_out(device) -> None:
    """For comparisons on one GPU: with no clusters, then with no bulk copies, the bits are those of such a device."""
    layers = [random_rows((1, 130, 24), torch.bfloat16, i) for i in range(3)]

    def run(cluster_blocks: int, limit: int) -> Tensor:
        device.d2v_emu_set_device(227 << 10, 100, cluster_blocks)
        device.d2v_limit_clusters(ctypes.c_int32(limit))
        try:
            return check(layers, "instance", "none", None, torch.float32)
        finally:
            device.d2v_limit_clusters(ctypes.c_int32(-1))

    forms = [run(blocks, -1) for blocks in (8, 1, 0)]
    assert [torch.equal(run(8, blocks), form) for blocks, form in zip((8, 1, 0), forms, strict=True)] == [True] * 3
    assert not torch.equal(forms[0], forms[1])


@pytest.mark.parametrize("limits", [H200, (227 << 10, 1, 8)], ids=str)
def test_strides_of_other_orders(device, limits) -> None:
    """Time before batch, one sample for all of the batch, a slice of wider and longer rows."""
    device.d2v_emu_set_device(*limits)
    x = random_rows((140, 3, 64), torch.bfloat16, 0)
    layouts_ = [x.transpose(0, 1), x[:, :1].transpose(0, 1).expand(3, 140, 64)]
    wide = random_rows((3, 150, 128), torch.bfloat16, 1)[:, 5:145, 64:]
    for layer in layouts_:
        assert layer.shape == wide.shape
        check([layer, wide, layer], "instance", "none", torch.tensor([140, 3, 77]), torch.float32)


def test_many_layers(device) -> None:
    layers = [random_rows((1, 9, 16), torch.bfloat16, i) for i in range(128)]
    for norm in NORMS:
        check(layers, norm, "none", None, torch.float32)
    with pytest.raises(RuntimeError, match="average_layers: number of layers: expected 1 to 128, got 129"):
        emu.average_layers([*layers, layers[0]], "layer", "none", None, 1e-5, torch.float32)


@pytest.mark.parametrize(
    ("layers", "norm", "lengths", "message"),
    [
        ([torch.zeros(2, 3)], "layer", None, "layer: expected 3 dimensions, got 2"),
        ([torch.zeros(2, 3, 4)], "group", None, "norm: expected none, layer, instance or batch, got group"),
        ([torch.zeros(2, 4, 3).mT], "layer", None, "last stride of layer: expected 1, got"),
        ([torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)], "layer", None, "size of a layer: expected 4, got 5"),
        ([torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).half()], "layer", None, "layers: expected one dtype"),
        ([torch.zeros(2, 3, 4).int()], "layer", None, "dtype of layers: expected float32"),
        ([torch.zeros(2, 3, 4)], "layer", torch.tensor([3]), "number of lengths: expected 2, got 1"),
        ([torch.zeros(2, 3, 4)], "layer", torch.tensor([3, 4]), "lengths: expected 0 to 3, got 4"),
    ],
)
def test_messages(device, layers, norm, lengths, message) -> None:
    with pytest.raises(RuntimeError, match=f"average_layers: {message}"):
        emu.average_layers(layers, norm, "none", lengths, 1e-5, torch.float32)
