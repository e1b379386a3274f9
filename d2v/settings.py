"""Where the settings of a run come from: a recipe, a file over it (TOML or JSON), the command line over both."""

from __future__ import annotations

import importlib
import json
import operator
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from d2v import recipes
from d2v.config import Config
from d2v.config.commands import Pretrain
from d2v.config.fields import OF_CALLS, check_ranges, find_nearest, flat_fields, replace_fields
from d2v.config.finetune import SECTION, read_config
from d2v.config.model import take_architecture
from d2v.files import open_regular, parse_json
from d2v.options import UsageError, advise, list_options

ONLY_OPTIONS = frozenset({"run.dir", *(name.replace("_", "-") for name in OF_CALLS)})
"""What chooses where to write, or runs something: counts on the command line only."""
COMMAND_LINE = "command line"
TRACK = "--run.track"


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value of an option, the last one where it is given twice, before the command line is read."""
    found = None
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option and (equals or arguments[i + 1 :]):
            found = value if equals else arguments[i + 1]
    return found


def has_run(arguments: Sequence[str]) -> bool:
    """Whether --run.dir holds a run."""
    folder = value_of("--run.dir", arguments)
    return folder is not None and any((Path(folder) / name).exists() for name in ("config.json", "checkpoints"))


def load_recipe(name: str) -> Config:
    """The configuration of a recipe by its name, or that a function of a Python file returns: FILE.py:FUNCTION.

    Runs that file, so only for names that the user gave on the command line.
    """
    if not name.rpartition(":")[0].endswith(".py"):
        return recipes.get(name)
    config = load_code(name, "recipe")()
    if type(config) is not Config:
        raise UsageError(f"recipe: expected a d2v.Config from {name}, got {type(config).__name__}")
    return config


def load_code(name: str, option: str) -> Any:
    """The function or class that FILE.py:FUNCTION names. Runs that file, so only for names that the user gave on the
    command line."""
    file, _, function = name.rpartition(":")
    names = runpy.run_path(file)
    if not callable(names.get(function)):
        valid = [key for key, value in names.items() if callable(value) and not key.startswith("_")] or [""]
        nearest = find_nearest(function, valid)
        raise UsageError(f"{option}: expected a function of {file}, got {function!r}; did you mean {nearest!r}?")
    return names[function]


def take_code(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments without the FILE.py:FUNCTION of --run.track, and these: no setting holds them, as settings are stored,
    and what is stored must not name code."""
    kept: list[str] = []
    code: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("--"):
            option, equals, value = argument.partition("=")
            inside = option == TRACK
            if inside and equals:
                kept.append(option)
                argument = value
        (code if inside and ".py:" in argument else kept).append(argument)
    if code and (following := kept[kept.index(TRACK) + 1 :][:1]) in ([], [o for o in following if o.startswith("--")]):
        kept.insert(kept.index(TRACK) + 1, "none")
    return kept, code


def read_file(file: str) -> dict[str, Any]:
    """Settings in a file, JSON where its name ends so, else TOML; `ValueError` says why it cannot be read."""
    is_json = file.endswith(".json")
    try:
        with open_regular(file) as stream:
            text = stream.read().decode("utf-8-sig")
        if is_json:
            return parse_json(text)
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        values: dict[str, Any] = toml.loads(text)
        return values
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: expected {'JSON' if is_json else 'TOML'}, got what cannot be read: {error}"
        ) from None


def apply_file(owner: Any, values: Mapping[str, Any], file: str) -> tuple[Any, list[str]]:
    """A configuration, or the options of a fine-tuning, with the values of a file; and the names of these options.

    Keys are options with dashes or underscores, in tables or dotted. `ValueError` names file, key, expected and got.
    """
    known = {o.name: o for o in list_options(type(owner)) if isinstance(owner, Config) or "." in o.name}
    fields = {name: ".".join(o.path) for name, o in known.items()}
    if isinstance(owner, Config):
        fields |= {"recipe": "recipe", "version": "version"}
    left_out = ONLY_OPTIONS if isinstance(owner, Config) else ONLY_OPTIONS | {"data.path", "data.valid"}
    changes, ignored = {}, []
    for key, value in _flatten(values):
        name = key.replace("_", "-")
        if name not in fields:
            advice = advise(f"--{name}", [f"--{valid}" for valid in fields]).replace("'--", "'")
            raise ValueError(f"{file}: expected a setting, got {key!r}; {advice}")
        if name in changes:
            raise ValueError(f"{file}: expected {name} once, got it with a dash and with an underscore")
        if name in left_out:
            ignored += [name] * (value != operator.attrgetter(fields[name])(owner))
        else:
            unset = value == "None" and type(None) in get_args(known[name].kind if name in known else str)
            changes[name] = None if unset else value
    try:
        changed = replace_fields(owner, {fields[name]: value for name, value in changes.items()})
        check_ranges(changed)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if ignored:
        print(f"note: {file}: these count on the command line only: {', '.join(ignored)}", file=sys.stderr)
    return changed, list(changes)


