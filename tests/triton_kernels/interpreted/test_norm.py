"""dropout_add_layer_norm: parts of the rows, rows beyond a warp, rows too wide, blocks of the encoder.

Not shown: the order of sums over the lanes of a warp; what a fused multiply-add rounds.
"""

from __future__ import annotations

import pytest
import torch
from support import reference
from support.accuracy import assert_accurate
from support.tensors import in_layout, random_rows
from torch import Tensor

from d2v import recipes
from d2v.model.transformer import Block
from d2v_kernels import dropout_add_layer_norm, registry, use_backend
from d2v_kernels.triton import norm
from d2v_kernels.triton.runtime import Tile, power_of_two

ops = torch.ops.d2v
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KEYS = torch.tensor([5, -3, 2**50 + 7])
SHAPES = [(3, 17, 40), (2, 3, 1100), (1, 2, 2100), (3, 5, 1), (2, 4, 257)]


def kept(shape: tuple[int, int, int], dropout: float) -> Tensor:
    """By the definition."""
    ones, zeros = torch.ones(shape), torch.zeros(shape)
    return reference.dropout_add_layer_norm(ones, zeros, None, None, KEYS[: shape[0]], dropout, 1e-5)[1] != 0.0


@pytest.fixture
def three_parts(monkeypatch) -> None:
    monkeypatch.setattr(norm, "NORM_SPLITS", 3)
    monkeypatch.setattr(norm, "backward_tile", lambda c, affine: Tile(2, power_of_two(c, 16), 1))


@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_over_parts(types, shape, three_parts) -> None:
    """Every row is in one part, the last part included, and what the forward drops has no gradient."""
    half, kind = types
    grad, straight, total = (in_layout(random_rows(shape, kind, i), "sliced") for i in range(3))
    of_copy, weight = in_layout(random_rows(shape, half, 3), "rows_apart"), random_rows(shape[2:], F32, 4)
    keys, rest = KEYS[: shape[0]], (0.3, 1e-5)
    with use_backend("triton"):
        if half == kind:
            got = ops.dropout_add_layer_norm_backward(grad, straight, total, weight, keys, *rest)
            of_copy = of_copy * 0.0
        else:
            got = ops.dropout_add_layer_norm_mixed_backward(grad, of_copy, straight, total, weight, keys, *rest, half)
    results = []
    for dtype in (F32, torch.float64):
        both, h, x, w = grad.to(dtype) + of_copy.to(dtype), straight.to(dtype), total.to(dtype), weight.to(dtype)
        results.append(reference.dropout_add_layer_norm_backward(both, h, x, w, keys, *rest))
    for result, careful, truth in zip(got, *results, strict=True):
        assert_accurate(result, careful.to(result.dtype), truth, factor=8.0)
    assert torch.equal(got[0] != 0.0, kept(shape, 0.3) & (got[1] != 0.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wide_and_mixed_rows_drop_the_same(shape) -> None:
    ones, zeros = torch.ones(shape), torch.zeros(shape)
    with use_backend("triton"):
        _, _, mixed = ops.dropout_add_layer_norm_mixed(
            ones.bfloat16(), zeros, None, None, KEYS[: shape[0]], 0.3, 1e-5, True, True
        )
        _, half = ops.dropout_add_layer_norm(ones.bfloat16(), zeros.bfloat16(), None, None, KEYS[: shape[0]], 0.3, 1e-5)
    assert torch.equal(mixed != 0.0, kept(shape, 0.3))
    assert torch.equal(half != 0.0, kept(shape, 0.3))


def test_mixed_backward_from_any_gradients(three_parts) -> None:
    """None of a gradient is zeros of it, and a repeated call gives the same bits."""
    grad, straight, total = (random_rows((3, 17, 40), F32, i) for i in range(3))
    of_copy, weight = random_rows((3, 17, 40), F16, 3), random_rows((40,), F32, 4)
    for given in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 1)):
        pairs = [*zip((grad, of_copy, straight), given, strict=True)]
        rest = (total, weight, KEYS, 0.3, 1e-5, F16)
        with use_backend("triton"):
            call = ops.dropout_add_layer_norm_mixed_backward
            some = call(*(g if use else None for g, use in pairs), *rest)
            again = call(*(g if use else None for g, use in pairs), *rest)
            full = call(*(g * use for g, use in pairs), *rest)
        for a, b, c in zip(some, again, full, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-6)


def test_norm_is_that_of_the_rounded_total() -> None:
    """Where rounding eats the branch, it is not in the norm either."""
    residual = torch.full((1, 2, 8), 256.0)
    residual[..., 0] = 0.0
    branch = torch.full_like(residual, 0.4).masked_fill(residual == 0.0, 0.0)
    branch[..., 1] = -0.4
    with use_backend("triton"):
        normed, total = dropout_add_layer_norm(branch.bfloat16(), residual.bfloat16())
    assert torch.equal(total, residual.bfloat16())
    assert normed[..., 1:].unique().numel() == 1


def test_rows_too_wide_run_by_the_definition() -> None:
    for op in ("dropout_add_layer_norm", "dropout_add_layer_norm_mixed_backward"):
        triton = next(b for b in registry.backends() if b.name == "triton")
        assert not triton.why_not(registry.Case(op, "cpu", (F32,), ("4096",)))
        assert triton.why_not(registry.Case(op, "cpu", (F32,), ("4097",))) == [
            "triton has rows of up to 4096 channels, not of 4097"
        ]
    x = torch.ones(1, 1, 4097)
    with use_backend("triton"), pytest.raises(NotImplementedError, match="not of 4097"):
        dropout_add_layer_norm(x, x)
    assert dropout_add_layer_norm(x, x)[1].unique().tolist() == [2.0]


@pytest.mark.parametrize("order", ["pre", "post"])
def test_blocks_under_autocast(order, monkeypatch) -> None:
    """The encoder's own call: bfloat16 branch, float32 residual, as near to the definition as native code."""
    config = recipes.get("vision-tiny").replace("encoder.norm_order", order).replace("encoder.dropout", 0.3)
    torch.manual_seed(0)
    block, x = Block(config.encoder), torch.randn(2, 5, config.encoder.width)
    weights, calls, results = torch.randn(x.shape), [], []
    for op in ("dropout_add_layer_norm_mixed", "dropout_add_layer_norm_mixed_backward"):
        body = getattr(norm, op)
        monkeypatch.setattr(norm, op, lambda *a, op=op, body=body: (calls.append(op), body(*a))[1])
    for backend in ("reference", "triton"):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        with use_backend(backend), torch.autocast("cpu", BF16):
            y = block(leaf).output
            results.append([y, *torch.autograd.grad((y * weights).sum(), [leaf, *block.parameters()])])
    norms = 2 if order == "post" else 1
    assert calls == ["dropout_add_layer_norm_mixed"] * norms + ["dropout_add_layer_norm_mixed_backward"] * norms
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()
