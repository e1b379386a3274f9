"""Which backend runs an operator, and why another one does not.

Every backend answers `why_not(case)` with a list of reasons; the first backend whose list is empty runs. A forced
backend that cannot run raises with its reasons: nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _env

OPERATORS: dict[str, str] = {}
"""Schema of every operator by name, in the order of definition."""
# Backends from the preferred one, by device type; and for an operator whose measurements say otherwise, by both.
PREFERENCES = {"cpu": ("native", "reference", "triton"), "cuda": ("native", "triton", "reference")}
EXCEPTIONS: dict[tuple[str, str], tuple[str, ...]] = {}


@dataclass(frozen=True)
class Case:
    """What is known about a call before it runs: operator, device type, dtypes, and op-specific traits."""

    op: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    traits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Backend:
    """A set of operator bodies with the limits they have."""

    name: str
    implementations: dict[str, Callable[..., Any]] = field(repr=False)
    limits: Callable[[Case], list[str]] = field(repr=False)
    make_ema_plan: Callable[..., Any] | None = field(default=None, repr=False)
    """Tables for `EmaPlan` from averages, sources, copies and low halves that the operator has accepted, or None."""
    missing: Callable[[str], list[str]] = field(default=lambda device: [], repr=False)
    """Device type -> parts of the backend that are not there and would run on it, with reasons."""

    def why_not(self, case: Case) -> list[str]:
        """Reasons why this backend cannot run the case; empty when it can."""
        if case.op not in self.implementations:
            return [f"{self.name} has no {case.op}"]
        return self.limits(case)


_backends: dict[str, Backend] = {}
_chosen: dict[tuple[object, ...], Callable[..., Any]] = {}
_forced = "auto"
_warned: set[str] = set()
"""Device types about which `_warn_of_missing` has spoken."""


def register_backend(backend: Backend) -> None:
    """Adds a backend; `PREFERENCES` says where it is preferred, and one that is not named there comes last."""
    _backends[backend.name] = backend
    _chosen.clear()


def backends() -> tuple[Backend, ...]:
    """All backends in order of registration."""
    return tuple(_backends.values())


def preferred(op: str, device: str) -> list[Backend]:
    """All backends in the order in which `auto` tries them."""
    order = EXCEPTIONS.get((device, op), PREFERENCES.get(device, ()))
    return sorted(_backends.values(), key=lambda b: order.index(b.name) if b.name in order else len(order))


def forced_backend() -> str:
    """Name forced by `use_backend` or the environment; `auto` when the registry chooses."""
    return _forced if _forced != "auto" else _env.default_backend()


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Forces the backend of every operator called inside, in all threads (a backward pass may run in another one).

    Args:
        name: "reference", "native", "triton", or "auto" for the registry's own choice.

    Raises:
        ValueError: unknown name. An operator that the forced backend cannot run raises `NotImplementedError` with
            the reasons when it is called. Operators of which a backend has no version at all are not its to run: for
            them the registry chooses as ever.

    Example:
        >>> from d2v_kernels import gelu
        >>> with use_backend("reference"):  # plain PyTorch, for comparison
        ...     gelu(torch.zeros(3))
        tensor([0., 0., 0.])
    """
    if name not in _env.BACKEND_NAMES:
        raise ValueError(f"use_backend: expected one of {', '.join(_env.BACKEND_NAMES)}, got {name!r}")
    return _forcing(name)


@contextlib.contextmanager
def _forcing(name: str) -> Iterator[None]:
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(case: Case, forced: str | None = None) -> Backend:
    """The backend that runs a case.

    Raises:
        NotImplementedError: the forced backend, or every backend, cannot run it; the text lists all reasons.
    """
    name = forced if forced is not None else forced_backend()
    if name in _backends and case.op not in _backends[name].implementations:
        name = "auto"
    reasons: list[str] = []
    for backend in preferred(case.op, case.device):
        if name not in ("auto", backend.name):
            continue
        why_not = backend.why_not(case)
        if not why_not:
            return backend
        reasons += why_not
    if name != "auto" and name not in _backends:
        reasons = [f"backend {name} is not part of this installation"]
    dtypes = ", ".join(str(d).removeprefix("torch.") for d in case.dtypes)
    outcome = "no backend can" if name == "auto" else f"backend {name} cannot"
    raise NotImplementedError(f"{case.op}: {outcome} run ({case.device}; {dtypes}): " + "; ".join(reasons))


def implementation(
    op: str, device: str, dtypes: tuple[torch.dtype, ...], traits: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """The body to call for this case; remembered, so that a repeated call costs one dictionary look-up."""
    key = (op, device, dtypes, traits, _forced)  # "auto" is the environment's choice, which a process makes once
    body = _chosen.get(key)
    if body is None:
        _warn_of_missing(device)
        body = choose(Case(op, device, dtypes, traits)).implementations[op]
        _chosen[key] = body
    return body


def _warn_of_missing(device: str) -> None:
    """Warns, once for a device type, where a part of a backend was left out of the installation: what runs instead is
    slower. A choice by name needs no warning."""
    if device in _warned or forced_backend() != "auto":
        return
    _warned.add(device)
    if missing := [text for backend in _backends.values() for text in backend.missing(device)]:
        warnings.warn(
            f"d2v_kernels runs slower on {device} than it could: {'; '.join(missing)}. To build it with a C++ compiler "
            "(and nvcc for GPUs): pip install cmake ninja pybind11, then in the sources pip install "
            "--no-build-isolation --no-deps --force-reinstall . ; `d2v info` shows what is there; "
            "D2V_KERNELS_BACKEND=reference keeps this and says nothing",
            RuntimeWarning,
            stacklevel=2,
        )
