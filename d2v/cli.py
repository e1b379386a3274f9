"""The `d2v` command.

A command is a row of `COMMANDS`: a dataclass of options (`d2v.config.commands`) and the function that takes its fields.
Input that cannot be used ends with one sentence on standard error and exit code 2; a run that had to stop (NaN,
collapse) with exit code 1.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from d2v import recipes
from d2v.config import Config, Data
from d2v.config import commands as options
from d2v.config.fields import build_section, check_ranges, find_nearest
from d2v.config.finetune import SECTION, TASKS
from d2v.config.inputs import find_kind
from d2v.options import UsageError, parse_options
from d2v.settings import (
    apply_file,
    describe_sources,
    has_run,
    load_code,
    load_recipe,
    pretrain_defaults,
    read_file,
    take_code,
    value_of,
    write_toml,
)  # fmt: skip
from d2v.sweep import sweep

EXTRAS = {
    "train": "tyro tomli PIL webdataset tensorboard tqdm matplotlib sklearn soundfile scipy tokenizers",
    "av": "av",
    "finetune": "jiwer flashlight",
    "quickstart": "skimage",
    "interop": "transformers",
    "onnx": "onnx onnxscript",
    "parquet": "pyarrow",
}
"""Optional dependencies by the extra of this package that brings them; `d2v --help` and `d2v info` need none."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with (
            _requeue_on_signals()
            if arguments[:1] in (["pretrain"], ["finetune"], ["sweep"])
            else contextlib.nullcontext()
        ):
            code = _dispatch(arguments)
            sys.stdout.flush()  # here, where it may fail
            return code
    except BrokenPipeError:  # what read the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"d2v: {_one_sentence(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        extra = next((extra for extra, names in EXTRAS.items() if missing in names.split()), None)
        if extra is None:
            raise
        print(f"d2v: this command needs {missing}: pip install 'd2v[{extra}]'", file=sys.stderr)
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


