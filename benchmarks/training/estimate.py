"""A training step on paper: the kernels of an eager step, counted on tensors without memory, and what a GPU should need
for them by assumed rates. Every time is an estimate; `benchmarks.step` prints measured ones beside it.

A kernel is an operator with the shapes of its tensors. Counted are FLOPs of products, bytes of inputs and outputs, each
once, and instructions where a kernel waits for them. Its time: the longer of the bytes' and of the rest's, and START
for every launch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from d2v import recipes
from d2v.model import layers, teacher
from d2v.model.data2vec import Data2Vec
from d2v.tools.cluster import Cluster, find_machine
from d2v.tools.paper import draw_masks, forms_of_gpus, length_of, on_paper
from d2v.train.flops import count_flops, shape_of

from ..harness.record import RESULTS, read_rows
from ..harness.report import markdown
from .cases import CPU, GPU, StepCase, make_config, make_inputs
from .forms import Form, group_of

START, LIST = 2e-6, 32
"""Seconds that a GPU loses between two kernels, and tensors that one launch over a list takes; both assumed."""
FUSED = "conv_layer_norm_gelu"
SHARES = {"matrix products": 0.6, "attention": 0.3, "convolutions": 0.4, "grouped convolutions": 0.05, FUSED: 0.2}
"""Of the peak, reached by products of a group; assumed. Groups of 24 to 48 channels fill a small part of the library's
tiles. The Triton form pads 48 to 64 and brings every number of its windows through shared memory, which bounds it to
about 0.33, and issues almost as many other instructions as its products take cycles (counted in code for sm_90)."""
SCALARS = {"restore_tokens": 344, "gelu": 145, "gelu_backward_": 116, "layer_norm_gelu": 180,
           "layer_norm_gelu_backward": 202, FUSED: 122, f"{FUSED}_backward": 161, "average_layers": 195,
           "gather_tokens": 17, "dropout_add_layer_norm": 80, "dropout_add_layer_norm_backward": 142,
           "dropout_add_layer_norm_mixed": 50, "dropout_add_layer_norm_mixed_backward": 87}  # fmt: skip
"""Warp instructions a KiB that is moved, bfloat16, as `make counts` finds them in compiled code for sm_90; of a fused
convolution those of its norm."""
PAIRS = {"attention": (14, 7, 10), "attention_backward": (36, 19, 26)}
"""Instructions of a thread for a pair of query and key, for its ALiBi, for its dropout; counted likewise."""
LAUNCHES = {FUSED: 3, f"{FUSED}_backward": 7, "native_layer_norm_backward": 3, "layer_norm_gelu_backward": 2,
            "dropout_add_layer_norm_backward": 3, "dropout_add_layer_norm_mixed_backward": 3,
            "attention_backward": 3, "convolution_backward": 4, "linalg_vector_norm": 1 / LIST}  # fmt: skip
"""Kernels of an operator, where not one; assumed."""
SILENT = re.compile(r"view|^(t|detach|alias|(un)?squeeze|transpose|permute|unbind|select|slice|expand|(new_)?empty\w*|"
                    r"split\w*|_record_function_\w+|device|scalar_tensor|as_strided)$")  # fmt: skip
"""Operators that launch nothing."""
WRITERS = re.compile(r"^(copy_|fill_|zero_|zeros|ones|full|randint|uniform_|normal_|bernoulli_|\w+_like)$")
"""Their first tensor is not read."""
TARGETS, LEAST_MFU = {"speech-base": 2600.0, "vision-base": 900.0}, 0.4
"""Seconds of audio, images; a second, on one H200."""
LONGEST = 12
"""Kernels that are shown one by one."""


@dataclass
class Kernel:
    """An operator with the shapes of its first tensors, and its counts in all calls of a step."""

    group: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    calls: int = 1
    flops: float = 0.0
    bytes: float = 0.0
    instructions: float = 0.0
    launches: float = 1.0

    def parts(self, machine: Cluster) -> dict[str, float]:
        """Seconds by what they are spent on."""
        products = self.flops / (machine.peak * SHARES.get(self.group, 1.0))
        return {"FLOPs": products, "instructions": self.instructions / machine.issue,
                "bytes": self.bytes / machine.memory_rate, "launches": self.launches * START}  # fmt: skip

    def seconds(self, machine: Cluster) -> float:
        """Of all calls; products and other instructions add up, because they share the schedulers."""
        part = self.parts(machine)
        return max(part["bytes"], part["FLOPs"] + part["instructions"]) + part["launches"]


class Recorder(TorchDispatchMode):
    """Collects the kernels that operators stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[Any, Kernel] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func._schema.name.split("::")[1]
        if not SILENT.search(name):
            self.add(func, name, args, _tensors((args, kwargs)), _tensors(result))
        return result

    def add(self, func: Any, name: str, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """One call."""
        shapes = tuple(tuple(x.shape) for x in inputs)
        group = group_of(func._schema.name, shapes)
        if group == "optimiser and clipping" and not outputs:  # lists, in place; of AdamW all but the gradients
            outputs = _tensors((args[0], args[2:4]))
        read, written = _bytes(inputs[1:] if WRITERS.match(name) else inputs), _bytes(outputs)
        if name in ("embedding", "index", "index_select", "gather"):
            read = min(read, 2.0 * written)  # only the rows that are asked for
        moved, (flops, instructions) = read + written, _work(func, name, args, outputs)
        instructions += SCALARS.get(name, 0) * moved / 1024.0
        if group == FUSED:
            moved, instructions = _add_norm(moved, outputs[0] if name == FUSED else args[2], args)
        if "convolutions" in group and not _has_channels_last(inputs[0]):
            moved *= 2.0  # the library copies to the layout that it wants
        launches = LAUNCHES.get(name, max(1, math.ceil(len(inputs) / LIST)))
        self.count(Kernel(group, name, shapes[:4], 1, flops, moved, instructions, launches))

    def count(self, one: Kernel) -> None:
        """Adds a call to those of its kernel."""
        kernel = self.kernels.setdefault((one.name, one.shapes), one)
        if kernel is not one:
            for part in ("calls", "flops", "bytes", "instructions", "launches"):
                setattr(kernel, part, getattr(kernel, part) + getattr(one, part))


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> float:
    """What is expanded counts as it lies in memory."""
    return float(sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in tensors))


