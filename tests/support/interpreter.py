"""pytest plugin for the child process whose Triton interprets: a program takes milliseconds, so fewer examples."""

from __future__ import annotations

import pytest
from hypothesis import settings

EXAMPLES = 6


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        function = getattr(item, "obj", None)
        mine = getattr(function, "_hypothesis_internal_use_settings", None)
        if mine is not None:
            smaller = settings(mine, max_examples=EXAMPLES, database=None, derandomize=True)
            function._hypothesis_internal_use_settings = smaller
