"""The program behind `make gpu`, run without a GPU: records, resuming, what it says of missing pieces, its report."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import operators, step, summary
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import emulator, stages
from benchmarks.harness import plots, record, report
from benchmarks.training.cases import DRY, GPU
from d2v_kernels import _env
from d2v_kernels.bench.measure import difference

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(_env.triton_interpreter(), reason="of a process without the interpreter")


def program(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    environment = {**os.environ, **({} if module == "gpu" else {"TRITON_INTERPRET": "1"})}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_dry_run_writes_records_and_resumes(tmp_path) -> None:
    arguments = [
        "--dry",
        "--output",
        str(tmp_path),
        "--records",
        str(tmp_path / "kept"),
        "--stages",
        "tests",
        "benchmarks",
        "report",
        "--only",
        "gather_tokens",
    ]
    first = program("gpu", *arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    records = record.read_rows(tmp_path / "gpu-dry.jsonl")
    assert [r["stage"] for r in records if r["kind"] == "stage"] == ["tests", "benchmarks", "report"]
    for r in records:
        assert r["emulated"] is True
        assert r["key"] == records[0]["key"]
        for name in ("date", "commit", "torch", "triton", "gpu", "gpu_state", "build", "sources"):
            assert name in r["machine"]
    stage = records[0]
    assert stage["status"] == "done"
    assert stage["counts"]["passed"] >= 10
    assert stage["counts"]["failed"] == 0
    assert any("needs a GPU" in reason for reason in stage["skip_reasons"])
    rows = [r for r in records if r["kind"] == "measurement"]
    assert {r["op"] for r in rows} == {"gather_tokens", "gather_tokens_backward"}
    for r in rows:
        assert {"d2v triton", "eager"} <= set(r["seconds"])
        assert r["bytes"] > 0
        assert r["chosen"] in ("d2v native", "d2v triton")
        assert r["ratios"]["eager"] > 0
        assert r["host_seconds"]["d2v triton"] > 0
    results = [path for path in tmp_path.iterdir() if path.is_file()]
    assert 3 <= len(results) <= 6
    for path in results:
        path.unlink()  # as a machine does that empties its output folder between two commands
    assert first.stdout.count("begins, at most ") == 3
    words = (tmp_path / "kept" / "gpu-dry" / "gpu-dry.md").read_text()
    assert "no measurement" in words
    assert " | ".join(report.COLUMNS["measurement"]) not in words
    again = program("gpu", *arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done by an earlier run") == 2
    later = record.read_rows(tmp_path / "gpu-dry.jsonl")
    assert [r for r in later if r["kind"] == "measurement"] == rows


def test_a_run_that_was_cut_off_goes_on(tmp_path) -> None:
    """Cases that have a row are not timed again; without the emulated library the row says why ours is missing."""
    path = tmp_path / "rows.jsonl"
    arguments = ["--output", str(path), "--key", "k", "--emulated", "-", "--only"]
    assert program("operators", *arguments, "gather_tokens tiny").returncode == 0
    before = record.read_rows(path)
    (row,) = (r for r in before if r["kind"] == "measurement")
    assert row["not_run"]["d2v native"] == "the CUDA sources are not built for the CPU"
    assert row["chosen"] == "d2v triton"
    path.write_text(path.read_text() + '{"kind": "measurement", "op": "cut o')
    assert record.keep_rows(path, "k") == before
    assert record.keep_rows(path, "k") == before
    done = program("operators", *arguments, "gather_tokens")
    assert "gather_tokens_backward" in done.stdout
    assert "measurement  gather_tokens tiny" not in done.stdout
    used_up = program("operators", *arguments, "restore", "--budget", "0")
    assert used_up.returncode == 3
    assert "1 of 1 cases left" in used_up.stdout
    assert record.keep_rows(path, "other") == []


STAGES = """
import sys
from benchmarks.gpu import __main__ as gpu, stages
from benchmarks.harness.record import run_child, store

