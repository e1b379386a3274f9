"""Defines an operator `torch.ops.d2v.*`: from its schema, shape function, reference body and gradient comes the rest.

A shape function checks what can be known without reading device values and returns a `Call`. The real body checks with
it, asks the registry for a backend and makes one call; the fake kernel makes empty tensors of what it returns. Native
code registers the same argument lists under `d2v_native` (a test compares them). Double backward is refused;
`torch.func.vmap` calls the operator once an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C import _is_tracing
from torch._C import _len_torch_dispatch_stack as _count_modes
from torch._C._functorch import peek_interpreter_stack as _find_transform
from torch.autograd import _profiler_enabled as _is_profiling
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling
from torch.utils._pytree import tree_leaves, tree_map_only

from . import _checks as check
from . import registry

TRITON_FAMILIES: dict[str, str] = {}
"""For operators that Triton has kernels for: the file in `triton/`."""
REFERENCE = registry.Backend("reference", {}, lambda case: [])
"""Plain PyTorch bodies: the definition of every operator, right in float64, on any device."""
_shapes: dict[str, Callable[..., Call]] = {}
NAMESPACE = "d2v" if __package__ == "d2v_kernels" else __package__
"""Of the public operators. The `kernels` loader gives each copy of this package a name of its own: several may live in
one process."""
_library = torch.library.Library(NAMESPACE, "DEF")

R = TypeVar("R")
Output = Tensor | tuple[tuple[int, ...] | torch.Size, torch.dtype]


class Call(NamedTuple):
    """What a shape function knows of a call."""

    first: Tensor | None
    """A tensor on the device of the call; None where there is nothing to do."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Dtypes that decide on a backend."""
    outputs: tuple[Output, ...] = ()
    """What the results, contiguous, look like: another tensor, or (shape, dtype)."""
    traits: tuple[str, ...] = ()
    """What else decides on a backend."""


class Gradient(NamedTuple):
    """The two functions of `torch.library.register_autograd`."""

    backward: Callable[..., Any]
    setup: Callable[..., None] = lambda ctx, inputs, output: None


def refuse(op: str, why: str) -> Gradient:
    """The gradient of an operator that has none."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{op}: {why}")

    return Gradient(backward)


def _qualified(op: str) -> str:
    return f"{NAMESPACE}::{op}"


def define(
    schema: str,
    shape: Callable[..., Call],
    reference: Callable[..., R],
    gradient: Gradient | None = None,
    *,
    triton: str = "",
    values: Callable[..., None] | None = None,
    prepare: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., R]:
    """Defines one operator and returns it; called when the file of its family is imported.

    Args:
        schema: name, arguments and results.
        shape: shape function, called with the operator's name and the arguments.
        reference: body in plain PyTorch.
        gradient: None: double backward is refused for "..._backward", and another operator has no gradient.
        triton: name of the file in `triton/` that has a function of the operator's name; empty where none has.
        values: checks values on the host; called like `shape`, in real calls only.
        prepare: changes the arguments before everything else.
    """
    op = schema.split("(", 1)[0]
    registry.OPERATORS[op] = schema
    _shapes[op] = shape
    REFERENCE.implementations[op] = guarded(op, reference)
    written = [i for i, argument in enumerate(schema.partition("->")[0].split(",")) if "!" in argument]
    if triton:
        TRITON_FAMILIES[op] = triton

    def body(*arguments: Any) -> Any:
        if prepare is not None:
            arguments = prepare(*arguments)
        try:
            call = shape(op, *arguments)
            if call.first is None:
                return None
            if values is not None:
                values(op, *arguments)
            result = registry.implementation(op, call.first.device.type, call.dtypes, call.traits)(*arguments)
        except RuntimeError:  # PyTorch's, of tensors without strides or addresses
            check.storage(op, arguments)
            raise
        for i in written:
            count_write(arguments[i])
        return result

    def lazily_negated(*arguments: Any) -> Any:
        """PyTorch itself hands on negated numbers where nothing is written."""
        check.resolved(op, (t for i in written for t in tree_leaves(arguments[i])))
        return operator(*tree_map_only(Tensor, Tensor.resolve_neg, arguments))

    def fake(*arguments: Any) -> Any:
        if prepare is not None:
            arguments = prepare(*arguments)
        call = shape(op, *arguments)
        results = [_empty(call.first, output) for output in call.outputs]
        return tuple(results) if len(results) > 1 else results[0] if results else None

    _library.define(schema)
    _library.impl(op, body, "CompositeExplicitAutograd")
    if written:
        _library.impl(op, lazily_negated, "Negative")
    torch.library.register_fake(_qualified(op), fake, lib=_library)
    operator: Callable[..., R] = getattr(getattr(torch.ops, NAMESPACE), op)
    torch.library.register_vmap(_qualified(op), _refuse_vmap if written else _one_by_one(operator), lib=_library)
    if gradient is None and op.endswith("_backward"):
        gradient = refuse(op.removesuffix("_backward"), "double backward is not supported")
    if gradient is not None:
        torch.library.register_autograd(_qualified(op), gradient.backward, setup_context=gradient.setup, lib=_library)
    return operator if written or gradient is None else _directly(schema, operator, body, gradient)


def _directly(schema: str, operator: Callable[..., R], body: Callable[..., R], gradient: Gradient) -> Callable[..., R]:
    """The operator for callers in Python: where nothing but autograd could stand between a call and its body, past
    PyTorch's dispatcher, which takes longer on the host than a small call itself."""
    op, _, declared = schema.partition(")")[0].partition("(")
    kinds, names = zip(*((_KINDS[kind], name) for kind, name in map(str.split, declared.split(", "))), strict=True)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            result = body(*arguments)
            gradient.setup(ctx, arguments, result)
            return result

        backward = staticmethod(gradient.backward)

    def call(*arguments: Any) -> Any:
        if is_compiling():
            return operator(*arguments)
        if not _is_plain(kinds, arguments):
            _check_types(op, names, kinds, arguments)
            return operator(*arguments)
        if torch.is_grad_enabled() and any(type(t) in _TENSORS and t.requires_grad for t in arguments):
            return Direct.apply(*arguments)
        return body(*arguments)

    return call


