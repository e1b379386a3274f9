"""Benchmarks of every operator at any shape: `python -m d2v_kernels.bench --help`."""
