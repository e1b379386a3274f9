"""The `d2v` command.

Options are the fields of the configuration, their help its documentation. Input that cannot be used ends with one
sentence on standard error and exit code 2; a run that had to stop (NaN, collapse) with exit code 1.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import sys
import typing
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from d2v.cli_options import EvaluateModel, Export, Features, Import, Init, Maps, Pack, Plot, Probe, Textures, Tokenizer
from d2v.config import PUBLISHED_BEHAVIOURS, Config

USAGE = """usage: d2v COMMAND [OPTIONS]

commands:
  pretrain RECIPE     pre-train a model; resumes if --run.dir holds a checkpoint
  finetune TASK       train a head and the encoder on labels; resumes if --run.dir holds a checkpoint
  evaluate probe      linear probe, kNN and few-label accuracy on frozen features
  evaluate model      scores of a fine-tuned model: accuracy, F1, correlation, or word error rate
  evaluate maps       pictures: similarity of features, masks, classes in two dimensions
  features            features of images, speech or text to one file, with an index beside it
  import              read a published fairseq checkpoint or a Hugging Face folder
  export              write a checkpoint as safetensors, for Hugging Face (1.0) or for fairseq
  plot DIR            draw a run: monitors, probes, similarity of features -> DIR/report.png
  recipes             list the recipes
  info                what this installation can run, and why not
  data textures       write the quick-start images: crops of photographs from the scikit-image package
  data pack           write images, speech or text as shards of even size
  data tokenizer      train a tokenizer on text, or import the published one

