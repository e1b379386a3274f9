"""What the reports have in common: Markdown tables, and the line that says where figures come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" if line[0] != "---" else "|" + "---|" * len(line) for line in lines)


def origin(machine: Row) -> str:
    """Processor or GPU, versions, commit and day of a record."""
    isa = f", ISA {machine['isa']}" if machine.get("isa") else ""
    gpu = f"{machine['gpu']}, " if machine.get("gpu") else ""
    return (
        f"{gpu}{machine['cpu']} ({machine['cores']} cores){isa}, python {machine['python']}, torch {machine['torch']}, "
        f"commit {machine['commit']}, {machine['date'][:10]}"
    )


def origins(rows: Iterable[Row]) -> list[str]:
    """Every origin of records, once."""
    return list(dict.fromkeys(origin(row["machine"]) for row in rows))
