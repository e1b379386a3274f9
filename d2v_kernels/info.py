"""`python -m d2v_kernels.info [--probe] [--json]`: which backend each operator and attention takes, or why not."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from . import _define, _env, _native, _samples, products, registry
from .ops import attention

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _probe(op: str, device: str, dtype: torch.dtype, backend: str) -> str:
    try:
        with registry.use_backend(backend):
            _samples.run(op, device, dtype)
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    return "ran"


# What models ask of attention: the form's name, and what sets it apart.
_ATTENTION_FORMS: dict[str, dict[str, bool]] = {
    "plain": {},
    "key padding": {"masked": True},
    "packed": {"packed": True},
    "ALiBi": {"alibi": True},
    "ALiBi, dropout": {"alibi": True, "dropout": True},
    "dropout from row keys": {"dropout": True, "dropout_keys": True},
}


def attention_engines() -> list[dict[str, Any]]:
    """For every form, device and dtype the engine of attention that runs, and the reasons against those before it."""
    rows = []
    for form, traits in _ATTENTION_FORMS.items():
        for device in _devices():
            for dtype in _DTYPES:
                request = attention.Request(device, dtype, 64, **traits)
                row: dict[str, Any] = {"form": form, "device": device, "dtype": str(dtype).removeprefix("torch.")}
                row["chosen"] = attention.choose_engine(request)
                row["why_not"] = _why_not_engines(request, row["chosen"])
                rows.append(row)
    return rows


def _why_not_engines(request: attention.Request, chosen: str) -> dict[str, str]:
    """Reasons against the other engines; one that comes after the chosen one is not tried."""
    order = attention.preferred_engines(request)
    earlier = order[: order.index(chosen)]
    why_not = {}
    for name in attention.ENGINES:
        if name != chosen:
            reasons = attention.why_not_engine(name, request, probe=name in earlier)
            why_not[name] = "; ".join(reasons) or f"{chosen} comes before it; not tried"
    return why_not


_TIMED_SHAPES = ((16, 40, 12, 64), (2, 250, 12, 64))  # few visible tokens; speech


def attention_times() -> list[dict[str, Any]]:
    """Milliseconds of forward and backward of plain attention by each engine of the CPU: minima of calls in turns."""
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        request = attention.Request("cpu", dtype, 64)
        names = [name for name in ("native", "sdpa") if not attention.why_not_engine(name, request)]
        for shape in _TIMED_SHAPES:
            generator = torch.Generator().manual_seed(0)
            inputs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]

            def call(name: str, inputs: list[torch.Tensor] = inputs) -> None:
                attention.attend(*inputs, engine=name).backward(inputs[0].detach())

            row = {"dtype": str(dtype).removeprefix("torch."), "shape": shape, "milliseconds": _race(names, call)}
            rows.append({**row, "chosen": attention.choose_engine(request)})
    return rows


def product_times() -> list[dict[str, Any]]:
    """Milliseconds of a float32 product on the CPU by each library that PyTorch brings; see `choose_products`."""
    a, b = torch.randn(2, 1024, 1024, generator=torch.Generator().manual_seed(0))
    names = [name for name in products.CHOICES[1:] if name != "onednn" or torch.backends.mkldnn.is_available()]
    row = {"dtype": "float32", "shape": (1024, 1024, 1024), "chosen": products.CHOICES[1 + products.takes_onednn(a)]}
    return [{**row, "milliseconds": _race(names, lambda name: products.product_by(name, a, b))}]


def _race(names: list[str], call: Callable[[str], Any]) -> dict[str, float]:
    """Milliseconds of the quickest of four calls of each, which take turns."""
    best = dict.fromkeys(names, float("inf"))
    for name in names * 4:
        start = time.perf_counter()
        call(name)
        best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def summarise(operators: list[dict[str, Any]]) -> str:
    """How many operators each backend runs on each device, of float32, and what of the backends is missing."""
    parts = []
    for device in _devices():
        rows = [row for row in operators if (row["device"], row["dtype"]) == (device, "float32")]
        for backend in registry.backends():
            count = sum(row[backend.name].startswith("chosen") for row in rows)
            if count or backend.name == "native":
                parts.append(f"{backend.name} on {device} for {count} of {len(rows)} operators")
        parts += [f"missing: {text}" for backend in registry.backends() for text in backend.missing(device)]
    return "; ".join(parts)


def collect(probe: bool = False) -> dict[str, Any]:
    """Versions, build record, and for every operator, device, dtype and backend "chosen", "usable" or the reasons."""
    operators: list[dict[str, Any]] = []
    for op in registry.OPERATORS:
        for device in _devices():
            for dtype in _DTYPES:
                case = _define.case(op, device, _samples.sample(op, device, dtype))
                chosen = registry.choose(case).name
                row: dict[str, Any] = {"op": op, "device": device, "dtype": str(dtype).removeprefix("torch.")}
                for backend in registry.backends():
                    reasons = backend.why_not(case)
                    state = "; ".join(reasons) or ("chosen" if backend.name == chosen else "usable")
                    if probe and not reasons:
                        state += f" ({_probe(op, device, dtype, backend.name)})"
                    row[backend.name] = state
                operators.append(row)
    return {
        "summary": summarise(operators),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "backend": registry.forced_backend(),
        "highest_isa_allowed": _env.highest_isa(),
        "build": _native.build_record(),
        "not_loaded": _native.load_errors(),
        "operators": operators,
        "attention": attention_engines(),
        "attention_times": attention_times() if probe else [],
        "product_times": product_times() if probe else [],
    }


def _print_text(report: dict[str, Any]) -> None:
    for key, value in report.items():
        if key in ("operators", "attention", "attention_times", "product_times"):
            continue
        if isinstance(value, dict):
            print(f"{key}:" + ("" if value else " -"))
            for name, item in value.items():
                print(f"  {name}: {item}")
        else:
            print(f"{key}: {value if value is not None else '-'}")
    print("operators:")
    names = [backend.name for backend in registry.backends()]
    last = ""
    for row in report["operators"]:
        title = f"{row['op']} on {row['device']}"
        if title != last:
            print(f"  {title}")
            last = title
        print(f"    {row['dtype']:<9}" + "  ".join(f"{name}: {row[name]}" for name in names))

    _print_attention(report["attention"])
    _print_times("attention on cpu, forward and backward (rows, tokens, heads, width)", report["attention_times"])
    _print_times("product on cpu (rows, channels, outputs)", report["product_times"])


def _print_times(title: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        print(f"{title}:")
    for row in rows:
        quickest = min(row["milliseconds"].values())
        times = (f"{name} {ms:.2f} ms ({ms / quickest:.2f} x)" for name, ms in row["milliseconds"].items())
        print(f"  {row['dtype']:<9}{row['shape']}  {', '.join(times)}  chosen: {row['chosen']}")


def _print_attention(rows: list[dict[str, Any]]) -> None:
    print("attention:")
    last = ""
    alike: dict[str, list[str]] = {}
    for row in rows:
        because = "".join(f"\n      not {name}: {reasons}" for name, reasons in row["why_not"].items())
        alike.setdefault(f"{row['form']} on {row['device']}\nchosen: {row['chosen']}{because}", []).append(row["dtype"])
    for text, dtypes in alike.items():
        title, rest = text.split("\n", 1)
        if title != last:
            print(f"  {title}")
            last = title
        print(f"    {', '.join(dtypes)}  {rest}")


def main(arguments: list[str] | None = None) -> None:
    """Prints the report; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m d2v_kernels.info", description=__doc__)
    text = "run a tiny case of every usable operator; time attention and products"
    parser.add_argument("--probe", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(arguments)
    report = collect(options.probe)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print_text(report)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # what read the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
