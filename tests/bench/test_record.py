"""Files of rows: part of a benchmark run replaces what it measured again, and nothing else."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth, memory, operators, step
from benchmarks.growth import Curve, Runner
from benchmarks.harness.record import (
    RESULTS,
    ChildError,
    identity,
    keep_rows,
    measured_on,
    newest,
    read_rows,
    require_native,
    run_child,
    store,
    write_rows,
)
from benchmarks.speedrun import records
from benchmarks.training.cases import StepCase
from d2v_kernels import _native, use_backend

Row = dict[str, Any]
STORED = sorted(RESULTS.glob("*.jsonl"))


@pytest.mark.parametrize("file", STORED, ids=lambda path: path.stem)
def test_stored_rows_measure_different_things_and_are_written_as_they_were(file: Path, tmp_path: Path) -> None:
    rows = read_rows(file)
    assert len({(identity(row), measured_on(row)) for row in rows}) == len(rows) == len(newest(rows))
    copy = tmp_path / file.name
    copy.write_text(file.read_text())
    store(copy, rows[0])
    assert copy.read_text() == file.read_text()


def test_a_new_row_takes_the_place_of_the_one_that_measured_the_same(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    end = {"kind": "stop", "curve": "c", "x": 1, "forms": ["d2v"]}
    write_rows(file, [{"kind": "failure", "op": "a", "case": "x"}, end])
    store(file, {"kind": "measurement", "op": "a", "case": "x", "emulated": False}, {"op": "a", "case": "x"})
    store(file, {**end, "forms": ["plain"]})
    assert [(r.get("kind"), r.get("forms")) for r in read_rows(file)] == [
        ("measurement", None), ("stop", ["d2v"]), (None, None), ("stop", ["plain"])]  # fmt: skip
    assert keep_rows(file, "other") == [] == read_rows(file)


def test_a_row_of_another_machine_or_backend_stays_and_the_last_one_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"op": "a", "case": "x", "backend": "native", "machine": {"cpu": "A", "isa": "avx2", "date": "2026-11-01"}}
    other = {**row, "machine": {"cpu": "B", "isa": "avx2", "date": "2026-11-03"}}
    plain = {**row, "backend": "reference", "machine": {**row["machine"], "date": "2026-11-02"}}
    store(file, row, {"op": "b"}, other)
    store(file, plain)
    assert read_rows(file) == [row, {"op": "b"}, other, plain]
    assert newest(read_rows(file)) == [{"op": "b"}, other]
    store(file, again := {**row, "machine": {**row["machine"], "date": "2026-11-04"}})
    assert read_rows(file) == [again, {"op": "b"}, other, plain] and newest(read_rows(file))[0] == again
    points = [
        {**r, "curve": "c", "threads": 1, "device": "cpu", "x_given": x} for r, x in ((row, 1), (row, 2), (other, 1))
    ]
    assert newest(points) == points[2:]


MEASURE = ("check", "ema", "errors", "growth", "speedrun", "loader", "memory", "operators", "published", "step",
           "training.packed", "versus")  # fmt: skip


@pytest.mark.parametrize("module", MEASURE)
def test_without_the_native_library_nothing_is_measured(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(_native._errors, _native.CPU_LIBRARY, "not built: no compiler")
    monkeypatch.setattr(sys, "argv", [module, *(["digits"] if module == "speedrun" else [])])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{module}" + ".__main__" * (module == "speedrun")).main()
    assert end.value.code == 2
    assert f"benchmarks.{module}: expected the native library, got not built: no compiler" in capsys.readouterr().err
    with use_backend("reference"):
        require_native(module)


def test_part_of_the_operators_leaves_the_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "cpu.jsonl"
    output.write_text((RESULTS / "cpu.jsonl").read_text())
    before = read_rows(output)

    def ask(number: int, threads: int, processes: int) -> Row:
        op, name, dtype = operators.cpu_cases()[number].key
        (old,) = (r for r in before if (r["op"], r["case"], r["dtype"], r["threads"]) == (op, name, dtype, threads))
        return {**old, "bytes": 1}

    monkeypatch.setattr(operators, "ask_for_row", ask)
    monkeypatch.setattr(operators, "machine_record", lambda: before[-1]["machine"])
    operators.main(["--only", "block images", "--threads", "1", "--output", str(output)])
    after = read_rows(output)
    changed = [a for a, b in zip(after, before, strict=True) if a != b]
    assert [(r["op"], r["threads"], r["bytes"]) for r in changed] == [("MaskSampler", 1, 1)]


def test_part_of_the_steps_leaves_the_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "step-cpu.jsonl"
    output.write_text((RESULTS / "step-cpu.jsonl").read_text())
    before = read_rows(output)
    monkeypatch.setattr(step, "ask_for_memory", lambda case, order, **_: {})
    monkeypatch.setattr(step, "machine_record", lambda: before[0]["machine"])
    monkeypatch.setattr(step, "ask_for_row", lambda case, order: {
        **next(r for r in before if (r["case"], r["threads"]) == (case.name, order["threads"])), "flops": 0.0,
    })  # fmt: skip
    step.main(["--only", "text-tiny", "--most", "1", "--output", str(output)])
    changed = [a for a, b in zip(read_rows(output), before, strict=True) if a != b]
    name = "text-tiny B=16 x 64 tokens"
    assert [(r["case"], r["threads"], r["flops"]) for r in changed] == [(name, 1, 0.0), (name, 2, 0.0)]
    with pytest.raises(SystemExit, match="--only: expected part of a case's name"):
        step.main(["--only", "nothing", "--output", str(output)])


def test_part_of_the_memory_leaves_the_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "memory-cpu.jsonl"
    output.write_text((RESULTS / "memory-cpu.jsonl").read_text())
    monkeypatch.setattr(memory, "ask_for_memory", lambda *_, **__: {"plain": 4, "d2v": 2})
    monkeypatch.setattr(memory, "machine_record", lambda: read_rows(output)[0]["machine"])
    memory.main(["--only", "speech", "--output", str(output)])
    found = [(r["recipe"], r["ratio"] == 0.5) for r in read_rows(output)]
    assert found == [("vision-base", False), ("speech-base", True)]


class Fake(Runner):
    """A runner whose processes need no time, and fail from a place on."""

    fails = 8.0

    def ask_child(self, order: Row) -> Row:
        if order["x"] >= self.fails:
            raise ChildError("stopped after 1 s")
        if order["kind"] == "memory":
            return {"bytes": 1}
        return {"case": "fake", "rows": 1, "parameters": 1, "forms": {f: {"minimum": 0.1} for f in order["forms"]}}


def test_part_of_the_growth_leaves_the_other_curves(tmp_path: Path) -> None:
    """Points of other sources go where the curve has come again; what it has not reached stays."""
    output = tmp_path / "growth-cpu.jsonl"
    output.write_text((RESULTS / "growth-cpu.jsonl").read_text())
    before = read_rows(output)
    options: argparse.Namespace = growth.parse_options([])
    runner = Fake(options, output)
    runner.machine = before[0]["machine"]
    runner.run(Curve("length", "seconds", (5, 7.5, 10), case=lambda x: StepCase("speech-small", 1, x)))
    after = read_rows(output)
    assert [r for r in after if r["curve"] != "length"] == [r for r in before if r["curve"] != "length"]
    own = [(r["kind"], r["x"], r.get("case") == "fake") for r in after if r["curve"] == "length"]
    assert own == [
        ("point", 10, False),
        ("point", 5, True),
        ("point", 7.5, True),
        ("stop", 10, False),
        ("stop", 10, False),
    ]


def test_some_methods_leave_the_other_rows_of_a_table(tmp_path: Path) -> None:
    file = tmp_path / "speedrun-digits.json"
    file.write_text((RESULTS / "speedrun-digits.json").read_text())
    before = json.loads(file.read_text())["rows"]
    scores = {"scratch": {"linear_probe": 0.5, "knn": 0.5, "few_label": 0.5}}
    result = {"method": "scratch", "rate": 1.0, "scores": scores, "cpu_seconds": 1.0}
    records.store("digits", [result], tmp_path)
    after = json.loads(file.read_text())["rows"]
    assert [a["name"] for a, b in zip(after, before, strict=True) if a != b] == ["scratch"]


def test_a_child_gives_its_output_and_its_status() -> None:
    status, output = run_child(["sh", "-c", "echo out; echo err >&2; exit 3"], None, {"PATH": "/usr/bin:/bin"})
    assert (status, output) == (3, "out\nerr\n")
