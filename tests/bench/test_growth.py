"""Growth curves: real points in processes of their own, resuming, stopping, exponents, table and plot."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth
from benchmarks.growth import Curve, Runner
from benchmarks.harness.record import ChildError, machine_record
from benchmarks.harness.report import fit_exponent
from benchmarks.training.cases import StepCase, make_config

Row = dict[str, Any]
BATCH = partial(StepCase, "vision-tiny")


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_curve_is_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of other sources and a line that was cut off go; what was measured, and another machine's, stays."""
    output = tmp_path / "growth.jsonl"
    old = {"key": "of other sources", "kind": "point", "curve": "operator", "machine": machine_record()}
    other = {**old, "threads": 1, "device": "cpu", "machine": {"cpu": "another"}}
    output.write_text(f'{json.dumps(old)}\n{json.dumps(other)}\n{{"key": "cut')
    arguments = ["--dry", "--only", "operator", "--output", str(output)]
    growth.main(arguments)
    kept, *rows = rows_of(output)
    assert kept == other
    assert [(r["kind"], r["curve"], r["x"], r["dry"]) for r in rows] == [("point", "operator", x, True) for x in (1, 2)]
    for row in rows:
        assert all(0.0 < row["forms"][form]["minimum"] <= row["forms"][form]["median"] for form in ("plain", "d2v"))
        assert {"cpu", "torch", "commit", "date"} <= set(row["machine"])
    text = capsys.readouterr().out
    assert "averaged layers K 1 to 2" in text and "time ~ x^" in text
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    growth.main(arguments)
    assert rows_of(output) == [other, *rows], "measured again"


def test_a_step_is_timed_and_its_memory_measured(tmp_path: Path) -> None:
    output = tmp_path / "growth.jsonl"
    Runner(growth.parse_options(["--dry"]), output).run(Curve("batch", "samples B", (2,), case=lambda x: BATCH(int(x))))
    (row,) = rows_of(output)
    assert row["command"] == "python -m benchmarks.growth --device cpu --threads 1 --only batch"
    assert set(row["forms"]) == {"plain", "d2v"}
    for form in row["forms"].values():
        assert 0.0 < form["minimum"] <= form["median"]
        assert form["memory"] > 1e6
    assert (row["x"], row["rows"]) == (2, 4)  # two masks a sample


def test_two_processes_train_and_exchange(tmp_path: Path) -> None:
    output = tmp_path / "growth.jsonl"
    runner = Runner(growth.parse_options(["--dry"]), output)
    runner.run(Curve("processes", "processes", (2,), "processes"))
    (row,) = rows_of(output)
    assert row["kind"] == "point", row
    form = row["forms"]["d2v"]
    assert form["samples_per_second"] == pytest.approx(growth.GLOBAL_BATCH / form["minimum"])
    assert form["exposed_share"] == pytest.approx(1.0 - form["local"] / form["minimum"])
    assert row["gradient_bytes"] == 4 * row["parameters"] > 0


# ---- where a curve ends


class Fake(Runner):
    """A runner whose processes are a power law."""

    def __init__(self, tmp_path: Path, *arguments: str, fails: float = math.inf) -> None:
        super().__init__(growth.parse_options(list(arguments)), tmp_path / "growth.jsonl")
        self.fails, self.orders = fails, 0

    def ask_child(self, order: Row) -> Row:
        self.orders += 1
        x = order["x"]
        if x >= self.fails and "plain" in order["forms"]:
            raise ChildError("exit status 1: RuntimeError: not enough memory")
        if order["kind"] == "memory":
            return {"bytes": int(1e9 * x)}
        powers = {"plain": 2.0, "d2v": 1.0}
        forms = {f: {"minimum": 0.1 * x ** powers[f], "median": 0.1 * x ** powers[f]} for f in order["forms"]}
        return {"case": "fake", "rows": 1, "forms": forms}


CURVE = Curve("length", "seconds", (1, 2, 4, 8, 16), case=lambda x: StepCase("speech-small", 1, x))


