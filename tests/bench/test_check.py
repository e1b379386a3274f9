"""`make bench-check` on training steps, and the closing table of `make bench`."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import check, growth, step, summary
from benchmarks.harness import report
from benchmarks.harness.record import RESULTS

Row = dict[str, Any]
CASE = "vision-tiny B=16"


def step_row(case: str = CASE, faster: float = 1.2, memory: float = 0.9, **values: Any) -> Row:
    """What `benchmarks.step` writes."""
    phases = {"forward": 0.4, "backward": 0.3, "optimiser": 0.2, "ema": 0.1}
    plain = {"minimum": faster, "median": faster, "phases": phases, "products": 1.0, "outside": 1.0, "memory": 1e9}
    ours = {**copy.deepcopy(plain), "minimum": 1.0, "memory": memory * 1e9}
    machine = {"cpu": "A processor", "cores": 2, "isa": "avx2", "gpu": None, "python": "3.11.7", "torch": "2.13.0",
               "commit": "abc1234", "date": "2026-11-22T00:00:00+00:00"}  # fmt: skip
    return {
        "kind": "step", "case": case, "recipe": case.split()[0], "device": "cpu", "threads": 1, "samples": 16,
        "modality": "vision", "forms": {"plain": plain, "d2v": ours}, "machine": machine, **values,
    }  # fmt: skip


def store(path: Path, *rows: Row) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check_steps(path: Path, allow: float, answers: list[check.Ratios]) -> tuple[list[str], list[str]]:
    """Problems, and the cases that were measured."""
    asked: list[str] = []

    def measure(case: str) -> check.Ratios:
        asked.append(case)
        return answers[len(asked) - 1]

    return check.check_steps(path, "", allow, measure), asked


def test_ratios_of_a_step() -> None:
    assert check.step_ratios(step_row()) == pytest.approx({"plain time": 1.2, "plain memory": 1 / 0.9})


def test_a_step_that_is_slower_in_every_attempt_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store(tmp_path / "step.jsonl", step_row())
    slow, good = {"plain time": 0.7, "plain memory": 1.1}, {"plain time": 0.8, "plain memory": 1.1}
    problems, asked = check_steps(path, 0.65, [slow] * 3)
    assert problems == ["plain time: stored 1.20, got 0.70"]
    assert asked == [CASE] * 3
    problems, asked = check_steps(path, 0.65, [slow, good])
    assert problems == [] and asked == [CASE] * 2
    heavy = {"plain time": 1.2, "plain memory": 0.5}
    assert check_steps(path, 0.65, [heavy] * 3)[0] == ["plain memory: stored 1.11, got 0.50"]
    assert check_steps(path, 0.4, [heavy])[0] == []
    out = capsys.readouterr().out
    assert "worse  step vision-tiny B=16  plain time" in out and "ok     step" in out


def test_only_tiny_recipes_of_one_thread_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [step_row("vision-small B=8"), step_row(threads=2), step_row("vision-tiny B=3")]
    assert check_steps(store(tmp_path / "step.jsonl", *rows), 0.65, []) == ([], [])
    out = capsys.readouterr().out
    assert "gone   step vision-tiny B=3" in out
    assert "has no tiny recipe with one thread" in out


def test_without_stored_steps_there_is_a_line_and_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = store(tmp_path / "cpu.jsonl")
    check.main(["--stored", str(empty), "--steps", str(tmp_path / "none.jsonl")])
    out = capsys.readouterr().out
    assert "none.jsonl" in out and "python -m benchmarks.step" in out


def test_a_real_step_against_fabricated_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against impossible ratios a real measurement fails, and the exit code says so."""
    kernels, path = store(tmp_path / "cpu.jsonl"), store(tmp_path / "step.jsonl", step_row(faster=1e3, memory=1e-3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "ATTEMPTS", 1)
        with pytest.raises(SystemExit, match=r"2 ratios fell below 0\.65"):
            check.main(["--stored", str(kernels), "--steps", str(path)])
    got = [float(text) for text in re.findall(r"got (\S+)", capsys.readouterr().out.replace(";", " "))]
    assert len(got) == 2 and all(0.3 < ratio < 30.0 for ratio in got)


# ---- the closing table


def test_the_summary_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary.main(["--results", str(tmp_path)])
    out = capsys.readouterr().out
    for file, module in (("cpu", "operators"), ("step-cpu", "step"), ("growth-cpu", "growth")):
        assert f"no {tmp_path / file}.jsonl; `python -m benchmarks.{module}` makes it" in out
    assert "cuda" not in out
    assert list(tmp_path.iterdir()) == []


def test_the_summary_shows_everything_with_its_origin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cpu.jsonl").write_text((RESULTS / "cpu.jsonl").read_text())
    store(tmp_path / "step-cpu.jsonl", step_row(), step_row("speech-tiny B=32 x 0.6 s", faster=0.95))
    origin = step_row()["machine"]
    points = [
        {"kind": "point", "curve": "batch", "label": "samples B", "x": x, "case": "c", "rows": x, "device": "cpu",
         "threads": 1, "dry": False, "machine": origin,
         "forms": {"plain": {"minimum": 0.2 * x, "memory": 2e8}, "d2v": {"minimum": 0.1 * x, "memory": 1e8}}}
        for x in (2, 4)
    ]  # fmt: skip
    store(tmp_path / "growth-cpu.jsonl", *points, {**points[0], "dry": True, "curve": "rehearsal"})
    summary.main(["--results", str(tmp_path)])
    out = capsys.readouterr().out
    for line in out.splitlines():
        if line.startswith("| `average_layers`"):
            assert " of " in line and "x |" in line
    assert "| vision-tiny B=16 | 1 | 16.0 | 1.20x |" in out
    assert "- batch      1 thread(s): samples B 2 to 4; plain time ~ x^1.00; d2v time ~ x^1.00" in out
    assert "plain/d2v 2.00 to 2.00" in out
    assert "rehearsal" not in out
    assert out.count("A processor (2 cores), ISA avx2, python 3.11.7, torch 2.13.0, commit abc1234, 2026-11-22") == 2
    for module in ("operators", "step", "growth"):
        assert f"by `python -m benchmarks.{module}`" in out
    assert {p.name for p in tmp_path.glob("*.png")} == {"cpu.png", "step-cpu.png", "growth-cpu.png"}


def test_the_dry_forms_have_the_stored_format() -> None:
    """The rows fabricated here have the keys that the program writes."""
    assert {"case", "recipe", "threads", "forms", "machine", "samples", "modality"} <= set(step_row())
    assert report.missed_goals(step_row()) != []
    assert any(c.name == CASE for c in step.cases_for("cpu", dry=False))
    assert {c.name for c in growth.curves_for("cpu", dry=True)} == {"batch", "operator", "processes"}
