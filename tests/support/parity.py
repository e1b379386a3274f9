"""How near a published step has to be met."""

from __future__ import annotations

from torch import Tensor


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str, floor: float = 1e-6) -> None:
    """Largest error over the largest value, which counts as `floor` at least."""
    assert actual.shape == expected.shape, name
    actual, expected = actual.detach().double(), expected.detach().double()
    limit = tolerance * max(float(expected.abs().max()), floor)
    error = float((actual - expected).abs().max())
    assert error <= limit, f"{name}: expected at most {limit:.3g}, got {error:.3g}"
