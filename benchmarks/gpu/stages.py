"""The stages of `benchmarks.gpu`. Each runs in processes of its own, under a time limit, and returns what to record."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..harness import plots
from ..harness import report as reports
from ..harness.record import CUDA_BIN, ROOT, read_rows, run_child, store
from ..training.cases import DRY, GPU
from . import emulator

TESTS = ROOT / "tests" / "gpu"
KEPT = ROOT / "build" / "gpu-records"
Outcome = dict[str, Any]


@dataclass
class Run:
    """Where results go, and how children run."""

    folder: Path
    """Kept from one command to the next."""
    output: Path
    """Gets a copy of every file after each stage."""
    stem: str
    key: str
    emulated: bool
    only: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    """What this machine lacks -> what is therefore left out."""

    @property
    def records(self) -> Path:
        return self.folder / f"{self.stem}.jsonl"

    def deliver(self) -> None:
        """Copies what there is to the output folder."""
        for path in self.folder.glob(f"{self.stem}*"):
            shutil.copyfile(path, self.output / path.name)

    def finished(self, kind: str) -> set[str]:
        """Cases of a kind that this command, or an earlier one of the same run, has a row of."""
        return {r["case"] for r in read_rows(self.records) if r.get("kind") == kind and r.get("key") == self.key}

    def log(self, name: str) -> Path:
        return self.folder / f"{self.stem}-{name}.log"

    @property
    def emulation(self) -> list[str]:
        """Arguments for children that need to know."""
        if not self.emulated:
            return []
        return ["--emulated", str(emulator.LIBRARY) if emulator.is_current() else "-"]

    def environment(self, **more: str) -> dict[str, str]:
        """The caller's, with this Python's and CUDA's tools on PATH; without a GPU one thread and the interpreter."""
        path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent), CUDA_BIN])
        own = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if self.emulated else {}
        return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **own, **more}


def outcome(status: int | None, **details: Any) -> Outcome:
    """done, failed or timed out, with details."""
    word = {0: "done", None: "timed out"}.get(status, "failed")
    return {"status": word, **({} if status == 0 else {"reason": f"exit status {status}"}), **details}


# ---- build


def build(run: Run, limit_s: float) -> Outcome:
    """The native libraries in place, for this GPU alone; or the CUDA sources for the CPU."""
    begin, output, status = time.monotonic(), "", 0
    for command in emulator.build_commands() if run.emulated else _build_commands():
        status, text = run_child(command, limit_s - (time.monotonic() - begin), run.environment())
        output += text
        if status != 0:
            break
    run.log("build").write_text(output)
    if run.emulated:
        if status != 0:
            reason = (output.strip().splitlines() or ["no output"])[-1][:300]
            run.missing[f"the CUDA sources compiled for the CPU ({reason})"] = "the emulated native operators"
        return outcome(status, library=emulator.LIBRARY.name)
    record = ROOT / "d2v_kernels" / "lib" / "build.json"
    details: Outcome = {"build": json.loads(record.read_text()) if record.exists() else {}}
    reasons = list(details["build"].get("missing", []))
    left = limit_s - (time.monotonic() - begin)
    code, text = run_child([sys.executable, "-m", "d2v_kernels.info", "--json"], min(60.0, left), run.environment())
    if code == 0:
        details["info"], _ = json.JSONDecoder().raw_decode(text[text.index("{\n") :])
        reasons += [f"{name}: {reason}" for name, reason in details["info"]["not_loaded"].items()]
    else:
        run.log("build").write_text(output + "\n" + text)
    run.missing |= dict.fromkeys(reasons, "the native operators")
    return outcome(status or code, **details)


def _build_commands() -> list[list[str]]:
    """CMake itself, as setup.py calls it: a GPU machine's setuptools may be too old for this project's metadata."""
    major, minor = torch.cuda.get_device_capability(0)
    folder, lib = ROOT / "build" / "gpu", ROOT / "d2v_kernels" / "lib"
    ninja = shutil.which("ninja") or shutil.which("ninja", path=Path(sys.executable).parent)
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release",
               f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}-real"]  # fmt: skip
    if ninja:
        options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    return [*emulator.cmake(folder, *options), ["cmake", "--install", str(folder), "--prefix", str(lib)]]


# ---- tests


def tests(run: Run, limit_s: float) -> Outcome:
    """Correctness against float64, streams, no host waits, large tensors, torch.compile, a golden training step."""
    if "pytest" in run.missing:
        return {"status": "skipped", "reason": "pytest is not installed"}
    passed = run.finished("tests")
    if not passed:
        run.log("tests").unlink(missing_ok=True)
    files = [p for p in sorted(TESTS.glob("test_*.py")) if p.name not in ("test_graphs.py", "test_program.py", *passed)]
    return {**_run_tests(run, files, limit_s, "tests"), "passed": sorted(run.finished("tests"))}