'd2v COMMAND --help' lists the options of a command; 'd2v pretrain RECIPE --help' shows the recipe's values.
"""


class UsageError(ValueError):
    """A command line that cannot be used; the text is the sentence for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"d2v: {_one_sentence(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from d2v.train.trainer import RunStopped

        if not isinstance(error, RunStopped):
            raise
        print(f"d2v: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("d2v: interrupted", file=sys.stderr)
        return 130


def _one_sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


COMMANDS: dict[str, Callable[[list[str]], int]] = {}


def _command(name: str) -> Callable[[Callable[[list[str]], int]], Callable[[list[str]], int]]:
    def register(function: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
        COMMANDS[name] = function
        return function

    return register


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments and arguments[0] == "--version":
        from d2v import __version__

        print(f"d2v {__version__}")
        return 0
    if not arguments:
        raise UsageError(f"command: expected one of {', '.join(COMMANDS)}, got nothing; see d2v --help")
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if name in COMMANDS:
            return COMMANDS[name](arguments[length:])
    groups = sorted({c.split()[0] for c in COMMANDS})
    if arguments[0] not in groups:
        raise UsageError(_unknown("command", arguments[0], groups))
    inner = [c.split()[1] for c in COMMANDS if c.startswith(f"{arguments[0]} ")]
    if len(arguments) > 1 and arguments[1] in ("-h", "--help"):
        print(f"usage: d2v {arguments[0]} {{{','.join(inner)}}} [OPTIONS]")
        return 0
    given = arguments[1] if len(arguments) > 1 else ""
    raise UsageError(_unknown(f"{arguments[0]}", given, inner))


def _unknown(what: str, given: str, valid: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(given, valid, n=1, cutoff=0.0)[0]
    return f"{what}: expected one of {', '.join(valid)}, got {given!r}; did you mean {nearest!r}?"


# ---- options ----------------------------------------------------------------------------------------------------


def parse_options(kind: Any, arguments: list[str], prog: str, default: Any = None) -> Any:
    """Parses options into the dataclass `kind` with tyro; raises `UsageError` with one sentence."""
    if not {"-h", "--help"} & set(arguments):
        _check_names(kind, arguments)
    text = io.StringIO()
    try:
        with redirect_stderr(text):
            extra = {} if default is None else {"default": default}
            return tyro.cli(kind, args=arguments, prog=prog, **extra)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_sentence_of_box(text.getvalue())) from None


def option_names(kind: Any) -> list[str]:
    """Long options of a dataclass, nested fields by dotted names, as tyro spells them."""
    names: list[str] = []
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        hint, name = hints[f.name], f.name.strip("_").replace("_", "-")
        if dataclasses.is_dataclass(hint):
            names += [f"--{name}.{inner[2:]}" for inner in option_names(hint)]
            # tyro negates the last part (--data.no-flip); the commands' own switches have no negative.
            flags = [n for n, h in typing.get_type_hints(hint).items() if h is bool]
            names += [f"--{name}.no-{flag.replace('_', '-')}" for flag in flags]
        else:
            names.append(f"--{name}")
    return names


def _check_names(kind: Any, arguments: list[str]) -> None:
    valid = option_names(kind)
    for argument in arguments:
        name = argument.split("=", 1)[0].replace("_", "-")
        if name.startswith("--") and name not in valid:
            nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]
            raise UsageError(f"option: unknown {argument.split('=', 1)[0]!r}; did you mean {nearest!r}?")


def _sentence_of_box(text: str) -> str:
    """First paragraph of tyro's framed message as one line."""
    lines = [line.strip("│ ").strip() for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    words: list[str] = []
    for line in lines:
        if line.startswith("─"):
            break
        words.append(line)
    return " ".join(" ".join(words).split()) or "options cannot be read; see --help"


def _settings_class() -> Any:
    """Options of `pretrain`: the sections of `Config`, and what belongs to the command only."""
    hints = typing.get_type_hints(Config)
    sections: list[Any] = []
    for f in dataclasses.fields(Config):
        if dataclasses.is_dataclass(hints[f.name]):
            sections.append((f.name, hints[f.name], field(default_factory=typing.cast(Any, hints[f.name]))))
    text = "Behaviours of the published code reproduced on purpose (docs/parity.md)."
    behaviours: Any = Literal[tuple(sorted(PUBLISHED_BEHAVIOURS))]
    sections.append(("published", Annotated[tuple[behaviours, ...], tyro.conf.arg(help=text)], ()))
    sections.append(("model", Init, Init()))
    text = "Build everything, run one update without writing anything, print shapes and sizes."
    sections.append(("dry_run", Annotated[bool, tyro.conf.arg(help=text), tyro.conf.FlagCreatePairsOff], False))
    text = "Updates to record, after two others: a trace with named ranges and a table in RUN/profile; 0: none."
    sections.append(("profile", Annotated[int, tyro.conf.arg(help=text)], 0))
    return dataclasses.make_dataclass("Settings", sections, frozen=True, namespace={"__doc__": "Settings of a run."})


def settings_to_config(settings: Any, base: Config) -> Config:
    """Settings of the command line as a configuration."""
    names = [f.name for f in dataclasses.fields(Config) if hasattr(settings, f.name) and f.name != "published"]
    values = {name: getattr(settings, name) for name in names}
    return dataclasses.replace(base, **values, published=frozenset(settings.published))


# ---- commands ---------------------------------------------------------------------------------------------------


@_command("pretrain")
def _pretrain(arguments: list[str]) -> int:
    from d2v import recipes

    names = list(recipes.RECIPES)
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(f"usage: d2v pretrain RECIPE [OPTIONS]\n\nRECIPE: {', '.join(names)}")
            print("'d2v pretrain RECIPE --help' lists every option with the recipe's value.")
            return 0
        raise UsageError(f"recipe: expected one of {', '.join(names)} as the first argument, got nothing")
    base = recipes.get(arguments[0])
    kind = _settings_class()
    start = {f.name: getattr(base, f.name) for f in dataclasses.fields(kind) if hasattr(base, f.name)}
    default = kind(**{**start, "published": tuple(sorted(base.published))})
    settings = parse_options(kind, arguments[1:], f"d2v pretrain {arguments[0]}", default)
    config = settings_to_config(settings, base)
    if settings.profile < 0:
        raise UsageError(f"profile: expected 0 updates or more, got {settings.profile}")
    if settings.dry_run:
        from d2v.tools.dry_run import dry_run

        print(f"recipe       {config.recipe}\n{dry_run(config, init=settings.model.init)}")
        return 0
    from d2v.train.pretraining import pretrain

    try:
        pretrain(config, init=settings.model.init, profile=settings.profile)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


@_command("evaluate probe")
def _evaluate_probe(arguments: list[str]) -> int:
    options = parse_options(Probe, arguments, "d2v evaluate probe")
    from d2v.evaluate.probe import probe

    probe(**{f.name: getattr(options, f.name) for f in dataclasses.fields(options)})
    return 0


@_command("evaluate model")
def _evaluate_model(arguments: list[str]) -> int:
    options = parse_options(EvaluateModel, arguments, "d2v evaluate model")
    from d2v.finetune.run import evaluate_model

    evaluate_model(**{f.name: getattr(options, f.name) for f in dataclasses.fields(options)})
    return 0


@_command("finetune")
def _finetune(arguments: list[str]) -> int:
    from d2v.cli_finetune import run_command

    return run_command(arguments)


@_command("evaluate maps")
def _evaluate_maps(arguments: list[str]) -> int:
    options = parse_options(Maps, arguments, "d2v evaluate maps")
    from d2v.tools.maps import draw_maps

    print(draw_maps(**{f.name: getattr(options, f.name) for f in dataclasses.fields(options)}))
    return 0


@_command("features")
def _features(arguments: list[str]) -> int:
    options = parse_options(Features, arguments, "d2v features")
    from d2v.evaluate.features import extract

    print(extract(**{f.name: getattr(options, f.name) for f in dataclasses.fields(options)}))
    return 0


@_command("import")
def _import(arguments: list[str]) -> int:
    options = parse_options(Import, arguments, "d2v import")
    from d2v.interop.convert import import_checkpoint

    print(import_checkpoint(options.from_, options.output))
    return 0


@_command("export")
def _export(arguments: list[str]) -> int:
    options = parse_options(Export, arguments, "d2v export")
    from d2v.interop.convert import export_checkpoint

    print(export_checkpoint(options.checkpoint, options.format, options.output))
    return 0


@_command("plot")
def _plot(arguments: list[str]) -> int:
    options = parse_options(Plot, arguments, "d2v plot")
    from d2v.tools.plot import draw_report

    print(draw_report(Path(options.dir), images=options.images, count=options.count, output=options.output))
    return 0


@_command("recipes")
def _recipes(arguments: list[str]) -> int:
    _no_options("recipes", arguments)
    from d2v import recipes

    for name, function in recipes.RECIPES.items():
        config = function()
        title = (function.__doc__ or "").strip().split("\n\n")[0]
        print(f"{name:14} {' '.join(title.split())}")
        print(
            f"{'':14} depth {config.encoder.prenet_depth}+{config.encoder.depth}, width {config.encoder.width}, "
            f"{config.stem.summary}, {config.mask.copies} masks of "
            f"{config.mask.ratio:.0%}, {config.run.steps} updates of {config.data.global_batch}"
        )
    return 0


@_command("info")
def _info(arguments: list[str]) -> int:
    for argument in arguments:
        if argument not in ("--probe", "--json", "-h", "--help"):
            raise UsageError(_unknown("info", argument, ["--probe", "--json"]))
    from d2v_kernels import info

    info.main(arguments)
    return 0


@_command("data textures")
def _textures(arguments: list[str]) -> int:
    options = parse_options(Textures, arguments, "d2v data textures")
    from d2v.tools.textures import write_textures

    counts = {"train": options.train_crops, "valid": options.valid_crops, "test": options.test_crops}
    if options.pretrain_crops:
        counts["pretrain"] = options.pretrain_crops
    print(write_textures(Path(options.output), seed=options.seed, size=options.size, counts=counts))
    return 0


@_command("data pack")
def _pack(arguments: list[str]) -> int:
    options = parse_options(Pack, arguments, "d2v data pack")
    from d2v.data.pack import PackSettings, pack

    settings = PackSettings(
        kind=options.kind, labelled=options.labelled, shard_bytes=round(options.shard_megabytes * 1e6),
        shard_samples=options.shard_samples, seed=options.seed, in_order=options.in_order, unchecked=options.unchecked,
    )  # fmt: skip
    workers, commands = options.workers, options.allow_commands
    print(pack(options.input, Path(options.output), settings, workers=workers, commands=commands))
    return 0


@_command("data tokenizer")
def _tokenizer(arguments: list[str]) -> int:
    options = parse_options(Tokenizer, arguments, "d2v data tokenizer")
    from d2v.data.tokenizer import write_tokenizer

    output = Path(options.output)
    print(write_tokenizer(output, options.data.path, vocabulary=options.vocabulary, gpt2=options.gpt2))
    return 0


def _no_options(command: str, arguments: list[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: d2v {command}")
        raise SystemExit(0)
    if arguments:
        raise UsageError(f"{command}: expected no options, got {arguments[0]!r}")
