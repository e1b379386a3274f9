"""Runs of `d2v pretrain` in processes of their own: start, watch, kill, compare."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from d2v.cli import main as d2v
from d2v.folder import MODEL, latest_checkpoint, load_json, load_tensors

ROOT = Path(__file__).resolve().parents[2]
MARK = "D2V_SOAK_JOB"
"""Environment variable by which the processes of a job are found, also those whose parent is gone."""
SAVED, LOST = 75, 76
"""Exit codes of a run that saved on a signal, and of one that lost a rank."""


def find_port() -> int:
    """A TCP port that is free now."""
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


def rank_environment(rank: int, ranks: int, port: int, host: str = "localhost") -> dict[str, str]:
    """What torchrun tells a rank, for ranks that are started without it."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": host, "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "soak",
    }  # fmt: skip


def base_environment(mark: str) -> dict[str, str]:
    """Environment of every process of a job: this source tree, one thread, no launcher's left-overs."""
    names = set(rank_environment(0, 1, 0)) | {"GLOO_SOCKET_IFNAME"}
    inherited = {k: v for k, v in os.environ.items() if k not in names}
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", MARK: mark}


@dataclass
class Job:
    """One launch: a process, or one for each rank where no launcher keeps them together."""

    mark: str
    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]
    started: float = field(default_factory=time.time)

    def text(self, rank: int = 0) -> str:
        """What was printed so far."""
        return self.logs[min(rank, len(self.logs) - 1)].read_text(errors="replace")

    def is_running(self) -> bool:
        """Whether any of the started processes still runs."""
        return any(p.poll() is None for p in self.processes)

    def codes(self, timeout: float) -> list[int]:
        """Exit codes, once all have ended; kills the job and raises `AssertionError` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.01)) for p in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"expected the run to end within {timeout} s; it printed:\n{self.tail()}") from None

    def pids(self) -> list[int]:
        """Process ids of everything that the job started and that lives."""
        own, wanted = os.getpid(), f"{MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != own:
                with contextlib.suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """kill -9 of every process of the job."""
        while pids := [p for p in self.pids() if is_alive(p)]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self.processes:
                process.poll()
        for process in self.processes:  # a process whose first thread is gone may still have its files and locks
            process.wait(60)

    def trainers(self) -> dict[int, int]:
        """Rank -> process id of the trainers: not of their loader workers, nor of a launcher."""
        family = self._family()
        return {rank: pid for pid, (parent, rank) in family.items() if parent not in family}

    def loader_workers(self) -> list[int]:
        """Process ids of the loader workers: forks of the trainers."""
        family = self._family()
        return [pid for pid, (parent, _) in family.items() if parent in family]

    def _family(self) -> dict[int, tuple[int, int]]:
        """Process id -> (parent, rank) of the processes that run `d2v pretrain`."""
        found = {}
        for pid in self.pids():
            with contextlib.suppress(OSError):
                place = Path(f"/proc/{pid}")
                command = (place / "cmdline").read_bytes().split(b"\0")
                variables = dict(v.partition(b"=")[::2] for v in (place / "environ").read_bytes().split(b"\0"))
                module = command[command.index(b"-m") + 1] if b"-m" in command else b""
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                if module == b"d2v" and is_alive(pid):
                    found[pid] = parent, int(variables.get(b"RANK", b"0"))
        return found

    def tail(self, characters: int = 1500) -> str:
        """The end of what all processes printed."""
        return "\n".join(f"[{log.name}] {log.read_text(errors='replace')[-characters:]}" for log in self.logs)


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def start(
    options: Sequence[str], log: Path, *, ranks: int = 1, launcher: str = "torchrun",
    launch: Sequence[str] = ("--standalone",), prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Job:  # fmt: skip
    """Starts `d2v pretrain *options`.

    Args:
        options: recipe and options.
        log: file for what is printed; with launcher="none", rank r > 0 writes beside it.
        ranks: processes of this launch; 1: without a launcher.
        launcher: "torchrun", or "none": one process for each rank, which nobody stops when another fails.
        launch: torchrun's options on where the ranks meet.
        prefix: command line put before each command.
        environment: additional variables.
    """
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "d2v", "pretrain", *options]
    shared = {**base_environment(mark), **(environment or {})}
    own: list[dict[str, str]] = [{}]
    if launcher == "torchrun" and (ranks > 1 or "--standalone" not in launch):
        torchrun = ["-m", "torch.distributed.run", *launch, f"--nproc-per-node={ranks}"]
        command = [sys.executable, *torchrun, "-m", "d2v", "pretrain", *options]
    elif ranks > 1:
        port = find_port()
        own = [rank_environment(rank, ranks, port) for rank in range(ranks)]
    log.parent.mkdir(parents=True, exist_ok=True)
    processes, logs = [], []
    for number, variables in enumerate(own):
        path = log if number == 0 else log.with_suffix(f".{number}{log.suffix}")
        with path.open("wb") as file:
            processes.append(
                subprocess.Popen(
                    [*prefix, *command], stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    env={**shared, **variables}, start_new_session=True, cwd=ROOT,
                )
            )  # fmt: skip
        logs.append(path)
    return Job(mark, processes, logs)


@contextlib.contextmanager
def running(*args: Any, **kwargs: Any) -> Iterator[Job]:
    """`start`, and the certainty that nothing of the job outlives the block."""
    job = start(*args, **kwargs)
    try:
        yield job
    finally:
        job.kill()


def finish(options: Sequence[str], log: Path, *, timeout: float = 300, **kwargs: Any) -> Job:
    """Runs to the end; `AssertionError` with the output where the exit code is not 0."""
    with running(options, log, **kwargs) as job:
        codes = job.codes(timeout)
        assert not any(codes), f"expected exit code 0, got {codes}:\n{job.tail()}"
        return job


def call(options: Sequence[str]) -> tuple[int, str]:
    """Exit code and error text of a `d2v` command in this process, which saves the start of another."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
        try:
            return d2v(list(options)), text.getvalue()
        except SystemExit as stop:
            return int(stop.code or 0), text.getvalue()