CHILD = '''
import subprocess, sys
name, hang, folder = sys.argv[1:]
print(name, file=open(f"{folder}/ran", "a"))
if name == hang:
    subprocess.run(["sh", "-c", "while true; do echo >> beats; sleep 0.05; done"], cwd=folder)
'''
folder, hang, *arguments = sys.argv[1:]

def make(stage):
    def work(run, limit_s):
        for case in ("one", "two", "three"):
            if case not in run.finished(stage):
                command = [sys.executable, "-c", CHILD, f"{stage} {case}", hang, folder]
                status, output = run_child(command, limit_s, run.environment())
                assert status == 0, output
                store(run.records, {"kind": stage, "case": case, "key": run.key})
        return {"status": "done"}
    return work

for name in gpu.BUDGETS:
    setattr(stages, name, make(name))
gpu.main(["--dry", "--output", folder, "--records", folder, *arguments])
"""


def test_a_run_that_is_killed_goes_on_with_its_next_case(tmp_path: Path) -> None:
    """Three commands, two of them killed in the middle of a stage: every case runs to its end once."""
    environment, beats = {**os.environ, "PYTHONPATH": str(ROOT)}, tmp_path / "beats"

    def start(hang: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", STAGES, str(tmp_path), hang]
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                                start_new_session=True)  # fmt: skip

    for hang in ("tests two", "benchmarks three"):
        first, deadline = start(hang), time.monotonic() + 60
        while not beats.exists():
            assert first.poll() is None and time.monotonic() < deadline, "it never got to the case"
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        time.sleep(0.3)
        count = beats.stat().st_size
        time.sleep(0.3)
        assert beats.stat().st_size == count, "a child outlived the command and would write to the next one's records"
        beats.unlink()
        (path,) = tmp_path.glob("*/*.jsonl")
        key = record.read_rows(path)[0]["key"]
        with path.open("a") as rows:  # a record that was cut off
            rows.write(json.dumps({"kind": "stage", "stage": "sanitizer", "status": "done", "key": key})[:-8])
    last = start("")
    words, _ = last.communicate(timeout=60)
    assert last.returncode == 0, words
    begun = (tmp_path / "ran").read_text().splitlines()
    cases = [f"{stage} {case}" for stage in gpu.BUDGETS for case in ("one", "two", "three")]
    twice = [case for case in cases if begun.count(case) == 2]
    assert sorted(set(begun)) == sorted(cases) and twice == ["tests two", "benchmarks three"]
    assert len(begun) == len(cases) + 2
    assert words.count("done by an earlier run") == list(gpu.BUDGETS).index("benchmarks")
    stored = record.read_rows(tmp_path / "gpu-dry.jsonl")
    assert {r["stage"]: r["status"] for r in stored if r["kind"] == "stage"} == dict.fromkeys(gpu.BUDGETS, "done")


@pytest.mark.parametrize("emulated", [False, True])
def test_wrong_cases_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, emulated: bool) -> None:
    monkeypatch.setattr(stages, "run_child", lambda *_: (0, ""))
    run = stages.Run(tmp_path, tmp_path, "gpu", "k", emulated)
    record.store(run.records, row(key="k"), row(key="k", case="d", not_run={"eager": "differs from float64"}))
    assert stages.benchmarks(run, 10.0) == {"status": "done", "failed": []}
    wrong = row(key="k", case="e", not_run={"d2v triton": "differs from float64 by 0.66 of the maximum"})
    failure = {"kind": "failure", "op": "gelu", "case": "f", "dtype": "float32", "key": "k", "reason": "r"}
    record.store(run.records, wrong, failure)
    found = stages.benchmarks(run, 10.0)
    assert found["failed"] == ["average_layers e", "gelu f"]
    assert found["status"] == ("failed" if emulated else "done")


def test_a_case_that_ends_its_process_comes_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a fault does that no handler sees; the next command measures the other cases before it tries again."""
    begun: list[str] = []
    fatal: set[str] = set()

    def measure(case, *_):
        begun.append(case.op)
        if case.op in fatal:
            raise KeyboardInterrupt
        op, name, dtype = case.key
        return {"kind": "measurement", "op": op, "case": name, "dtype": dtype}

    monkeypatch.setattr(operators, "measure_on_gpu", measure)
    monkeypatch.setattr(operators, "copy_rates", lambda *_: {1: 1.0})
    monkeypatch.setattr(emulator, "install", lambda _: None)  # would stay for the tests after this one
    path = tmp_path / "rows.jsonl"
    command = ["--device", "cuda", "--output", str(path), "--key", "k", "--emulated", "-", "--only", "tokens"]
    first, second, third = (c.op for c in operators.tiny_cases() if "tokens" in c.op)
    for broken, expected in ((second, [first, second]), (third, [third]), ("", [second, third])):
        fatal = {broken}
        begun.clear()
        with contextlib.suppress(KeyboardInterrupt):
            operators.main(command)
        assert begun == expected
        failures = {r["op"]: r["reason"] for r in record.read_rows(path) if r["kind"] == "failure"}
        assert broken in failures or not broken
    assert not failures


