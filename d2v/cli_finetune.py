"""`d2v finetune TASK`: options with the values that fit the task and the pre-trained model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace

from d2v.config import Data, Optim, Run
from d2v.config.finetune import TASKS, Decoding, TaskOptions

HELP = """usage: d2v finetune TASK --checkpoint DIR --train PATH [--valid PATH] --test PATH --run.dir DIR [OPTIONS]

TASK: {tasks}
'd2v finetune TASK --help' lists every option with the task's value.
"""


@dataclass(frozen=True)
class Settings:
    """Trains a head, and the encoder under it, on labelled samples. Checkpoints come at the end of each epoch; the one
    with the best score on held-out samples is chosen and looked at the test set once."""

    checkpoint: str = ""
    """Pre-trained model: run folder, checkpoint inside it, or exported folder."""
    train: str = ""
    """Labelled training data. speech-ctc: audio files with a .txt beside each, a .tsv manifest with an .ltr beside it,
    or .tar shards with .txt members; speech-classify: class folders, a .tsv of path<TAB>label, or shards with .cls
    members; vision-classify: class folders, or shards with .cls members; text-classify: a .tsv of text<TAB>label or
    text<TAB>text<TAB>label."""
    valid: str | None = None
    """Held-out data that choose the checkpoint, same formats; unset: task.valid_share of the training data."""
    test: str | None = None
    """Test data, same formats; unset: none."""
    worst: int = 50
    """Test samples that are listed as the worst."""
    task: TaskOptions = field(default_factory=TaskOptions)
    decode: Decoding = field(default_factory=Decoding)
    optim: Optim = field(default_factory=Optim)
    data: Data = field(default_factory=Data)
    run: Run = field(default_factory=Run)


def run_command(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    from d2v.cli import UsageError, parse_options

    names = ", ".join(TASKS)
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(HELP.format(tasks=names), end="")
            return 0
        raise UsageError(f"task: expected one of {names} as the first argument, got nothing")
    task, rest = arguments[0], arguments[1:]
    if task not in TASKS:
        import difflib

        nearest = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.0)[0]
        raise UsageError(f"task: expected one of {names}, got {task!r}; did you mean {nearest!r}?")
    settings = parse_options(Settings, rest, f"d2v finetune {task}", find_defaults(task, rest))
    for name in ("checkpoint", "train"):
        if not getattr(settings, name):
            raise UsageError(f"{name}: expected a path, got nothing")
    if settings.data.path:
        raise UsageError(f"data.path: expected nothing, --train names the data; got {settings.data.path!r}")
    from d2v.finetune.run import finetune

    data = settings.data if settings.valid is None else replace(settings.data, valid=settings.valid)
    try:
        finetune(
            task, settings.checkpoint, settings.train, settings.test, run=settings.run, optim=settings.optim,
            data=data, options=settings.task, decode=settings.decode, worst=settings.worst,
        )  # fmt: skip
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def find_defaults(task: str, arguments: list[str]) -> Settings:
    """Options of a task before the command line is read: they follow the model that --checkpoint names."""
    from d2v.config import Config, Stem
    from d2v.finetune.defaults import MODALITIES, default_sections
    from d2v.finetune.run import read_defaults

    checkpoint = _find_value(arguments, "--checkpoint")
    if checkpoint:
        _, sections = read_defaults(task, checkpoint)
    else:  # for the help
        modality = MODALITIES[task]
        positions = {"speech": "conv", "text": "none", "vision": "sincos"}[modality]
        stem = Stem(modality=modality, positions=positions)  # type: ignore[arg-type]
        sections = default_sections(task, Config(stem=stem))
    optim, data, run, options = sections
    given = {f.name for f in dataclasses.fields(Settings)}
    assert {"optim", "data", "run", "task"} <= given
    return Settings(optim=optim, data=data, run=run, task=options)


def _find_value(arguments: list[str], name: str) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == name:
            return arguments[i + 1] if i + 1 < len(arguments) else None
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None
