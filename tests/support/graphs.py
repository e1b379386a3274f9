"""Tests of compiled graphs begin with a compiler that knows none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def count_graphs() -> int:
    """Graphs that were made so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
