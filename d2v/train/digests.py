"""Digests of a run's weights: what shows that two runs, or two ranks, computed the same bits.

The digest of a tensor is the sum over its numbers of bits · (2^64 / golden ratio + 2 · place), modulo 2^64: any
changed bit changes it, it takes one pass, and shards of a tensor add up to that of the whole, so that it does not
depend on the ranks. It is no cryptographic hash.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from d2v.config import Run
from d2v.train.distributed import Ranks, make_reduction

_BASE, _MODULUS = 0x9E3779B97F4A7C15, 1 << 64
_CHUNK = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Sums:
    """Digests of tensors in the making; nothing is read from the device before `finish`."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows: list[Tensor] = []
        self._places: Tensor | None = None

    def add(self, name: str, value: Tensor, first: int = 0) -> None:
        """A tensor, or its piece from number `first` on."""
        bits = value.detach().reshape(-1).view(_INTEGERS[value.element_size()])
        if self._places is None or self._places.device != bits.device:
            self._places = torch.arange(_CHUNK, device=bits.device)
        sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
        for start in range(0, len(bits), _CHUNK):
            chunk = bits[start : start + _CHUNK].long()
            plain = chunk.sum()
            sums += torch.stack([plain, (chunk * self._places[: len(chunk)]).sum() + (first + start) * plain])
        self._names.append(name)
        self._rows.append(sums)

    def finish(self) -> dict[str, int]:
        """The digests by name."""
        rows = torch.stack(self._rows).tolist() if self._rows else []
        return {
            n: (_BASE * plain + 2 * placed) % _MODULUS for n, (plain, placed) in zip(self._names, rows, strict=True)
        }


def digest(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Digests by name of tensors of any dtype of 1 to 8 bytes; of sharded ones this rank's summand."""
    sums = _Sums()
    for name, value in tensors.items():
        if isinstance(value, DTensor):
            _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
            sums.add(name, value.to_local(), offset[0] * math.prod(value.shape[1:]) if offset else 0)
        else:
            sums.add(name, value)
    return sums.finish()


class Digests:
    """The digests of a run: of its weights, which copies on several ranks must share, and of gradients."""

    def __init__(self, network: nn.Module, ranks: Ranks, run: Run) -> None:
        """network: what `parallelise` returned."""
        assert run.digest_every is not None
        self.ranks, self.every = ranks, run.digest_every
        self.shards = (run.shard_ranks or ranks.size) if run.parallel == "fsdp" else 1
        """Neighbouring ranks that hold one copy of the model."""
        self._gradients: _Sums | None = None
        if isinstance(network, DistributedDataParallel):
            # It does not take a function whose annotations are text.
            self._begin = make_reduction(run, ranks)
            network.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))
            self._places = {id(parameter): place for place, parameter in enumerate(network.parameters())}

    def before_update(self, due: bool) -> None:
        """due: whether `collect` follows on this update."""
        self._gradients = _Sums() if due else None

    def _reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """The mean of gradients over the ranks, as without digests."""
        if self._gradients is not None:
            for parameter, value in zip(bucket.parameters(), bucket.gradients(), strict=True):
                self._gradients.add(str(self._places[id(parameter)]), value)
        return self._begin(bucket.buffer())

    def collect(self, update: int, model: nn.Module) -> tuple[dict[str, Any], str | None]:
        """A line of `digests.jsonl`, and in words which ranks hold other weights than most; every rank calls.

        The line has `step`, `weights` (digests by name) and with ddp `gradients` (of each rank's own, before they meet
        those of the others).
        """
        state, whole = model.state_dict(), self.ranks.rank % self.shards == 0
        # What is not sharded is counted once.
        own = digest({name: value for name, value in state.items() if whole or isinstance(value, DTensor)})
        # A sum that does not depend on the order in which the buckets were reduced.
        found = self._gradients.finish() if self._gradients is not None else {}
        total = sum((2 * int(name) + 1) * value for name, value in found.items()) % _MODULUS
        parts = self.ranks.gather((own, total if found else None))
        copies = [
            {n: sum(part.get(n, 0) for part, _ in parts[first : first + self.shards]) % _MODULUS for n in state}
            for first in range(0, len(parts), self.shards)
        ]
        gradients = [value for _, value in parts if value is not None]
        line: dict[str, Any] = {"step": update, "weights": {name: f"{v:016x}" for name, v in copies[0].items()}}
        line |= {"gradients": [f"{v:016x}" for v in gradients]} if gradients else {}
        return line, self._find_odd(copies)

    def _find_odd(self, copies: list[dict[str, int]]) -> str | None:
        """The ranks whose weights are not those of most, with the first tensor, in words."""
        kinds = [tuple(copy.values()) for copy in copies]
        (common, count), *others = Counter(kinds).most_common()
        if not others:
            return None
        odd = [n for n, kind in enumerate(kinds) if kind != common]
        name = next(name for n, name in enumerate(copies[0]) if kinds[odd[0]][n] != common[n])
        if tied := 2 * count == len(kinds):  # no majority
            odd = list(range(len(kinds)))
        ranks = [r for n in odd for r in range(n * self.shards, (n + 1) * self.shards)]
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        whose = "each other" if tied else "the other ranks"
        return f"{who}: weights that differ from those of {whose}, first {name}; a processor or memory may be faulty"


def first_difference(stored: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Of two lines of one update: the first tensor that differs and, where the gradients tell, whose they are."""
    names: Iterable[str] = stored["weights"].keys() | found["weights"].keys()
    differing = [n for n in [*found["weights"], *sorted(names - found["weights"].keys())]
                 if stored["weights"].get(n) != found["weights"].get(n)]  # fmt: skip
    if not differing:
        return None
    text = differing[0] + (f" and {len(differing) - 1} others" if len(differing) > 1 else "")
    old, new = stored.get("gradients", []), found.get("gradients", [])
    if len(old) == len(new) and (ranks := [str(rank) for rank in range(len(old)) if old[rank] != new[rank]]):
        text += f"; own gradients of rank {', '.join(ranks)}"
    return text
