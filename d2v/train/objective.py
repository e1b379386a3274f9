"""What a run optimises, as the trainer knows it: pre-training and fine-tuning are two of these."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2v.data.dataset import STREAM_LAYERS, Batch, random_stream
from d2v.data.sources import Source
from d2v.model.data2vec import WORKING_DTYPES
from d2v.model.transformer import TransformerEncoder
from d2v.train.distributed import World
from d2v.train.optim import decay_groups


@dataclass
class Step:
    """Result of one forward on a micro-batch."""

    losses: dict[str, Tensor]
    """0-D differentiable sums; the trainer divides them by the weight of the whole update."""
    values: dict[str, Tensor]
    """0-D values to log; their sums over the micro-batches of all ranks are shown."""
    out: Any
    """What `Objective.monitor` takes."""


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
    noun: str = "samples"
    """What a sample is called."""

    # ---- the model ------------------------------------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks: the units that are compiled and sharded."""
        raise NotImplementedError

    @property
    def may_skip(self) -> bool:
        """Whether trained parameters may take no part in an update."""
        return False

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of trained parameters for the optimiser; an entry `rate` multiplies the learning rate."""
        return decay_groups(self.model, self.config.optim)

    # ---- an update ------------------------------------------------------------------------------------------

    def updates(self, first: int, world: World) -> Generator[list[Batch], None, None]:
        """This rank's micro-batches of every update from number `first` (0-based) to the last."""
        raise NotImplementedError

    def weigh(self, batch: Batch) -> float:
        """What the batch adds to the divisor of the losses; known on the host."""
        raise NotImplementedError

    def begin_update(self, update: int) -> None:
        """Before the forwards of update number `update` (1-based); equal on all ranks."""

    def forward(self, network: nn.Module, batch: Batch, world: World) -> Step:
        """One forward; `network` stands for `model` and takes its arguments."""
        raise NotImplementedError

    def end_update(self, update: int, applied: Tensor | None) -> None:
        """After the optimiser's step. applied: 0-D float64, 0 where the step was skipped for an overflow; None: it
        never is."""

    def work(self, batch: Batch) -> Mapping[str, float]:
        """Host counts of a batch whose rates are shown, tokens for instance."""
        return {}

    # ---- what is shown --------------------------------------------------------------------------------------

    def monitor(self, step: Step, batch: Batch) -> dict[str, float]:
        """Further entries of a line of metrics, measured on one micro-batch."""
        raise NotImplementedError

    def skip_blocks(self, blocks: TransformerEncoder, update: int) -> None:
        """Chooses the blocks that layer drop skips in an update: one draw for all its micro-batches and ranks."""
        if blocks.layer_drop > 0.0:
            rng = random_stream(self.config.run.seed, update, 0, STREAM_LAYERS)
            blocks.skipped = blocks.draw_skipped(rng.random(len(blocks.blocks)).tolist())

    def describe(self, update: int) -> dict[str, float]:
        """Settings that change with the update and are shown."""
        return {}

    def describe_rates(self, rates: Mapping[str, float], world: World) -> dict[str, float]:
        """Entries made of the rates of `work`."""
        return dict(rates)

    def validate(self, network: nn.Module, world: World) -> dict[str, float]:
        """Entries from the held-out samples, the same on every rank; not called without any."""
        raise NotImplementedError

    def find_failure(self, line: Mapping[str, Any], batch: Batch | None) -> str | None:
        """Why the run must not go on after this line, or None."""
        return None


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of a forward under `run.precision`."""
    dtype = WORKING_DTYPES.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
