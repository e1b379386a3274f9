"""Every operator, dtype and layout on the GPU's backends against float64."""

from __future__ import annotations

import math

import pytest
import torch
from gpu.conftest import FLOATS, both, compare
from support import reference
from support.layouts import in_layout, random_rows
from torch import Tensor

from d2v_kernels import merge_ema_state, split_ema_state

ops = torch.ops.d2v
F32, BF16, F16 = FLOATS
LAYOUTS = ["contiguous", "offset", "sliced", "rows_apart", "transposed"]
SHAPES = [(2, 33, 100), (1, 1, 1), (3, 70, 64), (2, 17, 131)]
NORMS = [("instance", "layer"), ("layer", "none"), ("none", "instance"), ("instance", "none"), ("layer", "layer")]


def arrange(place, x: Tensor, layout: str) -> Tensor:
    """The values of x on the device in another layout."""
    return in_layout(place.put(x), layout)


def lists(n: int, rows: int, high: int, dtype=torch.int32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (rows, n), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_average_layers(place, backend, dtype, number) -> None:
    shape, (norm, out_norm) = SHAPES[number], NORMS[number]
    layout = LAYOUTS[number]
    place.need("average_layers", backend, dtype, norm, out_norm, more=(F32,))
    host = [random_rows(shape, dtype, i, offset=2.0) for i in range(3)]
    lengths = torch.tensor([shape[1] - i for i in range(shape[0])]).clamp(min=0) if number % 2 else None
    got = ops.average_layers([arrange(place, x, layout) for x in host], norm, out_norm, lengths, 1e-5, F32)
    careful = reference.average_layers([x.float() for x in host], norm, out_norm, lengths, 1e-5, F32)
    truth = reference.average_layers([x.double() for x in host], norm, out_norm, lengths, 1e-5, torch.float64)
    compare(got, careful, truth)


# Time lengths and widths at which the kernels change their form.
FORMS = [
    (2, 196, 768, "instance", "layer"),
    (1, 500, 768, "instance", "none"),
    (1, 999, 768, "instance", "none"),
    (1, 1025, 72, "instance", "layer"),
    (2, 512, 1023, "instance", "none"),
    (3, 60, 3080, "layer", "layer"),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_average_layers_forms(gpu, backend, place, dtype, form) -> None:
    b, t, c, norm, out_norm = form
    place.need("average_layers", backend, dtype, norm, out_norm, more=(F32,))
    host = [random_rows((b, t, c), dtype, i, offset=2.0) for i in range(4)]
    got = ops.average_layers(place.put(*host), norm, out_norm, None, 1e-5, dtype)
    careful = reference.average_layers([x.float() for x in host], norm, out_norm, None, 1e-5, F32)
    compare(
        got, careful, reference.average_layers([x.double() for x in host], norm, out_norm, None, 1e-5, torch.float64)
    )


@pytest.mark.parametrize(
    "types", [(F32, F32, BF16), (F32, BF16, BF16), (F32, BF16, None), (F16, F16, F32), (BF16, F32, F16)]
)
def test_update_ema(place, backend, types) -> None:
    place.need("update_ema_", backend, types[0], more=tuple(t for t in types[1:] if t))
    sizes = [0, 1, 7, 1000, 16384, 16393, 40001]
    averages = [random_rows((n, 1), types[0], n)[:, 0] for n in sizes]
    sources = [random_rows((n, 1), types[1], n + 1)[:, 0] for n in sizes]
    truth = [a.double() + 0.01 * (s.double() - a.double()) for a, s in zip(averages, sources, strict=True)]
    careful = [a.float() + 0.01 * (s.float() - a.float()) for a, s in zip(averages, sources, strict=True)]
    moved = [in_layout(place.put(a), "offset" if i % 2 else "contiguous") for i, a in enumerate(averages)]
    copies = [torch.full_like(a, 7.0, dtype=types[2]) for a in moved] if types[2] else []
    ops.update_ema_(moved, place.put(*sources), copies, 0.01, None)
    compare(moved, careful, truth)
    assert all(torch.equal(c, a.to(c.dtype)) for c, a in zip(copies, moved, strict=False))
    weight = torch.tensor(0.25, dtype=torch.float64, device=place.device)
    before = [a.clone() for a in moved]
    ops.update_ema_(moved, place.put(*sources), copies, 0.5, weight)
    truth = [a.cpu().double() + 0.25 * (s.double() - a.cpu().double()) for a, s in zip(before, sources, strict=True)]
    compare(moved, [t.float() for t in truth], truth)


@pytest.mark.parametrize("source", FLOATS)
def test_update_split_ema(place, backend, source) -> None:
    """The halves of a float32 average, as near to float64 as one."""
    place.need("update_split_ema_", backend, source)
    sizes = [0, 1, 7, 1000, 16393]
    state = [split_ema_state(random_rows((n, 1), F32, n)[:, 0]) for n in sizes]
    sources = [random_rows((n, 1), source, n + 1)[:, 0] for n in sizes]
    high, low = ([place.put(pair[i]) for pair in state] for i in range(2))
    ops.update_split_ema_(high, low, place.put(*sources), 0.01, None)
    for i, (h, x) in enumerate(state):
        before, after = merge_ema_state(h, x), merge_ema_state(high[i].cpu(), low[i].cpu())
        truth = before.double() + 0.01 * (sources[i].double() - before.double())
        compare(after, before + 0.01 * (sources[i].float() - before), truth)
        assert torch.equal(split_ema_state(after)[0], high[i].cpu())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("number", range(4))
def test_gather_tokens(place, backend, dtype, number) -> None:
    b, t, c = SHAPES[number]
    place.need("gather_tokens", backend, dtype)
    index = lists(9, 2 * b, t, torch.int64 if number % 2 else torch.int32)
    host = random_rows((b, t, c), dtype, 1)
    got = ops.gather_tokens(arrange(place, host, LAYOUTS[number]), place.put(index), 2)
    assert torch.equal(got.cpu(), reference.gather_tokens(host, index, 2))
    grad = random_rows((2 * b, 9, c), dtype, 2)
    got = ops.gather_tokens_backward(arrange(place, grad, LAYOUTS[number]), place.put(index), 2, t)
    compare(got, *both(reference.gather_tokens_backward, grad, index, 2, t))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fill", ["vector", "rows", "noise"])
def test_restore_tokens(place, backend, dtype, fill) -> None:
    place.need("restore_tokens", backend, dtype)
    n, v, t, c = 3, 10, 33, 100
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(t, generator=generator) for _ in range(n)]).int()
    kept = random_rows((n, v, c), dtype, 1)
    shape = (c,) if fill == "vector" else (n, t - v, c)
    rows = None if fill == "noise" else random_rows(shape, dtype, 2)
    keys = torch.tensor([1, -7, 2**40 + 5]) if fill == "noise" else None
    got = ops.restore_tokens(arrange(place, kept, "sliced"), place.put(order), place.put(rows), place.put(keys), 0.5)
    wanted = reference.restore_tokens(kept, order, rows, keys, 0.5)
    if fill == "noise":
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5 if dtype == F32 else 1e-2, atol=1e-5)
    else:
        assert torch.equal(got.cpu(), wanted)
    grad = random_rows((n, t, c), dtype, 3)
    fill_rows = {"vector": -1, "rows": t - v, "noise": -2}[fill]
    got = ops.restore_tokens_backward(arrange(place, grad, "offset"), place.put(order), v, fill_rows)
    compare(got, *both(reference.restore_tokens_backward, grad, order, v, fill_rows))


