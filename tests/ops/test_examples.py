"""The examples in the docstrings of public functions and classes run, and each has one."""

from __future__ import annotations

import doctest
import inspect

import pytest

import d2v
import d2v_kernels

PUBLIC = [getattr(d2v_kernels, name) for name in d2v_kernels.__all__ if name != "__version__"]
RESULTS = {"Alibi", "Masks", "Noise", "Packed", "RegressionLoss"}  # shown with the function that takes or gives them


@pytest.mark.parametrize("given", PUBLIC, ids=lambda given: given.__name__)
def test_example(given) -> None:
    (found,) = doctest.DocTestFinder(recurse=False).find(
        given, given.__name__, globs=dict(vars(inspect.getmodule(given)))
    )
    assert found.examples or given.__name__ in RESULTS
    done = doctest.DocTestRunner().run(found)
    assert done.failed == 0 and done.attempted == len(found.examples)


def test_one_version() -> None:
    """Written down twice: importing `d2v` must not import torch."""
    assert d2v_kernels.__version__ == d2v.__version__
