"""Checks that shape functions share; they import this file as `check`, as in `check.rows(op, "x", x, "B, T, C")`.

Messages begin with the operator's name and give expected and got.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT_SET = frozenset(FLOATS)
INDICES = (torch.int32, torch.int64)
VECTOR_FILL, NO_FILL = -1, -2  # values of restore_tokens_backward's fill_rows beside a row count


def compute_dtype(of: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic on values of a dtype."""
    return torch.float64 if of == torch.float64 else torch.float32


def fail(op: str, what: str, expected: object, got: object) -> NoReturn:
    """Raises `ValueError` with expected and got."""
    raise ValueError(f"{op}: {what}: expected {expected}, got {got}")


def require(condition: bool, op: str, what: str, expected: object, got: object) -> None:
    """Raises `ValueError` with expected and got unless the condition holds."""
    if not condition:
        fail(op, what, expected, got)


def whole(op: str, name: str, value: Any, low: int, high: int) -> int:
    """The value as an integer; it must be one, from low to high."""
    try:
        good = low <= value <= high and value == int(value)
    except (TypeError, ValueError, RuntimeError):
        good = False
    require(good, op, name, f"a whole number, {low} to {high}", value)
    return int(value)


def dtype(op: str, name: str, t: Tensor, expected: torch.dtype | tuple[torch.dtype, ...]) -> None:
    """Raises `TypeError` with expected and got unless t has the dtype, or one of them."""
    if t.dtype == expected or (isinstance(expected, tuple) and t.dtype in expected):
        return
    names = expected if isinstance(expected, tuple) else (expected,)
    words = ("one of " if isinstance(expected, tuple) else "") + ", ".join(map(dtype_name, names))
    raise TypeError(f"{op}: dtype of {name}: expected {words}, got {dtype_name(t.dtype)}")


def dtype_name(of: torch.dtype) -> str:
    """For example float32."""
    return str(of).removeprefix("torch.")


def dims(op: str, name: str, t: Tensor, layout: str) -> None:
    """`layout` names the dimensions, as in "B, T, C"."""
    count = layout.count(",") + 1
    if t.dim() != count:
        fail(op, name, f"{count} dimensions ({layout})", f"shape {tuple(t.shape)}")


def shape(op: str, name: str, t: Tensor, expected: Sequence[int]) -> None:
    """This shape and no other."""
    if t.shape != expected:
        fail(op, f"shape of {name}", tuple(expected), tuple(t.shape))


def unit_stride(op: str, name: str, t: Tensor) -> None:
    """Numbers of the last dimension lie side by side."""
    if _lies_apart(t):
        fail(op, f"last stride of {name}", 1, f"strides {t.stride()}")


def _lies_apart(t: Tensor) -> bool:
    # A tensor without elements, or of width 1, has no meaningful last stride.
    return t.shape[-1] > 1 and t.stride(-1) != 1 and t.numel() > 0


def contiguous(op: str, name: str, t: Tensor) -> None:
    """Elements lie in the order of their indices, without gaps."""
    if not t.is_contiguous():
        fail(op, f"layout of {name}", "contiguous", f"strides {t.stride()}")


def rows(op: str, name: str, t: Tensor, layout: str) -> None:
    """A floating tensor of this layout whose last stride is 1."""
    dims(op, name, t, layout)
    if t.dtype not in FLOATS:
        dtype(op, name, t, FLOATS)
    unit_stride(op, name, t)


def index(op: str, name: str, t: Tensor, first: Tensor) -> None:
    """An integer tensor on the device of `first`."""
    if t.dtype not in INDICES:
        dtype(op, name, t, INDICES)
    if t.device != first.device:
        device(op, name, t, first)


def vector(op: str, name: str, t: Tensor | None, like: Tensor) -> None:
    """None, or a floating tensor (C,) beside `like` (..., C), on its device."""
    if t is not None:
        dtype(op, name, t, FLOATS)
        shape(op, name, t, like.shape[-1:])
        unit_stride(op, name, t)
        device(op, name, t, like)


def keys(op: str, name: str, t: Tensor, count: int) -> None:
    """One int64 number a row."""
    shape(op, name, t, (count,))
    dtype(op, name, t, torch.int64)


def dropout(op: str, probability: float, name: str, given: Tensor | None) -> None:
    """A probability below 1, with keys where it is not 0."""
    require(0.0 <= probability < 1.0, op, "dropout", "0 or more and less than 1", probability)
    require(probability == 0.0 or given is not None, op, name, "a tensor where dropout is above 0", None)


def device(op: str, name: str, t: Tensor | None, first: Tensor) -> None:
    """None, or a tensor on the device of `first`."""
    if t is not None and t.device != first.device:
        fail(op, f"device of {name}", first.device, t.device)


def weight(op: str, given: Tensor | None, place: torch.device | None = None) -> None:
    """None, or a 0-D float64 tensor (the weight 1 - decay of a moving average), on the device if one is named."""
    if given is not None:
        require(given.dim() == 0, op, "weight", "a 0-D tensor", f"shape {tuple(given.shape)}")
        dtype(op, "weight", given, torch.float64)
        require(place is None or given.device == place, op, "device of weight", place, given.device)