@pytest.mark.parametrize("types", [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_masked_regression_loss(place, backend, types, beta) -> None:
    place.need("masked_regression_loss", backend, types[0], more=types[1:])
    x, y = random_rows((70, 100), types[0], 0), random_rows((40, 100), types[1], 1)
    rows_x, rows_y = torch.randperm(70, generator=torch.Generator().manual_seed(2))[:50], lists(50, 1, 40)[0]
    arguments = (rows_x, rows_y, beta, 0.3)
    moved = (arrange(place, x, "sliced"), arrange(place, y, "offset"), *place.put(rows_x, rows_y), beta, 0.3)
    compare(ops.masked_regression_loss(*moved), *both(reference.masked_regression_loss, x, y, *arguments))
    got = ops.masked_regression_loss_backward(place.put(torch.tensor(0.7)), *moved)
    compare(got, *both(reference.masked_regression_loss_backward, torch.tensor(0.7), x, y, *arguments))


def compare_gradients(got: tuple[Tensor, ...], truth: tuple[Tensor, ...], careful: tuple[Tensor, ...]) -> None:
    """Of rows and vectors. Beside bfloat16 rows, float32 sums have the error of GELU's short form, up to 1.2e-4."""
    for result, true, close in zip(got, truth, careful, strict=True):
        if got[0].dtype == BF16 and result.dtype == F32:
            error = (result.cpu().double() - true.double()).abs().max()
            assert float(error) <= 3e-4 * float(true.abs().max())
        else:
            compare(result, true, close)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(70, 512), (9, 100), (3, 1)])