def _has_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _add_norm(moved: float, y: Tensor, args: Any) -> tuple[float, float]:
    """Bytes of a fused convolution, and the instructions of its norm. Besides what comes and goes, its kernels hand on
    `y` (N,...,D): forward the norm reads it and the residual; backward the gradient of y is written and read twice, and
    what is added to the gradient of x read again."""
    one, residual = float(y.numel() * y.itemsize), float(args[-2])
    if len(args) == 5:
        return moved + (1.0 + residual) * one, SCALARS[FUSED] * (2.0 + residual) * one / 1024.0
    return moved + (3.0 + residual) * one, SCALARS[f"{FUSED}_backward"] * 3.0 * one / 1024.0


def _work(func: Any, name: str, args: Any, outputs: list[Tensor]) -> tuple[float, float]:
    """FLOPs of products, a multiply-add as 2, without what attention computes again; and attention's instructions."""
    backward = "backward" in name
    if "attention" in name:  # d2v has (N,T,H,D), PyTorch (N,H,T,D)
        (query, key), own = args[1:3] if backward else args[:2], name.startswith("attention")
        plain, alibi, random = PAIRS["attention_backward" if backward else "attention"]
        biased = own and args[6 if backward else 3] is not None
        multiplied = query.numel() * key.shape[1 if own else 2]
        lanes = multiplied / query.shape[-1] / 32.0
        drops = own and args[-2] > 0.0
        return (8.0 if backward else 4.0) * multiplied, lanes * (plain + alibi * biased + random * drops)
    if name == "convolution_backward":  # PyTorch's count takes grouped weights for those without groups
        grad, _, weight = args[:3]
        return 2.0 * grad.shape[0] * math.prod(grad.shape[2:]) * weight.numel() * sum(args[-1][:2]), 0.0
    if name.startswith(FUSED):
        y, weight = (args[2], args[3]) if backward else (outputs[0], args[1])
        return (4.0 if backward else 2.0) * y.numel() / y.shape[-1] * weight.numel(), 0.0
    count = flop_registry.get(func.overloadpacket)
    return (float(count(*args, out_val=outputs[0])) if count else 0.0), 0.0


# ---- the step


