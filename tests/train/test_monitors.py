"""Monitors: they see what the published one does not; alarms are not blind to NaN."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.collapse.faults import PLANTED, SETTINGS
from d2v import recipes
from d2v.config import Config, Run
from d2v.model.data2vec import Data2Vec, Output, build_model
from d2v.train import pretraining
from d2v.train.logging import read_metrics
from d2v.train.monitors import (
    RANK_LIMIT,
    find_failure,
    measure,
    measure_content_spread,
    measure_effective_rank,
    measure_explained_variance,
)
from d2v.train.pretraining import pretrain
from d2v.train.trainer import RunStopped


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


def test_effective_rank_of_known_spectra() -> None:
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    rows = torch.randn(4, 500, 16)
    assert measure_effective_rank(rows) == pytest.approx(16.0, rel=0.02)
    assert measure_effective_rank(1e-6 * rows + 1e-6) == pytest.approx(16.0, rel=0.02)
    # Three equal directions among sixteen, turned and moved away from the origin: 3.
    three = torch.cat([rows[..., :3], torch.zeros(4, 500, 13)], dim=-1) @ rotation + 5.0
    assert measure_effective_rank(three) == pytest.approx(3.0, rel=0.02)
    # Eigenvalues in the ratio 3 : 1 give exp of that entropy.
    two = torch.tensor([[math.sqrt(3.0), 0.0], [-math.sqrt(3.0), 0.0], [0.0, 1.0], [0.0, -1.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert measure_effective_rank(two[None]) == pytest.approx(math.exp(entropy), rel=1e-5)
    assert measure_effective_rank(two[None].bfloat16()) == pytest.approx(math.exp(entropy), rel=1e-2)
    # Fewer rows than channels: the other product, the same numbers.
    wide = torch.randn(1, 8, 64, dtype=torch.float64)
    values = torch.linalg.eigvalsh(wide[0].T.cov()).clamp_min(0)
    shares = values / values.sum()
    assert measure_effective_rank(wide) == pytest.approx(float(torch.special.entr(shares).sum().exp()), rel=1e-4)


def test_effective_rank_of_collapsed_and_broken_rows() -> None:
    torch.manual_seed(0)
    constant = torch.randn(16).expand(4, 50, 16)
    assert measure_effective_rank(constant) == 1.0
    # Rounding of a constant is no direction.
    assert measure_effective_rank(constant * (1 + 1e-7 * torch.randn(4, 50, 16))) == 1.0
    assert measure_effective_rank(torch.zeros(4, 50, 16)) == 1.0
    line = torch.randn(4, 50, 1) * torch.randn(16)
    assert measure_effective_rank(line) == pytest.approx(1.0, abs=1e-3)
    assert measure_effective_rank(line + 0.01 * torch.randn(4, 50, 16)) < RANK_LIMIT
    for value in (math.nan, math.inf):
        broken = torch.randn(4, 50, 16)
        broken[1, 2, 3] = value
        assert math.isnan(measure_effective_rank(broken))
    assert math.isnan(measure_effective_rank(torch.randn(1, 1, 16)))


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    rows = torch.randn(6, 40, 8)
    lengths = torch.tensor([40, 30, 20, 10, 5, 1])
    valid = torch.arange(40) < lengths[:, None]
    padded = torch.where(valid[..., None], rows, 1e6 * torch.ones(8))
    alone = rows[valid][None]
    assert measure_effective_rank(padded, lengths) == measure_effective_rank(alone)
    padded[~valid] = math.nan
    assert measure_effective_rank(padded, lengths) == measure_effective_rank(alone)


def test_cost_is_bounded_by_a_fixed_choice_of_rows() -> None:
    torch.manual_seed(0)
    many = torch.randn(100, 100, 8)
    limited = measure_effective_rank(many, limit=500)
    assert limited == measure_effective_rank(many, limit=500)
    assert limited == pytest.approx(8.0, rel=0.03)
    # Every twentieth row, so every sample has its share.
    assert limited == measure_effective_rank(many.reshape(1, -1, 8)[:, ::20])


def forward(model: Data2Vec) -> Output:
    torch.manual_seed(1)
    out: Output = model(torch.randn(6, 3, 16, 16))
    return out


def small_model() -> Data2Vec:
    """With targets as the published image models have them."""
    torch.manual_seed(0)
    config = recipes.vision_tiny()
    stem = dataclasses.replace(config.stem, image_size=16)
    target = dataclasses.replace(config.target, norm="instance", out_norm="layer")
    return Data2Vec(dataclasses.replace(config, stem=stem, target=target))


class Reads(TorchDispatchMode):
    """Counts reads of a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_monitors_of_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    out = forward(small_model())
    assert out.features.shape == (6, 16, 64)
    assert not out.features.requires_grad
    lists: list[Tensor] = []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: (lists.append(t), original(t))[1])
    with Reads() as reads:
        values = measure(out)
    assert (reads.count, len(lists)) == (0, 1)  # one read for all
    explained = measure_explained_variance(out.prediction.detach(), out.target)
    assert values["explained_variance"] == pytest.approx(float(explained))
    assert values["content_spread"] == pytest.approx(float(measure_content_spread(out.targets)))
    assert values["stem_rank"] == pytest.approx(float(measure_effective_rank(out.features)))
    assert values["target_rank"] == pytest.approx(float(measure_effective_rank(out.targets)))
    lengths = torch.tensor([16, 8, 8, 4, 4, 2])
    assert measure(out, lengths)["stem_rank"] == pytest.approx(float(measure_effective_rank(out.features, lengths)))


