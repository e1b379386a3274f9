"""A row of the operators' benchmark, on a CPU or a GPU, and where its contenders run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..registry import use_backend

Call = Callable[[], Any]
Contenders = dict[str, Call]
Goals = dict[str, float]
Function = Callable[..., Any]
F32, BF16 = torch.float32, torch.bfloat16


class Bytes(int):
    """Bytes read once plus bytes written once, with the formula that the number comes from."""

    formula: str

    def __new__(cls, formula: str, **sizes: int) -> Bytes:
        self = super().__new__(cls, eval(formula, {"__builtins__": {}}, sizes))
        self.formula = f"{formula} with {', '.join(f'{name}={value}' for name, value in sizes.items())}"
        return self


@dataclass(frozen=True)
class Place:
    """Where contenders run."""

    device: torch.device
    backends: tuple[str, ...] = ()
    """On a GPU or in its emulation: of ours, forced one after the other. Empty: the one that the library takes."""
    to: torch.dtype | None = None
    """What floating inputs are cast to after they were rounded to the case's dtype; None: they stay."""

    def kind(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that a tensor of this one has here."""
        return self.to or dtype

    def ours(self, prepare: Callable[[], Call]) -> Contenders:
        """Our call, prepared and made on each backend."""

        def forced(name: str) -> Call:
            call: Call | None = None
            # A backend that cannot run says so when it is called.
            with use_backend(name), contextlib.suppress(NotImplementedError):
                call = prepare()

            def run() -> Any:
                with use_backend(name):
                    return (call or prepare())()

            return run

        return {f"d2v {name}": forced(name) for name in self.backends} if self.backends else {"d2v": prepare()}

    def normal(self, seed: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        """Numbers of a normal distribution, the same for a seed, a shape and a dtype whatever they are cast to."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, device=self.device, generator=generator).to(dtype).to(self.kind(dtype))

    def inputs(self, seed: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        """What an operator reads forward, in contrast to gradients and parameters: of a normal distribution, too."""
        return self.normal(seed, *shape, dtype=dtype)

    def orders(self, seed: int, rows: int, tokens: int) -> Tensor:
        """A random order of the tokens of each row, int64."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.rand((rows, tokens), device=self.device, generator=generator).argsort(1)

    def floors(self, inputs: Sequence[Tensor], outputs: Callable[[], Sequence[Tensor]], *, alone: bool = False) -> Any:
        """Contenders that pass once over inputs and outputs and compute nothing: none here."""
        return {}


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: `make(place, seed)` gives the contenders on one fresh set of inputs."""

    op: str
    name: str
    dtype: torch.dtype
    bytes: Bytes
    make: Callable[[Place, int], Contenders] = field(repr=False)
    goals: Goals = field(default_factory=dict)
    """Contender -> wanted ratio of its time over ours; `floor`: our time over its time, at most; `ceiling`: wanted
    share of a GPU's copy rate; `host`: seconds. torch.compile takes some ten seconds a case, so that the project's own
    runs have it only where there is a goal for it."""
    tolerance: float = 2e-4
    compare: Callable[[Any], Sequence[Tensor]] = field(default=lambda result: [result], repr=False)
    """Tensors of a result that must agree, relative to their maximum."""
    flops: int = 0
    traits: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    """With others than `dtype`, for the registry."""
    exact: float | None = None
    """Where contenders draw random numbers of their own and `compare` is of statistics: the tolerance of ours, number
    by number, against the reference, which draws the same."""

    @property
    def registered(self) -> str:
        """The operator's name in the registry."""
        name = self.op.removesuffix(" forward + backward").replace(" backward", "_backward")
        return "gelu" if name == "gelu_linear" else name  # made of GELU and products of PyTorch

    @property
    def key(self) -> tuple[str, str, str]:
        """Operator, name and dtype, as rows have them."""
        return self.op, self.name, str(self.dtype).removeprefix("torch.")


class Family(NamedTuple):
    """Cases of one operator."""

    make: Callable[..., Case]
    """(name, *sizes, dtype=, goals=, **options) -> case."""
    sizes: dict[str, str]
    """What the numbers of a shape mean, in their order."""
    usual: tuple[int, ...]
    """A shape of a model."""
    tiny: tuple[int, ...]
    options: dict[str, Any]
    """Name -> default, or choices with the default first."""

    def tiny_case(self) -> Case:
        """In bfloat16, without goals."""
        return self.make("tiny", *self.tiny, dtype=BF16, goals={})


FAMILIES: dict[str, Family] = {}
"""By operator, in the order of definition."""


def family(op: str, sizes: str, usual: tuple[int, ...], tiny: tuple[int, ...], **options: Any) -> Any:
    """Names what makes the cases of an operator; sizes: "K layers, B samples", in the order of its arguments."""

    def add(make: Callable[..., Case]) -> Callable[..., Case]:
        meanings = dict(part.split(" ", 1) for part in sizes.split(", "))
        FAMILIES[op] = Family(make, meanings, usual, tiny, options)
        return make

    return add


def compile_whole(function: Function) -> Function:
    """Compiled at the first call: the compiler is not even imported where it does not take part."""
    compiled: list[Function] = []

    def call(*arguments: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(function, fullgraph=True, dynamic=False))
        return compiled[0](*arguments)

    return call


def with_gradients(function: Function, leaves: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Result and gradients."""
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, grad))


def loose(dtype: torch.dtype) -> float:
    """Tolerance of results that are rounded to a dtype."""
    return 2e-2 if dtype.itemsize == 2 else 2e-4
