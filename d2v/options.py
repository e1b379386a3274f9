"""Reads options of a command with tyro: their names, help in a useful order, one sentence for what cannot be read."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import itertools
import typing
from collections.abc import Collection, Iterator, Sequence
from contextlib import redirect_stderr
from typing import Annotated, Any, Literal, NamedTuple

from d2v.config import Config
from d2v.config.fields import find_nearest

RARE = "rarely set"
GROUPS = ("", "task", "decode", "run", "probe", "data", "optim", "ema", "mask", "target", "loss", "encoder", "decoder",
          "head", "stem", RARE)  # fmt: skip
"""Parts of the help, in its order."""

MEANT = {
    "lr base-lr peak-lr": "optim.learning-rate",
    "batch batch-size bs bsz": "data.global-batch batch",
    "epochs num-epochs max-epochs": "task.epochs run.steps",
    "max-steps num-steps updates iterations max-updates": "run.steps",
    "num-workers": "data.workers workers",
    "output output-dir out save-dir log-dir run-dir": "run.dir output",
    "data data-dir data-path dataset train input images": "train data.path input",
    "val validation valid": "valid data.valid",
    "wd": "optim.weight-decay",
    "warmup": "task.warmup optim.warmup-steps",
    "fp16 bf16 fp32 amp dtype": "run.precision",
    "gpu cuda": "run.device device",
    "init pretrained load ckpt checkpoint": "checkpoint model.init",
    "mask-ratio": "mask.ratio",
    "momentum ema-decay": "ema.start",
    "save-every save-steps": "run.checkpoint-every",
    "grad-clip clip-grad max-grad-norm": "optim.clip",
    "grad-accum accumulate": "data.micro-batch",
}
"""What people call options elsewhere, and what they are here: the first that the command has."""
_FIRST_WORD = "settings come from the first argument, RECIPE or TASK, and from options such as --run.steps 1000"
ADVICE = {
    "recipe": _FIRST_WORD, "task": _FIRST_WORD,
    "resume": "the same command resumes a run whose --run.dir holds a checkpoint",
    "gpus": "several processes: torchrun --nproc-per-node N -m d2v ...",
}  # fmt: skip
"""Answers to options that runs do not have and that no other option stands for."""


class UsageError(ValueError):
    """A command line that cannot be used; the text is the sentence for the user."""


class Option(NamedTuple):
    """One option of a command.

    Fields: path (names of the fields that lead to its value from the command's dataclass), name, kind (type), help,
    default (`MISSING`: it must be given), only (words of `setting`), rare, positional, section (text of its class).
    """

    path: tuple[str, ...]
    name: str
    kind: Any
    help: str
    default: Any
    only: frozenset[str]
    rare: bool
    positional: bool
    section: str


def list_options(
    kind: Any, default: Any = None, prefix: str = "", path: tuple[str, ...] = (), only: str = ""
) -> Iterator[Option]:
    """Options of a dataclass, those of its sections by dotted names, with the values of `default`."""
    hints, texts = typing.get_type_hints(kind), _texts_of_fields(kind)
    for f in dataclasses.fields(kind):
        given, hint, words = f.metadata.get("option", ""), hints[f.name], f"{only} {f.metadata.get('only', '')}"
        if given is None:
            continue
        name = given or prefix + f.name.replace("_", "-")
        value, where = getattr(default, f.name, f.default), (*path, f.name)
        if dataclasses.is_dataclass(hint):
            yield from list_options(hint, value, "" if hint is Config else f"{name}.", where, words)
            continue
        if choices := f.metadata.get("choices"):
            hint, value = tuple[Literal[tuple(sorted(choices))], ...], tuple(sorted(typing.cast(Any, value)))  # type: ignore[misc]
        marks = f.metadata.get("rare", False), f.metadata.get("positional", False), inspect.getdoc(kind) or ""
        yield Option(where, name, hint, texts[f.name], value, frozenset(words.split()), *marks)


@functools.cache
def _texts_of_fields(kind: Any) -> dict[str, str]:
    """The text under each field, in one line."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(base)).body[0]).body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return texts


def option_names(kind: Any) -> list[str]:
    """Long options of a command's dataclass, as tyro spells them."""
    names = []
    for option in list_options(kind):
        names.append(f"--{option.name}")
        if option.kind is bool and "." in option.name:  # the commands' own switches have no negative
            names.append(f"--{option.name.rpartition('.')[0]}.no-{option.name.rpartition('.')[2]}")
    return names


def parse_options(
    kind: Any, arguments: list[str], prog: str, default: Any = None, first: Sequence[str] = (),
    traits: Collection[str] | None = None, note: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Values of the options of a command's dataclass, as nested dicts.

    Args:
        kind: the dataclass.
        arguments: of the command line.
        prog: name in the help.
        default: instance whose values hold where an option is not given; None: the defaults of the fields.
        first: options that the help begins with.
        traits: of the model; the help lists only options with an effect on it. None: all.
        note: end of the description.

    Raises:
        UsageError: with one sentence. SystemExit: the help was asked for.
    """
    options = list(list_options(kind, default))
    if not {"-h", "--help"} & set(arguments):
        check_names(prog.removeprefix("d2v "), option_names(kind), arguments)
    elif traits is not None:
        options = [o for o in options if o.only <= set(traits)]
    flags = {f"--{o.name}" for o in options if o.kind is bool and o.default is False}
    if set(arguments) <= flags and all(o.default is not dataclasses.MISSING for o in options):
        flat = {"__".join(o.path): f"--{o.name}" in arguments or o.default for o in options}
    else:
        about = f"{inspect.getdoc(kind)}\n\n{note}".strip()
        flat = _parse(_declare(options, first), arguments, prog, about)
    values: dict[str, Any] = {} if default is None else dataclasses.asdict(default)
    for option in options:
        inner = values
        for name in option.path[:-1]:
            inner = inner.setdefault(name, {})
        inner[option.path[-1]] = flat["__".join(option.path)]
    return values


def _parse(declared: Any, arguments: Sequence[str], prog: str, about: str) -> dict[str, Any]:
    """Values of the options by the names of the declared fields."""
    import tyro

    text = io.StringIO()
    try:
        with redirect_stderr(text):
            omit = (tyro.conf.OmitArgPrefixes,)
            parsed = tyro.cli(declared, args=arguments, prog=prog, description=about, config=omit)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_sentence_of_box(text.getvalue())) from None
    return {n: v for part in (parsed, *vars(parsed).values()) for n, v in getattr(part, "__dict__", {}).items()}


def _declare(options: list[Option], first: Sequence[str]) -> Any:
    """A dataclass for tyro with a section for each part of the help."""
    import tyro

    def group(o: Option) -> str:
        return RARE if o.rare else "" if o.name in first or "." not in o.name else o.name.split(".")[0]

    def rank(o: Option) -> tuple[int, int, bool]:
        return GROUPS.index(group(o)), ([*first, o.name]).index(o.name), o.default is not dataclasses.MISSING

    parts: dict[str, list[Any]] = {"": []}
    texts: dict[str, str] = {}
    for o in sorted(options, key=rank):
        metavar = o.name.upper() if o.positional else None
        hint = "(required)" if o.default == "" else "(unset)" if o.default is None else None
        argument = tyro.conf.arg(name=o.name, help=o.help, metavar=metavar, help_behavior_hint=hint)
        marks = [argument] + [tyro.conf.Positional] * o.positional
        marks += [tyro.conf.FlagCreatePairsOff] * (o.kind is bool and "." not in o.name)
        marked = (o.kind, *marks)
        declaration = ("__".join(o.path), Annotated[marked], dataclasses.field(default=o.default))
        parts.setdefault(group(o), []).append(declaration)
        texts.setdefault(group(o), o.section.split("\n\n")[0] if group(o) != RARE else "")
    top = parts.pop("")
    for name, fields in parts.items():
        part: Any = dataclasses.make_dataclass("Part", fields, namespace={"__doc__": texts[name]})
        mark = tyro.conf.arg(name=name)
        top.append((f"part{len(top)}", Annotated[part, mark], dataclasses.field(default_factory=part)))
    return dataclasses.make_dataclass("Options", top)


def check_names(command: str, valid: list[str], arguments: Sequence[str]) -> None:
    """`UsageError` for an option that a command does not have, with what may be meant."""
    for argument in arguments:
        given = argument.split("=", 1)[0]
        if given.startswith("--") and given.replace("_", "-") not in valid:
            if not valid:
                raise UsageError(f"{command}: expected no options, got {given!r}")
            raise UsageError(f"option: unknown {given!r}; {advise(given.replace('_', '-'), valid)}")


def advise(given: str, valid: list[str]) -> str:
    """What somebody may have meant by an option that a command does not have."""
    last = given.removeprefix("--").rpartition(".")[2]
    for words, targets in MEANT.items():
        meant = [f"--{target}" for target in targets.split() if f"--{target}" in valid]
        if last in words.split() and meant:
            return f"did you mean {meant[0]!r}?"
    if last in ADVICE and "--run.dir" in valid:
        return ADVICE[last]
    same = [name for name in valid if name.removeprefix("--").rpartition(".")[2] == last]
    return f"did you mean {' or '.join(map(repr, same or [find_nearest(given, valid)]))}?"


def _sentence_of_box(text: str) -> str:
    """First paragraph of tyro's framed message as one line."""
    lines = [line.strip("│ ").strip() for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    words: list[str] = []
    for line in lines:
        if line.startswith("─"):
            break
        words.append(line)
    return " ".join(" ".join(words).split()) or "options cannot be read; see --help"