def find_case(recipe: str) -> StepCase:
    """The batch that `benchmarks.step` measures a recipe with, else its own micro-batch."""
    config = recipes.get(recipe)
    own = StepCase(recipe, config.data.micro_batch or config.data.global_batch, length_of(config))
    return next((case for case in GPU + CPU if case.recipe == recipe), own)


@contextlib.contextmanager
def _step_on_paper() -> Iterator[None]:
    """Tensors without memory; operators as on a GPU, though the tensors say that they are on a CPU."""

    def cast(module: nn.Module, dtype: torch.dtype) -> None:  # `Module.to` cannot change tensors without memory
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                for name, p in list(part.named_parameters(recurse=False)):
                    part.register_parameter(name, nn.Parameter(p.to(dtype), requires_grad=False))

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p > 0.0 else x

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, p: float) -> Tensor:  # the one that takes a bias
        whole = bias.expand(*q.shape[:3], k.shape[2])
        result: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, whole, True, p)[0]
        return result

    with (
        forms_of_gpus(),
        mock.patch.object(layers.LayerNorm, "forward", lambda self, x: nn.LayerNorm.forward(self, x.float())),
        mock.patch.object(F, "dropout", dropout),
        mock.patch.object(F, "scaled_dot_product_attention", attend),
        mock.patch.object(Data2Vec, "to", lambda self, _: self),
        mock.patch.multiple(teacher, _cast_products=cast),
        mock.patch.multiple(
            teacher.Teacher,
            _versions=lambda self: (),
            update=lambda *_: None,  # they need addresses
            _bookkeeping=lambda self: contextlib.nullcontext(),  # without it operators come here before they are split
        ),
        on_paper(),
    ):
        yield


def count_step(case: StepCase, convolution: str = "library") -> tuple[list[Kernel], float]:
    """Kernels of a bfloat16 step of the form `d2v`, and the FLOPs that the model needs (`d2v.train.flops`).

    `convolution`: run.convolution, whose `auto` would ask for this CPU and not for the GPU, where it is `library`.
    """
    config = make_config(case, "bf16").replace("run.convolution", convolution)
    inputs = make_inputs(case, config, 0)
    masks, measured = draw_masks(config, inputs)
    with _step_on_paper():
        form = Form("d2v", config, Data2Vec(config).state_dict(), torch.device("cpu"))
        object.__setattr__(form.model.stem, "measure", lambda *_: measured)
        form.step(inputs, masks)  # makes the optimiser's moments
        with Recorder() as recorder:
            form.step(inputs, masks)
        averaged = sum(p.numel() for p in form.model.teacher.parameters())
        copies = _bytes(p for part in form.model.teacher.working_parts().values() for p in part.parameters())
        # In its own pass: reads average and student, writes the average and the working copy.
        recorder.count(Kernel("update_ema", "update_ema_", ((averaged,),), bytes=12.0 * averaged + copies))
    return list(recorder.kernels.values()), count_flops(config, shape_of(masks, case.samples, inputs.shape[1]))


# ---- the table


def measured_groups(case: StepCase, machine: str) -> dict[str, float]:
    """Group -> seconds of a step that was stored for this case on such a GPU; empty: none."""
    rows = [row for name in ("step-cuda", "gpu") for row in read_rows(RESULTS / f"{name}.jsonl")]
    found = [row["forms"]["d2v"].get("groups", {}) for row in rows if row.get("kind") == "step"
             and row["case"] == case.name and machine in str(row["machine"].get("gpu")).lower()]  # fmt: skip
    return found[-1] if found else {}


def summarise(kernels: list[Kernel], machine: Cluster) -> list[dict[str, Any]]:
    """Counts and seconds of every group, the longest first; "bound": what most of it is spent on."""
    lines = []
    for group in dict.fromkeys(k.group for k in kernels):
        own = [k for k in kernels if k.group == group]
        line = {n: sum(getattr(k, n) for k in own) for n in ("calls", "launches", "flops", "bytes", "instructions")}
        parts = {n: sum(k.parts(machine)[n] for k in own) for n in own[0].parts(machine)}
        seconds = sum(k.seconds(machine) for k in own)
        lines.append({"group": group, **line, "seconds": seconds, "bound": max(parts, key=lambda n: parts[n])})
    return sorted(lines, key=lambda line: -line["seconds"])


