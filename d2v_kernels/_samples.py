"""Small inputs of every operator: for `info --probe`, which tells usable from importable, and for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import compute_dtype
from ._define import NAMESPACE
from .registry import OPERATORS


def samples(
    device: torch.device | str, dtype: torch.dtype, tokens: int = 3, width: int = 4
) -> dict[str, tuple[Any, ...]]:
    """Arguments of one call of each `torch.ops.d2v.<op>`, the same at every call.

    Floating inputs have the dtype where the operator allows it; averages, targets, weights and biases that of the
    arithmetic.
    """
    wide, generator = compute_dtype(dtype), torch.Generator(device).manual_seed(0)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(of)

    x, grad, high = normal(2, tokens, width), normal(2, tokens, width), normal(2, tokens, width, of=torch.bfloat16)
    rows, target, visible = x.flatten(0, 1), normal(2 * tokens, width, of=wide), (tokens + 1) // 2
    weight, bias, keys = normal(width, of=wide), normal(width, of=wide), torch.arange(1, 3, device=device)
    order = torch.rand((2, tokens), device=device, generator=generator).argsort(1).int()
    picked, one = torch.arange(tokens, device=device), torch.ones((), device=device, dtype=wide)
    # Longer than one block of queries or keys, so that a call runs every loop.
    t = max(150, tokens + 36)
    query, key, value, out = (normal(2, t, 2, 64) for _ in range(4))
    log_sum, positions = torch.full((2, 2, t), 9.0, device=device, dtype=wide), torch.arange(2 * t, device=device).int()
    slopes, lengths = torch.ones(2, device=device, dtype=wide), keys + t // 2
    attention = (slopes, positions.view(2, t), lengths, None, keys, 0.1, 0.125)
    taps = normal(width, width // 2, 3, of=wide)
    half, full = (x if x.itemsize == 2 else x.bfloat16()), x.float()
    found: dict[str, tuple[Any, ...]] = {
        "average_layers": ([x, grad], "instance", "layer", None, 1e-5, wide),
        "update_ema_": ([target.clone(), weight.clone()], [rows, x[0, 0]], [rows * 0, x[0, 0] * 0], 0.5, None),
        "update_split_ema_": ([high], [torch.zeros_like(high, dtype=torch.int16)], [full], 0.5, None),
        "gather_tokens": (x, order[:, :visible], 1),
        "gather_tokens_backward": (grad[:, :visible], order[:, :visible], 1, tokens),
        "restore_tokens": (x[:, :visible], order, None, keys, 0.1),
        "restore_tokens_backward": (grad, order, visible, -1),
        "masked_regression_loss": (rows[picked], target, picked, picked, 0.0, 1.0),
        "masked_regression_loss_backward": (one, rows[picked], target, picked, picked, 0.0, 1.0),
        "layer_norm_gelu": (rows, weight, bias, 1e-5),
        "layer_norm_gelu_backward": (grad.flatten(0, 1), rows, weight, bias, 1e-5),
        "conv_layer_norm_gelu": (x, taps, weight, True, 1e-5),
        "conv_layer_norm_gelu_backward": (grad, x, x + grad, taps, weight, True, 1e-5),
        "gelu": (x,),
        "gelu_backward": (grad, x),
        "gelu_backward_": (grad.clone(), x),
        "attention": (query, key, value, *attention),
        "attention_backward": (out, query, key, value, out, log_sum, *attention),
        "dropout_add_layer_norm": (x, grad, weight, bias, keys, 0.5, 1e-5),
        "dropout_add_layer_norm_backward": (grad, grad, x, weight, keys, 0.5, 1e-5),
        "dropout_add_layer_norm_mixed": (half, full, weight, bias, keys, 0.5, 1e-5, True, True),
        "dropout_add_layer_norm_mixed_backward": (full, half, None, full, weight, keys, 0.5, 1e-5, half.dtype),
    }
    assert set(found) == set(OPERATORS)
    return found


def sample(op: str, device: torch.device | str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of one call."""
    return samples(device, dtype)[op]


def run(op: str, device: str, dtype: torch.dtype) -> Any:
    """One call with the sample."""
    return getattr(getattr(torch.ops, NAMESPACE), op)(*sample(op, device, dtype))