@contextlib.contextmanager
def _requeue_on_signals() -> Iterator[None]:
    """Outside of the training, which has its own handlers, SIGTERM and SIGUSR1 end the process with the code that says:
    start it again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: Any) -> None:
        print(f"{signal.Signals(number).name}: stopping; the same command goes on", file=sys.stderr)
        raise SystemExit(os.EX_TEMPFAIL)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _one_sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        raise UsageError(f"command: expected one of {', '.join(COMMANDS)}, got nothing; see d2v --help")
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if name in COMMANDS:
            return _run(name, arguments[length:])
    group = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    if arguments[0] in ("-h", "--help", "help") or (group and arguments[1:2] in (["-h"], ["--help"])):
        _print_commands(group or COMMANDS)
        return 0
    if arguments[0] == "--version":
        from d2v import __version__

        print(f"d2v {__version__}")
        return 0
    if group:
        raise UsageError(_unknown(arguments[0], "".join(arguments[1:2]), [name.split()[1] for name in group]))
    groups = sorted({name.split()[0] for name in COMMANDS})
    last = {name.split()[-1]: name for name in COMMANDS}  # also of those who leave out the first word
    raise UsageError(_unknown("command", arguments[0], groups, last))


def _unknown(what: str, given: str, valid: Collection[str], more: dict[str, str] | None = None) -> str:
    names = {name: name for name in valid} | (more or {})
    nearest = names[find_nearest(given.replace("_", "-"), names)]
    return f"{what}: expected one of {', '.join(valid)}, got {given!r}; did you mean {nearest!r}?"


def _print_commands(names: Collection[str]) -> None:
    rows = {f"{name} {COMMANDS[name].word}".strip(): COMMANDS[name].summary for name in names}
    print("usage: d2v COMMAND [OPTIONS]\n\ncommands:")
    print("\n".join(f"  {name:{max(map(len, rows))}}  {summary}" for name, summary in rows.items()))
    print(
        "\n'd2v COMMAND --help' lists the options of a command; 'd2v pretrain RECIPE --help' shows the recipe's values."
    )


def _run(name: str, arguments: list[str]) -> int:
    command, default, traits, note = COMMANDS[name], None, None, ""
    code: list[str] = []
    if command.word:
        valid, word = list(command.choices), command.word
        if arguments[:1] in (["-h"], ["--help"]):
            text = inspect.getdoc(command.options)
            print(f"usage: d2v {name} {word} [OPTIONS]\n\n{text}\n\n{word}: {', '.join(valid)}")
            print(f"'d2v {name} {word} --help' lists the options with the values of that {word}.")
            return 0
        first, arguments = _take_first(name, arguments)
        if name == "sweep" and not {"-h", "--help"} & set(arguments):
            return sweep(first, arguments)
        arguments, code = take_code(arguments)
        assert command.defaults is not None
        default, config = command.defaults(first, arguments)
        traits = config.traits | {name, *first.split("-")}
        note = f"Options without effect on {first or config.recipe} are not listed."
        name = f"{name} {first}".strip()
    values = parse_options(command.options, arguments, f"d2v {name}", default, command.first, traits, note)
    settings = build_section(command.options, {**values, "track": code} if code else values, name)
    check_ranges(settings)
    function = command.function
    if isinstance(function, str):
        module, _, function_name = function.partition(":")
        function = getattr(importlib.import_module(module), function_name)
    try:
        result = function(**vars(settings))
    except SystemExit as stop:  # after a signal, once a checkpoint is saved
        return stop.code if isinstance(stop.code, int) else 1
    if isinstance(result, str):
        print(result)
    return 0


def _take_first(name: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The argument in front of the options, "" where an option or a run folder stands for it, and the others."""
    word, valid = COMMANDS[name].word.lower(), list(COMMANDS[name].choices)
    first = arguments[0] if arguments else "-"
    recipe = value_of("--recipe", arguments) if word == "recipe" else None
    if not first.startswith("-"):
        if recipe is not None:
            raise UsageError(f"recipe: expected one, got {first!r} and {recipe!r}")
        arguments = arguments[1:]
    elif recipe is not None or (word == "recipe" and value_of("--config", arguments)):
        first = recipe or ""
    elif name == "pretrain" and has_run(arguments):
        first = ""
    else:
        place = "as the first argument" + (", --recipe or --config FILE" if word == "recipe" else "")
        raise UsageError(f"{word}: expected one of {', '.join(valid)} {place}, got nothing")
    if first and first not in valid and not (word == "recipe" and ".py:" in first):
        raise UsageError(_unknown(word, first, valid))
    return first, arguments


# ---- what runs a command, where it is not one call -----------------------------------------------------------------


def _pretrain(
    config: Config, init: str | None, dry_run: bool, profile: int, track: Sequence[str], **given: Any
) -> str | None:  # fmt: skip
    if dry_run:
        from d2v.tools.dry_run import dry_run as describe

        sources = describe_sources(config, given["base"], given["origin"], dict(given["sources"]))
        return f"recipe       {config.recipe}\n{sources}\n{describe(config, init=init)}"
    from d2v.evaluate.watch import RunProbe
    from d2v.train.pretraining import pretrain

    code = [load_code(name, "run.track") for name in track]
    pretrain(config, init=init, profile=profile, probe=RunProbe, track=code, plan=given["plan"])
    return None


def _plan(config: Config, base: Config, origin: str, machine: str, **given: Any) -> str:
    from d2v.tools.plan import plan

    if given["dry_run"] or given["profile"] or given["plan"]:
        raise UsageError("plan: expected no --dry-run, --profile or --run.plan, as nothing is run; got one of them")
    names = ("gpus", "hours", "mfu", "network", "failures", "measured", "measured_gpus", "run_folder", "output")
    own: Any = read_file(machine) if machine.endswith((".toml", ".json")) else machine
    base = base if origin == "recipe" else config
    return plan(config, base, own, given=dict(given["sources"]), **{name: given[name] for name in names})