def test_cases_of_both_kinds_of_rivals_run(tmp_path: Path) -> None:
    """Attention, of which one backend is asked for by name, and PyTorch's two ways to convolve a sequence."""
    path, arguments = tmp_path / "rows.jsonl", ["--key", "k", "--emulated", "-", "--only"]
    for name in ("2 heads of 16", "tiny 2 x 9, 32 -> 32, 4 groups, K=3"):
        assert program("operators", "--output", str(path), *arguments, name).returncode == 0
    rows = [r for r in record.read_rows(path) if r["kind"] != "copy"]
    assert [r["kind"] for r in rows] == ["measurement"] * 4, [r.get("reason") for r in rows]
    assert all({"d2v triton", "eager"} <= set(r["seconds"]) for r in rows), "none differs from float64"
    assert "eager, a grid of one row" in rows[3]["seconds"] and "eager, a grid of one row" not in rows[2]["seconds"]


def test_missing_pieces_are_named(monkeypatch, tmp_path) -> None:
    find = gpu.importlib.util.find_spec
    absent = {"triton", "pytest", "matplotlib"}
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    missing = gpu.find_missing()
    assert absent <= set(missing)
    assert missing["nvcc"] == "the CUDA operators"
    run = stages.Run(tmp_path, tmp_path, "gpu", "k", False, missing=missing)
    assert stages.tests(run, 10.0) == {"status": "skipped", "reason": "pytest is not installed"}
    monkeypatch.setattr(stages.shutil, "which", lambda name, path=None: None)
    assert stages.sanitizer(run, 10.0)["status"] == "skipped"
    assert run.missing["compute-sanitizer"] == "the sanitizer stage"
    absent.add("torch")
    with pytest.raises(SystemExit, match="has no torch or no numpy; choose another with PYTHON="):
        gpu.find_missing()


