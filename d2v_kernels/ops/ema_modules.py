"""Tensors of two modules, matched by name, for `EmaPlan.from_modules`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .. import _checks as check

OP = "EmaPlan.from_modules"
Buffers = Literal["copy", "average", "ignore"]
# Names under which torch.compile, FSDP1 and activation checkpointing hold the module they wrap.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Place(NamedTuple):
    """Where a module holds a tensor."""

    holder: dict[str, Tensor | None]
    key: str
    tensor: Tensor


class Pairing:
    """Averages, sources and copies of two modules; listed again when a module holds other tensors than before."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, buffers: Buffers, copies: nn.Module | torch.dtype | None,
        split: bool,
    ) -> None:  # fmt: skip
        """See `EmaPlan.from_modules`, which has these arguments."""
        for name, module in (("teacher", teacher), ("student", student)):
            if not isinstance(module, nn.Module):
                words = f"{type(module).__name__}; EmaPlan(averages, sources) takes tensors"
                raise TypeError(f"{OP}: {name}: expected a module, got {words}")
        check.require(buffers in ("copy", "average", "ignore"), OP, "buffers", "copy, average or ignore", buffers)
        if not isinstance(copies, nn.Module | torch.dtype | None):
            raise TypeError(f"{OP}: copies: expected a dtype, a module or None, got {type(copies).__name__}")
        check.require(teacher is not student, OP, "teacher", "another module than the student", "the same")
        self._modules = {"teacher": teacher, "student": student}
        if isinstance(copies, nn.Module):
            self._modules["copies"] = copies
        self._copy_dtype = copies if isinstance(copies, torch.dtype) else None
        self._buffers, self._split = buffers, split
        self.averages: dict[str, Tensor] = {}
        self.copied: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor] = {}
        self.low: dict[str, Tensor] | None = None
        self.places: list[Place] = []
        """Of the tensors that a plan has been made of; empty until then."""

    def replaced(self) -> bool:
        """Whether a module holds another tensor object at a name."""
        return not self.places or any(holder.get(key) is not tensor for holder, key, tensor in self.places)

    @torch.no_grad()
    def find(self) -> list[Place]:
        """Lists the tensors that the modules hold now, and returns their places."""
        for module in self._modules.values():
            _reshard(module)
        places: list[Place] = []
        averaged = self._match("_parameters", places)
        copied: dict[str, list[Tensor]] = {}
        if self._buffers != "ignore":
            for name, group in self._match("_buffers", places).items():
                is_averaged = self._buffers == "average" and group[0].is_floating_point()
                (averaged if is_averaged else copied)[name] = group
        for name in [n for n, group in averaged.items() if not (group[0].is_floating_point() or group[0].is_complex())]:
            copied[name] = averaged.pop(name)
        for name, (average, source, *_) in averaged.items():
            check.dtype(OP, f"{name} of the teacher", average, torch.bfloat16 if self._split else check.FLOATS)
            check.dtype(OP, f"{name} of the student", source, check.FLOATS)
        for name, group in averaged.items() if not self.averages else ():
            sharded = ["sharded" if hasattr(t, "placements") else "not" for t in group]
            got = ", ".join(f"the {who} {how}" for who, how in zip(self._modules, sharded, strict=True))
            check.require(len(set(sharded)) == 1, OP, name, "all or none sharded (`fully_shard` them alike)", got)
        check.writable(OP, {name: group[0] for name, group in copied.items()})
        for name, before in self.averages.items():
            now = averaged.get(name, [before])[0]
            good = hasattr(now, "placements") or not hasattr(before, "placements")
            words = ("a shard", "the gathered tensor; pass the outermost module that is sharded")
            check.require(good, OP, f"{name} of the teacher", *words)
        self.averages = {name: group[0] for name, group in averaged.items()}
        self.sources = [group[1] for group in averaged.values()]
        self.copied = {name: group[0] for name, group in copied.items()}
        self._targets = [t for group in copied.values() for t in (group[0], *group[2:])]
        self._origins = [group[1] for group in copied.values() for _ in (group[0], *group[2:])]
        if "copies" in self._modules:
            self.copies = {name: group[2] for name, group in averaged.items()}
        elif self._copy_dtype is not None:
            self.copies = self._beside(self.copies, self._copy_dtype)
        self.low = self._beside(self.low or {}, torch.int16) if self._split else None
        return places

    def copy_buffers(self) -> None:
        """What is not averaged, from the student."""
        if self._targets:
            check.storage(OP, [self._targets, self._origins])
            with torch.no_grad():
                torch._foreach_copy_(self._targets, self._origins)

    def _beside(self, kept: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """A tensor of the dtype for each average: what is kept already on its device, or zeros."""
        return {
            name: kept[name].to(average.device) if name in kept else torch.zeros_like(average, dtype=dtype)
            for name, average in self.averages.items()
        }

    def _match(self, kind: str, all_places: list[Place]) -> dict[str, list[Tensor]]:
        """Name -> tensors of teacher, student and copies; tied ones once. Their places are added to a list."""
        found = {who: dict(_places(module, kind)) for who, module in self._modules.items()}
        what, first = kind.removeprefix("_"), found["teacher"]
        for who, places in found.items():
            all_places += places.values()
            same_names(OP, f"{what} of the {who}", first, places)
        groups: dict[int, tuple[str, list[Tensor]]] = {}
        for name, place in first.items():
            group = [places[name].tensor for places in found.values()]
            for who, t in zip(self._modules, group, strict=True):
                check.shape(OP, f"{name} of the {who}", t, place.tensor.shape)
            known, tied = groups.setdefault(id(place.tensor), (name, group))
            same = all(a is b for a, b in zip(tied, group, strict=True))
            what = f"{name}, which is {known} in the teacher, of the {' and '.join(list(self._modules)[1:])}"
            check.require(same, OP, what, f"the tensor at {known}", "another")
        return dict(groups.values())


def _places(module: nn.Module, kind: str, prefix: str = "") -> Iterator[tuple[str, Place]]:
    """The tensors that the module and those below it hold, by their names without those of wrappers; tied ones at each
    of their names."""
    holder: dict[str, Tensor | None] = getattr(module, kind)
    for key, tensor in holder.items():
        if tensor is not None:
            yield prefix + key, Place(holder, key, tensor)
    for name, child in module._modules.items():
        wrapped = name in _WRAPPED or (name == "module" and isinstance(module, DistributedDataParallel | DataParallel))
        if child is not None:
            yield from _places(child, kind, prefix if wrapped else f"{prefix}{name}.")


def _reshard(module: nn.Module) -> None:
    """FSDP2 leaves the outermost parameters gathered after a forward without a backward; a step on the shards would not
    reach the next forward."""
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def same_names(op: str, what: str, wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises `ValueError` with the names that are missing or too many."""
    missing, extra = ([n for n in a if n not in b] for a, b in ((wanted, given), (given, wanted)))
    expected = f"also {_listed(missing)}" if missing else f"the {len(wanted)} of the teacher alone"
    check.require(not (missing or extra), op, what, expected, _listed(extra) if extra else "none of them")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def with_local(local: Tensor, like: Any) -> Tensor:
    """The tensor whose part on this rank is `local`, distributed as `like` is."""
    if not hasattr(like, "placements"):
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def distributed_like(value: Tensor, like: Any) -> Tensor:
    """A tensor that every rank has whole, distributed as `like` is; one that is distributed already as it is."""
    if not hasattr(like, "placements") or hasattr(value, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank each takes its part of what it has, and nothing is sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