def finish_here(options: Sequence[str]) -> None:
    """Like `finish`, on one rank in this process."""
    code, text = call(["pretrain", *options])
    assert code == 0, f"expected exit code 0, got {code}:\n{text[-3000:]}"


def wait_until(condition: Callable[[], Any], job: Job, what: str, timeout: float = 120) -> Any:
    """The first true value of `condition`; `AssertionError` where the job ends or the time is over before."""
    deadline = time.monotonic() + timeout
    while True:
        alive = job.is_running()  # asked first: what the run did last counts
        if value := condition():
            return value
        assert alive, f"expected {what} before the end of the run:\n{job.tail()}"
        assert time.monotonic() < deadline, f"expected {what} within {timeout} s:\n{job.tail()}"
        time.sleep(0.002)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl; an unfinished last one is left out."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def has_reached(run: Path, step: int) -> Callable[[], bool]:
    """A condition: a line of metrics for `step` or later was written."""
    return lambda: any(line["step"] >= step for line in read_metrics(run)[-1:])


def has_kept(run: Path, step: int) -> Callable[[], bool]:
    """A condition: the checkpoint of `step` or a later one is there; it is written beside the training."""
    return lambda: last_step(run) >= step


def losses(run: Path) -> list[float]:
    """Loss of every logged update, in order."""
    return [line["loss"] for line in read_metrics(run)]


def final_model(run: Path) -> dict[str, torch.Tensor]:
    """Tensors of student and teacher in the newest checkpoint."""
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None, f"expected a checkpoint in {run}"
    return load_tensors(checkpoint, MODEL)


def last_step(run: Path) -> int:
    """Completed updates of the newest checkpoint; 0 without one."""
    checkpoint = latest_checkpoint(run)
    return 0 if checkpoint is None else int(load_json(checkpoint / "state.json")["step"])


def assert_same_weights(run: Path, reference: Path) -> int:
    """Bit-equality of two runs' newest checkpoints; returns the number of tensors compared."""
    got, expected = final_model(run), final_model(reference)
    assert last_step(run) == last_step(reference)
    assert got.keys() == expected.keys()
    differing = [n for n in expected if got[n].numpy().tobytes() != expected[n].numpy().tobytes()]
    assert not differing, f"{len(differing)} of {len(expected)} tensors differ, for example {differing[0]}"
    return len(expected)


def largest_difference(got: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference of two sequences of the same length."""
    assert len(got) == len(expected) > 0, f"expected {len(expected)} losses, got {len(got)}"
    return max(abs(g - e) / abs(e) for g, e in zip(got, expected, strict=True))
