"""Datasets and loaders. Every random choice about a sample is a function of (seed, epoch, sample id)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2v.config import Config
from d2v.config.inputs import KINDS, InputKind, build_part, find_kind

if TYPE_CHECKING:
    from d2v.data.dataset import Modality


def make_modality(config: Config) -> Modality:
    """How the data of a configuration is found, decoded and stacked; `ValueError` for settings that do not fit it.

    A modality is imported where it is used: each needs libraries that the others do not.
    """
    modality: Modality = build_part(find_kind(config.stem.modality).modality, config)
    return modality


def register_modality(kind: type[Modality]) -> type[Modality]:
    """Makes a kind of input of one's own known by its `name`, which `stem.modality` can then have; also a decorator.

    A process that uses such a model registers it first: of the class a model's folder has the name only. `ValueError`:
    no name, or one that another class has.
    """
    known = KINDS.get(kind.name)
    if not kind.name or (known is not None and getattr(known.modality, "__qualname__", None) != kind.__qualname__):
        raise ValueError(f"register_modality: expected a name besides {', '.join(KINDS)}, got {kind.name!r}")
    KINDS[kind.name] = InputKind(kind.make_stem, kind, frozenset(kind.words), grid=kind.grid)
    return kind
