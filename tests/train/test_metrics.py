"""Windows of metrics on one and several ranks, the clock, and the file of metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from d2v import recipes
from d2v.runtime import format_seconds
from d2v.train.logging import MetricsFile, MetricWindow, Progress, describe_line, read_metrics
from d2v.train.trackers import Trackers, make_trackers


def test_window_means_and_resume() -> None:
    window = MetricWindow()
    rows = [{"a": torch.tensor(float(i)), "b": torch.tensor(0.1 * i)} for i in range(5)]
    for row in rows[:2]:
        window.add(row)
    again = MetricWindow()
    again.restore(json.loads(json.dumps(window.state())), window.tensors(), torch.device("cpu"))
    for row in rows[2:]:
        window.add(row)
        again.add(row)
    assert window.means() == again.means()
    assert window.means()["a"] == 2.0
    window.reset()
    assert window.means() == {}
    assert window.tensors() == {}


def test_sums_of_all_ranks() -> None:
    """Every rank adds its part; what is reduced is the sum, and the window itself goes on."""
    ranks = [MetricWindow(), MetricWindow()]
    for update in range(3):
        for rank, window in enumerate(ranks):
            window.add({"loss": torch.tensor(1.0 + update + 10 * rank)})
            window.count(tokens=100.0 * (rank + 1))
    sums = [w.tensors()["metrics.sums"].clone() for w in ranks]

    def reduce(values: torch.Tensor) -> None:
        assert values.dtype == torch.float64
        values += sums[1]

    for _ in range(2):
        assert ranks[0].means(reduce) == {"loss": pytest.approx((2.0 * 6 + 30) / 3)}
    assert ranks[0].means() == {"loss": 2.0}
    assert ranks[0].tensors(reduce)["metrics.sums"].tolist() == [42.0]
    # The first rank of a resumed run takes the sums; the others begin at 0, so that they count once.
    stored = ranks[0].tensors(reduce)
    again = [MetricWindow(), MetricWindow()]
    for rank, window in enumerate(again):
        window.restore(ranks[0].state(), stored, torch.device("cpu"), main=rank == 0)
    assert [w.means()["loss"] for w in again] == [14.0, 0.0]


def test_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("d2v.train.logging.time.perf_counter", lambda: now[0])

    def late(count: int) -> Iterator[int]:
        for i in range(count):
            now[0] += 1.0
            yield i

    window = MetricWindow()
    window.resume_clock()
    for _ in window.watch(late(4)):
        now[0] += 3.0
        window.add({"loss": torch.tensor(1.0)})
        window.count(tokens=8.0, flops=80.0)
    assert window.step_seconds() == 4.0
    assert window.data_wait() == 0.25
    assert window.rates() == {"tokens": 2.0, "flops": 20.0}
    assert window.rates(lambda values: values.mul_(3)) == {"tokens": 6.0, "flops": 60.0}
    window.pause_clock()
    now[0] += 50.0
    with window.waiting():  # validation has its own loader
        now[0] += 50.0
    assert (window.seconds(), window.data_wait()) == (16.0, 0.25)
    window.reset()
    assert (window.seconds(), window.data_wait(), window.rates()) == (0.0, 0.0, {})


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


def test_the_console_line() -> None:
    line = {"step": 5, "loss": 1.23456, "content_spread": 0.5, "samples_per_second": 12.3, "step_seconds": 2.0}
    assert describe_line(line) == "loss 1.2346, spread 0.500, 12 samples/s"
    full = {**line, "valid_loss": 2.0, "data_wait": 0.07}
    assert describe_line(full) == "loss 1.2346, valid 2.0000, spread 0.500, 12 samples/s, data wait 7%"
    # Other training has no spread.
    assert describe_line({"loss": 1.0, "samples_per_second": 3.0}) == "loss 1.0000, 3 samples/s"


def test_a_collapsed_local_encoder_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(0, 100)
    usual = {"loss": 1.0, "samples_per_second": 3.0, "step_seconds": 2.0, "target_rank": 9.0}
    for step, rank in enumerate((5.0, 1.01, 1.0, math.nan), start=1):
        progress.show({**usual, "step": step, "stem_rank": rank})
    notes = [text for text in capsys.readouterr().err.splitlines() if text.startswith("note")]
    (note,) = notes
    assert "stem_rank 1 (limit 1.05): the local encoder gives nearly the same direction for all tokens" in note
    progress.show({**usual, "step": 9, "target_rank": math.nan})
    assert "note: target_rank nan" in capsys.readouterr().err


def test_tensorboard_has_every_finite_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = recipes.vision_tiny()
    board = Trackers(make_trackers(["tensorboard"]), print)
    board.start(config, tmp_path, 0)
    for step in (1, 2, 3):
        board.log({"step": step, "loss": 1.0 / step, "stem_rank": 2.0, "word": "text", "valid_loss": math.nan})
    board.finish("failed")
    board = Trackers(make_trackers(["tensorboard"]), print)
    board.start(config, tmp_path, 1)  # of a run resumed after update 1
    board.finish("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "stem_rank"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0)]


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(0, 35)
    progress.show({"step": 5, "loss": 1.0, "samples_per_second": 3.0, "step_seconds": 2.0})
    progress.close()
    assert capsys.readouterr().err == "update 5/35: loss 1.0000, 3 samples/s, 1:00 left\n"
    assert [format_seconds(s) for s in (59.6, 3_661.0, math.nan, math.inf)] == ["1:00", "1:01:01", "?", "?"]