def _finetune(
    checkpoint: str, train: str, valid: str | None, test: str | None, data: Data, file: str | None,
    track: Sequence[str], **others: Any,
) -> None:  # fmt: skip
    for name, value in (("checkpoint", checkpoint), ("train", train)):
        if not value:
            raise UsageError(f"{name}: expected a path, got nothing")
    if data.path:
        raise UsageError(f"data.path: expected nothing, --train names the data; got {data.path!r}")
    from d2v.finetune.run import finetune

    data = data if valid is None else replace(data, valid=valid)
    code = [load_code(name, "run.track") for name in track]
    finetune(checkpoint=checkpoint, train_path=train, test_path=test, data=data, track=code, **others)


def _finetune_defaults(task: str, arguments: list[str]) -> tuple[options.FineTuning, Config]:
    """Options before the command line is read: they follow the model that --checkpoint names."""
    checkpoint = value_of("--checkpoint", arguments)
    if checkpoint is not None:
        from d2v.finetune.run import read_defaults

        config, sections = read_defaults(task, checkpoint, value_of("--data.tokenizer", arguments))
    else:  # for the help
        from d2v.finetune.defaults import MODALITIES, default_sections

        config = recipes.get(f"{MODALITIES[task]}-base")
        sections = default_sections(task, config)
    optim, data, run, task_options = sections
    default = options.FineTuning(task=task, optim=optim, data=data, run=run, options=task_options)
    if (file := value_of("--config", arguments)) is not None:
        values = read_file(file)
        if isinstance(tuned := values.get(SECTION), dict):  # of a run
            values = {key: value for key, value in values.items() if key in ("optim", "data", "run")}
            values["task"] = tuned.get("options", {})
        default, _ = apply_file(default, values, file)
    return default, config


def _list_recipes(show: str | None) -> str:
    if show is not None:
        return write_toml(load_recipe(show))
    lines = []
    for name, function in recipes.RECIPES.items():
        config, title = function(), (function.__doc__ or "").strip().split("\n\n")[0]
        lines += [
            f"{name:14} {' '.join(title.split())}",
            f"{'':14} depth {config.encoder.prenet_depth}+{config.encoder.depth}, width {config.encoder.width}, "
            f"{find_kind(config.stem.modality).describe(config.stem)}, {config.mask.copies} masks of "
            f"{config.mask.ratio:.0%}, {config.run.steps} updates of {config.data.global_batch}",
        ]
    return "\n".join(lines)


def _info(**flags: bool) -> None:
    from d2v_kernels import info

    info.main([f"--{name}" for name, on in flags.items() if on])


def _textures(output: Path, seed: int, size: int, **crops: int) -> str:
    from d2v.tools.textures import write_textures

    counts = {name.removesuffix("_crops"): count for name, count in crops.items() if count}
    return write_textures(output, seed=seed, size=size, counts=counts)


def _pack(
    input: str, output: Path, shard_megabytes: float, workers: int, allow_commands: bool, **settings: Any
) -> str:  # fmt: skip
    from d2v.data.pack import PackSettings, pack

    what = PackSettings(shard_bytes=round(shard_megabytes * 1e6), **settings)
    return pack(input, output, what, workers=workers, commands=allow_commands)


class Command(NamedTuple):
    """One command.

    Fields: summary; options (their dataclass); function (takes their values; "module:name" is imported when the command
    runs; text that it returns is printed); first (options that the help begins with). Where an argument stands in front
    of the options: word (what it is called), choices, and defaults (makes of it and of the other arguments the options
    before they are read, and a configuration of the model, which decides what the help lists).
    """

    summary: str
    options: Any
    function: Callable[..., Any] | str
    first: tuple[str, ...] = ()
    word: str = ""
    choices: Collection[str] = ()
    defaults: Callable[[str, list[str]], tuple[Any, Config]] | None = None


