"""One small call of every operator: `python -m benchmarks.gpu.small` runs them all, for a memory checker to watch.

Tests of how operators behave on a device, rather than what they compute, take the calls from here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_kernels import registry, use_backend

from ..harness.record import parse
from . import emulator

ops = torch.ops.d2v
F32, BF16 = torch.float32, torch.bfloat16


def make_calls(device: torch.device, rows: int = 64, width: int = 256) -> dict[str, Callable[[], Any]]:
    """Operator -> call that makes its result from tensors made here; nothing is uploaded or read back by a call."""

    def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    layers = [normal(4, rows, width) for _ in range(3)]
    averages, sources = [normal(5000, dtype=F32) for _ in range(3)], [normal(5000) for _ in range(3)]
    copies = [torch.zeros_like(s) for s in sources]
    low = [torch.zeros(5000, device=device, dtype=torch.int16) for _ in range(3)]
    weight = torch.full((), 0.01, dtype=torch.float64, device=device)
    index = torch.stack([torch.randperm(rows, device=device)[: rows // 2] for _ in range(8)]).int()
    order = torch.stack([torch.randperm(rows, device=device) for _ in range(4)]).int()
    gathered, kept, full = normal(8, rows // 2, width), normal(4, rows // 2, width), normal(4, rows, width)
    keys = torch.arange(4, device=device)
    x, y, picked = normal(rows, width), normal(rows, width, dtype=F32), torch.arange(rows, device=device)
    t = rows + 36
    heads, out = normal(2, t, 3, 2, 64).unbind(2), normal(2, t, 2, 64)
    positions = torch.arange(2 * t, device=device).int().view(2, t)
    bias = (torch.ones(2, device=device), positions, keys[:2] + t // 2)
    log_sum = torch.full((2, 2, t), 9.0, device=device)
    one = torch.ones((), device=device)
    attention = (*bias, None, keys[:2], 0.1, 0.125)
    return {
        "average_layers": lambda: ops.average_layers(layers, "instance", "layer", None, 1e-5, F32),
        "update_ema_": lambda: [ops.update_ema_(averages, sources, copies, 0.5, weight), averages, copies][1:],
        "update_split_ema_": lambda: [ops.update_split_ema_(copies, low, averages, 0.5, weight), copies, low][1:],
        "gather_tokens": lambda: ops.gather_tokens(layers[0], index, 2),
        "gather_tokens_backward": lambda: ops.gather_tokens_backward(gathered, index, 2, rows),
        "restore_tokens": lambda: ops.restore_tokens(kept, order, None, keys, 0.1),
        "restore_tokens_backward": lambda: ops.restore_tokens_backward(full, order, rows // 2, -1),
        "masked_regression_loss": lambda: ops.masked_regression_loss(x, y, picked, picked, 0.0, 1.0),
        "masked_regression_loss_backward": lambda: ops.masked_regression_loss_backward(
            one, x, y, picked, picked, 0.0, 1.0
        ),
        "layer_norm_gelu": lambda: ops.layer_norm_gelu(x, y[0], y[1], 1e-5),
        "layer_norm_gelu_backward": lambda: ops.layer_norm_gelu_backward(x, x, y[0], y[1], 1e-5),
        "gelu": lambda: ops.gelu(x),
        "gelu_backward": lambda: ops.gelu_backward(x, x),
        "gelu_backward_": lambda: ops.gelu_backward_(x.clone(), x),
        "dropout_add_layer_norm": lambda: ops.dropout_add_layer_norm(full, full, y[0], y[1], keys, 0.1, 1e-5),
        "dropout_add_layer_norm_backward": lambda: ops.dropout_add_layer_norm_backward(
            full, full, full, y[0], keys, 0.1, 1e-5
        ),
        "dropout_add_layer_norm_mixed": lambda: ops.dropout_add_layer_norm_mixed(
            full.bfloat16(), full.float(), y[0], y[1], keys, 0.1, 1e-5, True, True
        ),
        "dropout_add_layer_norm_mixed_backward": lambda: ops.dropout_add_layer_norm_mixed_backward(
            full.float(), full.bfloat16(), None, full.float(), y[0], keys, 0.1, 1e-5, torch.bfloat16
        ),
        "attention": lambda: ops.attention(*heads, *attention),
        "attention_backward": lambda: ops.attention_backward(out, *heads, out, log_sum, *attention),
    }


def flat(result: Any) -> list[Tensor]:
    """Tensors of a result."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def why_not(op: str, backend: str, device: str) -> list[str]:
    """Reasons against the call of `make_calls`."""
    dtypes = {
        "average_layers": (BF16, F32), "update_ema_": (BF16, F32), "masked_regression_loss": (BF16, F32),
        "masked_regression_loss_backward": (BF16, F32), "update_split_ema_": (F32,),
    }.get(op, (BF16,))  # fmt: skip
    traits = {"average_layers": ("instance", "layer")}.get(op, ("64",) if op.startswith("attention") else ())
    return next(b for b in registry.backends() if b.name == backend).why_not(registry.Case(op, device, dtypes, traits))


def main() -> None:
    """Runs every operator on every backend that can, at sizes with and without remainders; prints a line for each."""
    options = parse(
        "gpu.small", __doc__, None,
        emulated=(None, "on the CPU; LIBRARY: the CUDA sources built for it, or -"),
        backends=(["native", "triton"], "backends to run"),
    )  # fmt: skip
    device, sizes = torch.device("cuda"), ((37, 100), (64, 256))
    if options.emulated is not None:
        emulator.install(None if options.emulated == "-" else Path(options.emulated))
        device, sizes = torch.device("cpu"), ((9, 20), (16, 32))
    for backend in options.backends:
        for op in registry.OPERATORS:
            if reasons := why_not(op, backend, device.type):
                print(f"skipped {backend} {op}: {'; '.join(reasons)}", flush=True)
                continue
            with use_backend(backend):
                for rows, width in sizes:
                    flat(make_calls(device, rows, width)[op]())
            if device.type == "cuda":
                torch.cuda.synchronize()
            print(f"ran {backend} {op}", flush=True)


if __name__ == "__main__":
    main()
