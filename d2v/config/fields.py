"""How a setting is declared: default, range, where it applies; and how sections of settings are checked and built."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import reprlib
import sys
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

_BOUNDS = {"low": operator.ge, "high": operator.le, "above": operator.gt, "below": operator.lt}


def setting(
    default: Any = dataclasses.MISSING, *, low: float | None = None, high: float | None = None,
    above: float | None = None, below: float | None = None, only: str = "", free: bool = False, rare: bool = False,
    option: str | None = "", choices: Collection[str] = (), positional: bool = False, outside: bool = False,
) -> Any:  # fmt: skip
    """A field of a dataclass of settings.

    Args:
        default: its value; a field without one is an option that must be given.
        low, high, above, below: range of a number, `low` and `high` included. None is always in range.
        only: words that must all be in `Config.traits`, or name the command or task, for the field to have an effect;
            the help leaves others out.
        free: may change when a run is resumed: the sequence of updates stays as it is.
        rare: listed at the end of the help.
        option: name on the command line, where it is not the field's; None: not on the command line.
        choices: names that a set of names may hold.
        positional: given on the command line without a name.
        outside: opens, runs or writes something outside a model's folder; counts only where the caller gives it, never
            from a folder's `config.json`.
    """
    metadata = dict(
        low=low, high=high, above=above, below=below, only=only, free=free, rare=rare, option=option, choices=choices,
        positional=positional, outside=outside,
    )  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def check_ranges(section: Any, name: str = "") -> None:
    """`ValueError` names a number that is out of its field's range, in a section or in those inside it."""
    for f in dataclasses.fields(section):
        value, own = getattr(section, f.name), f.metadata.get("option") or f.name
        path = f"{name}.{own}" if name else own
        if dataclasses.is_dataclass(value):
            check_ranges(value, path)
            continue
        bounds = {key: f.metadata[key] for key in _BOUNDS if f.metadata.get(key) is not None}
        if value is not None and not all(_BOUNDS[key](value, bound) for key, bound in bounds.items()):
            raise ValueError(f"{path}: expected {_describe(**bounds)}, got {value}")
        if any(isinstance(v, float) and math.isnan(v) for v in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{path}: expected a number, got {value}")


def _describe(
    low: float | None = None, high: float | None = None, above: float | None = None, below: float | None = None
) -> str:
    upper = "" if high is None and below is None else f"below {below}" if high is None else f"at most {high}"
    if low is None:
        return ", ".join([f"above {above}"] * (above is not None) + [upper] * bool(upper))
    return f"{low} to {upper.removeprefix('at most ')}" if upper else f"{low} or more"


def require(condition: bool, name: str, expected: str, config: Any) -> None:
    """`ValueError` naming a setting by its dotted name, what was expected and what was given."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {operator.attrgetter(name)(config)}")


def flat_fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """Fields of a dataclass by name, those of its sections by dotted names."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.default_factory):
            found |= {f"{f.name}.{name}": inner for name, inner in flat_fields(f.default_factory).items()}
        else:
            found[f.name] = f
    return found


def replace_fields(owner: Any, changes: Mapping[str, Any], where: str = "") -> Any:
    """A dataclass with other values of fields, which dotted names lead to through its sections.

    Raises:
        ValueError: a value of another type; the text begins with `where` and the name.
    """
    shown = {f.name: where + (f.metadata.get("option") or f.name) for f in dataclasses.fields(owner)}
    kind: Any = type(owner)
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, rest = name.partition(".")
        if rest:
            inner.setdefault(section, {})[rest] = value
        else:
            own[name] = _convert(_hints(kind)[name], value, shown[name])
    own |= {name: replace_fields(getattr(owner, name), part, f"{shown[name]}.") for name, part in inner.items()}
    return dataclasses.replace(owner, **own)


def forget_places(config: Any) -> Any:
    """A configuration of a folder without what opens, runs or writes something outside it (`setting(outside=True)`)."""
    found = {name: f.default for name, f in flat_fields(type(config)).items() if f.metadata.get("outside")}
    return replace_fields(config, found)


OF_CALLS = ("data.allow_commands", "data.cache", "target.cache", "run.compile_cache", "run.local_checkpoint")
"""Settings that choose where to write or run something: with run.dir never taken from a file."""


def find_nearest(name: str, valid: Collection[str]) -> str:
    """The valid name that is most like another."""
    return difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]


def build_section(cls: Any, value: dict[str, Any], where: str) -> Any:
    """A dataclass of settings from JSON; `ValueError`, beginning with `where`, names unknown fields and values of
    another type."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, got {shorten(value)}")
    fields, hints = {f.name: f for f in dataclasses.fields(cls)}, _hints(cls)
    if unknown := sorted(set(value) - set(fields)):
        raise ValueError(f"{where}: unknown fields {unknown}; expected {sorted(fields)}")
    kwargs: dict[str, Any] = {}
    for name, item in value.items():
        section = fields[name].default_factory
        if dataclasses.is_dataclass(section):
            kwargs[name] = build_section(section, item, f"{where}.{name}")
        else:
            kwargs[name] = _convert(hints[name], item, f"{where}.{name}")
    return cls(**kwargs)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """A value of a field's type from JSON: lists become tuples or sets; `ValueError` names one of another type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (tuple, frozenset) and isinstance(value, (list, tuple, set, frozenset)):
        variadic = origin is frozenset or inner[1:] == (...,)
        if inner == (str, ...):  # words, of which some may be numbers: data.image_range
            value = [str(item) if type(item) in (int, float) else item for item in value]
        if variadic or len(inner) == len(value):
            kinds = [inner[0]] * len(value) if variadic else inner
            return origin(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    elif origin in (typing.Union, types.UnionType):
        return value if value is None else _convert(inner[0], value, where)
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in inner):
            return value
    elif hint is float:
        if type(value) in (int, float) and (value == math.inf or not abs(value) > sys.float_info.max):
            return value
    elif hint is int:
        if type(value) is int and abs(value) < 1 << 63:
            return value
    elif type(value) is hint or (hint is Path and isinstance(value, Path)):
        return value
    expected = f"one of {', '.join(map(str, inner))}" if origin is Literal else str(hint) if inner else hint.__name__
    raise ValueError(f"{where}: expected {expected}, got {shorten(value)}")


def shorten(value: Any) -> str:
    """A value of a file in a message: of a large or deeply nested one the beginning."""
    text = reprlib.repr(value) if isinstance(value, (list, tuple, dict)) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a configuration's JSON object by dotted name."""
    flat: dict[str, Any] = {}
    for section, value in config.items():
        flat |= {f"{section}.{n}": v for n, v in value.items()} if isinstance(value, Mapping) else {section: value}
    return flat
