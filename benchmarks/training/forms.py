"""The forms of a training step: each does forward, backward, clipping, AdamW and the moving average; and what a
step spends its time and memory on."""

from __future__ import annotations

import contextlib
import itertools
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2v.config import Config
from d2v.model.data2vec import Data2Vec
from d2v.model.target_cache import TargetCache
from d2v.model.transformer import Block
from d2v.train.objective import autocast
from d2v.train.optim import build_optimiser, clip_gradients, decay_groups
from d2v_kernels import Masks

from .plain import PlainData2Vec, plain_blocks

FORMS = {
    "plain": "the published formulation in eager PyTorch",
    "plain compiled": "the same under torch.compile",
    "d2v": "this library",
    "d2v all": "as one compiled graph; on a GPU with compiled blocks, the teacher as a CUDA graph",
    "d2v frozen": "this library with a teacher that stands still: its targets come from disk",
}
FROZEN = "d2v frozen"
PHASES = ("forward", "backward", "optimiser", "ema")
CLIP = 3.0


class Form:
    """A model of one form with its optimiser."""

    def __init__(self, name: str, config: Config, state: dict[str, Tensor], device: torch.device) -> None:
        self.name, self.config, self.device = name, config, device
        self.plain = name.startswith("plain")
        self.model: Data2Vec = (PlainData2Vec if self.plain else Data2Vec)(config)
        self.model.load_state_dict(state)
        self.model.to(device).train()
        self.network: nn.Module = self.model
        if name == "plain compiled":
            self.network = torch.compile(self.model)  # type: ignore[assignment]
        elif name == "d2v all":
            self._use_everything()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = build_optimiser(decay_groups(self.model, config.optim), config.optim)
        self.marks: list[Any] = []
        self.cache: TargetCache | None = None
        if name == FROZEN:
            self._folder = tempfile.TemporaryDirectory()
            self.cache = TargetCache(Path(self._folder.name), config, "", 10**12)

    def _use_everything(self) -> None:
        """On a CPU the network as one graph; on a GPU the student's blocks, and the teacher as a CUDA graph."""
        if self.device.type != "cuda":
            self.model.compile()
            return
        self.model.graph_teacher()
        for owner in (self.model.context, self.model.blocks):
            for block in owner.modules():
                if isinstance(block, Block):
                    block.compile()

    def forward(self, inputs: Tensor, masks: Masks, noise: Tensor | None = None) -> Tensor:
        """The loss; noise: decoder rows, for comparing forms."""
        blocks = plain_blocks() if self.plain else contextlib.nullcontext()
        with blocks, autocast(self.config.run.precision, self.device):
            if self.cache is None:
                loss: Tensor = self.network(inputs, masks=masks, noise=noise).loss
                return loss
            keys = self.cache.keys(inputs.cpu(), None)
            targets = self.cache.read(keys, masks.mask.shape[1])
            out = self.network(
                inputs, masks=masks, noise=noise, targets=None if targets is None else targets.to(inputs.device)
            )
            if targets is None:
                self.cache.write(keys, out.targets, None)
            return cast(Tensor, out.loss)

    def step(self, inputs: Tensor, masks: Masks) -> None:
        """One update."""
        self._mark(first=True)
        loss = self.forward(inputs, masks)
        self._mark()
        loss.backward()
        self._mark()
        if self.plain:
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        else:
            clip_gradients(self.parameters, CLIP)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._mark()
        if isinstance(self.model, PlainData2Vec):
            self.model.update_teacher(0.999)
        elif self.cache is None:
            self.model.teacher.update(0.999)
        self._mark()

    def _mark(self, first: bool = False) -> None:
        if first:
            self.marks = []
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def phases(self) -> dict[str, float]:
        """Seconds of each phase of the last step, which has ended."""
        on_gpu = self.device.type == "cuda"
        spans = (
            begin.elapsed_time(end) / 1e3 if on_gpu else end - begin for begin, end in itertools.pairwise(self.marks)
        )
        return dict(zip(PHASES, spans, strict=False))


