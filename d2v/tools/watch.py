"""Several runs at a glance, and a command of the user's where one needs attention."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from d2v.files import SWEEP
from d2v.folder import LOST, STATUS, load_json
from d2v.runtime import format_seconds
from d2v.train.logging import describe_line, read_metrics
from d2v.train.monitors import find_low_ranks

SHORTEST_STALL = 60.0
"""Seconds of silence that never count as a stall."""


class Sight(NamedTuple):
    """What is known of a run now."""

    name: str
    state: str
    """running, finished, stopped, failed; or what its folder cannot say itself: lost (a rank), dead (its process is
    gone), stalled (silent for too long), new (nothing is written yet), unknown (of a version without `STATUS`)."""
    text: str
    """Progress and numbers."""
    alerts: dict[str, str]
    """What needs attention, by kind."""


def watch(runs: Sequence[Path], every: float, once: bool, stall: float | None, on_alert: str | None) -> str | None:
    """Shows a line for each run until all have ended; on a terminal in place, elsewhere when something changes.

    Args:
        runs: folders of runs, or of sweeps.
        every: seconds between looks.
        once: look once.
        stall: seconds without a line of metrics after which a run counts as stalled; None: five times what the last
            lines took, at least a minute.
        on_alert: command that gets the run's folder and a sentence as two more arguments, once for each run and kind
            of alert; None: none.

    Raises:
        ValueError: a folder that is none.
        SystemExit: 1 where a run failed, died, stalled or lost a rank.
    """
    if missing := [str(run) for run in runs if not run.is_dir()]:
        raise ValueError(f"runs: expected run folders, found none at {missing[0]!r}")
    if not runs:
        raise ValueError("runs: expected at least one run folder, got none")
    told: set[tuple[str, str]] = set()
    before: list[Sight] = []
    while True:
        sights = [sight for run in runs for sight in look_inside(run, stall)]
        _show(sights, before)
        before = sights
        for sight in sights:
            for kind, text in sight.alerts.items():
                if (sight.name, kind) not in told:
                    told.add((sight.name, kind))
                    _alert(sight.name, text, on_alert)
        if once or not {"running", "stalled", "new"} & {s.state for s in sights}:
            break
        time.sleep(every)
    if any(s.state in ("failed", "dead", "stalled", "lost") for s in sights):
        raise SystemExit(1)
    return None


def look(run: Path, stall: float | None = None, now: float | None = None) -> Sight:
    """What a run's folder says; now: seconds since the epoch, unset: the clock."""
    if not (run / STATUS).is_file():
        old = (run / "metrics.jsonl").is_file()
        return Sight(str(run), "unknown" if old else "new", f"no {STATUS}" if old else "nothing written yet", {})
    status = load_json(run / STATUS)
    now = time.time() if now is None else now
    line, state = status.get("metrics", {}), str(status.get("state"))
    line = line if isinstance(line, dict) else {}
    reason = str(status.get("reason", ""))
    if state == "running":
        state, reason = _find_silence(run, status, now, stall)
    left = status.get("seconds_left")
    progress = f"update {status.get('step')}/{status.get('last_step')}"
    words = [progress, describe_line(line)]
    words += [f"{format_seconds(float(left))} left"] if state == "running" and isinstance(left, (int, float)) else []
    alerts = {} if state in ("running", "finished", "stopped") else {state: f"{state}: {reason}"}
    if state == "running":
        alerts |= find_low_ranks(line)
    notes = [reason] if reason else [f"note: {text.split(':')[0]}" for text in alerts.values()]
    return Sight(str(run), state, ", ".join(filter(None, [*words, *notes])), alerts)


def look_inside(folder: Path, stall: float | None = None) -> list[Sight]:
    """What a run's folder says, or those of the runs of a sweep, which knows of runs that failed before they wrote."""
    if not (folder / SWEEP).is_file():
        return [look(folder, stall)]
    try:
        members = [(Path(m["name"]).name, str(m["state"])) for m in load_json(folder / SWEEP)["runs"]]
    except (KeyError, TypeError):
        raise ValueError(f"{folder / SWEEP}: expected runs, each with name and state, got others") from None
    sights = []
    for name, state in members:
        sight = look(folder / name, stall)
        if sight.state == "new" and state.startswith("failed"):
            sight = Sight(sight.name, "failed", state, {"failed": state})
        sights.append(sight)
    return sights


def _find_silence(run: Path, status: dict[str, Any], now: float, stall: float | None) -> tuple[str, str]:
    """The state of a run that says that it is running, and why that is not so."""
    if (run / LOST).is_file():
        return "lost", (run / LOST).read_text(encoding="utf-8", errors="replace")[:500]
    since = now - float(status.get("time", now))
    if status.get("host") == socket.gethostname() and not _is_alive(status.get("pid")):
        return "dead", "its process is gone"
    limit = SHORTEST_STALL if stall is None else stall
    if stall is None and since > limit:  # only then is all of a long run's file worth reading
        steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")[-2:]]
        seconds = status.get("metrics", {}).get("step_seconds", 0.0)
        limit = max(SHORTEST_STALL, 5 * (steps[-1] - steps[0]) * seconds if steps else SHORTEST_STALL * 5)
    if since > limit:
        return "stalled", f"no line of metrics for {format_seconds(since)}"
    return "running", ""


def _is_alive(pid: Any) -> bool:
    if type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _show(sights: Sequence[Sight], before: Sequence[Sight]) -> None:
    """Prints the lines, over those of before on a terminal; elsewhere those of another state or update."""
    width = max(len(s.name) for s in sights)
    lines = [f"{s.name:{width}}  {s.state:8}  {s.text}" for s in sights]
    if sys.stdout.isatty():
        columns = os.get_terminal_size().columns
        up = f"\x1b[{len(before)}A" if before else ""
        print(up + "\n".join(f"\x1b[2K{line[: columns - 1]}" for line in lines), flush=True)
        return
    known = {(s.name, s.state, s.text.split(",")[0]) for s in before}
    for sight, line in zip(sights, lines, strict=True):
        if (sight.name, sight.state, sight.text.split(",")[0]) not in known:
            print(line, flush=True)


def _alert(run: str, text: str, command: str | None) -> None:
    print(f"alert: {run}: {text}", file=sys.stderr, flush=True)
    if command is not None:
        try:
            subprocess.run([*shlex.split(command), run, text], check=False)
        except OSError as error:
            print(f"note: on-alert: cannot run {command!r}: {error.strerror}", file=sys.stderr)
