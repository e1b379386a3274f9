"""The native mask sampler and its Python twin draw the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import d2v_kernels

KINDS = ("span", "rectangles", "token-span", "block", "random")


@st.composite
def _cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    kind = draw(st.sampled_from(KINDS))
    options: dict[str, Any] = {
        "kind": kind,
        "ratio": draw(st.sampled_from([0.0, 0.1, 0.35, 0.48, 0.5, 0.65, 0.8, 0.99, 1.0])),
        "span": draw(st.integers(1, 12)),
        "seed": draw(st.integers(-(2**63), 2**64 - 1)),
        "equal_counts": draw(st.booleans()),
    }
    grid = kind == "rectangles" or (kind == "block" and draw(st.booleans()))
    if grid:
        options["grid"] = (draw(st.integers(1, 14)), draw(st.integers(1, 14)))
    else:
        options["tokens"] = draw(st.integers(1, 120))
    if kind == "block":
        options["adjust"], options["inverse"] = draw(st.sampled_from([0.0, 0.05, 0.07])), draw(st.booleans())
    samples = draw(st.integers(0, 4))
    call: dict[str, Any] = {
        "sample_ids": draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=samples, max_size=samples)),
        "epoch": draw(st.integers(-3, 2**40)),
        "copies": draw(st.integers(1, 4)),
    }
    if not grid and draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, options["tokens"]), min_size=samples, max_size=samples))
        call["lengths"] = torch.tensor(lengths, dtype=torch.int64)
    return options, call


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=_cases())
def test_same_bits(cpu_library: Path, case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    options, call = case
    sampler = d2v_kernels.MaskSampler(**options)
    with d2v_kernels.use_backend("native"):
        native = sampler.draw(**call)
    with d2v_kernels.use_backend("reference"):
        python = sampler.draw(**call)
    for name, a, b in zip(native._fields, native, python, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("options", "samples", "copies"),
    [
        ({"kind": "span", "tokens": 999, "ratio": 0.65, "span": 10, "equal_counts": True}, 11, 1),
        ({"kind": "rectangles", "grid": (14, 14), "ratio": 120 / 196, "span": 4}, 16, 1),
        ({"kind": "token-span", "tokens": 512, "ratio": 0.35, "span": 4}, 8, 1),
        ({"kind": "block", "tokens": 999, "ratio": 0.5, "adjust": 0.05, "span": 5}, 3, 8),
        ({"kind": "block", "grid": (14, 14), "ratio": 0.8, "adjust": 0.07, "span": 3, "inverse": True}, 4, 16),
        ({"kind": "random", "tokens": 512, "ratio": 0.48}, 4, 8),
    ],
    ids=lambda value: value.get("kind") if isinstance(value, dict) else None,
)
def test_same_bits_at_published_sizes(cpu_library: Path, options: dict[str, Any], samples: int, copies: int) -> None:
    sampler = d2v_kernels.MaskSampler(**options, seed=7)
    with d2v_kernels.use_backend("native"):
        native = sampler.draw(range(samples), 3, copies=copies)
    with d2v_kernels.use_backend("reference"):
        python = sampler.draw(range(samples), 3, copies=copies)
    assert torch.equal(native.mask, python.mask)
    assert torch.equal(native.rows, python.rows)
