"""What a trace says of the reduction of gradients: every parameter once an update, and when."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.scaling import overlap

SMALL = ["encoder.width=32", "encoder.depth=2", "target.top_k=2", "decoder.width=32", "encoder.heads=2"]


def test_a_run_reduces_every_parameter_once_an_update() -> None:
    common = ["--updates", "1", "--samples", "1", "--forwards", "2", "--set", *SMALL]
    full, half = overlap.main(common)
    # Not after the first of the two forwards.
    assert full["share"] == 1.0 and full["buckets"] >= 1
    assert half["share"] == pytest.approx(0.5, abs=1e-3)
    assert half["sent"] == pytest.approx(0.5 * full["sent"], abs=1e-3)  # MB, rounded to kB


def event(name: str, start: float, end: float, kind: str = "float", size: int = 1000) -> dict[str, Any]:
    return {"name": name, "ts": start, "dur": end - start, "args": {"Input type": [kind], "Input Dims": [[size]]}}


def test_what_lies_behind_the_last_gradient_is_not_hidden() -> None:
    events = [
        event("d2v/backward", 0, 100), event("autograd::engine::evaluate_function: X", 10, 60),
        event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 60, 95),
        event("gloo:all_reduce", 20, 40), event("gloo:all_reduce", 50, 90), event("gloo:all_reduce", 95, 99, size=1),
        event("gloo:all_reduce", 95, 99, "long int"), event("c10d::allreduce_", 0, 100),
    ]  # fmt: skip
    found = overlap.read_trace(events, 2000, 2, 1)
    assert found["buckets"] == 2 and found["share"] == 1.0 and found["reduced"] == found["sent"] == 0.008
    assert found["milliseconds"] == 0.06 and found["hidden"] == pytest.approx(0.5)
