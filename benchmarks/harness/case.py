"""A row of the operators' benchmark, on a CPU or a GPU, and where its contenders run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import d2v_kernels as dk

from .timer import make_floor

Call = Callable[[], Any]
Contenders = dict[str, Call]
Goals = dict[str, float]
Function = Callable[..., Any]
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Place:
    """Where contenders run."""

    device: torch.device
    backends: tuple[str, ...] = ()
    """On a GPU or in its emulation: of ours, forced one after the other. Empty: the one that the library takes."""

    def ours(self, prepare: Callable[[], Call]) -> Contenders:
        """Our call, prepared and made on each backend."""

        def forced(name: str) -> Call:
            call: Call | None = None
            # A backend that cannot run says so when it is called.
            with dk.use_backend(name), contextlib.suppress(NotImplementedError):
                call = prepare()

            def run() -> Any:
                with dk.use_backend(name):
                    return (call or prepare())()

            return run

        return {f"d2v {name}": forced(name) for name in self.backends} if self.backends else {"d2v": prepare()}

    def normal(self, seed: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, device=self.device, generator=generator).to(dtype)

    def orders(self, seed: int, rows: int, tokens: int) -> Tensor:
        """A random order of the tokens of each row, int64."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.rand((rows, tokens), device=self.device, generator=generator).argsort(1)

    def floors(self, inputs: Sequence[Tensor], outputs: Callable[[], Sequence[Tensor]], *, alone: bool = False) -> Any:
        """One pass over inputs and outputs, on a CPU; `alone`: not with streaming stores, too."""
        names = {} if self.backends else {"floor": False} if alone else {"floor": False, "floor (streaming)": True}
        return {name: make_floor([t.detach() for t in inputs], outputs, stream) for name, stream in names.items()}


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: `make(place, seed)` gives the contenders on one fresh set of inputs."""

    op: str
    name: str
    dtype: torch.dtype
    bytes: int
    """Bytes read once plus bytes written once."""
    make: Callable[[Place, int], Contenders] = field(repr=False)
    goals: Goals = field(default_factory=dict)
    """Contender -> wanted ratio of its time over ours; `floor`: our time over its time, at most; `ceiling`: wanted
    share of a GPU's copy rate; `host`: seconds."""
    tolerance: float = 2e-4
    compare: Callable[[Any], Sequence[Tensor]] = field(default=lambda result: [result], repr=False)
    """Tensors of a result that must agree, relative to their maximum."""
    flops: int = 0
    traits: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    """With others than `dtype`, for the registry."""

    @property
    def registered(self) -> str:
        """The operator's name in the registry."""
        name = self.op.removesuffix(" forward + backward").replace(" backward", "_backward")
        return "gelu" if name == "gelu_linear" else name  # made of GELU and products of PyTorch

    @property
    def key(self) -> tuple[str, str, str]:
        """Operator, name and dtype, as rows have them."""
        return self.op, self.name, str(self.dtype).removeprefix("torch.")


def compile_whole(function: Function) -> Function:
    return torch.compile(function, fullgraph=True, dynamic=False)


def with_gradients(function: Function, leaves: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Result and gradients."""
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad))


def loose(dtype: torch.dtype) -> float:
    """Tolerance of results that are rounded to a dtype."""
    return 2e-4 if dtype == F32 else 2e-2
