"""Size, import order and circles of the packages; `make structure` prints them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from scripts import structure

ORDER = (
    ("files", "runtime"), ("config",), ("folder",), ("recipes", "model"), ("data",), ("signals", "spectrograms"),
    ("train",), ("saved",), ("evaluate",), ("finetune",), ("interop",), ("tools", "testing"), ("",), ("options",),
    ("settings",), ("sweep",), ("cli",),
)  # fmt: skip
"""Parts of `d2v` from left to right: each imports only from those before it and from itself."""
LARGEST = {"d2v": 26_177, "d2v_kernels": 8_994, "benchmarks": 6_903}
"""Lines; they rise for what the change log names."""


def rank(module: str) -> int:
    """Place of a module of d2v in `ORDER`, where "" is the package itself; `python -m d2v` comes last."""
    part = (module.split(".") + [""])[1]
    return next((i for i, parts in enumerate(ORDER) if part in parts), len(ORDER))


def test_d2v_imports_only_from_the_left() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in structure.graph("d2v").items()
        for other in others
        if rank(other) > rank(name) or (rank(other) == rank(name) and other.split(".")[1] != name.split(".")[1])
    ]
    assert not wrong


@pytest.mark.parametrize("package", structure.PACKAGES)
def test_no_import_circles(package: str) -> None:
    assert structure.circles(structure.graph(package)) == []


def test_circles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert structure.circles(edges) == [["a", "b", "c"]]


@pytest.mark.parametrize("package", structure.PACKAGES)
def test_folders_are_small(package: str) -> None:
    folders = Counter(path.parent for path in structure.modules(package).values() if path.name != "__init__.py")
    assert {str(folder): n for folder, n in folders.items() if n > 12} == {}


@pytest.mark.parametrize("package", structure.PACKAGES)
def test_size(package: str) -> None:
    assert structure.count_lines(package) <= LARGEST[package]


def test_imports_inside_functions_count(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "__init__.py").write_text("")
    (tmp_path / "p" / "a.py").write_text("def f():\n    from p.b import g\n")
    (tmp_path / "p" / "b.py").write_text("from . import a\n")
    assert structure.circles(structure.graph("p", tmp_path)) == [["p.a", "p.b"]]
