"""One tiny call of every operator, to tell usable from importable."""

from __future__ import annotations

from collections.abc import Callable

import torch

_op = torch.ops.d2v


def _rows(device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones((2, 3, 4), device=device, dtype=dtype)


def _index(device: str) -> torch.Tensor:
    return torch.tensor([[0, 2, 1], [1, 0, 2]], device=device)


def _average_layers(device: str, dtype: torch.dtype) -> None:
    out = torch.float64 if dtype == torch.float64 else torch.float32
    _op.average_layers([_rows(device, dtype)] * 2, "instance", "none", None, 1e-5, out)


def _update_ema(device: str, dtype: torch.dtype) -> None:
    _op.update_ema_([_rows(device, dtype)], [_rows(device, dtype)], [], 0.5, None)


def _update_split_ema(device: str, dtype: torch.dtype) -> None:
    high = _rows(device, torch.bfloat16)
    _op.update_split_ema_([high], [high.view(torch.int16) * 0], [_rows(device, dtype)], 0.5, None)


def _gather(device: str, dtype: torch.dtype) -> None:
    _op.gather_tokens(_rows(device, dtype), _index(device), 1)


def _gather_backward(device: str, dtype: torch.dtype) -> None:
    _op.gather_tokens_backward(_rows(device, dtype), _index(device), 1, 3)


def _restore(device: str, dtype: torch.dtype) -> None:
    keys = torch.tensor([1, 2], device=device)
    _op.restore_tokens(_rows(device, dtype)[:, :2], _index(device), None, keys, 0.1)


def _restore_backward(device: str, dtype: torch.dtype) -> None:
    _op.restore_tokens_backward(_rows(device, dtype), _index(device), 2, 1)


def _loss(device: str, dtype: torch.dtype) -> None:
    x = _rows(device, dtype).flatten(0, 1)
    _op.masked_regression_loss(x, x, _index(device)[0], _index(device)[1], 0.0, 1.0)


def _loss_backward(device: str, dtype: torch.dtype) -> None:
    x = _rows(device, dtype).flatten(0, 1)
    grad = torch.ones((), device=device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    _op.masked_regression_loss_backward(grad, x, x, None, None, 0.0, 1.0)


def _norm_gelu(device: str, dtype: torch.dtype) -> None:
    x = _rows(device, dtype).flatten(0, 1)
    _op.layer_norm_gelu(x, x[0], None, 1e-5)


def _norm_gelu_backward(device: str, dtype: torch.dtype) -> None:
    x = _rows(device, dtype).flatten(0, 1)
    _op.layer_norm_gelu_backward(x, x, x[0], None, 1e-5)


def _gelu(device: str, dtype: torch.dtype) -> None:
    _op.gelu(_rows(device, dtype))


def _gelu_backward(device: str, dtype: torch.dtype) -> None:
    _op.gelu_backward(_rows(device, dtype), _rows(device, dtype))


def _gelu_backward_in_place(device: str, dtype: torch.dtype) -> None:
    _op.gelu_backward_(_rows(device, dtype), _rows(device, dtype))


def _attention_inputs(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    # Longer than one block of queries or keys, so that a probe runs every loop.
    return [torch.ones((2, 150, 2, 16), device=device, dtype=dtype) for _ in range(3)]


def _attention_bias(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.ones(2, device=device, dtype=wide), torch.arange(300, device=device).int().view(2, 150)]


def _attention(device: str, dtype: torch.dtype) -> None:
    bias = _attention_bias(device, dtype)
    _op.attention(*_attention_inputs(device, dtype), *bias, None, None, None, 0.0, 0.25)


def _attention_backward(device: str, dtype: torch.dtype) -> None:
    inputs, bias = _attention_inputs(device, dtype), _attention_bias(device, dtype)
    out, log_sum = _op.attention(*inputs, *bias, None, None, None, 0.0, 0.25)
    _op.attention_backward(out, *inputs, out, log_sum, *bias, None, None, None, 0.0, 0.25)


def _add_norm(device: str, dtype: torch.dtype) -> None:
    x, keys = _rows(device, dtype), torch.tensor([1, 2], device=device)
    _op.dropout_add_layer_norm(x, x, x[0, 0], None, keys, 0.5, 1e-5)


def _add_norm_backward(device: str, dtype: torch.dtype) -> None:
    x, keys = _rows(device, dtype), torch.tensor([1, 2], device=device)
    _op.dropout_add_layer_norm_backward(x, x, x, x[0, 0], keys, 0.5, 1e-5)


PROBES: dict[str, Callable[[str, torch.dtype], None]] = {
    "average_layers": _average_layers,
    "update_ema_": _update_ema,
    "update_split_ema_": _update_split_ema,
    "gather_tokens": _gather,
    "gather_tokens_backward": _gather_backward,
    "restore_tokens": _restore,
    "restore_tokens_backward": _restore_backward,
    "masked_regression_loss": _loss,
    "masked_regression_loss_backward": _loss_backward,
    "layer_norm_gelu": _norm_gelu,
    "layer_norm_gelu_backward": _norm_gelu_backward,
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
    "gelu_backward_": _gelu_backward_in_place,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "dropout_add_layer_norm": _add_norm,
    "dropout_add_layer_norm_backward": _add_norm_backward,
}
