"""Monitors: they see what the published one does not; alarms are not blind to NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from d2v.config import Run
from d2v.metrics import (
    MetricsFile,
    Window,
    find_failure,
    measure_content_spread,
    measure_explained_variance,
    read_metrics,
)


def test_content_spread_ignores_what_the_position_explains() -> None:
    torch.manual_seed(0)
    position, content = torch.randn(1, 50, 8), torch.randn(400, 50, 8)
    assert measure_content_spread(position.expand(400, -1, -1)) < 0.002
    assert measure_content_spread(3 * position + 0.5 * content) == pytest.approx(0.5, rel=0.02)
    assert math.isnan(measure_content_spread(content[:1]))


def test_explained_variance() -> None:
    torch.manual_seed(0)
    target = torch.randn(1000, 8) * 3 + 5
    assert measure_explained_variance(target, target) == pytest.approx(1.0, abs=1e-6)
    assert measure_explained_variance(target.mean(0).expand_as(target), target) == pytest.approx(0.0, abs=1e-5)
    assert measure_explained_variance(target + 3 * torch.randn(1000, 8), target) == pytest.approx(0.0, abs=0.1)


def test_window_means_and_resume() -> None:
    window = Window()
    rows = [{"a": torch.tensor(float(i)), "b": torch.tensor(0.1 * i)} for i in range(5)]
    for row in rows[:2]:
        window.add(row)
    again = Window()
    again.restore(json.loads(json.dumps(window.state())), window.tensors(), torch.device("cpu"))
    for row in rows[2:]:
        window.add(row)
        again.add(row)
    assert window.means() == again.means()
    assert window.means()["a"] == 2.0
    window.reset()
    assert window.means() == {}
    assert window.tensors() == {}


def line(**values: float) -> dict[str, float]:
    usual = {"step": 10_000, "loss": 1.0, "grad_norm": 1.0, "prediction_std": 0.5, "content_spread": 0.5}
    return {**usual, **values}


def test_failures() -> None:
    run = Run(collapse_after=100)
    nan = math.nan
    assert find_failure(line(), run, 8) is None
    for broken in ({"loss": nan}, {"grad_norm": math.inf}, {"loss": nan, "step": 1}):
        assert "not finite" in str(find_failure(line(**broken), run, 8))
    low = {"prediction_std": 0.001, "content_spread": 0.001}
    assert "collapse: prediction_std 0.001 (limit 0.01)" in str(find_failure(line(**low), run, 8))
    assert find_failure(line(prediction_std=nan, content_spread=nan), run, 8) is not None
    assert find_failure(line(**{**low, "prediction_std": nan}), run, 8) is not None
    # One monitor alone does not stop a run; nor does anything early, with one sample, or with the rule off.
    assert find_failure(line(content_spread=0.001), run, 8) is None
    assert find_failure(line(**low, step=50), run, 8) is None
    assert find_failure(line(**low), run, 1) is None
    assert find_failure(line(**low), Run(collapse_content_spread=0.0), 8) is None


def test_metrics_file_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": math.nan if step == 2 else 1.5})
    file.close()
    with path.open("a") as raw:
        raw.write('{"step": 4, "lo')
    assert [entry["loss"] for entry in read_metrics(path)] == [1.5, None, 1.5]
    MetricsFile(path, 2).close()
    assert path.read_text() == '{"step": 1, "loss": 1.5}\n{"step": 2, "loss": null}\n'
    MetricsFile(path, 0).close()
    assert path.read_text() == ""
