"""What a run optimises, as the trainer knows it: pre-training and fine-tuning are two of these."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2v.data.dataset import STREAM_LAYERS, Batch, random_stream
from d2v.data.sources import Source
from d2v.model.data2vec import WORKING_DTYPES, Data2Vec
from d2v.train.optim import decay_groups

if TYPE_CHECKING:  # what computes features needs this file, and none of the seconds that FSDP takes to import
    from d2v.train.distributed import Ranks


@dataclass
class Step:
    """Result of one forward on a micro-batch."""

    losses: dict[str, Tensor]
    """0-D differentiable sums; the trainer divides them by the weight of the whole update."""
    values: dict[str, Tensor]
    """0-D values to log; their sums over the micro-batches of all ranks are shown."""
    out: Any
    """What `Objective.monitor` takes."""
    work: Mapping[str, float] = field(default_factory=dict)
    """Host counts whose rates are shown, tokens for instance."""


Probe = Callable[[int, Callable[[Iterable[str]], None]], dict[str, float]]
"""Number of the update, and what says notes -> entries for the next line of metrics, the same on every rank."""


class Objective:
    """Model, data and loss of a run."""

    config: Any
    """Has the sections run, optim and data, and `to_json`."""
    model: nn.Module
    """Everything that a checkpoint holds."""
    source: Source
    """Training samples."""
    valid: Source | None = None
    """Held-out samples."""
    probe: Probe | None = None
    """What measures the features on labelled samples while the run goes on."""
    noun: str = "samples"
    """What a sample is called."""
    may_skip: bool = False
    """Whether trained parameters may take no part in an update."""

    @property
    def encoder(self) -> Data2Vec:
        """The pre-trained part of `model`, or all of it."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks: the units that are compiled and sharded."""
        return [*self.encoder.context.blocks, *self.encoder.blocks.blocks]

    def set_recompute(self) -> None:
        """Has the blocks compute their activations again in the backward pass, where the run asks for it."""
        for part in (self.encoder.context, self.encoder.blocks):
            part.recompute = self.config.run.activation_checkpointing

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of trained parameters for the optimiser; an entry `rate` multiplies the learning rate."""
        return decay_groups(self.model, self.config.optim)

    def updates(self, first: int, ranks: Ranks) -> Generator[list[Batch], None, None]:
        """This rank's micro-batches of every update from number `first` (0-based) to the last."""
        raise NotImplementedError

    def weigh(self, batch: Batch) -> float:
        """What the batch adds to the divisor of the losses; known on the host."""
        raise NotImplementedError

    def begin_update(self, update: int) -> None:
        """Before the forwards of update number `update` (1-based): chooses the blocks that layer drop skips, by one
        draw for all micro-batches and ranks."""
        blocks = self.encoder.blocks
        if blocks.layer_drop > 0.0:
            rng = random_stream(self.config.run.seed, update, 0, STREAM_LAYERS)
            blocks.skipped = blocks.draw_skipped(rng.random(len(blocks.blocks)).tolist())

    def forward(self, network: nn.Module, batch: Batch, ranks: Ranks) -> Step:
        """One forward; `network` is called in place of `model` and takes its arguments."""
        raise NotImplementedError

    def end_update(self, update: int, applied: Tensor | None) -> None:
        """After the optimiser's step. applied: 0-D float64, 0 where the step was skipped for an overflow; None: it
        never is."""

    def monitor(self, step: Step, batch: Batch) -> dict[str, float]:
        """Entries of a line of metrics that are measured on one micro-batch."""
        raise NotImplementedError

    def describe(self, update: int, rates: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
        """Entries made of the number of the update and of the amounts a second of samples and of `Step.work`."""
        return {"samples_per_second": rates["samples"]}

    def validate(self, network: nn.Module, ranks: Ranks) -> dict[str, float]:
        """Entries from the held-out samples, the same on every rank; not called without any."""
        raise NotImplementedError

    def find_failure(self, line: Mapping[str, Any], batch: Batch | None) -> str | None:
        """Why the run must not go on after this line, or None."""
        return None


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of a forward under `run.precision`."""
    dtype = WORKING_DTYPES.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
