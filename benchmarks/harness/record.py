"""What a measurement was made on, the files that keep its rows, and the processes that it runs in."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from d2v_kernels import _native, info, registry
from d2v_kernels.bench.measure import describe_machine, read_rows

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CUDA_BIN = "/usr/local/cuda/bin"
# Without these, glibc returns every large output to the system and the page faults of the next allocation, the same
# for all contenders, take several times longer than the kernels.
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}
MARK = "result: "
"""Begins the line of a child's result: a library may print after it."""
_GUARD = """
import os, signal, subprocess, sys, threading

def watch():
    os.read(int(sys.argv[1]), 1)
    os.killpg(0, signal.SIGKILL)

child = subprocess.Popen(sys.argv[2:])
threading.Thread(target=watch, daemon=True).start()
status = child.wait()
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""
"""Runs a program with the same exit status; a pipe that ends, because the process that holds it is gone, kills both and
all that they started. A child that outlived a killed command would write to the records of the next one."""
_QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit",
          "temperature.gpu", "compute_cap", "memory.total")  # fmt: skip
_SOURCES = ("d2v_kernels", "csrc", "benchmarks", "tests/gpu", "CMakeLists.txt", "setup.py")
_SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp", ".txt")
_IDENTITY = ("op", "case", "dtype", "threads", "device", "curve", "x_given", "stage", "emulated")


# ---- the machine


def _output(*command: str) -> str:
    """What a program prints; empty where it is missing or fails."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def _last_level_cache() -> int | None:
    try:
        return int(os.sysconf("SC_LEVEL3_CACHE_SIZE")) or None
    except (ValueError, OSError):
        return None


def machine_basics() -> Row:
    """CPU, GPU, system, versions, ISA level of the native library, commit and date."""
    return {**describe_machine(), "commit": _output("git", "describe", "--always", "--dirty") or "unknown"}


def machine_record() -> Row:
    """What a record of the CPU has: its caches, too."""
    return {**machine_basics(), "last_level_cache_bytes": _last_level_cache()}


def gpu_state() -> dict[str, str]:
    """Name, driver, clocks and limits as nvidia-smi has them now; empty without it."""
    lines = _output("nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader").splitlines()
    return dict(zip(_QUERY, (value.strip() for value in lines[0].split(",")), strict=False)) if lines else {}


def gpu_machine(emulated: bool) -> Row:
    """GPU, driver, clocks, versions, build record, commit and date; stored with every record."""
    properties: Row = {}
    versions = {found.name: found.version for found in importlib.metadata.distributions()}
    if not emulated and torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        properties = {"name": p.name, "multiprocessors": p.multi_processor_count, "l2_cache_bytes": p.L2_cache_size,
                      "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"}  # fmt: skip
    return {
        **machine_basics(),
        "gpu": properties.get("name"),
        "gpu_properties": properties,
        "gpu_state": {} if emulated else gpu_state(),
        "torch_cuda": torch.version.cuda,
        "triton": versions.get("triton") or versions.get("pytorch-triton"),
        "xformers": versions.get("xformers"),
        "build": info.collect()["build"],
        "sources": source_hash(),
    }


def source_hash(more: tuple[str, ...] = ()) -> str:
    """What was measured, where there is no commit to name it: a digest of the sources' bytes, `more` paths too."""
    digest = hashlib.sha256()
    for name in (*_SOURCES, *more):
        place = ROOT / name
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in _SUFFIXES)
        for path in files:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run_key(*parts: object, more: tuple[str, ...] = ()) -> str:
    """Records with another key belong to other sources, another machine or other versions (`parts`): they do not count
    as done."""
    return hashlib.sha256(" ".join(map(str, [*parts, source_hash(more)])).encode()).hexdigest()[:16]


# ---- files of rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """The whole file, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fresh.replace(path)


def identity(row: Row) -> str:
    """What a row measured, whenever and with whatever result; of a curve's end, its place and forms, too."""
    kind = "measurement" if row.get("kind") == "failure" else row.get("kind")
    end = (row["x"], row["forms"]) if kind == "stop" else ()
    return repr((kind, *(row.get(name) or None for name in _IDENTITY), *end))


def measured_on(row: Row) -> tuple[Any, ...]:
    """The machine and the backend of a row."""
    return (row.get("backend"), *((row.get("machine") or {}).get(name) for name in ("cpu", "cores", "isa", "gpu")))


def newest(rows: list[Row]) -> list[Row]:
    """What is shown where several machines or backends measured the same, or points of one curve: the last one's."""
    keys = [(row["curve"], row["threads"], row["device"]) if "curve" in row else identity(row) for row in rows]
    pairs = sorted(zip(keys, rows, strict=True), key=lambda pair: (pair[1].get("machine") or {}).get("date", ""))
    last = {key: measured_on(row) for key, row in pairs}
    return [row for key, row in zip(keys, rows, strict=True) if measured_on(row) == last[key]]