COMMANDS = {
    "pretrain": Command(
        "pre-train a model; resumes if --run.dir holds a checkpoint", options.Pretrain, _pretrain,
        ("data.path", "run.dir", "run.steps", "data.global-batch", "optim.learning-rate", "data.valid", "model.init"),
        "RECIPE", recipes.RECIPES, pretrain_defaults,
    ),
    "sweep": Command(
        "pre-train with all combinations of several values", options.Sweep, sweep,
        ("data.path", "run.dir", "slurm", "run.seed", "run.steps", "optim.learning-rate", "data.valid", "model.init"),
        "RECIPE", recipes.RECIPES, pretrain_defaults,
    ),
    "plan": Command(
        "whether a run fits on N GPUs, how long it takes, what it moves: estimates", options.Plan, _plan,
        ("gpus", "machine", "hours", "data.global-batch", "data.micro-batch", "run.parallel", "mfu", "measured",
         "measured-gpus", "run", "network", "failures", "output", "model.init"),
        "RECIPE", recipes.RECIPES, pretrain_defaults,
    ),
    "finetune": Command(
        "train a head and the encoder on labels; resumes if --run.dir holds a checkpoint", options.FineTuning,
        _finetune,
        ("checkpoint", "train", "valid", "test", "run.dir", "task.epochs", "data.global-batch", "optim.learning-rate"),
        "TASK", TASKS, _finetune_defaults,
    ),
    "evaluate probe": Command(
        "linear probe, kNN and few-label accuracy on frozen features", options.Probe, "d2v.evaluate.probe:probe"
    ),
    "evaluate model": Command(
        "scores of a fine-tuned model: accuracy, F1, correlation, or word error rate", options.EvaluateModel,
        "d2v.finetune.run:evaluate_model",
    ),
    "evaluate maps": Command(
        "figures: similarity of features, masks, classes in two dimensions", options.Maps, "d2v.tools.maps:draw_maps"
    ),
    "features": Command(
        "features of images, speech or text to one file, with an index beside it", options.Features,
        "d2v.evaluate.features:extract",
    ),
    "transcribe": Command(
        "text of recordings, with the times of words, by a model fine-tuned on transcripts", options.Transcribe,
        "d2v.finetune.predict:transcribe", ("checkpoint",),
    ),
    "import": Command(
        "read a published fairseq checkpoint or a Hugging Face folder", options.Import,
        "d2v.interop.convert:import_checkpoint",
    ),
    "export": Command(
        "write a checkpoint as safetensors, for Hugging Face (1.0), fairseq, torch.export or ONNX", options.Export,
        "d2v.interop.convert:export_checkpoint",
    ),
    "plot": Command(
        "plot a run: metrics, probes, similarity of features -> DIR/report.png", options.Plot,
        "d2v.tools.plot:draw_report",
    ),
    "compare": Command(
        "table and curves of several runs or a sweep, means over seeds, tests of differences", options.Compare,
        "d2v.tools.compare:compare",
    ),
    "watch": Command(
        "progress of runs, and what is wrong with one, until all have ended", options.Watch, "d2v.tools.watch:watch"
    ),
    "audit": Command(
        "replay updates of a run and compare them, bit for bit, with what it wrote down", options.Audit,
        "d2v.tools.audit:audit",
    ),
    "recipes": Command("list the recipes", options.Recipes, _list_recipes),
    "info": Command("which operators and backends this installation can run, and why not", options.Info, _info),
    "data textures": Command(
        "write the quick-start images: crops of photographs from the scikit-image package", options.Textures, _textures
    ),
    "data pack": Command("write images, speech or text as shards of even size", options.Pack, _pack),
    "data tokenizer": Command(
        "train a tokenizer on text, or take over another one", options.Tokenizer,
        "d2v.interop.tokenizer:write_tokenizer", ("output", "data.path"),
    ),
}  # fmt: skip
"""All commands, in the order of the help."""