def index_range(op: str, name: str, index: Tensor, high: int | None) -> None:
    """On the CPU, every index lies in [0, high); device values are never read."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, top = (int(v) for v in torch.aminmax(index))
    bound = "or more" if high is None else f"to {high - 1}"
    require(low >= 0 and (high is None or top < high), op, name, f"0 {bound}", f"{low} to {top}")


def dtypes_of(*tensors: Tensor | None) -> tuple[torch.dtype, ...]:
    """Their dtypes, each once."""
    return tuple(dict.fromkeys(t.dtype for t in tensors if t is not None))


def lies_flat(*tensors: Tensor) -> bool:
    """True if the tensors, of one shape, lie in memory in one order without gaps."""
    if all(t.is_contiguous() for t in tensors):
        return True
    sizes, strides = tensors[0].shape, tensors[0].stride()
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(strides, sizes, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return all(st == other for t in tensors for st, other, n in zip(strides, t.stride(), sizes, strict=True) if n > 1)


_noted: set[tuple[str, str]] = set()


def side_by_side(op: str, name: str, t: Tensor) -> Tensor:
    """An input of a public function; one whose channels do not lie side by side is copied, with a warning the first
    time: its caller would have to write the same copy."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(t).__name__}")
    if t.layout != torch.strided or t.dim() == 0 or not _lies_apart(t):
        return t
    if not torch.compiler.is_compiling() and (op, name) not in _noted:
        _noted.add((op, name))
        text = f"{op}: {name} has strides {t.stride()}; it is copied, here and from now on, as numbers of the last"
        warnings.warn(f"{text} dimension have to lie side by side", UserWarning, stacklevel=3)
    storage(op, [t])  # before it is read
    return t.contiguous()


def with_unit_stride(t: Tensor) -> Tensor:
    """A gradient may arrive expanded or transposed, and what a compiler keeps in another order (inductor, near
    convolutions); the operators need channels side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


# ---- memory

_BYTES = operator.attrgetter("nbytes")


def extent(t: Tensor) -> int:
    """Bytes from the first element of t to the end of its last one."""
    if t.is_contiguous() or t.numel() == 0:
        return t.nbytes
    return (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))) * t.itemsize


def storage(op: str, arguments: Iterable[Any]) -> None:
    """Tensors among the arguments, and in lists of them, are dense and lie within their storage, which can be freed or
    cut after a tensor was made."""
    for t in arguments:
        if isinstance(t, list | tuple):
            storage(op, t)
        elif isinstance(t, Tensor):
            if t.layout != torch.strided or t.is_nested:
                words = "nested" if t.is_nested else t.layout
                raise TypeError(f"{op}: layout of a tensor: expected strided, got {words}")
            needed = t.storage_offset() * t.itemsize + extent(t) if t.numel() else 0
            got = t.untyped_storage().nbytes()
            require(needed <= got, op, f"storage of a tensor {tuple(t.shape)}", f"{needed} bytes", f"{got} bytes")


def strided(op: str, *tensors: Tensor | None) -> None:
    """For public functions that change layouts or shapes before the operator is called."""
    for t in tensors:
        if not isinstance(t, Tensor | None):
            raise TypeError(f"{op}: expected tensors, got {type(t).__name__}")
        if t is not None and t.layout != torch.strided:
            storage(op, [t])


def resolved(op: str, written: Iterable[Tensor]) -> None:
    """No tensor that is written is lazily negated, with other numbers in its memory."""
    for t in written:
        require(not t.is_neg(), op, "a tensor that is written", "one that holds its numbers", "a lazily negated view")


def writable(op: str, tensors: Mapping[str, Tensor]) -> None:
    """No tensor, by its name, that PyTorch refuses to change: one made in inference mode, outside of it."""
    for name, t in tensors.items():
        good = not t.is_inference() or torch.is_inference_mode_enabled()
        require(good, op, name, "a tensor made outside of torch.inference_mode, or its clone", "one made inside")


def apart(op: str, written: Mapping[str, Sequence[Tensor]], read: Sequence[Tensor]) -> None:
    """No number that is written lies where another one of these tensors does; read[i] may be an entry i itself."""
    outputs = [t for group in written.values() for t in group]
    tensors = [*outputs, *read]
    flat = all(map(Tensor.is_contiguous, tensors))
    starts = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    ends = starts + np.fromiter(map(_BYTES if flat else extent, tensors), np.int64, len(tensors))
    order = np.argsort(starts, kind="stable")
    if (ends[order][:-1] <= starts[order][1:]).all() and (flat or all(map(lies_flat, outputs))):
        return
    storage(op, tensors)  # where one was freed, another may lie now
    named = {f"{name}[{i}]": t for name, group in written.items() for i, t in enumerate(group)}
    own = {(i, *_place(t)) for group in written.values() for i, t in enumerate(group)}
    others = {f"sources[{i}]": t for i, t in enumerate(read) if (i, *_place(t)) not in own}
    for cluster in _clusters({**named, **others}):
        targets, rest = ([cluster[name] for name in cluster if name in group] for group in (named, others))
        if not targets or (len(cluster) == 1 and lies_flat(*targets)):
            continue
        unit = min(t.itemsize for t in cluster.values())
        places = torch.cat([_places(t, unit) for t in targets])
        good = places.unique().numel() == places.numel()
        good = good and not (rest and torch.isin(torch.cat([_places(t, unit) for t in rest]), places).any())
        require(good, op, "memory of what is written", "no overlap", f"an overlap in {', '.join(list(cluster)[:4])}")


def _place(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.dtype, t.stride()


def _clusters(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors whose ranges of addresses overlap, together."""
    clusters: list[dict[str, Tensor]] = []
    end = 0
    for name, t in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if t.numel() > 0:
            if t.data_ptr() >= end:
                clusters.append({})
            clusters[-1][name] = t
            end = max(end, t.data_ptr() + extent(t))
    return clusters


def _places(t: Tensor, unit: int) -> Tensor:
    """Addresses of all elements, in units of memory."""
    place = torch.tensor(t.data_ptr() // unit)
    for n, step in [(n, stride * t.itemsize // unit) for n, stride in zip(t.shape, t.stride(), strict=True)]:
        place = place[..., None] + torch.arange(n) * step
    return (place[..., None] + torch.arange(t.itemsize // unit)).flatten()