def estimate(name: str, recipe: str, as_json: bool = False) -> str:
    """Tables of a recipe on a machine, or the same with every kernel as JSON. `ValueError`: unknown names."""
    machine, case = find_machine(name), find_case(recipe)
    (kernels, needed), measured = count_step(case), measured_groups(case, name)
    lines = summarise(kernels, machine)
    gpu, host = (sum(line[part] for line in lines) for part in ("seconds", "launches"))
    seconds = max(gpu, host * machine.launch)
    unit = {"vision": "images", "speech": "s of audio", "text": "tokens"}[case.modality]
    rate, mfu = case.samples * (case.length or 1.0) / seconds, needed / seconds / machine.peak
    fused = sum(k.seconds(machine) for k in count_step(case, "fused")[0])
    result = {"estimate": True, "machine": name, "case": case.name, "rates": dataclasses.asdict(machine), "unit": unit,
              "seconds": seconds, "a second": rate, "mfu": mfu, "groups": lines, "measured": measured,
              "seconds with run.convolution fused": fused}  # fmt: skip
    if as_json:
        return json.dumps({**result, "kernels": [vars(k) | {"seconds": k.seconds(machine)} for k in kernels]})
    goals = [("MFU", mfu, LEAST_MFU, ".0%")]
    if recipe in TARGETS and name == "h200":
        goals.append((f"{unit} a second", rate, TARGETS[recipe], ",.0f"))
    shares = ", ".join(f"{group} {share:.0%}" for group, share in SHARES.items() if group != FUSED)
    return "\n".join([
        f"ESTIMATE, no measurement: {case.name}, bfloat16, eager form d2v, one {name}.", "",
        f"Assumed: {machine.peak / 1e12:.0f} TFLOP/s, of it {shares}; {machine.memory_rate / 1e12:.2f} TB/s; "
        f"{machine.issue / 1e12:.2f} T warp instructions/s; {START * 1e6:g} us a kernel, of the host "
        f"{machine.launch * 1e6:g}.", "", *_tables(lines, measured, kernels, machine), "",
        f"Step {seconds * 1e3:.1f} ms (GPU {gpu * 1e3:.1f}, launches {host * machine.launch * 1e3:.1f}); needed: "
        f"{needed / 1e12:.2f} TFLOP; {rate:,.0f} {unit} a second.",
        f"With run.convolution fused {fused * 1e3:.1f} ms on the GPU, if its products reach {SHARES[FUSED]:.0%} of the "
        "peak: an assumption, too.",
        *(f"{what} {value:{form}}: target {goal:{form}} {'' if value >= goal else 'NOT '}reached by this estimate."
          for what, value, goal, form in goals),
    ])  # fmt: skip


def _tables(
    lines: list[dict[str, Any]], measured: dict[str, float], kernels: list[Kernel], machine: Cluster
) -> list[str]:
    """Groups, and the longest kernels."""
    counts = {"GFLOP": ("flops", 1e9), "MB": ("bytes", 1e6), "M instructions": ("instructions", 1e6),
              "ms, estimate": ("seconds", 1e-3)}  # fmt: skip
    total, names = sum(line["seconds"] for line in lines), {line["group"] for line in lines}
    rows = [[line["group"], line["calls"], f"{line['launches']:.0f}",
             *(f"{line[n] / unit:.1f}" for n, unit in counts.values()), f"{line['seconds'] / total:.0%}", line["bound"],
             f"{measured.get(line['group'], 0.0) * 1e3:.1f}"] for line in lines]  # fmt: skip
    rows += [[n, *[""] * 8, f"{s * 1e3:.1f}"] for n, s in measured.items() if n not in names]
    head = ["group", "calls", "launches", *counts, "share", "most of it", "ms, measured"]
    keep = len(head) - (0 if measured else 1)
    first = sorted(kernels, key=lambda k: -k.seconds(machine))[:LONGEST]
    each = ([f"`{k.name}`", ", ".join("×".join(map(str, s)) for s in k.shapes[:3]), k.calls, f"{k.flops / 1e9:.1f}",
             f"{k.bytes / 1e6:.1f}", f"{k.seconds(machine) * 1e3:.2f}"] for k in first)  # fmt: skip
    longest = markdown(["longest kernels", "shapes", "calls", "GFLOP", "MB", "ms, estimate"], each)
    return [markdown(head[:keep], (row[:keep] for row in rows)), "", longest]
