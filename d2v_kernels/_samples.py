"""Small inputs of every operator: for `info --probe`, which tells usable from importable, and for tests."""

from __future__ import annotations

from typing import Any

import torch

from ._checks import compute_dtype
from .registry import OPERATORS


def sample(op: str, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of one call of `torch.ops.d2v.<op>`; floating inputs have the dtype where the operator allows it."""
    wide = compute_dtype(dtype)
    x = torch.ones((2, 3, 4), device=device, dtype=dtype)
    rows, keys = x.flatten(0, 1), torch.tensor([1, 2], device=device)
    index = torch.tensor([[0, 2, 1], [1, 0, 2]], device=device)
    high = torch.ones((2, 3, 4), device=device, dtype=torch.bfloat16)
    # Longer than one block of queries or keys, so that a call runs every loop.
    query = torch.ones((2, 150, 2, 16), device=device, dtype=dtype)
    log_sum = torch.full((2, 2, 150), 8.0, device=device, dtype=wide)
    slopes, positions = torch.ones(2, device=device, dtype=wide), torch.arange(300, device=device).int().view(2, 150)
    attention = (slopes, positions, None, None, None, 0.0, 0.25)
    samples: dict[str, tuple[Any, ...]] = {
        "average_layers": ([x, x], "instance", "none", None, 1e-5, wide),
        "update_ema_": ([x.clone()], [x], [], 0.5, None),
        "update_split_ema_": ([high], [high.view(torch.int16) * 0], [x], 0.5, None),
        "gather_tokens": (x, index, 1),
        "gather_tokens_backward": (x, index, 1, 3),
        "restore_tokens": (x[:, :2], index, None, keys, 0.1),
        "restore_tokens_backward": (x, index, 2, 1),
        "masked_regression_loss": (rows, rows, index[0], index[1], 0.0, 1.0),
        "masked_regression_loss_backward": (slopes[0], rows, rows, None, None, 0.0, 1.0),
        "layer_norm_gelu": (rows, rows[0], None, 1e-5),
        "layer_norm_gelu_backward": (rows, rows, rows[0], None, 1e-5),
        "gelu": (x,),
        "gelu_backward": (x, x),
        "gelu_backward_": (x.clone(), x),
        "attention": (query, query, query, *attention),
        "attention_backward": (query, query, query, query, query, log_sum, *attention),
        "dropout_add_layer_norm": (x, x, x[0, 0], None, keys, 0.5, 1e-5),
        "dropout_add_layer_norm_backward": (x, x, x, x[0, 0], keys, 0.5, 1e-5),
    }
    half = x if x.itemsize == 2 else x.bfloat16()
    samples["dropout_add_layer_norm_mixed"] = (half, x.float(), x[0, 0], None, keys, 0.5, 1e-5, True, True)
    mixed_backward = (x.float(), half, None, x.float(), x[0, 0], keys, 0.5, 1e-5, half.dtype)
    samples["dropout_add_layer_norm_mixed_backward"] = mixed_backward
    assert set(samples) == set(OPERATORS)
    return samples[op]


def run(op: str, device: str, dtype: torch.dtype) -> Any:
    """One call with the sample."""
    return getattr(torch.ops.d2v, op)(*sample(op, device, dtype))
