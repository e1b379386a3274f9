"""Options of other programs beside our settings: one table, read in both directions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from d2v.config import Config

Convert = Callable[[Any, Any], Any]


def _same(value: Any, _: Any) -> Any:
    return value


@dataclass(frozen=True)
class Option:
    """An option of another program and the setting that says the same."""

    name: str
    """Theirs."""
    field: str
    """Ours: section and field."""
    default: Any = None
    """Of the other program; a function gets the settings that were read before."""
    read: Convert = _same
    """Our value from theirs and the settings that were read before."""
    write: Convert = _same
    """Their value from ours and the whole configuration."""


def read_options(options: Iterable[Option], get: Callable[[str, Any], Any], own: dict[str, Any]) -> None:
    """Adds our settings to `own`; `get` takes the name of an option and its default."""
    for option in options:
        default = option.default(own) if callable(option.default) else option.default
        own[option.field] = option.read(get(option.name, default), own)


def write_options(options: Iterable[Option], config: Any) -> dict[str, Any]:
    """The options that say what our settings (a `Config`, or one section of it) say."""
    return {option.name: option.write(setting_of(config, option.field), config) for option in options}


def setting_of(config: Any, field: str) -> Any:
    """The value of a setting by its dotted name in a configuration or a section."""
    return functools.reduce(getattr, field.split("."), config)


def apply(base: Config, own: dict[str, Any], **more: Any) -> Config:
    """A configuration with other settings, by section and field; `more`: fields outside any section."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in own.items():
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = value
    made: dict[str, Any] = {s: dataclasses.replace(getattr(base, s), **v) for s, v in sections.items()}
    return dataclasses.replace(base, **made, **more)


# ---- conversions of several programs ----------------------------------------------------------------------------


def hidden_ratio(hidden: int, width: int) -> float:
    """Ratio that gives the hidden width back when multiplied by the width and cut to an integer."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def as_float(value: Any, _: Any) -> float:
    """A number as float."""
    return float(value)


def as_int(value: Any, _: Any) -> int:
    """A number as integer."""
    return int(value)


def as_bool(value: Any, _: Any) -> bool:
    """A truth value."""
    return bool(value)


def hidden_option(name: str, default: Any = None) -> Option:
    """Hidden width of the MLPs, which we keep as a ratio; the width was read before."""
    return Option(
        name,
        "encoder.mlp_ratio",
        default,
        lambda v, own: hidden_ratio(int(v), own["encoder.width"]),
        lambda v, config: round(config.encoder.width * v),
    )
