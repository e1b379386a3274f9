"""Examples in docstrings of the operators compute what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import d2v_kernels.ops

MODULES = [f"d2v_kernels.ops.{found.name}" for found in pkgutil.iter_modules(d2v_kernels.ops.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0 or name != "d2v_kernels.ops.ema"