@contextlib.contextmanager
def settings(threads: int) -> Iterator[None]:
    """Threads for a while; full float32 products."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_equal(config: Config, inputs: Tensor, masks: Masks, device: torch.device) -> dict[str, float]:
    """Largest errors of loss and gradients between the plain form and this library, relative to the largest value.

    `config` draws nothing. Raises `AssertionError` above 1e-4 (loss) and 1e-3 (gradients), float32.
    """
    torch.manual_seed(0)
    state = Data2Vec(config).state_dict()
    noise = None
    if config.version == 2 and masks.keep is not None:
        rows, tokens = masks.mask.shape
        noise = torch.randn(rows, tokens - masks.keep.shape[1], config.encoder.width).to(device)
    forms = [Form(name, config, state, device) for name in ("plain", "d2v")]
    losses = []
    for form in forms:
        loss = form.forward(inputs.to(device), masks, noise)
        loss.backward()
        losses.append(float(loss.detach()))
    worst = 0.0
    for (name, a), b in zip(forms[0].model.named_parameters(), forms[1].model.parameters(), strict=True):
        if a.grad is not None or b.grad is not None:
            assert a.grad is not None, f"{name}: no gradient in the plain form"
            assert b.grad is not None, f"{name}: no gradient in d2v"
            error = (a.grad - b.grad).abs().max() / b.grad.abs().max().clamp_min(1e-12)
            worst = max(worst, float(error))
    relative = abs(losses[0] - losses[1]) / abs(losses[1])
    assert relative < 1e-4, f"losses {losses}"
    assert worst < 1e-3, f"gradients differ by {worst}"
    return {"loss": relative, "gradient": worst}


# ---- what a step spends its time and memory on

PRODUCTS = (
    "mm", "linear", "convolution", "conv_layer", "conv1d", "conv2d", "attention", "gemm", "xmma", "cutlass", "wgrad",
    "dgrad", "fprop", "flash", "fmha", "nvjet",
)  # fmt: skip
"""Parts of the names of operators and kernels that are matrix products, convolutions or attention."""


GROUPS = {
    "attention": r"attention|flash",
    "convolutions": r"conv",
    "matrix products": r"^(mm|addmm|bmm|baddbmm|linear|_linear_pointwise)_?$",
    "norms": r"layer_norm|batch_norm|group_norm",
    "dropout": r"dropout|bernoulli",
    "optimiser and clipping": r"adamw|^_foreach|vector_norm",
    "copies and casts": r"copy|clone|cat$|stack|pad|zero|fill|slice|select",
    "sums": r"^(sum|mean)",
}
"""Groups of operators, by the first pattern that is in the name; what fits none is "element-wise"."""


def group_of(operator: str, shapes: Sequence[Sequence[int]] = ()) -> str:
    """Group of an operator, "aten::mm" for instance; this library's are named after themselves.

    shapes: of its tensors; they tell whether a convolution has groups.
    """
    space, _, name = operator.rpartition("::")
    group = next((g for g, pattern in GROUPS.items() if re.search(pattern, name)), "element-wise")
    if space == "d2v" and group != "attention":
        return name.strip("_").removesuffix("_backward")
    first = 1 if "backward" in name else 0
    if group == "convolutions" and len(shapes) > first + 1 and shapes[first + 1]:
        return group if shapes[first][1] == shapes[first + 1][1] else f"grouped {group}"
    return group


def measure_operators(form: Form, batch: Any, steps: int = 2) -> dict[str, Any]:
    """Seconds a step inside products and outside them, how many operators (CPU) or kernels (GPU) it launches, and
    "groups": seconds of the operators of every group, on a GPU those of the kernels that they launch.

    From torch.profiler, whose own cost is inside; shares matter, not sums.
    """
    on_gpu = form.device.type == "cuda"
    spent = {"products": 0.0, "outside": 0.0, "launches": 0.0}
    for event in _profile(form, batch, steps, by_kernel=on_gpu):
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if event.key.startswith("ProfilerStep") or not seconds:
            continue
        spent["launches"] += event.count
        spent["products" if any(part in event.key.lower() for part in PRODUCTS) else "outside"] += seconds
    groups: dict[str, float] = {}
    for event in _profile(form, batch, steps, by_kernel=False):
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        if seconds and "::" in event.key and event.device_type == torch.autograd.DeviceType.CPU:
            group = group_of(event.key, event.input_shapes)
            groups[group] = groups.get(group, 0.0) + seconds / steps
    return {**{name: value / steps for name, value in spent.items()}, "groups": groups}


def _profile(form: Form, batch: Any, steps: int, by_kernel: bool) -> Any:
    """Events of some steps: kernels by their names, or operators by name and shapes."""
    on_gpu = form.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    kinds += [] if by_kernel else [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, record_shapes=not by_kernel) as profiler:
        for _ in range(steps):
            form.step(*batch)
        synchronise(form.device)
    return profiler.key_averages(group_by_input_shape=not by_kernel)


def measure_gpu_memory(form: Form, batch: Any) -> int:
    """Peak bytes of a step on a GPU: what lives through it of this form, and the most that comes on top."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    form.step(*batch)
    torch.cuda.synchronize()
    teacher = form.model.teacher
    parts = teacher.working_parts().values() if teacher.working_dtype else ()
    working = [p for part in parts for p in part.parameters()]
    moments = [v for state in form.optimiser.state.values() for v in state.values() if torch.is_tensor(v)]
    kept = sum(t.numel() * t.element_size() for t in (*form.model.parameters(), *working, *moments))
    return torch.cuda.max_memory_allocated() - before + kept


def synchronise(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
