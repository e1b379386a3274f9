"""Moving averages of whole models against PyTorch, timm and diffusers: `python -m benchmarks.ema`.

Contenders take turns on the same tensors; the smallest times count. With a copy, the others are followed by
`torch._foreach_copy_` into bfloat16. timm and diffusers are left out, and named, where they are not installed.
"""

import argparse
import copy
import importlib.util
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2v_kernels import EmaPlan
from d2v_kernels.bench.timer import take_turns

from .harness.record import require_native

DECAY = 0.999
SIZES = {14: (768, 2), 300: (1024, 24)}  # millions of parameters: width and depth of a transformer's blocks
Contenders = dict[str, tuple[int, Callable[[], Any]]]  # name: bytes moved for each parameter, and one step


def make_model(width: int, depth: int) -> nn.Module:
    sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    return nn.Sequential(*(nn.Sequential(nn.LayerNorm(width), *(nn.Linear(*s) for s in sizes)) for _ in range(depth)))


def find_file(package: str, *path: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0], *path) if spec and spec.submodule_search_locations else None


def make_contenders(student: nn.Module, teacher: nn.Module, copies: list[Tensor]) -> Contenders:
    """Every way of one step; all write the same averages and copies."""
    averages, sources = list(teacher.parameters()), list(student.parameters())

    def multiply_and_add() -> None:
        torch._foreach_mul_(averages, DECAY)
        torch._foreach_add_(averages, sources, alpha=1 - DECAY)

    others: Contenders = {
        "`_foreach_lerp_`": (12, lambda: torch._foreach_lerp_(averages, sources, 1 - DECAY)),
        "`_foreach_mul_`, `_foreach_add_`": (20, multiply_and_add),
    }
    if path := find_file("timm", "utils", "model_ema.py"):  # the package as a whole needs torchvision
        spec: Any = importlib.util.spec_from_file_location("model_ema", path)
        spec.loader.exec_module(timm := importlib.util.module_from_spec(spec))
        ema = timm.ModelEmaV3(nn.Linear(1, 1), decay=DECAY)
        ema.module = teacher
        others["timm `ModelEmaV3`"] = (12, lambda: ema.update(student))
    if find_file("diffusers"):
        from diffusers.training_utils import EMAModel

        # The foreach form allocates as much as the model once more.
        for name, foreach, size in (("", False, 32), (", foreach", True, 24))[: 2 if len(sources) < 50 else 1]:
            shadow = EMAModel((), decay=DECAY, min_decay=DECAY, foreach=foreach)
            shadow.shadow_params, shadow.optimization_step = averages, 1
            others[f"diffusers `EMAModel`{name}"] = (size, lambda shadow=shadow: shadow.step(sources))
    plan = EmaPlan(averages, sources, copies)
    if not copies:
        return {"d2v": (12, lambda: plan.step(DECAY)), **others}
    split = EmaPlan(copies, sources, low=[torch.zeros_like(c, dtype=torch.int16) for c in copies])
    for name, (size, call) in others.items():
        others[name] = (size + 6, lambda call=call: (call(), torch._foreach_copy_(copies, averages)))
    return {"d2v": (14, lambda: plan.step(DECAY)), "d2v split": (12, lambda: split.step(DECAY)), **others}


def compare(with_copy: bool) -> None:
    """Every contender's first step is right, on a small model."""
    student, start = make_model(16, 2), make_model(16, 2).requires_grad_(False)
    rounded = [p.bfloat16() for p in start.parameters()] if with_copy else []
    for name in make_contenders(student, start, rounded):
        teacher, copies = copy.deepcopy((start, rounded))
        averages = copies if name == "d2v split" else list(teacher.parameters())
        goal = [a.double().lerp(s.double(), 1 - DECAY) for a, s in zip(averages, student.parameters(), strict=True)]
        make_contenders(student, teacher, copies)[name][1]()
        for results, tolerance in ((averages, 5e-3 if averages is copies else 1e-6), (copies, 5e-3)):
            for a, w in zip(results, goal, strict=False):
                torch.testing.assert_close(a.double(), w, rtol=tolerance, atol=1e-6)


def measure(millions: int, with_copy: bool, rounds: int, clock: Callable[[], float]) -> list[str]:
    """Rows of the table."""
    student = make_model(*SIZES[millions])
    teacher = copy.deepcopy(student).requires_grad_(False)
    copies = [p.bfloat16() for p in teacher.parameters()] if with_copy else []
    contenders = make_contenders(student, teacher, copies)
    samplers = {n: lambda call=call: -clock() + (call(), clock())[1] for n, (_, call) in contenders.items()}
    take_turns(samplers, rounds=1, least=1, budget_s=0.0)
    times = {n: min(t) for n, t in take_turns(samplers, rounds=rounds, least=5, budget_s=60.0).items()}
    place = f"| {millions} M | {'bf16' if with_copy else ''} | {torch.get_num_threads()} |"
    ratios = {n: f"{times[n] * 1e3:.2f} | {times[n] / times['d2v']:.2f}" for n in times}
    return [f"{place} {n} | {size} | {ratios[n]} |" for n, (size, _) in contenders.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", choices=SIZES, default=[*SIZES], help="parameters")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of PyTorch")
    parser.add_argument("--rounds", type=int, default=40, help="turns of all contenders, for at most a minute")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: of all threads together")
    options = parser.parse_args()
    require_native("ema")
    for name in ("timm", "diffusers"):
        print("" if find_file(name) else f"{name} is not installed: left out\n", end="")
    print("| parameters | copy | threads | step | bytes a parameter | ms | time / d2v |\n|---|---|---|---|---|---|---|")
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    for with_copy, millions, threads in itertools.product((False, True), options.millions, options.threads):
        torch.set_num_threads(threads)
        compare(with_copy)
        print("\n".join(measure(millions, with_copy, options.rounds, clock)), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
