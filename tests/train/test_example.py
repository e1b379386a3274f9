"""`examples/pretrain.py`: the whole algorithm on the public operators alone."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).resolve().parents[2] / "examples" / "pretrain.py"


@pytest.fixture
def example() -> dict[str, Any]:
    torch.manual_seed(0)
    return runpy.run_path(str(FILE))


def test_the_loss_falls(example: dict[str, Any]) -> None:
    model = example["Data2Vec"]()
    before = [p.clone() for p in model.teacher.parameters()]
    losses = example["train"](model, example["make_images"](32), 40)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(not torch.equal(a, b) for a, b in zip(before, model.teacher.parameters(), strict=True))


def test_targets_come_from_the_teacher(example: dict[str, Any]) -> None:
    model, images = example["Data2Vec"](), example["make_images"](4)
    first = model.targets(images)
    assert first.shape == (4, 64, 64) and not first.requires_grad
    with torch.no_grad():
        model.student.embed.weight.mul_(2.0)
        assert torch.equal(model.targets(images), first)
        model.teacher.embed.weight.mul_(2.0)
    assert not torch.allclose(model.targets(images), first)


def test_it_is_short_and_needs_no_trainer() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    modules = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    modules |= {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in modules} == {"copy", "torch", "d2v_kernels"}
