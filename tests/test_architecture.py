"""Who may use whom, as CONTRIBUTING.md draws it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from scripts import structure

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "d2v_kernels").rglob("*.py")) + sorted((ROOT / "d2v").rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def uses(names: set[str], package: str) -> set[str]:
    return {n for n in names if n == package or n.startswith(package + ".")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_rules(path: Path) -> None:
    names, where = structure.imports(module_of(path), path), path.relative_to(ROOT).as_posix()
    for outside in ("benchmarks", "tests", "support"):
        assert not uses(names, outside)
    if where.startswith("d2v_kernels/"):
        assert not uses(names, "d2v")
        assert where.startswith("d2v_kernels/bench/") or not uses(names, "d2v_kernels.bench")
    else:
        deep = {n for n in uses(names, "d2v_kernels") if n.count(".") > 1}
        assert not deep, f"only top-level names of d2v_kernels: {deep}"
    if where.startswith("d2v_kernels/triton/"):
        shared = ("d2v_kernels._", "d2v_kernels.registry", "d2v_kernels.triton.runtime")
        others = {n for n in uses(names, "d2v_kernels") if not n.startswith(shared)}
        assert not others, f"kernels use neither definitions nor kernels of other families: {others}"
    elif where.startswith("d2v_kernels/ops/"):
        assert not uses(names, "d2v_kernels.triton"), "the registry hands out backends"
    if where != "d2v_kernels/ops/attention.py":
        assert not uses(names, "xformers")
    if not where.startswith("d2v_kernels/triton/"):
        assert not uses(names, "triton")
    assert not uses(names, "pickle")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_env_reads_the_environment(path: Path) -> None:
    if path.name not in ("_env.py", "trackers.py", "distributed.py"):
        assert not re.search(r"os\.(environ|getenv|putenv)|import (environ|getenv)", path.read_text())


ONE_NAME = re.compile(
    r"\.(\w*(all_reduce|reduce_scatter|all_gather|all_to_all)\w*|full_tensor|redistribute|coalescing_manager)$"
)
UNDER_DIST = re.compile(
    r"^(dist|torch\.distributed|\w*funcol\w*|c10d)\..*\b(\w*(reduce|gather|broadcast|scatter|barrier)\w*|i?send|i?recv)$"
)
COLLECTIVES = {
    "d2v/train/distributed.py": [
        "dist.all_gather_object",
        "dist.all_reduce",
        "dist.barrier",
        "dist.broadcast_object_list",
        "part.set_custom_reduce_scatter",
    ],
    "d2v/train/ranks/heartbeat.py": ["dist.barrier"],
    "d2v/train/ranks/reduction.py": ["dist.all_gather", "dist.all_to_all_single"],
    "d2v/train/optim.py": ["norm.full_tensor"],  # of one number
}


def collectives(text: str) -> list[str]:
    """Calls by which ranks exchange tensors, and names of them that are imported by themselves."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if ONE_NAME.search(name) or UNDER_DIST.match(name) else []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
            found += [a.name for a in node.names if UNDER_DIST.match(f"dist.{a.name}") or "functional" in a.name]
    return sorted(found)


def test_collectives_are_called_in_one_place() -> None:
    """`all_reduce` in d2v/train/distributed.py checks what it is given; nothing goes past it."""
    found = {path.relative_to(ROOT).as_posix(): collectives(path.read_text()) for path in SOURCES}
    assert {where: calls for where, calls in found.items() if calls} == COLLECTIVES


@pytest.mark.parametrize(
    "text",
    [
        "dist.all_reduce(x[:, 0])", "torch.distributed.broadcast(x, 0)", "funcol.all_reduce(x, 'sum', group)",
        "dist.distributed_c10d.reduce_scatter_tensor(a, b)", "torch.ops._c10d_functional.all_reduce_(x, 'max', '0')",
        "x.redistribute(mesh)", "from torch.distributed import all_gather", "dist.isend(x, 1)",
    ],
)  # fmt: skip
def test_collectives_elsewhere_are_found(text: str) -> None:
    assert collectives(text)


def test_include_rules() -> None:
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        found = re.findall(r'#include\s+[<"]([^>"]+)[>"]', path.read_text())
        room = path.relative_to(ROOT / "csrc").parts[0]
        torch = [f for f in found if f.startswith(("torch/", "ATen/", "c10/"))]
        python = [f for f in found if f.startswith(("pybind11/", "Python.h"))]
        assert room == "torch" or not torch, (path, torch)
        assert room == "python" or not python, (path, python)
        for forbidden in {"torch": "python/", "python": "torch/", "core": "../torch"}.get(room, "?"), "../../":
            assert not any(forbidden in f and not f.startswith("torch/") for f in found), (path, found)


def test_sizes() -> None:
    """A person can read the library in a day: short files, short functions."""
    for path in SOURCES:
        text = path.read_text()
        assert text.count("\n") <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                assert node.end_lineno - node.lineno < 70, f"{path}: {node.name}"
