"""Prints the size of each package, its largest folders and its import circles: `make structure`.

The tests of `tests/test_architecture.py` take the import graph from here.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("d2v_kernels", "d2v", "benchmarks")


def modules(package: str, root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file of every module of a package."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Absolute dotted names that a module imports anywhere, also inside functions: modules, and names in modules."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def graph(package: str, root: Path = ROOT) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports. A name counts for the module that it is taken from."""
    known = modules(package, root)
    edges: dict[str, set[str]] = {}
    for name, path in known.items():
        edges[name] = set()
        for wanted in imports(name, path):
            module = wanted if wanted in known else wanted.rpartition(".")[0]
            if module in known and module != name:
                edges[name].add(module)
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a loop (strongly connected components, Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in edges[node]:
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            cut = stack.index(node)
            if len(stack) - cut > 1:
                found.append(sorted(stack[cut:]))
            del stack[cut:]

    for node in edges:
        if node not in order:
            visit(node)
    return found


def count_lines(package: str, root: Path = ROOT) -> int:
    """Lines of a package's Python files, as `wc -l` counts them."""
    return sum(path.read_text(encoding="utf-8").count("\n") for path in modules(package, root).values())


def main() -> int:
    """One line a package, one a circle; exit code 1 where there is a circle."""
    bad = 0
    for package in PACKAGES:
        files = modules(package)
        folders = Counter(path.parent for path in files.values())
        largest, most = folders.most_common(1)[0]
        found = circles(graph(package))
        bad += len(found)
        print(
            f"{package:12} {count_lines(package):6} lines, {len(files):3} files in {len(folders):2} folders, "
            f"at most {most} in one ({largest.relative_to(ROOT)}), {len(found)} import circles"
        )
        for circle in found:
            print(f"  circle: {', '.join(circle)}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
