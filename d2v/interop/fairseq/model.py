"""Models from published configurations and named tensors, and their tensors by published names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from d2v.config import Config
from d2v.interop.fairseq.config import translate
from d2v.interop.fairseq.names import (
    DERIVED,
    FAMILIES,
    Entry,
    family_of,
    format_number,
    student_entries,
    teacher_entries,
)
from d2v.interop.torch_file import check_weights
from d2v.model.data2vec import Data2Vec


def build(
    config: dict[str, Any],
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor] | None,
    *,
    family: str,
    mask_token: int | None = None,
) -> Data2Vec:
    """A model from a fairseq model configuration and named tensors.

    It reproduces every behaviour of the family's published code (`Config.published`) but the teacher of 1.0 text that
    sees masked tokens only.

    Args:
        config: the `model` section of a fairseq configuration, resolved to plain values.
        student: tensors by published names; kept in float32.
        teacher: tensors by the names of the published `_ema` entry; None: a copy of the student. What the published
            code copies into the teacher at every step is the student's own here, and not read.
        family: one of `FAMILIES`.
        mask_token: id of the mask token of 1.0 text; other families take None. The padding id of text is 1.

    Raises:
        ValueError: unknown family, missing, unexpected or misshapen tensors. NotImplementedError: an option that is not
            built, by name.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    if (mask_token is None) == (family == "d2v1_text"):
        expected = "the id of the mask token" if family == "d2v1_text" else "None"
        raise ValueError(f"mask_token: expected {expected} for {family}, got {mask_token}")
    shapes = {name: tuple(t.shape) for name, t in student.items()}
    return assemble(translate(config, family, shapes, mask_token), student, teacher)


def assemble(
    config: Config,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor] | None,
    optional: re.Pattern[str] | None = None,
    prepare: Callable[[Data2Vec], object] | None = None,
) -> Data2Vec:
    """A model with tensors by published names; arguments as of `build`. Names that `optional` matches may be missing:
    such tensors start at random. `prepare` takes parts out of the model first."""
    # The averages are used as they are; the random weights drawn here are overwritten.
    with torch.random.fork_rng(devices=[]):
        model = Data2Vec(config)
    if prepare is not None:
        prepare(model)
    _load("student", student_entries(model), student, optional)
    model.teacher.copy_student()
    if teacher is not None:
        entries = list(teacher_entries(model))
        shared = {entry.name for entry, averaged in entries if not averaged}
        own = [e for e, averaged in entries if averaged and not e.name.endswith(DERIVED)]
        _load("teacher", own, {n: t for n, t in teacher.items() if n not in shared})
    return model


def parameters(model: Data2Vec) -> dict[str, Tensor]:
    """The student's tensors by published names, fixed positions included: live views without gradient."""
    return {entry.name: entry.view(entry.tensor.detach()) for entry in student_entries(model)}


def gradients(model: Data2Vec) -> dict[str, Tensor]:
    """Gradients of the student's parameters by published names; those without a gradient are absent."""
    return {e.name: e.view(e.tensor.grad) for e in student_entries(model) if e.tensor.grad is not None}


def teacher_parameters(model: Data2Vec) -> dict[str, Tensor]:
    """The teacher's tensors by the names of the published `_ema` entry: live views of averages, fixed tables, and of
    what the published code copies from the student, which is the student's own here."""
    tensors = {entry.name: entry.view(entry.tensor.detach()) for entry, _ in teacher_entries(model)}
    return tensors | ({"version": format_number()} if family_of(model) == "d2v1_text" else {})


@torch.no_grad()
def _load(
    what: str, entries: Iterable[Entry], given: Mapping[str, Tensor], optional: re.Pattern[str] | None = None
) -> None:
    own = {e.name: e for e in entries if e.name in given or optional is None or not optional.match(e.name)}
    unexpected = sorted(n for n in given.keys() - own.keys() if not n.endswith(DERIVED))
    missing = sorted(own.keys() - given.keys())
    if missing or unexpected:
        raise ValueError(
            f"{what}: expected the tensors of the configuration; missing {missing}, unexpected {unexpected}"
        )
    for name, entry in own.items():
        target, value = entry.view(entry.tensor.detach()), given[name]
        if name.endswith("alibi_scale") and value.dim() == 4:  # the first published files lack the axis of blocks
            value = value[None]
        if value.shape != target.shape:
            raise ValueError(f"{what}: {name}: expected shape {tuple(target.shape)}, got {tuple(value.shape)}")
        if target.is_floating_point():
            check_weights(value, f"{what}: {name}")
        target.copy_(value)