def graphs(run: Run, limit_s: float) -> Outcome:
    """Every operator captured in a CUDA graph and replayed."""
    if "pytest" in run.missing:
        return {"status": "skipped", "reason": "pytest is not installed"}
    return _run_tests(run, [TESTS / "test_graphs.py"], limit_s, "graphs")


def _run_tests(run: Run, files: list[Path], limit_s: float, title: str) -> Outcome:
    deadline, lock = time.monotonic() + limit_s, threading.Lock()

    def together(paths: list[Path]) -> tuple[str, int | None, str]:
        names = [str(p.relative_to(ROOT)) for p in paths]
        # The folder's own configuration only: that of all tests wants packages that a GPU machine may lack.
        command = [sys.executable, "-m", "pytest", *names, f"--confcutdir={TESTS.relative_to(ROOT)}", "-m", "gpu", "-v",
                   "--tb=short", "-p", "no:cacheprovider", "--durations=5", *run.emulation]  # fmt: skip
        if run.only:
            command += ["-k", run.only]
        status, output = run_child(command, deadline - time.monotonic(), run.environment())
        with lock, run.log("tests").open("a") as log:  # at once: this command may be stopped before the other files end
            log.write(f"==== {title}: {' '.join(names)}\n{output}\n")
            if status == 0 and not run.only:
                store(run.records, {"kind": title, "case": paths[0].name, "key": run.key})
        return " ".join(names), status, output

    with ThreadPoolExecutor(2 if run.emulated else 4) as pool:
        # Files side by side, for most of the time goes into compiling kernels; a few tests are not worth it.
        done = list(pool.map(together, [files] if run.only else [[f] for f in files]))
    counts, statuses = {"passed": 0, "failed": 0, "skipped": 0, "error": 0}, []
    for _, status, output in done:
        statuses.append(0 if status == 5 else status)  # 5: no test of this file was asked for
        for word, number in _count_tests(output, finished=status is not None).items():
            counts[word] += number
    reasons = sorted({r for _, _, text in done for r in re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", text, re.M)})
    failed = [name for _, _, text in done for name in re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)]
    worst = None if None in statuses else max(statuses, default=0)
    unfinished = [names for names, status, _ in done if status is None]
    return outcome(worst, counts=counts, failed=failed, skip_reasons=reasons, unfinished=unfinished)


def _count_tests(output: str, finished: bool) -> dict[str, int]:
    """By pytest's closing line; where it was stopped, by the lines of the tests that it got to."""
    if finished:
        last = (output.strip().splitlines() or [""])[-1]
        return {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    words = re.findall(r"^\S+::.* (PASSED|FAILED|SKIPPED|ERROR)", output, re.M)
    return {word.lower(): words.count(word) for word in set(words)}


# ---- sanitizer


def sanitizer(run: Run, limit_s: float) -> Outcome:
    """compute-sanitizer's memcheck and racecheck over one small call of every operator."""
    small = [sys.executable, "-m", "benchmarks.gpu.small", *run.emulation]
    if run.emulated:
        status, output = run_child(small, limit_s, run.environment())
        run.log("sanitizer").write_text(output)
        return outcome(status, tools={}, ran=_ran(output), note="small calls without a sanitizer: no GPU")
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=CUDA_BIN)
    if tool is None:
        run.missing["compute-sanitizer"] = "the sanitizer stage"
        return {"status": "skipped", "reason": "no compute-sanitizer on PATH"}
    results: dict[str, Outcome] = {}
    with run.log("sanitizer").open("w") as log:
        deadline = time.monotonic() + limit_s
        for number, kind in enumerate(("memcheck", "racecheck")):
            # PyTorch asks CUDA things that it may refuse: those answers are no errors of a kernel.
            quiet = ["--report-api-errors", "no"] if kind == "memcheck" else []
            command = [tool, "--tool", kind, *quiet, "--error-exitcode", "99", "--print-limit", "20", *small]
            share = (deadline - time.monotonic()) / (2 - number)
            # Every tensor an allocation of its own, so that an access beyond its end is one beyond an allocation.
            environment = run.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            status, output = run_child(command, share, environment)
            log.write(f"==== {kind}\n{output}\n")
            results[kind] = _sanitizer_outcome(status, output)
    words = [r["status"] for r in results.values()]
    worst = next((w for w in ("failed", "timed out", "skipped") if w in words), "done")
    reasons = "; ".join(f"{k}: {r['reason']}" for k, r in results.items() if "reason" in r)
    return {"status": worst, "tools": results, **({"reason": reasons} if reasons else {})}


def _ran(output: str) -> list[str]:
    return re.findall(r"^ran (.*)$", output, re.M)


ASYNCHRONOUS = "average_bulk_kernel"
"""racecheck knows neither bulk copies nor other blocks' shared memory: what it says of this kernel is kept apart, to be
held against the thread sanitizer's runs of the same source on a CPU."""


def _sanitizer_outcome(status: int | None, output: str) -> Outcome:
    """Failed only where it found something; a driver that refuses the tool is a reason to skip."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    ran = _ran(output)
    if status is None:
        return {"status": "timed out", "reason": f"stopped after {len(ran)} operators", "ran": ran}
    if found and any(map(int, found)) and ran:
        races = re.findall(r"Race reported between .*", output)
        doubtful = [race for race in races if ASYNCHRONOUS in race]
        if races and len(doubtful) == len(races):
            return {"status": "done", "doubtful": doubtful, "ran": ran}
        return {"status": "failed", "reason": f"{found[-1]} errors", "ran": ran}
    if status == 0:
        return {"status": "done", "ran": ran}
    lines = [line for line in output.splitlines() if re.search(r"rror|not supported", line)]
    return {"status": "skipped", "reason": (lines or ["it did not run"])[0].strip("= ")[:300], "ran": ran}


# ---- benchmarks


def bandwidth(run: Run, limit_s: float) -> Outcome:
    """The most wanted operators: layer average, moving average, gather, restore, loss; none of PyTorch's compiler."""
    return benchmarks(run, limit_s, most=8)


def benchmarks(run: Run, limit_s: float, most: int = 1000) -> Outcome:
    """The first cases of a GPU; rows are in the records file before the next case begins."""
    command = [sys.executable, "-m", "benchmarks.operators", "--device", "cuda", "--output", str(run.records),
               "--key", run.key, "--budget", f"{max(limit_s - 25.0, 5.0):.0f}", "--only", run.only, "--most", str(most),
               *run.emulation]  # fmt: skip
    status, output = run_child(command, limit_s, run.environment())
    tail = output.strip().splitlines()[-3:]
    if status == 3:
        return {"status": "timed out", "reason": tail[-1] if tail else "budget used up"}
    wrong = _wrong_cases([row for row in read_rows(run.records) if row.get("key") == run.key])
    if status == 0 and wrong and run.emulated:  # there is nothing that may be amiss without a GPU
        return {"status": "failed", "reason": f"{len(wrong)} cases", "failed": wrong}
    return outcome(status, failed=wrong, **({} if status == 0 else {"output": tail}))


def _wrong_cases(rows: list[Outcome]) -> list[str]:
    """Cases that failed, or in which an operator of ours differs from float64."""

    def differs(row: Outcome) -> bool:
        words = row.get("not_run", {}).items()
        return any(name.startswith("d2v") and why.startswith("differs") for name, why in words)

    return [f"{row['op']} {row['case']}" for row in rows if row["kind"] == "failure" or differs(row)]


# ---- steps


def steps(run: Run, limit_s: float) -> Outcome:
    """Whole training steps of the base recipes, the plain form against this library; no compilation, for the time."""
    begin, done, begun = time.monotonic(), run.finished("step"), run.finished("begun step")
    left = [name for name in (c.name for c in (DRY if run.emulated else GPU[:3])) if name not in done]
    wrong: Outcome = {}
    for name in sorted(left, key=begun.__contains__):  # what ended an earlier command keeps no other from its turn
        store(run.records, {"kind": "begun step", "case": name, "key": run.key})
        rows = run.folder / ".step.jsonl"
        rows.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.step", "--threads", "1", "--forms", "plain", "d2v", "--most", "1",
                   "--rounds", "12", "--budget", "5", "--output", str(rows), f"--only={name}"]  # fmt: skip
        command += ["--dry", "--rounds", "2"] if run.emulated else ["--device", "cuda"]
        status, output = run_child(command, limit_s - (time.monotonic() - begin), run.environment())
        store(run.records, *({**row, "emulated": run.emulated, "key": run.key} for row in read_rows(rows)))
        rows.unlink(missing_ok=True)
        tail = output.strip().splitlines()[-3:]
        if status is None:
            return outcome(None, case=name, output=tail)
        if status != 0:
            wrong[name] = [f"exit status {status}", *tail]
    failures: Outcome = {"failed": list(wrong), "output": wrong} if wrong else {}
    return outcome(min(len(wrong), 1), measured=len(left) - len(wrong), **failures)


# ---- report


def report(run: Run, limit_s: float) -> Outcome:
    """The document, and the plot where there is something measured to plot."""
    rows = read_rows(run.records)
    (run.folder / f"{run.stem}.md").write_text(reports.document(rows))
    if reports.measurements(rows) and "matplotlib" not in run.missing:
        plots.roofline(rows, run.folder / f"{run.stem}.png")
    return {"status": "done", "rows": len(reports.measurements(rows, run.emulated))}