def test_a_collapsed_local_encoder_is_seen_and_said() -> None:
    """The stem gives the same for every patch: the published monitor is pinned near 1, two others agree."""
    model = small_model()
    with torch.no_grad():
        for stem in (model.stem, model.teacher.get_submodule("stem")):
            stem.proj.weight.zero_()  # type: ignore[union-attr]
    out = forward(model)
    values = measure(out)
    assert float(out.target_std) > 0.9
    assert values["stem_rank"] == 1.0
    line = {"step": 10_000, "loss": 1.0, "prediction_std": float(out.prediction_std), **values}
    text = str(find_failure(line, Run(collapse_after=100), 6))
    assert "stem_rank 1 (limit 1.05)" in text
    assert "the local encoder gives nearly the same direction for all tokens" in text
    assert "try " in text and "--stem.gradient-scale" in text


def test_a_run_that_collapses_is_stopped(make_config: Callable[..., Config]) -> None:
    """Weight decay that eats the weights, and targets without norms: constant predictions, a loss that falls to 0."""
    config = make_config(
        ema={"start": 0.5, "end": 0.5},
        target={"norm": "none", "out_norm": "none"},
        optim={"learning_rate": 1e-2, "weight_decay": 20.0, "warmup_steps": 2},
        run={"steps": 400, "log_every": 20, "collapse_after": 40, "checkpoint_every": 1000},
    )
    with pytest.raises(RunStopped, match=r"collapse: prediction_std .*content_spread .*try .*--ema\.start") as stopped:
        pretrain(config)
    assert "docs/monitoring.md" in str(stopped.value)
    lines = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    assert 40 < lines[-1]["step"] < 400
    assert lines[-1]["loss"] < 0.1 * lines[0]["loss"]  # the loss alone looks like success


def line(**values: float) -> dict[str, float]:
    usual = {
        "step": 10_000, "loss": 1.0, "grad_norm": 1.0, "prediction_std": 0.5, "content_spread": 0.5,
        "stem_rank": 9.0, "target_rank": 9.0,
    }  # fmt: skip
    return {**usual, **values}


def test_failures() -> None:
    run = Run(collapse_after=100)
    nan = math.nan
    assert find_failure(line(), run, 8) is None
    for broken in ({"loss": nan}, {"grad_norm": math.inf}, {"loss": nan, "step": 1}):
        assert "not finite" in str(find_failure(line(**broken), run, 8))
    low = {"prediction_std": 0.001, "content_spread": 0.001}
    text = str(find_failure(line(**low), run, 8))
    assert "collapse: prediction_std 0.001 (limit 0.01)" in text
    assert "--ema.start" in text
    assert find_failure(line(**{**low, "prediction_std": nan}), run, 8) is not None
    # One monitor alone does not stop a run; nor does anything early, with one sample, or with the rule off.
    for name in ("prediction_std", "content_spread", "stem_rank", "target_rank"):
        for value in (0.001, nan):
            assert find_failure(line(**{name: value}), run, 8) is None
    assert find_failure(line(**low, step=50), run, 8) is None
    assert find_failure(line(**low), run, 1) is None
    assert find_failure(line(**low), Run(collapse_content_spread=0.0), 8) is None
    # A line of other training has none of these.
    assert find_failure({"step": 10_000, "loss": 1.0}, run, 8) is None


def test_the_rule_begins_after_a_fortieth_of_the_run_and_at_most_5000_updates() -> None:
    low = {"prediction_std": 0.001, "content_spread": 0.001}
    for steps, first in ((1_000, 26), (400_000, 5_001)):
        assert find_failure(line(**low, step=first - 1), Run(steps=steps), 8) is None
        assert find_failure(line(**low, step=first), Run(steps=steps), 8) is not None


