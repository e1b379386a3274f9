"""Names of tensors of other programs from pairs of forms, which are read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

Pairs = tuple[tuple[str, str], ...]
"""Two forms of a name: # stands for a number, #+1 for that number plus one, * for anything."""


def renamed(name: str, pairs: Pairs) -> Iterator[str]:
    """The name in the second form of each pair whose first form it has."""
    for form, other in pairs:
        pattern = re.escape(form).replace(r"\#", r"(\d+)").replace(r"\*", "(.*)")
        if match := re.fullmatch(pattern, name):
            parts = iter(match.groups())
            yield re.sub(r"#\+1|[#*]", lambda sign: _fill(sign[0], next(parts)), other)  # noqa: B023


def _fill(sign: str, part: str) -> str:
    return str(int(part) + 1) if sign == "#+1" else part


def rename(name: str, pairs: Pairs) -> str:
    """The name in the second form of the first pair that fits, or unchanged."""
    return next(renamed(name, pairs), name)


def reverse(pairs: Iterable[tuple[str, str]]) -> Pairs:
    """The pairs the other way round."""
    return tuple((second, first) for first, second in pairs)
