"""Reads the sources of the Triton kernels and finds what an interpreter and a compiler may do differently.

A value is narrow where it may be bfloat16 or float16: what `tl.load` gives from a pointer that is not said to be wide,
and what is made of it without a cast to 32 bits. Functions are followed into each other: an argument is narrow if one
of the calls passes a narrow value, a result if one of the returned values is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

CASTS = {"tl.float32", "tl.int32", "tl.int64", "tl.uint16", "tl.uint32"}
"""Targets of casts that are not narrow floats."""
REDUCTIONS = {"sum", "dot", "max", "min", "argmax", "argmin", "reduce", "cumsum", "cumprod", "associative_scan", "sort"}
EXTREMA = {"maximum", "minimum", "max", "min", "argmax", "argmin", "clamp"}
CONSTANT = {"arange", "program_id", "num_programs", "cdiv", "philox", "dot", "zeros", "full"}
"""Calls of `tl` whose result is not narrow: integers and float32 accumulators."""


@dataclass
class Function:
    """A kernel or a function that kernels call."""

    place: str
    tree: ast.FunctionDef
    narrow: set[str] = field(default_factory=set)
    """Names that may be narrow."""
    gives_narrow: bool = False
    pointers: dict[str, str] = field(default_factory=dict)
    """Name of a pointer that was computed -> name of the one that it was computed from."""

    @property
    def parameters(self) -> list[str]:
        return [a.arg for a in (*self.tree.args.args, *self.tree.args.kwonlyargs)]


@dataclass(frozen=True)
class Finding:
    """kind: cast, store, arithmetic, reduction or extremum; place: file.function; text: the source."""

    kind: str
    place: str
    text: str


class Audit:
    """All functions of some files that Triton compiles."""

    def __init__(self, sources: dict[str, str], wide: set[str]) -> None:
        """sources: name of the file -> text; wide: names of pointers, alone or as file.function:name, whose elements
        are never narrow."""
        self.wide = wide
        self.functions: dict[str, list[Function]] = {}
        for file, text in sources.items():
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                    self.functions.setdefault(node.name, []).append(Function(f"{file}.{node.name}", node))
        while self._follow():
            pass

    @property
    def every(self) -> Iterator[Function]:
        return (f for named in self.functions.values() for f in named)

    def _follow(self) -> bool:
        """One pass over everything; whether it found something new."""
        before = sum(len(f.narrow) + f.gives_narrow for f in self.every)
        for f in self.every:
            for node in ast.walk(f.tree):
                if isinstance(node, ast.Assign | ast.AugAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    for target in targets:
                        self._assign(f, target, node.value)
                elif isinstance(node, ast.Return) and node.value is not None:
                    f.gives_narrow |= self.is_narrow(f, node.value)
                elif isinstance(node, ast.Call):
                    for callee in self._callees(node):
                        given = [*zip(callee.parameters, node.args, strict=False)]
                        given += [(k.arg, k.value) for k in node.keywords if k.arg]
                        callee.narrow |= {name for name, value in given if self.is_narrow(f, value)}
        return before != sum(len(f.narrow) + f.gives_narrow for f in self.every)

    def _assign(self, f: Function, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple):
            values = value.elts if isinstance(value, ast.Tuple) else [value] * len(target.elts)
            for one, of in zip(target.elts, values, strict=True):
                self._assign(f, one, of)
        elif isinstance(target, ast.Name):
            if (root := _root(value)) and root != target.id:
                f.pointers[target.id] = root
            if self.is_narrow(f, value):
                f.narrow.add(target.id)

    def _callees(self, call: ast.Call) -> list[Function]:
        return self.functions.get(call.func.id, []) if isinstance(call.func, ast.Name) else []

    def _is_wide(self, f: Function, pointer: ast.expr) -> bool:
        root = _root(pointer)
        root = f.pointers.get(root, root)
        return bool({root, f"{f.place}:{root}"} & self.wide)

    def is_narrow(self, f: Function, value: ast.expr) -> bool:
        """Whether the value may be bfloat16 or float16."""
        match value:
            case ast.Name():
                return value.id in f.narrow
            case ast.Constant() | ast.Compare() | ast.BoolOp() | ast.Attribute():
                return False
            case ast.Call(func=ast.Attribute(attr="to")):
                return not _is_cast_to_wide(value)
            case ast.Call(func=ast.Attribute(attr=name)) if name in CONSTANT:
                return False
            case ast.Call(func=ast.Attribute(attr="load")):
                return not self._is_wide(f, value.args[0])
            case ast.Call(func=ast.Attribute(attr="where")):
                return any(self.is_narrow(f, a) for a in value.args[1:])
            case ast.Call(func=ast.Name()) if self._callees(value):
                return any(callee.gives_narrow for callee in self._callees(value))
        return any(self.is_narrow(f, child) for child in ast.iter_child_nodes(value) if isinstance(child, ast.expr))

    def find(self) -> set[Finding]:
        """Everything worth a reason, but casts and stores through `rounded`, which is where narrow casts belong."""
        found = set()
        for f in self.every:
            for node in ast.walk(f.tree):
                if kind := self._kind(f, node):
                    found.add(Finding(kind, f.place, ast.unparse(node)))
                if (isinstance(node, ast.Call) and _tl(node) in EXTREMA) or _is_select_of_larger(node):
                    found.add(Finding("extremum", f.place, ast.unparse(node)))
        return found

    def _kind(self, f: Function, node: ast.AST) -> str | None:
        """Of an operation on a narrow value, or that makes one."""
        match node:
            case ast.Call(func=ast.Attribute(attr="to")):
                return None if _is_cast_to_wide(node) else "cast"
            case ast.Call() if _tl(node) == "store":
                is_rounded = isinstance(node.args[1], ast.Call) and ast.unparse(node.args[1].func) == "rounded"
                return None if is_rounded or self._is_wide(f, node.args[0]) else "store"
            case ast.Call() if _tl(node) in REDUCTIONS | EXTREMA:
                return "reduction" if any(self.is_narrow(f, a) for a in node.args) else None
            case ast.BinOp():
                operands = [node.left, node.right]
            case ast.Compare():
                operands = [node.left, *node.comparators]
            case ast.AugAssign():
                operands = [node.target, node.value]
            case _:
                return None
        return "arithmetic" if any(self.is_narrow(f, o) for o in operands) else None


def _root(pointer: ast.expr) -> str:
    """`out` of out + row * stride + c."""
    while isinstance(pointer, ast.BinOp):
        pointer = pointer.left
    return pointer.id if isinstance(pointer, ast.Name) else ""


def _tl(call: ast.Call) -> str:
    """`sum` of `tl.sum(...)`; empty for other calls."""
    name = ast.unparse(call.func)
    return name.removeprefix("tl.") if name.startswith("tl.") else ""


def _is_cast_to_wide(call: ast.Call) -> bool:
    target = ast.unparse(call.args[0])
    return target in CASTS or target.startswith("tl.pointer_type(")


def _is_select_of_larger(node: ast.AST) -> bool:
    """tl.where(a > b, a, b) and its like: an extremum in other words."""
    if not (isinstance(node, ast.Call) and _tl(node) == "where" and isinstance(node.args[0], ast.Compare)):
        return False
    compared = {ast.unparse(o) for o in (node.args[0].left, *node.args[0].comparators)}
    ordered = any(isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.args[0].ops)
    return ordered and {ast.unparse(a) for a in node.args[1:]} == compared