def test_one_monitor_stops_a_run_in_three_lines_running() -> None:
    run = Run(collapse_after=100)
    for name in ("content_spread", "stem_rank", "target_rank"):
        lines: dict[str, int] = {}
        values = [0.001, math.nan, 0.5 if name == "content_spread" else 9.0, 0.001, 0.001, 0.001]
        found = [find_failure(line(**{name: value}), run, 8, lines) for value in values]
        assert found[:5] == [None] * 5  # a healthy line in between begins anew
        assert f"collapse: {name} 0.001" in str(found[5]) and "in 3 lines running" in str(found[5])
        # Lines that have no monitors do not count: those of checkpoints.
        find_failure({"step": 0, "loss": 1.0}, run, 0, lines)
        assert find_failure(line(**{name: 0.001}), run, 8, lines) is not None
    lines = {}
    for _ in range(9):  # a student that gives the mean only may have begun just now
        assert find_failure(line(prediction_std=0.001), run, 8, lines) is None
    # Lines before the rule begins count, too.
    lines = {}
    assert [find_failure(line(target_rank=1.0, step=s), run, 8, lines) for s in (50, 100)] == [None, None]
    assert find_failure(line(target_rank=1.0, step=150), run, 8, lines) is not None


SAME = "the targets are the same for every sample"
SEEN = {
    "constant stem": rf"2: collapse: content_spread 0\.001 .*stem_rank 1 .*: {SAME} and the local encoder gives nearly",
    "positions only": rf"6: collapse: content_spread 0\.001 \(limit 0\.1\) in 3 lines running: {SAME}",
    "one direction": r"6: collapse: stem_rank 1 \(limit 1\.05\) in 3 lines running: the local encoder gives nearly",
    "one target": r"6: collapse: target_rank 1 \(limit 1\.05\) in 3 lines running: the targets lie along one direction",
    "dead teacher": rf"6: collapse: content_spread 0\.001 \(limit 0\.1\) in 3 lines running: {SAME}",
    "rate x 300": r"4: diverged: loss .* times that of predicting 0 \(limit 5\)",
}
"""At which update a run is stopped, and with which sentence."""


def short(make_config: Callable[..., Config], **sections: dict[str, Any]) -> Config:
    """A run of the usual form whose lines come every second update."""
    run = {"steps": 60, "log_every": 2, "checkpoint_every": 60, **sections.pop("run", {})}
    return make_config(run=run, data={"global_batch": 8}, **sections)


@pytest.mark.parametrize("fault", SEEN)
def test_a_planted_collapse_stops_the_run(
    fault: str, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*given: Any) -> Data2Vec:
        model = build_model(*given)
        with torch.no_grad():
            PLANTED.get(fault, lambda model: None)(model)
        return model

    monkeypatch.setattr(pretraining, "build_model", build)
    with pytest.raises(RunStopped, match=f"stopped at update {SEEN[fault]}"):
        pretrain(SETTINGS.get(fault, lambda config: config)(short(make_config)))


def test_a_healthy_run_goes_on(make_config: Callable[..., Config]) -> None:
    folder = pretrain(short(make_config))
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 60


def test_a_teacher_that_never_moves_is_refused_where_nobody_asked_for_it(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    still = {"start": 1.0, "end": 1.0}
    with pytest.raises(ValueError, match=r"expected a decay below 1, got 1 and 1.*--ema\.freeze-after 0"):
        pretrain(short(make_config, ema=still))
    assert not (tmp_path / "run").exists()
    # Asked for; and with the teacher of a checkpoint, both at once and when the run is taken up again.
    first = pretrain(short(make_config, ema={**still, "freeze_after": 0}))
    second = str(tmp_path / "second")
    pretrain(short(make_config, ema=still, run={"dir": second, "steps": 40, "checkpoint_every": 20}), init=str(first))
    shutil.rmtree(tmp_path / "second" / "checkpoints" / "step-00000040")
    pretrain(short(make_config, ema=still, run={"dir": second, "steps": 40, "checkpoint_every": 20}))


@pytest.mark.parametrize("pair", [("prediction_std", "target_rank"), ("stem_rank", "target_rank")])
@pytest.mark.parametrize("value", [1e-3, math.nan])
def test_any_two_monitors_agree(pair: tuple[str, str], value: float) -> None:
    text = str(find_failure(line(**dict.fromkeys(pair, value)), Run(collapse_after=100), 8))
    assert text.startswith("collapse: ")
    assert all(name in text for name in pair)
