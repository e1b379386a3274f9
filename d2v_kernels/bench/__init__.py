"""Benchmarks of every operator at any shape: `python -m d2v_kernels.bench --help`."""

from . import blocks, cases

__all__ = ["blocks", "cases"]
