"""EmaPlan's native tables: the same numbers as the list operator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import d2v_kernels
from d2v_kernels import _native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _tensors() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    averages, sources, copies = [], [], []
    for i, shape in enumerate([(3, 5), (0,), (40000,), (), (7, 1, 9), (16384,), (16385,)]):
        averages.append(torch.randn(shape).to(DTYPES[i % 3]))
        sources.append(torch.randn(shape).to(DTYPES[(i + 1) % 3]))
        copies.append(torch.zeros(shape, dtype=DTYPES[(i // 2) % 3]))
    averages.append(torch.randn(4, 6, dtype=torch.float64).T)
    sources.append(torch.randn(4, 6, dtype=torch.float64).T)
    copies.append(torch.zeros(4, 6).T)
    return averages, sources, copies


@pytest.mark.parametrize("with_copies", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0, torch.tensor(0.25, dtype=torch.float64)])
def test_equals_the_list_operator(cpu_library: Path, with_copies: bool, decay: float | Tensor) -> None:
    averages, sources, copies = _tensors()
    expected, expected_copies = [a.clone() for a in averages], [c.clone() for c in copies]
    d2v_kernels.update_ema_(expected, sources, decay, copies=expected_copies if with_copies else None)
    plan = d2v_kernels.EmaPlan(averages, sources, copies if with_copies else None)
    assert plan.native
    plan.step(decay)
    for got, want in zip([*averages, *copies], [*expected, *expected_copies], strict=True):
        assert torch.equal(got, want)


def test_refuses_mixed_fp64(cpu_library: Path) -> None:
    module = _native.native_module()
    assert module is not None
    with pytest.raises(ValueError, match="float64 for both"):
        module.EmaPlan([(0, 0, 0, 1, 3, 0, -1)], [])


@pytest.mark.parametrize("which", ["average", "source", "copy"])
def test_follows_tensors_that_move(cpu_library: Path, which: str) -> None:
    averages, sources, copies = [torch.zeros(5)], [torch.ones(5)], [torch.zeros(5, dtype=torch.bfloat16)]
    plan = d2v_kernels.EmaPlan(averages, sources, copies)
    moved = {"average": averages, "source": sources, "copy": copies}[which][0]
    before = moved.data
    moved.data = torch.full_like(before, 3.0)
    plan.step(0.5)
    assert plan.native
    expected = 0.5 * (3.0 if which == "average" else 0.0) + 0.5 * (3.0 if which == "source" else 1.0)
    assert torch.equal(averages[0], torch.full((5,), expected))
    assert torch.equal(copies[0], averages[0].bfloat16())
    if which != "source":
        assert not before.any()


def test_lets_go_of_its_tensors(cpu_library: Path) -> None:
    average = torch.zeros(5)
    uses = average._use_count()  # type: ignore[attr-defined]
    plan = d2v_kernels.EmaPlan([average], [torch.ones(5)])
    assert average._use_count() > uses  # type: ignore[attr-defined]
    del plan
    assert average._use_count() == uses  # type: ignore[attr-defined]