def test_layer_norm_gelu(place, backend, dtype, shape) -> None:
    place.need("layer_norm_gelu", backend, dtype)
    x, grad = random_rows(shape, dtype, 0, offset=3.0), random_rows(shape, dtype, 1)
    weight, bias = 1.0 + 0.1 * torch.randn(shape[1]), 0.1 * torch.randn(shape[1])
    moved = (arrange(place, x, "rows_apart"), *place.put(weight, bias), 1e-5)
    compare(ops.layer_norm_gelu(*moved), *both(reference.layer_norm_gelu, x, weight, bias, 1e-5))
    got = ops.layer_norm_gelu_backward(place.put(grad), *moved)
    compare_gradients(got, *both(reference.layer_norm_gelu_backward, grad, x, weight, bias, 1e-5))


@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)])
@pytest.mark.parametrize("shape", [(3, 70, 64), (2, 9, 101), (2, 17, 768), (1, 3, 1300), (3, 5, 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_add_layer_norm(place, backend, types, shape, dropout) -> None:
    half, kind = types
    mixed = "" if half == kind else "_mixed"
    place.need(f"dropout_add_layer_norm{mixed}", backend, half, str(shape[2]), more=(kind,))
    branch, of_copy = (random_rows(shape, half, i) for i in range(2))
    residual, of_normed, of_total = (random_rows(shape, kind, i, offset=i - 3.0) for i in range(2, 5))
    weight, bias = 1.0 + 0.1 * torch.randn(shape[2]), 0.1 * torch.randn(shape[2])
    last = (torch.tensor([1, -7, 2**40 + 5])[: shape[0]] if dropout else None, dropout, 1e-5)
    rest = (place.put(last[0]), dropout, 1e-5)
    moved = (arrange(place, branch, "rows_apart"), arrange(place, residual, "sliced"), *place.put(weight, bias), *rest)
    grad, straight = arrange(place, of_normed, "offset"), arrange(place, of_total, "rows_apart")
    if mixed:
        normed, copied, total = ops.dropout_add_layer_norm_mixed(*moved, True, True)
        assert torch.equal(copied, normed.to(half))
        others = (grad, place.put(of_copy), straight)
        got = ops.dropout_add_layer_norm_mixed_backward(*others, total, moved[2], *rest, half)
        of_normed = of_normed + of_copy.float()
    else:
        normed, total = ops.dropout_add_layer_norm(*moved)
        got = ops.dropout_add_layer_norm_backward(grad, straight, total, moved[2], *rest)
    forward, backward = reference.dropout_add_layer_norm, reference.dropout_add_layer_norm_backward
    compare(total, *(r[1] for r in both(forward, branch, residual, None, None, *last)))
    none = torch.zeros(shape)  # the norm is that of the total as it is given back
    compare(normed, *(r[0] for r in both(forward, none, total, weight, bias, None, 0.0, 1e-5)))
    first = 0 if dropout else 1
    compare(got[first:], *(r[first:] for r in both(backward, of_normed, of_total, total, weight, *last)))
    if dropout:
        kept = forward(none + 1.0, none, None, None, *last)[1] != 0.0
        assert torch.equal(got[0].cpu() != 0.0, kept & (got[1].cpu() != 0.0))
    else:
        assert got[0].numel() == 0 or torch.equal(got[0], got[1].to(half))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "taps"),
    [
        ((2, 150, 96), (96, 48, 19)),
        ((3, 40, 72), (72, 24, 4)),
        ((2, 9, 7, 30), (20, 3, 3, 5)),
        ((1, 1, 16), (16, 8, 3)),
    ],
)
def test_conv_layer_norm_gelu(place, backend, dtype, shape, taps) -> None:
    place.need("conv_layer_norm_gelu", backend, dtype)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in (shape, taps, taps[:1]))
    x, weight, residual = x.to(dtype), (weight / taps[1]).to(dtype), shape[-1] == taps[0]
    moved = (*place.put(x, weight, bias), residual, 1e-5)
    out, y = ops.conv_layer_norm_gelu(*moved)
    compare(y, *(pair[1] for pair in both(reference.conv_layer_norm_gelu, x, weight, bias, residual, 1e-5)))
    normed = both(lambda y, x: reference.layer_norm_gelu(y.flatten(0, -2), None, None, 1e-5).view(y.shape)
                  + (x if residual else 0.0), y, x)  # fmt: skip
    compare(out, *normed)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    got = ops.conv_layer_norm_gelu_backward(place.put(grad), moved[0], y, *moved[1:])
    compare_gradients(got, *both(reference.conv_layer_norm_gelu_backward, grad, x, y, weight, bias, residual, 1e-5))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(70, 512), (9, 101), (1,)])
