"""The teacher: moving averages of the student's weights, and the forward pass that makes targets."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2v.model.layers import valid_positions
from d2v_kernels import EmaPlan

# Parts of a model in the order they run, and those averaged in each scope (`Ema.scope`).
PARTS = ("stem", "positions", "context", "blocks")
SCOPES = {
    "all": PARTS,
    "encoder": ("positions", "context", "blocks"),
    "transformer": ("positions", "blocks"),
    "layers": ("context", "blocks"),
    "blocks": ("blocks",),
}


Layers = int | Sequence[int] | None
"""Blocks that run before features are taken: a number, several, or None: all, and the final norm."""


class Encoded(NamedTuple):
    """Features of an unmasked input."""

    features: Tensor
    """(B,T,C); of K layers (B,T,K,C)."""
    valid: Tensor
    """(B,T) bool; False at padding."""
    class_token: Tensor | None
    """(B,C): the last extra token, of K layers (B,K,C); or None."""


class Teacher(nn.Module):
    """Averages of the student's weights in float32, and a forward with them that keeps no gradient.

    Parts in the scope are copied; what it leaves out is the student's own. Parameters are averaged, buffers (fixed
    positions) copied. Averages are parameters with `requires_grad=False`: an optimiser that takes the trainable ones
    never sees them, and `state_dict` holds them. With a working dtype, the forward runs on copies whose matrix products
    have that dtype, written by the averaging pass itself (data2vec section 3.2).
    """

    def __init__(
        self, student: Mapping[str, Any], scope: str, working_dtype: torch.dtype | None = None, sharded: bool = False
    ) -> None:
        """
        Args:
            student: modules by the names of `PARTS`; held by reference.
            scope: a key of `SCOPES`.
            working_dtype: bfloat16 or float16 for low-precision working copies; None: the averages are used directly.
            sharded: the weights are going to be spread over processes (fsdp).
        """
        super().__init__()
        # In a dict, so that the student's modules are not registered a second time.
        self._student = dict(student)
        self.working_dtype, self.sharded = working_dtype, sharded
        self._working: dict[str, nn.Module] = {}
        self._written: tuple[tuple[int, int], ...] = ()
        self._plan: EmaPlan | None = None
        for name in SCOPES[scope]:
            self.add_module(name, copy.deepcopy(student[name]).requires_grad_(False))
        self.train(False)

    @property
    def owned(self) -> tuple[str, ...]:
        """Names of the parts in the scope."""
        return tuple(self._modules)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode."""
        return super().train(False)

    def copy_student(self) -> None:
        """Makes the averages equal to the student bit for bit, as at the start of a run."""
        for name in self.owned:
            self.get_submodule(name).load_state_dict(self._student[name].state_dict())

    @torch.no_grad()
    def update(self, decay: float | Tensor) -> None:
        """One step average <- average + (1 - decay) * (student - average), in one pass over all parameters.

        Args:
            decay: in [0, 1]; or a 0-D float64 tensor on the device holding 1 - decay.
        """
        if self.working_dtype is not None:
            self.working_parts()
        if self._plan is None:
            student = nn.ModuleDict({name: self._student[name] for name in self.owned})
            self._plan = EmaPlan.from_modules(self, student, copies=nn.ModuleDict(self._working) or None)
        self._plan.step(decay)
        if self._working:
            self._written = self._versions()

    @torch.no_grad()
    def collect(
        self, inputs: Tensor, features: Tensor, lengths: Tensor | None, top_k: int, source: str
    ) -> list[Tensor]:
        """Target tensors of the top K main blocks on the full input, extra tokens cut off.

        Args:
            inputs: what the stem takes.
            features: (B,T,C), the student's stem output, used where the stem is not averaged.
            lengths: (B,) tokens before the padding, on the host; None: no padding.
            top_k: K.
            source: "ffn" or "block".

        Returns:
            K tensors (B,T,C), views without gradient, to be read only: autograd cannot save them.
        """
        parts = self._parts()
        with self._precision(features.device), self._bookkeeping():
            positions = parts["positions"]
            x = parts["stem"](inputs, lengths) if "stem" in self._modules else features.detach()
            bias = positions.attention_bias(x, lengths)
            x = parts["context"](positions(x, lengths), bias)
            tensors = parts["blocks"].collect(x, top_k, source, bias)
            return [t[:, t.shape[1] - features.shape[1] :] for t in tensors]

    def encode(self, inputs: Tensor, lengths: Tensor | None = None, layer: Layers = None) -> Encoded:
        """`Data2Vec.encode` with the averaged weights."""
        with self._precision(inputs.device):
            return encode_parts(self._parts(), inputs, lengths, layer)

    def _precision(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.working_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.working_dtype)

    def _bookkeeping(self) -> contextlib.AbstractContextManager[Any]:
        """Without version counters and records of views, which a compiler leaves out by itself. Buffers that sharded
        weights are gathered in are written again by passes that may have them."""
        kept = self.sharded or torch.compiler.is_compiling()
        return contextlib.nullcontext() if kept else torch.inference_mode()

    def _parts(self) -> dict[str, Any]:
        if self.working_dtype is None:
            return {**self._student, **dict(self.named_children())}
        # A graph cannot look at addresses; whoever runs one has made the copies before.
        return {**self._student, **(self._working if torch.compiler.is_compiling() else self.working_parts())}

    def _versions(self) -> tuple[tuple[int, int], ...]:
        return tuple((t.data_ptr(), t._version) for t in itertools.chain(self.parameters(), self.buffers()))

    def working_parts(self) -> dict[str, nn.Module]:
        """Working copies, made on first use and rewritten when an average was changed from outside (a checkpoint)."""
        if not self._working:
            self._working = {name: copy.deepcopy(part) for name, part in self.named_children()}
            for part in self._working.values():
                _cast_products(part, self.working_dtype)
            self._plan = None
        elif self._written != self._versions():
            for name, part in self._working.items():
                part.load_state_dict(self.get_submodule(name).state_dict())
        self._written = self._versions()
        return self._working

    def __getstate__(self) -> dict[str, Any]:
        # The plan holds addresses of this process; a copy makes its own.
        return {**self.__dict__, "_plan": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        """Moves with the model, but averages stay in float32 or above: a cast makes low-precision working copies."""

        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            if moved.dtype not in (torch.bfloat16, torch.float16):
                return moved
            self.working_dtype = moved.dtype
            return t.to(moved.device)

        self._working, self._plan = {}, None
        return super()._apply(keep_precision, recurse)


def _cast_products(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Weights of matrix products to a lower precision; norms and tokens stay, as under autocast."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            part.to(dtype)


@torch.no_grad()
def encode_parts(parts: Mapping[str, Any], inputs: Tensor, lengths: Tensor | None, layer: Layers) -> Encoded:
    """Features of an unmasked input in evaluation mode; see `Data2Vec.encode`."""
    blocks = len(parts["context"].blocks) + len(parts["blocks"].blocks)
    if not all(0 <= n <= blocks for n in _list_layers(layer, blocks)):
        raise ValueError(f"layer: expected 0 to {blocks}, got {layer}")
    with evaluating(*parts.values()):
        stem = parts["stem"]
        (tokens, lengths), inputs = stem.measure(inputs, lengths), stem.mark(inputs, lengths)
        x = encode_measured(parts, inputs, lengths, layer)
    extra = x.shape[1] - tokens
    valid = valid_positions(lengths, tokens, x.device)
    if valid is None:
        valid = torch.ones(x.shape[0], tokens, dtype=torch.bool, device=x.device)
    return Encoded(x[:, extra:], valid, x[:, extra - 1] if extra else None)


def _list_layers(layer: Layers, blocks: int) -> Sequence[int]:
    return [blocks if layer is None else layer] if layer is None or isinstance(layer, int) else layer


def encode_measured(parts: Mapping[str, Any], inputs: Tensor, lengths: Tensor | None, layer: Layers) -> Tensor:
    """(B,E+T,C): what the first `layer` blocks make of inputs that the stem has measured, extra tokens in front; of
    several layers (B,E+T,K,C)."""
    stem, positions, context, main = (parts[name] for name in PARTS)
    x = stem(inputs, lengths)
    bias = positions.attention_bias(x, lengths)
    x = context.embed(positions(x, lengths), bias)
    blocks = [*context.blocks, *main.blocks]
    wanted = _list_layers(layer, len(blocks))
    found = {0: x}
    for i, block in enumerate(blocks[: max(wanted)]):
        x = block(x, bias, i).output
        if i + 1 in wanted:
            found[i + 1] = x
    if not (layer is None or isinstance(layer, int)):
        return torch.stack([bias.unpack(found[n]) for n in wanted], dim=2)
    if layer is None and main.norm is not None:
        x = main.norm(x)
    return bias.unpack(x)


@contextlib.contextmanager
def evaluating(*parts: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode, for a while."""
    modes = [(module, module.training) for part in parts for module in part.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---- its forward as a CUDA graph: one launch in place of a few hundred ----------------------------------------------

SHAPES = 8
"""Most shapes that are recorded; other ones run as they are."""
_WARM_UPS = 3

Make = Callable[[Tensor, Tensor], Tensor]
Record = Callable[[Make, Tensor, Tensor], tuple[Callable[[], None], Tensor]]


class GraphedTargets:
    """Calls `make` through recordings, one for every shape of its inputs.

    What `make` reads besides its inputs must keep its address and be changed in place, as averaged weights are.
    """

    def __init__(self, make: Make, record: Record | None = None) -> None:
        """
        Args:
            make: (inputs, features) -> targets, without gradient, random numbers or reads from the device.
            record: makes (replay, result) of `make` and two tensors that keep their addresses; unset: CUDA graphs.
        """
        self.make, self.record = make, record or record_graph
        self._entries: dict[object, tuple[Tensor, Tensor, Callable[[], None], Tensor]] = {}

    def __call__(self, inputs: Tensor, features: Tensor) -> Tensor:
        """The targets of `make`, in memory of their own."""
        kind = inputs.device.type
        key = (
            *((tuple(t.shape), t.dtype, t.device) for t in (inputs, features)),
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        )
        if key not in self._entries:
            if len(self._entries) >= SHAPES:
                return self.make(inputs, features)
            buffers = inputs.detach().clone(), features.detach().clone()
            self._entries[key] = (*buffers, *self.record(self.make, *buffers))
        input_buffer, feature_buffer, replay, result = self._entries[key]
        input_buffer.copy_(inputs)
        feature_buffer.copy_(features.detach())
        replay()
        # The next replay writes over the result, which a backward pass or a monitor may still need.
        return result.clone()


def record_graph(make: Make, inputs: Tensor, features: Tensor) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of `make` on two static tensors: how to replay it, and where the result appears."""
    kind = inputs.device.type
    # Casts that autocast remembers would be left out of the recording.
    precision = torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), precision:
        for _ in range(_WARM_UPS):  # compiles kernels, fills caches
            make(inputs, features)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), precision:
        result = make(inputs, features)
    return graph.replay, result