def _check_types(op: str, names: Sequence[str], kinds: Sequence[frozenset[type]], arguments: Sequence[Any]) -> None:
    """One sentence for what is no tensor, and for tangents, which PyTorch would drop without a word."""
    for name, argument, allowed in zip(names, arguments, kinds, strict=False):
        if allowed & _TENSORS and not isinstance(argument, Tensor) and type(argument) not in allowed:
            raise TypeError(f"{op}: {name}: expected a tensor, got {type(argument).__name__}")
    leaves = tree_leaves(arguments) if forward_ad._current_level >= 0 else []
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in leaves):
        raise NotImplementedError(f"{op}: expected tensors without tangents, got some: forward mode is not supported")


_TENSORS, _LISTS = frozenset((Tensor, torch.nn.Parameter)), frozenset((list, tuple))
_KINDS: dict[str, frozenset[type]] = {
    "Tensor": _TENSORS, "Tensor?": _TENSORS | {type(None)}, "Tensor[]": _LISTS,
    "int": frozenset((int,)), "SymInt": frozenset((int,)), "float": frozenset((float,)), "bool": frozenset((bool,)),
    "str": frozenset((str,)), "ScalarType": frozenset((torch.dtype,)),
}  # fmt: skip
"""Types of arguments that need no conversion, by their types in a schema."""


def _is_plain(kinds: Sequence[frozenset[type]], arguments: Sequence[Any]) -> bool:
    """Whether the arguments are as the schema says, all tensors ordinary ones that hold their numbers, and no mode,
    transform or profiler is at work."""
    busy = _count_modes() or _find_transform() is not None or forward_ad._current_level >= 0
    if busy or _is_profiling() or _is_tracing() or len(kinds) != len(arguments):
        return False
    for argument, allowed in zip(arguments, kinds, strict=True):
        kind = type(argument)
        if kind not in allowed:
            return False
        if kind in _TENSORS and not _holds_numbers(argument):
            return False
        if kind in _LISTS and any(not _holds_numbers(t) or t.requires_grad for t in argument):
            return False
    return True


def _holds_numbers(t: Tensor) -> bool:
    return type(t) in _TENSORS and not t.is_neg() and (t.is_cpu or t.is_cuda)


def _one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A rule for vmap, right and not fast: one call after the other."""

    def batched(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        calls = [operator(*_select(arguments, in_dims, i)) for i in range(info.batch_size)]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])

    return batched


def _refuse_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    raise NotImplementedError("d2v_kernels: expected tensors that are written without vmap, got them under it")


def guarded(op: str, body: Callable[..., R]) -> Callable[..., R]:
    """The body of a backend that does not check by itself that memory belongs to its tensors."""

    def call(*arguments: Any) -> R:
        check.storage(op, arguments)
        return body(*arguments)

    return call


def count_write(tensors: Tensor | Sequence[Tensor]) -> None:
    """In-place writes that autograd's check of saved tensors counts."""
    try:
        increment_version(tensors)
    except RuntimeError:  # tensors of inference mode have no count
        increment_version([t for t in tree_leaves(tensors) if not t.is_inference()])


def case(op: str, device: str, arguments: tuple[Any, ...]) -> registry.Case:
    """What the registry is asked when the operator is called with these arguments on a device."""
    call = _shapes[op](op, *arguments)
    return registry.Case(op, device, call.dtypes, call.traits)


def _select(argument: Any, dims: Any, i: int) -> Any:
    """Arguments of call i under vmap, whose tensors have the batch at these dimensions, or None."""
    if isinstance(argument, list | tuple) and isinstance(dims, list | tuple):
        return [_select(a, d, i) for a, d in zip(argument, dims, strict=True)]
    return argument if dims is None else argument.select(dims, i)


def _empty(first: Tensor | None, output: Output) -> Tensor:
    if isinstance(output, Tensor):
        return output.new_empty(output.shape)
    assert first is not None
    return first.new_empty(output[0], dtype=output[1])
