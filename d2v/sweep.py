"""`d2v sweep`: a run for every combination of some options' values, one after the other or as a Slurm array."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2v.config import Config
from d2v.config.commands import Pretrain, Sweep
from d2v.config.fields import build_section, check_ranges, shorten
from d2v.files import SWEEP, write_atomically
from d2v.options import UsageError, check_names, list_options, option_names, parse_options
from d2v.settings import pretrain_defaults, take_code, value_of

SCRIPT = "sweep.sbatch"
_OWN = ("run.dir", "slurm", "dry-run")
_STOPPED = (os.EX_TEMPFAIL, 128 + signal.SIGINT)
"""Exit codes of a run that was stopped from outside: the sweep stops, too."""
_SLURM = """#!/usr/bin/env bash
# A task of a Slurm array for each of {count} runs of `d2v sweep`. Change the lines below for your cluster, then hand
# this file to sbatch in the folder where the sweep was made.
#SBATCH --job-name=d2v-sweep
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.out
# A signal to the run 300 s before the time limit: it saves and leaves with exit code 75.
#SBATCH --signal=USR1@300

case "$SLURM_ARRAY_TASK_ID" in
{cases}
esac
trap : USR1 TERM                                           # only the run ends on signals
srun "${{PYTHON:-python}}" -m d2v "$@"
code=$?
if [ "$code" -eq 75 ]; then
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null)
    [ "${{state:-RUNNING}}" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""


@dataclass
class Member:
    """One run of a sweep."""

    name: str
    """Of its folder."""
    values: dict[str, str]
    """Options in which the runs differ."""
    command: list[str]
    """Arguments of `d2v`."""
    config: Config
    state: str = "not begun"


def split_values(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Arguments that all runs share, without those of the sweep itself; and for each option with several values the
    arguments of each value."""
    check_names("sweep", option_names(Sweep), arguments)
    known = {o.name: o.kind for o in list_options(Pretrain)}
    starts = [i for i, argument in enumerate(arguments) if argument.startswith("--")]
    starts.append(len(arguments))
    shared = list(arguments[: starts[0]])
    axes: dict[str, list[list[str]]] = {}
    for start, end in itertools.pairwise(starts):
        name, given = arguments[start][2:].partition("=")[0].replace("_", "-"), arguments[start + 1 : end]
        kind = known.get(name)
        parts = typing.get_args(kind) if typing.get_origin(kind) is tuple else (kind,)
        if name in _OWN:
            if name == "run.dir" and len(given) != ("=" not in arguments[start]):
                raise UsageError(f"run.dir: expected one folder for the runs, got {' '.join(given) or 'nothing'}")
            if name != "run.dir" and given:
                raise UsageError(f"{name}: expected no value, got {' '.join(given)}")
            continue
        if kind is None or len(given) <= len(parts) or parts[-1] is ...:
            shared += arguments[start:end]
            axes.pop(name, None)  # the last one counts
        elif len(given) % len(parts):
            raise UsageError(f"{name}: expected {len(parts)} numbers for each value, got {' '.join(given)}")
        else:
            chunks = [given[i : i + len(parts)] for i in range(0, len(given), len(parts))]
            axes[name] = [_spell(name, kind, chunk) for chunk in dict.fromkeys(map(tuple, chunks))]
    if not axes:
        raise UsageError("sweep: expected an option with several values, such as --run.seed 0 1 2, got none")
    return shared, axes


def _spell(name: str, kind: Any, values: Sequence[str]) -> list[str]:
    """Arguments for one value of an option; switches have no value on the command line."""
    if kind is not bool:
        return [f"--{name}", *values]
    if values[0].lower() not in ("true", "false"):
        raise UsageError(f"{name}: expected True or False, got {values[0]!r}")
    section, _, last = name.rpartition(".")
    return [f"--{name}" if values[0].lower() == "true" else f"--{section}.no-{last}"]


def plan(recipe: str, arguments: Sequence[str], folder: str) -> list[Member]:
    """The runs of a sweep, their settings checked; the last option changes fastest."""
    shared, axes = split_values(arguments)
    lasts = [name.rpartition(".")[2] for name in axes]
    titles = [name if lasts.count(last) > 1 else last for name, last in zip(axes, lasts, strict=True)]
    members: list[Member] = []
    for chosen in itertools.product(*axes.values()):
        texts = ["_".join(c[1:]) if c[1:] else str(".no-" not in c[0]) for c in chosen]
        plain = [re.sub(r"[^\w.+-]+", "_", text) for text in texts]
        name = ",".join(f"{title}={text}" for title, text in zip(titles, plain, strict=True))
        options = [*shared, *itertools.chain(*chosen), "--run.dir", str(Path(folder) / name)]
        with contextlib.redirect_stderr(io.StringIO() if members else sys.stderr):  # notes are said once
            default, _ = pretrain_defaults(recipe, options)
        parsed = parse_options(Pretrain, take_code(options)[0], f"d2v sweep {recipe}", default, ("model.init",))
        settings = build_section(Pretrain, parsed, "sweep")
        check_ranges(settings)
        command = ["pretrain", *[recipe] * bool(recipe), *options]
        members.append(Member(name, dict(zip(axes, texts, strict=True)), command, settings.config))
    names = [member.name for member in members]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"sweep: expected values with folders of their own, got two for {double!r}")
    if long := next((name for name in names if len(name.encode()) > 255), None):
        raise UsageError(f"sweep: expected values that fit into the name of a folder, 255 bytes, got {shorten(long)!r}")
    return members


def find_state(config: Config) -> str:
    """Whether a run is finished; `ValueError` where its folder holds one with other settings."""
    from d2v.folder import CONFIG, latest_checkpoint, load_json, step_of
    from d2v.train.run_dir import compare_configs

    folder = Path(config.run.dir)
    found = latest_checkpoint(folder)
    if found is None:
        return "not begun"
    compare_configs(load_json(found / CONFIG), config, folder, step_of(found))
    return "finished" if step_of(found) >= config.run.last else f"stopped after update {step_of(found)}"


def sweep(recipe: str, arguments: Sequence[str]) -> int:
    """Runs what is not finished yet of a sweep, writes `sweep.json` into its folder; returns the exit code: 1 where a
    run failed, that of a run that was stopped from outside, else 0."""
    folder, flags = Path(value_of("--run.dir", arguments) or ""), set(arguments)
    if not folder.name:
        raise UsageError("run.dir: expected a folder for the runs, got nothing")
    if folder.exists() and not (folder / SWEEP).is_file() and any(folder.iterdir()):
        raise ValueError(f"run.dir: expected an empty folder or an earlier sweep, got {str(folder)!r} with other files")
    members = plan("" if value_of("--recipe", arguments) else recipe, arguments, str(folder))
    for member in members:
        try:
            member.state = find_state(member.config)
        except ValueError as error:
            member.state = f"failed: {error}"
    code = 0
    if "--dry-run" not in flags:
        folder.mkdir(parents=True, exist_ok=True)
        _record(folder, members)
        if "--slurm" in flags:
            cases = "\n".join(f"    {i}) set -- {shlex.join(m.command)} ;;" for i, m in enumerate(members))
            path = folder / SCRIPT
            write_atomically(path, _SLURM.format(count=len(members), last=len(members) - 1, cases=cases))
            print(f"sbatch {shlex.quote(str(path))}")
            return 0
        code = _run_all(folder, members)
    print("\n".join(f"{m.name}: {m.state}" for m in members))
    return code or int(any(m.state.startswith("failed") for m in members))


def _record(folder: Path, members: Sequence[Member]) -> None:
    runs = [{"name": m.name, "options": m.values, "command": m.command, "state": m.state} for m in members]
    write_atomically(folder / SWEEP, json.dumps({"runs": runs}, indent=1))


def _run_all(folder: Path, members: Sequence[Member]) -> int:
    for i, member in enumerate(members):
        if member.state == "finished" or member.state.startswith("failed"):
            continue
        print(f"run {i + 1} of {len(members)}: {member.name}", file=sys.stderr)
        code = _run_one(member.command)
        ends = {0: "finished", **dict.fromkeys(_STOPPED, "stopped")}
        member.state = ends.get(code, f"failed with exit code {code}")
        _record(folder, members)
        if code in _STOPPED:
            return code
        if code:
            print(f"{member.name}: {member.state}; the others go on", file=sys.stderr)
    return 0


def _run_one(command: Sequence[str]) -> int:
    """Exit code of a run in a process of its own: one that is killed does not take the others with it."""
    process = subprocess.Popen([sys.executable, "-m", "d2v", *command])
    try:
        return process.wait()
    except (SystemExit, KeyboardInterrupt) as stop:  # a signal, which may have reached this process alone
        interrupted = isinstance(stop, KeyboardInterrupt)
        process.send_signal(signal.SIGINT if interrupted else signal.SIGTERM)
        process.wait()
        return _STOPPED[interrupted]
