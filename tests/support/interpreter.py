"""pytest plugin for the child process whose Triton interprets: fewer examples, as a program takes milliseconds, and the
compiler's meaning where the interpreter has one of its own.

`maximum` and `minimum` of NaN and a number are the number, as PTX's max.f32 has it. What the interpreter does wrongly
without a word is an error: a cast to bfloat16 or float8 that cuts bits off, and sums, products and comparisons of
bfloat16, which it takes for integers.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

EXAMPLES = 6


class Differs(AssertionError):
    """The interpreter would compute something else than generated code."""


def pytest_configure() -> None:
    if importlib.util.find_spec("triton") is not None:
        mean_what_the_compiler_means()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        function = getattr(item, "obj", None)
        mine = getattr(function, "_hypothesis_internal_use_settings", None)
        if mine is not None:
            smaller = settings(mine, max_examples=EXAMPLES, database=None, derandomize=True)
            function._hypothesis_internal_use_settings = smaller


def mean_what_the_compiler_means() -> None:
    """Changes Triton's interpreter in this process."""
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    for name in ("binary_op", "create_dot"):
        setattr(builder, name, _refusing_raw_bits(name, getattr(builder, name)))
    sums: Any = interpreter.ReduceOps
    sums.apply_impl = _refusing_raw_bits("reduction", sums.apply_impl)
    interpreter._convert_float = _refusing_cuts(interpreter._convert_float)
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _patching_once(interpreter)


def _is_raw(operand: Any) -> bool:
    """Whether the interpreter keeps the operand's floats as integers."""
    handle = getattr(operand, "handle", operand)
    kind = getattr(handle, "dtype", None)
    return kind is not None and kind.scalar.is_floating() and handle.data.dtype.kind == "u"


def _refusing_raw_bits(name: str, computes: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(computes)
    def checked(self: Any, *operands: Any) -> Any:
        flat = [o for given in operands for o in (given if isinstance(given, tuple) else (given,))]
        if any(_is_raw(o) for o in flat):
            raise Differs(
                f"{name}: expected operands in float32, got bfloat16, which the interpreter takes for integers"
            )
        return computes(self, *operands)

    return checked


def _refusing_cuts(convert: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(convert)
    def checked(values: Any, before: Any, after: Any, rounding: Any) -> Any:
        result = convert(values, before, after, rounding)
        if after.primitive_bitwidth < before.primitive_bitwidth:
            again = convert(result, after, before, None)
            same = np.frombuffer(again.tobytes(), np.uint8) == np.frombuffer(np.asarray(values).tobytes(), np.uint8)
            if not same.all():
                raise Differs(f"cast: expected `rounded` for {before} to {after}, which the interpreter does not round")
        return result

    return checked


def _patching_once(interpreter: Any) -> Callable[[Any], Any]:
    """Every call of a function inside a kernel searches the language for what its launch has replaced already, a fourth
    of a test's time: once a launch and module is enough."""
    patch, replaced, modules = interpreter._patch_lang, set[int](), dict[Any, set[int]]()

    @functools.wraps(patch)
    def patched(function: Any) -> Any:
        if function not in modules:
            modules[function] = {id(v) for v in function.__globals__.values() if inspect.ismodule(v)}
        if replaced and modules[function] & languages <= replaced:
            return interpreter._LangPatchScope()
        scope = patch(function)
        if not replaced:  # a launch; calls inside it never restore anything
            restore = scope.restore
            scope.restore = lambda: (replaced.clear(), restore())
        replaced.update(modules[function] & languages)
        return scope

    languages = {id(interpreter.tl), id(interpreter.tl.core)}
    return patched
