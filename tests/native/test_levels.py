"""Every instruction level, and every number of threads, gives the same results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2v_kernels import _native

from .conftest import run_python

LEVELS = ("base", "avx2", "avx512", "avx512bf16", "amx")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}

_RUN_ALL = """
import sys, torch
from d2v_kernels import _native
torch.manual_seed(0)
torch.set_num_threads({threads})
op, out = torch.ops.d2v_native, dict()
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for channels in (5, 64, 771):
        def make(*shape):
            return torch.randn(*shape, channels, dtype=torch.float64).to(dtype)
        layers, lengths = [make(3, 45) for _ in range(4)], torch.tensor([45, 0, 31])
        for norm in ("none", "layer", "instance", "batch"):
            for out_norm in ("none", "layer", "instance"):
                out[norm, out_norm, dtype, channels] = op.average_layers(layers, norm, out_norm, lengths, 1e-5, dtype)
        average, copy = make(300), make(300)
        op.update_ema_([average], [make(300)], [copy], 0.25, None)
        out["ema", dtype, channels], out["copy", dtype, channels] = average, copy
        index = torch.randint(0, 45, (6, 20))
        out["gather", dtype, channels] = op.gather_tokens(layers[0], index, 2)
        out["scatter", dtype, channels] = op.gather_tokens_backward(make(6, 20), index, 2, 45)
        restore = torch.stack([torch.randperm(45) for _ in range(3)])
        out["noise", dtype, channels] = op.restore_tokens(make(3, 20), restore, None, torch.tensor([1, -2, 3]), 0.5)
        for rows in (25, -1):
            kept, fill = op.restore_tokens_backward(layers[1], restore, 20, rows)
            out["kept", rows, dtype, channels], out["fill", rows, dtype, channels] = kept, fill
        rows = torch.randperm(400)[:333]
        for beta in (0.0, 0.3):
            x, y = make(400), make(333)
            loss = op.masked_regression_loss(x, y, rows, None, beta, 0.1)
            out["loss", beta, dtype, channels] = torch.stack(loss)
            gradient = op.masked_regression_loss_backward(loss[0], x, y, rows, None, beta, 0.1)
            out["gradient", beta, dtype, channels] = gradient
        query, key, value = make(2, 53, 3, 2).unbind(2)
        slopes, positions = 0.1 * torch.rand(2).to(loss[0].dtype), torch.randint(0, 90, (2, 52))
        rest = slopes, positions, torch.tensor([53, 40]), None, torch.tensor([5, -6]), 0.2, channels**-0.5
        result, log_sum = op.attention(query, key, value, *rest)
        out["attention", dtype, channels], out["log sum", dtype, channels] = result, log_sum
        gradients = op.attention_backward(make(2, 53, 2), query, key, value, result, log_sum, *rest)
        for name, gradient in zip(("query", "key", "value", "slopes"), gradients):
            out["attention " + name, dtype, channels] = gradient
        x, weight, bias = make(400), make(), make()
        out["norm gelu", dtype, channels] = op.layer_norm_gelu(x, weight, bias, 1e-5)
        gradients = op.layer_norm_gelu_backward(x.flip(0), x, weight, bias, 1e-5)
        out.update({{("norm gelu", i, dtype, channels): g for i, g in enumerate(gradients)}})
        out["gelu", dtype, channels] = op.gelu(3 * x)
        out.update({{("slope", i, dtype, channels): g for i, g in enumerate(op.gelu_backward(x.flip(0), 3 * x))}})
        keys, weight = torch.tensor([1, -2, 3]), make().flatten()
        for dropout in (0.0, 0.3):
            results = op.dropout_add_layer_norm(layers[0], layers[1], weight, weight, keys, dropout, 1e-5)
            more = op.dropout_add_layer_norm_backward(layers[2], layers[3], layers[1], weight, keys, dropout, 1e-5)
            for i, t in enumerate((*results, *more)):
                out["norm", i, dropout, dtype, channels] = t
            if dtype.itemsize == 2:
                wide, rest = layers[1].float(), (weight, keys, dropout, 1e-5)
                results = op.dropout_add_layer_norm_mixed(layers[0], wide, weight, *rest, True, True)
                more = op.dropout_add_layer_norm_mixed_backward(wide, layers[2], None, wide, *rest, dtype)
                for i, t in enumerate((*results, *more)):
                    out["norm of two dtypes", i, dropout, dtype, channels] = t
print(_native.build_record()["isa"])
torch.save(out, {path!r})
"""


def _run(path: Path, level: str, threads: int) -> tuple[str, dict[tuple[object, ...], torch.Tensor]]:
    level = run_python(_RUN_ALL.format(threads=threads, path=str(path)), D2V_KERNELS_ISA=level).strip()
    return level, torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def results(
    cpu_library: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], dict[tuple[object, ...], torch.Tensor]]:
    folder = tmp_path_factory.mktemp("levels")
    levels = [n for n in LEVELS if n in _native.build_record()["isa_levels"]]
    found = {}
    for asked, threads in [(level, 1) for level in levels] + [(levels[-1], 2)]:
        level, tensors = _run(folder / f"{asked}-{threads}.pt", asked, threads)
        found[level, threads] = tensors
    return found


def test_levels_agree(results: dict[tuple[str, int], dict[tuple[object, ...], torch.Tensor]]) -> None:
    base = results["base", 1]
    for (level, _), tensors in results.items():
        for key, expected in base.items():
            tolerance = TOLERANCE[expected.dtype]
            if key[0] == "noise":  # computed in fp32, whatever the type
                tolerance = max(tolerance, 2e-6)
            elif key[0] == "attention slopes":  # from results that were rounded to the type of the inputs
                tolerance = max(tolerance, TOLERANCE[key[1]])
            torch.testing.assert_close(
                tensors[key], expected, rtol=tolerance, atol=tolerance, msg=lambda m, at=(level, key): f"{at}: {m}"
            )


def test_threads_change_no_bit(results: dict[tuple[str, int], dict[tuple[object, ...], torch.Tensor]]) -> None:
    ((level, _),) = [key for key in results if key[1] == 2]
    for key, expected in results[level, 1].items():
        assert torch.equal(results[level, 2][key], expected), key