def test_without_a_gpu_it_says_so(tmp_path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = program("gpu", "--output", str(tmp_path), "--records", str(tmp_path))
    assert done.returncode == 1
    assert "sees no NVIDIA GPU (`make gpu-dry` needs none)" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_child_is_stopped_at_its_limit() -> None:
    begin = time.monotonic()
    code = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    status, output = record.run_child([sys.executable, "-c", code], 1.5, {"PATH": "/usr/bin:/bin"})
    assert status is None
    assert "begun" in output
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("emulated", [False, True])
def test_step_takes_the_command_of_its_stage(monkeypatch, tmp_path, emulated: bool) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(stages, "run_child", lambda command, *_: (asked.append(command) or 0, ""))
    run = stages.Run(tmp_path, tmp_path, "gpu", "k", emulated)
    cases = DRY if emulated else GPU[:3]
    assert [case.recipe for case in GPU[:3]] == ["vision-base", "speech-base", "text-base"]
    record.store(run.records, {"kind": "step", "case": cases[0].name, "key": "k"})
    assert stages.steps(run, 10.0) == {"status": "done", "measured": len(cases) - 1}
    assert len(asked) == len(cases) - 1, "what an earlier command measured is not measured again"
    options = step.parse_options(asked[0][3:])
    assert (options.dry, options.only, options.forms) == (emulated, cases[1].name, ["plain", "d2v"])


def test_a_step_that_fails_does_not_keep_the_others_from_their_turn(monkeypatch, tmp_path) -> None:
    asked: list[str] = []
    bad = GPU[0].name

    def run_child(command, *_):
        asked.append(next(part.removeprefix("--only=") for part in command if part.startswith("--only=")))
        if asked[-1] == bad:
            return -11, "Segmentation fault"
        path = Path(command[command.index("--output") + 1])
        record.store(path, {"kind": "step", "case": asked[-1]})
        return 0, ""

    monkeypatch.setattr(stages, "run_child", run_child)
    run = stages.Run(tmp_path, tmp_path, "gpu", "k", False)
    found = stages.steps(run, 10.0)
    assert asked == [c.name for c in GPU[:3]]
    assert (found["status"], found["failed"], found["measured"]) == ("failed", [bad], 2)
    assert found["output"] == {bad: ["exit status -11", "Segmentation fault"]}
    assert run.finished("step") == {c.name for c in GPU[1:3]}
    record.store(run.records, {"kind": "begun step", "case": GPU[1].name, "key": "other"})
    bad = ""
    assert stages.steps(run, 10.0) == {"status": "done", "measured": 1}
    path = tmp_path / "gpu.jsonl"
    record.write_rows(path, [{"kind": "begun step", "case": GPU[0].name, "key": "k"}])
    asked.clear()
    stages.steps(run, 10.0)
    assert asked == [GPU[1].name, GPU[2].name, GPU[0].name], "what an earlier command did not survive comes last"


def test_tests_that_passed_are_not_run_again(monkeypatch, tmp_path) -> None:
    asked: list[str] = []

    def run_child(command, *_):
        asked.append(next(part for part in command if part.startswith("tests/")))
        return (None if "test_attention" in asked[-1] else 0), "== 2 passed in 1s =="

    monkeypatch.setattr(stages, "run_child", run_child)
    run = stages.Run(tmp_path, tmp_path, "gpu", "k", False)
    first = stages.tests(run, 10.0)
    assert first["status"] == "timed out"
    record.store(run.records, {"kind": "stage", "stage": "tests", "key": "k", **first})
    number = len(asked)
    again = stages.tests(run, 10.0)
    assert [Path(name).name for name in asked[number:]] == ["test_attention.py"]
    assert sorted(again["passed"]) == sorted(first["passed"])


def test_tests_are_counted_even_where_they_were_stopped() -> None:
    begun = "tests/gpu/test_a.py::test_x[1-a b] PASSED [ 10%]\ntests/gpu/test_a.py::test_y FAILED [ 20%]\ntests/gpu/tes"
    assert stages._count_tests(begun, finished=False) == {"passed": 1, "failed": 1}
    closing = "x\n===== 1 failed, 12 passed, 3 skipped, 1 warning in 2.00s ====="
    assert stages._count_tests(closing, finished=True) == {"failed": 1, "passed": 12, "skipped": 3}


RACE = "========= Error: Race reported between Write access"
HAZARDS = "========= RACECHECK SUMMARY: 2 hazards displayed\n"


@pytest.mark.parametrize(
    ("status", "output", "word", "reason"),
    [
        (0, "ran native gather_tokens\n========= ERROR SUMMARY: 0 errors\n", "done", None),
        (99, "ran native gather_tokens\n========= ERROR SUMMARY: 3 errors\n", "failed", "3 errors"),
        (99, "ran a b\n========= RACECHECK SUMMARY: 2 hazards displayed\n", "failed", "2 errors"),
        (99, f"ran a b\n{RACE} at row_kernel+0x1\n{RACE} at average_bulk_kernel+0x1\n{HAZARDS}", "failed", "2 errors"),
        (99, f"ran a b\n{RACE} at void average_bulk_kernel<1>(int)+0x1 in layers_bulk.cuh:9\n{HAZARDS}", "done", None),
        (1, "========= Error: Device not supported. Please refer\n", "skipped", "Error: Device not supported"),
        (None, "ran native gather_tokens\n", "timed out", "stopped after 1 operators"),
    ],
)
def test_what_a_sanitizer_says(status, output, word, reason) -> None:
    got = stages._sanitizer_outcome(status, output)
    assert got["status"] == word
    assert got.get("reason", "").startswith(reason or "")
    assert ("reason" in got) == (reason is not None)
    assert len(got.get("doubtful", ())) == (word == "done" and "Race" in output), "racecheck's blind spot is kept apart"


def row(**changes) -> dict:
    base = {
        "kind": "measurement",
        "op": "average_layers",
        "case": "c",
        "dtype": "bfloat16",
        "bytes": 430_000_000,
        "flops": 0,
        "seconds": {"d2v native": {"median": 1.05e-4}, "eager": {"median": 2.1e-3}},
        "host_seconds": {"d2v native": 9e-6},
        "not_run": {"compile": "too slow"},
        "chosen": "d2v native",
        "ceiling_bytes_per_second": 4.3e12,
        "goals": {"eager": 10.0, "compile": 2.0, "ceiling": 0.9},
        "ratios": {"eager": 20.0},
        "share_of_ceiling": 0.952,
        "emulated": False,
        "machine": {"gpu": "G", "torch": "2", "date": "2026-01-01"},
    }
    return {**base, **changes}


def test_goals() -> None:
    assert report.missed_goals(row()) == ["compile not measured"]
    assert report.missed_goals(row(share_of_ceiling=0.5, goals={"ceiling": 0.9})) == ["50% of the copy rate < 90%"]
    assert report.missed_goals(row(goals={"eager": 30.0})) == ["20.00x eager < 30"]
    assert report.missed_goals(row(goals={}, host_seconds={"d2v native": 2e-5})) == ["host 20.0 us > 10"]
    short = row(
        bytes=43_000_000, seconds={"d2v native": {"median": 1.3e-5}}, share_of_ceiling=0.77, goals={"ceiling": 0.9}
    )
    assert report.missed_goals(short) == []
    short["seconds"]["d2v native"]["median"] = 1.5e-5
    assert report.missed_goals(short) == ["15.0 us > floor 10.0 + 4"]


def test_emulated_records_are_never_measurements(tmp_path, capsys) -> None:
    fake = row(emulated=True, case="emulated case")
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (row(), fake)))
    summary.main(["--files", str(path), str(ROOT / "benchmarks/results/cpu.jsonl"), "--markdown"])
    out = capsys.readouterr()
    assert out.out.count("| `average_layers` | c |") == 1
    assert "105.0" in out.out
    assert "MaskSampler" in out.out  # the CPU run's own table
    assert "emulated case" not in out.out
    assert "left out: 1 emulated records" in out.err
    assert "emulated case" not in report.table(report.measurements([row(), fake]))
    assert "no measurement" in report.document([fake])
    plots.roofline([row(), fake], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_contenders_are_compared_first() -> None:
    x = torch.tensor([1.0, -4.0])
    assert difference([x], [x + torch.tensor([0.0, 0.4])]) == pytest.approx(0.4 / 3.6)
    assert difference([x], [x[:1]]) == math.inf
    assert difference([x * math.nan], [x]) == math.inf


def test_cases_have_names_of_their_own() -> None:
    for cases in (operators.gpu_cases(), operators.tiny_cases()):
        names = [(c.op, c.name, c.dtype) for c in cases]
        assert len(set(names)) == len(names)
        assert all(c.bytes > 0 for c in cases)
    assert {c.registered for c in operators.tiny_cases()} == {c.registered for c in operators.gpu_cases()}