def test_forms_stop_one_by_one_at_the_budget(tmp_path: Path) -> None:
    runner = Fake(tmp_path, "--budget", "14", "--memory", "1000")
    runner.run(CURVE)
    points = {f: [r["x"] for r in runner.rows if r["kind"] == "point" and f in r["forms"]] for f in ("plain", "d2v")}
    # 7 steps in 7 s: at most 1 s a step. plain takes 0.1 x^2 s, d2v 0.1 x.
    assert points == {"plain": [1, 2], "d2v": [1, 2, 4, 8]}
    stops = [r for r in runner.rows if r["kind"] == "stop"]
    assert [(r["forms"], r["x"]) for r in stops] == [(["plain"], 4), (["d2v"], 16)]
    assert all("a step would take about 1.6 s" in r["reason"] for r in stops)
    again = Fake(tmp_path, "--budget", "14", "--memory", "1000")
    again.run(CURVE)
    assert again.orders == 0 and again.rows == runner.rows


def test_forms_stop_at_the_memory(tmp_path: Path) -> None:
    runner = Fake(tmp_path, "--budget", "1e9", "--memory", "5")
    runner.run(CURVE)
    assert [r["x"] for r in runner.rows if r["kind"] == "point"] == [1, 2, 4]
    stops = [r for r in runner.rows if r["kind"] == "stop"]
    assert [r["x"] for r in stops] == [8, 8]
    assert all("8.0 GB, more than 5.0" in r["reason"] for r in stops)


def test_a_failed_process_ends_its_form_and_is_recorded(tmp_path: Path) -> None:
    runner = Fake(tmp_path, "--budget", "1e9", "--memory", "1000", fails=4)
    runner.run(CURVE)
    stops = [r for r in runner.rows if r["kind"] == "stop"]
    assert [(r["forms"], r["x"]) for r in stops] == [(["plain"], 4)]
    assert "not enough memory" in stops[0]["reason"]
    assert [r["x"] for r in runner.rows if r["kind"] == "point" and "d2v" in r["forms"]] == [1, 2, 4, 8, 16]


def test_a_process_that_runs_out_of_memory_says_so(tmp_path: Path) -> None:
    """The limit on a child's memory turns an allocation too many into an error of that child."""
    runner = Runner(growth.parse_options(["--memory", "0.3"]), tmp_path / "growth.jsonl")
    case = StepCase("vision-small", 64)
    with pytest.raises(ChildError, match="Error"):
        runner.ask_child({"kind": "memory", "x": 64, "case": case, "forms": ["plain"], "device": "cpu"})


# ---- arithmetic, table, plot


def test_predictions_and_exponents() -> None:
    assert growth.predict([], 4.0) is None
    assert growth.predict([(2.0, 3.0)], 4.0) == pytest.approx(6.0)
    assert growth.predict([(1.0, 9.0), (2.0, 4.0), (4.0, 16.0)], 8.0) == pytest.approx(64.0)
    assert growth.predict([(2.0, 4.0), (4.0, 1.0)], 8.0) == pytest.approx(1.0), "noise is not a falling cost"
    assert fit_exponent([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert fit_exponent([0, 4], [1, 2]) is None


def test_settings_of_a_case_reach_its_configuration() -> None:
    case = StepCase("vision-small", 1, settings=(("target.top_k", 3), ("mask.copies", 5)))
    config = make_config(case, "fp32")
    assert (config.target.top_k, config.mask.copies) == (3, 5)
    assert case.name == "vision-small B=1, target.top_k 3, mask.copies 5"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_point_has_a_configuration(device: str) -> None:
    curves = growth.curves_for(device, dry=False)
    names = {c.name for c in curves}
    assert {"batch", "length", "layers", "operator", "masks", "parameters", "workers"} <= names
    for curve in curves:
        for x in curve.xs:
            if curve.case is not None:
                make_config(curve.case(x), "fp32")


def test_an_unknown_curve_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"--only: expected names of curves, batch, .*got 'width'"):
        growth.main(["--only", "width"])