def store(path: Path, *rows: Row, replaces: Callable[[Row], bool] = lambda row: False) -> None:
    """Adds rows to a file. Each takes the place of the stored row that measured the same on the same machine and
    backend; other rows stay, whatever part of the benchmark is run, but for those that `replaces` names."""
    stored = [row for row in read_rows(path) if not replaces(row)]
    write_rows(path, {(identity(row), measured_on(row)): row for row in (*stored, *rows)}.values())


def keep_rows(path: Path, key: str) -> list[Row]:
    """Drops the rows of other runs from the file; returns those that stay."""
    kept = [row for row in read_rows(path) if row.get("key") == key]
    write_rows(path, kept)
    return kept


# ---- processes


class ChildError(RuntimeError):
    """A process that gave no result; the text says why."""


def run_child(command: Sequence[str], limit_s: float | None, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit status (None: stopped at the limit, with all its children) and output. Ends, too, where this process does,
    however that comes about."""
    # Popen looks for a program on the caller's own PATH, not on the one it hands on.
    program = shutil.which(command[0], path=environment.get("PATH")) or command[0]
    watched, held = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-ISc", _GUARD, str(watched), program, *command[1:]], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=(watched,),
        )  # fmt: skip
        try:
            output, _ = child.communicate(timeout=None if limit_s is None else max(limit_s, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            output, _ = child.communicate()
            return None, output
        return child.returncode, output
    finally:
        os.close(watched)
        os.close(held)


def ask_child(
    module: str, order: Row, *, threads: int = 1, keep_pages: bool = True, limit_s: float | None = None,
    launcher: Sequence[str] = (),
) -> Any:  # fmt: skip
    """The result that `python -m benchmarks.MODULE --child ORDER` answers with. `ChildError` without one."""
    command = [sys.executable, *launcher, "-m", f"benchmarks.{module}", "--child", json.dumps(order)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **(KEEP_PAGES if keep_pages else {})}
    status, output = run_child(command, limit_s, environment)
    if status is None:
        raise ChildError(f"stopped after {limit_s:g} s")
    lines = [line for line in output.splitlines() if line.strip()]
    found = [line for line in lines if line.startswith(MARK)]
    if status != 0 or not found:
        errors = [line for line in lines if "Error" in line] or lines[-1:] or ["no output"]
        raise ChildError(f"exit status {status}: {errors[-1].strip()[:200]}")
    return json.loads(found[-1].removeprefix(MARK))


def limit_memory(size: int | None) -> None:
    """An allocation too many then is an error that says so, and ends this process and no other."""
    if size:
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def answer(result: Any) -> None:
    """The child's side."""
    print(MARK + json.dumps(result), flush=True)


def require_native(module: str) -> None:
    """Ends with status 2 where ours would be the reference, which nobody has asked for."""
    reason = _native.load_errors().get(_native.CPU_LIBRARY)
    if reason and registry.forced_backend() == "auto":
        how = "`make setup`, or `pip install --no-build-isolation -e` of this clone, builds it"
        text = f"{how}; D2V_KERNELS_BACKEND=reference measures the reference"
        print(f"benchmarks.{module}: expected the native library, got {reason}; {text}", file=sys.stderr)
        raise SystemExit(2)


def parse(
    module: str, text: str | None, arguments: list[str] | None, *, native: bool = True,
    first: tuple[str, Iterable[str]] | None = None, **options: tuple[Any, str],
) -> argparse.Namespace:  # fmt: skip
    """Options of `python -m benchmarks.MODULE`: name -> default and help. The type is that of the default. A list takes
    several values, a tuple of choices one (the first by default), None a text; an option without help is not shown.
    native: what runs on the CPU needs the native library. first: name and choices of an argument without dashes."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if first is not None:
        parser.add_argument(first[0], choices=first[1])
    for name, (default, words) in options.items():
        values: Row = {"default": default, "help": words or argparse.SUPPRESS}
        if isinstance(default, bool):
            values["action"] = "store_true"
        elif isinstance(default, tuple):
            values |= {"default": default[0], "choices": default}
        elif isinstance(default, list):
            values |= {"type": type(default[0]) if default else str, "nargs": "+"}
        elif default is not None:
            values["type"] = Path if isinstance(default, Path) else type(default)
        parser.add_argument(f"--{name}", **values)
    given = parser.parse_args(arguments)
    asked = vars(given).get
    elsewhere = asked("device") == "cuda" or asked("emulated") or asked("estimate")
    if native and not elsewhere and asked("backend", "native") == "native":
        require_native(module)
    return given