def _flatten(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{section}.{name}", inner) for name, inner in value.items())
        else:
            yield section, value


def _base_of(values: Mapping[str, Any], file: str) -> tuple[Config, Config]:
    """The recipe that a file names, and the configuration that its values go over: of a file with every section, such
    as a run's config.json, the defaults, and it may name a recipe that is not ours."""
    name = values.get("recipe", "")
    whole = {f.partition(".")[0] for f in flat_fields(Config) if "." in f} - {"probe"} <= set(values)  # older runs
    if isinstance(name, str) and ".py" in name:
        raise ValueError(
            f"{file}: recipe: expected a name, got {name!r}: a file with code counts on the command line only"
        )
    if whole:
        return recipes.get(name) if name in list(recipes.RECIPES) else Config(), Config()
    if not name or not isinstance(name, str):
        got = repr(name) if name else "nothing"
        raise ValueError(f"{file}: recipe: expected the name of a recipe here or on the command line, got {got}")
    try:
        return (recipes.get(name),) * 2
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def pretrain_defaults(recipe: str, arguments: Sequence[str]) -> tuple[Pretrain, Config]:
    """Options before the command line is read: of the recipe, with the architecture of --model.init, with the values of
    --config; or, with neither recipe nor file, those of the run in --run.dir."""
    recipe = recipe or value_of("--recipe", arguments) or ""
    init, file = value_of("--model.init", arguments), value_of("--config", arguments)
    values = read_file(file) if file is not None else {}
    if SECTION in values:
        raise ValueError(f"{file}: expected settings of pre-training, got those of a fine-tuned model")
    if recipe:
        base = config = load_recipe(recipe)
    elif file is not None:
        base, config = _base_of(values, file)
    else:
        from d2v.train.run_dir import read_run

        base = config = read_run(str(value_of("--run.dir", arguments)))
        if config.data.path.startswith("pipe:") and "--data.allow-commands" not in arguments:
            print("note: --data.allow-commands is not stored and has to be given again", file=sys.stderr)
    origin = "run" if not (recipe or file) else "recipe" if base.recipe or recipe else "default"
    sources: dict[str, str] = {}
    if (recipe or file) and init and not {"-h", "--help"} & set(arguments):
        from d2v.folder import CONFIG, find_checkpoint

        config = take_architecture(config, read_config(find_checkpoint(init, "model.init") / CONFIG))
    if file is not None:
        config, names = apply_file(
            config, {**values, "recipe": config.recipe if recipe else values.get("recipe", "")}, file
        )
        sources = dict.fromkeys(names, file)
    given = {argument.partition("=")[0].replace("_", "-").replace(".no-", ".") for argument in arguments}
    sources |= {o.name: COMMAND_LINE for o in list_options(Config) if f"--{o.name}" in given}
    return Pretrain(config=config, base=base, origin=origin, sources=tuple(sources.items())), config


def describe_sources(config: Config, base: Config, origin: str, sources: Mapping[str, str]) -> str:
    """A line for every setting that differs from its `origin`, the recipe mostly: value, where it came from, value
    there."""
    before = {o.name: o.default for o in list_options(Config, base)}
    shown = {name: "nothing" if value == "" else value for name, value in before.items()}
    lines = [
        f"{o.name} {o.default}: {sources.get(o.name, '--model.init')} ({origin}: {shown[o.name]})"
        for o in list_options(Config, config)
        if o.default != before[o.name]
    ]
    lines.append(f"{'all others' if lines else 'all'}: {origin}")
    return "\n".join(f"{'' if i else 'settings':12} {line}" for i, line in enumerate(lines))


def write_toml(config: Config) -> str:
    """A configuration as TOML that --config takes, without the places that only a run has; what is unset is "None"."""
    lines = [f"{name} = {_toml_value(getattr(config, name))}" for name in ("recipe", "version", "published")]
    section = ""
    for name, field in flat_fields(Config).items():
        if "." in name and not field.metadata.get("outside"):
            if section != (section := name.partition(".")[0]):
                lines.append(f"\n[{section}]")
            lines.append(f"{name.partition('.')[2]} = {_toml_value(operator.attrgetter(name)(config))}")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, (tuple, frozenset)):
        return f"[{', '.join(map(_toml_value, sorted(value) if isinstance(value, frozenset) else value))}]"
    if value is None:
        return '"None"'
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