def test_gelu(place, backend, dtype, shape) -> None:
    place.need("gelu", backend, dtype)
    x, grad = (4.0 * random_rows(shape, F32, i) for i in range(2))
    x, grad = x.to(dtype), grad.to(dtype)
    moved = place.put(grad, x)
    compare(ops.gelu(moved[1]), *both(reference.gelu, x))
    compare(ops.gelu_backward(*moved), *both(reference.gelu_backward, grad, x))
    y = ops.gelu_backward_(*moved)
    compare((moved[0], y), *both(reference.gelu_backward, grad, x))


def test_nan_and_lengths(place, backend) -> None:
    """What lies behind a length is not read, and a NaN stays in its column."""
    place.need("average_layers", backend, F32, "instance", "none", more=(F32,))
    layers = [random_rows((2, 50, 32), F32, i) for i in range(2)]
    layers[0][1, 7, 3] = math.nan
    layers[1][0, 30:] = math.nan
    got = ops.average_layers(place.put(*layers), "instance", "none", torch.tensor([30, 50]), 1e-5, F32).cpu()
    assert not got[0].isnan().any()
    assert not got[0, 30:].any()
    assert got[1, :, 3].isnan().all()
    assert not got[1, :, :3].isnan().any()


def test_bits_repeat(place, backend) -> None:
    place.need("average_layers", backend, BF16, "instance", "layer", more=(F32,))
    layers = place.put(*(random_rows((2, 90, 96), BF16, i) for i in range(3)))
    index, grad = place.put(lists(40, 4, 30), random_rows((4, 40, 96), BF16, 9))
    x, rows = place.put(random_rows((200, 96), BF16, 3), torch.arange(200))
    runs = []
    for _ in range(2):
        results = [ops.average_layers(layers, "instance", "layer", None, 1e-5, F32)]
        results.append(ops.gather_tokens_backward(grad, index, 2, 30))
        if backend == "triton":  # native has no loss on a GPU
            results += [*ops.masked_regression_loss(x, x.flip(0), rows, rows, 0.0, 1.0)]
            results += [*ops.layer_norm_gelu_backward(x, x.flip(0).contiguous(), x[0], x[1], 1e-5)]
            tokens, taps = x.view(4, 50, 96), x.view(-1)[: 96 * 24 * 5].view(96, 24, 5)
            results += [*ops.dropout_add_layer_norm_backward(tokens, None, tokens.flip(0), None, rows[:4], 0.1, 1e-5)]
            results += [*ops.conv_layer_norm_gelu_backward(tokens, tokens, tokens.flip(0), taps, x[0], True, 1e-5)]
        runs.append(results)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
