"""What a step spends its time on: matrix products and convolutions, and everything else."""

from __future__ import annotations

from typing import Any

import torch

from .step_forms import Form

PRODUCTS = (
    "mm", "linear", "convolution", "conv1d", "conv2d", "attention", "gemm", "xmma", "cutlass", "wgrad", "dgrad",
    "fprop",
    "flash", "fmha", "nvjet",
)  # fmt: skip
"""Parts of the names of operators and kernels that are matrix products, convolutions or attention."""


def is_product(name: str) -> bool:
    """Whether an operator's or kernel's time counts as matrix products, convolutions or attention."""
    return any(part in name.lower() for part in PRODUCTS)


def measure_operators(form: Form, batch: Any, steps: int = 2) -> dict[str, float]:
    """Seconds a step inside products and outside them, and how many operators (CPU) or kernels (GPU) it launches.

    From torch.profiler, whose own cost is inside; shares matter, not sums.
    """
    on_gpu = form.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(steps):
            form.step(*batch)
        if on_gpu:
            torch.cuda.synchronize()
    inside = outside = 0.0
    launches = 0
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.key.startswith("ProfilerStep") or not spent:
            continue
        launches += event.count
        if is_product(event.key):
            inside += spent
        else:
            outside += spent
    return {"products": inside / 1e6 / steps, "outside": outside / 1e6 / steps, "launches": launches / steps}
