"""A run in memory: model, optimiser, what is counted, and the number of completed updates.

One update: forward and backward of each micro-batch with the gradient of (sum of losses) / (weight of the whole update,
over all micro-batches and ranks), clipping, AdamW at the scheduled rate, and what the objective does after that: one
step of the teacher's average. Nothing is read from the device.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v.data.dataset import Batch
from d2v.folder import CONFIG, MODEL_PREFIX, STATE, describe_mismatch, load_json, read_index
from d2v.runtime import span
from d2v.train.checkpoint import load_into
from d2v.train.distributed import World
from d2v.train.metrics import Window
from d2v.train.objective import Objective, Step
from d2v.train.optim import (
    PREFIX,
    build_optimiser,
    clip_gradients,
    learning_rate_at,
    make_state,
    optimiser_tensors,
    set_learning_rate,
)
from d2v.train.parallel import accumulating, parallelise
from d2v.train.profile import memory_bytes

_RANK_SEEDS = 0x9E3779B97F4A7C15


class Trainer:
    """Updates an objective's model on the ranks of a world."""

    def __init__(self, objective: Objective, world: World) -> None:
        self.objective, self.world, self.config = objective, world, objective.config
        self.model = objective.model
        run = self.config.run
        self.network = parallelise(self.model, objective.blocks(), run, world, may_skip=objective.may_skip)
        self.optimiser = build_optimiser(objective.parameter_groups(), self.config.optim)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=run.precision == "fp16")
        self.window = Window()
        self.update = 0
        self.rate = 0.0
        self.pending: dict[str, Any] = {}
        """Entries for the next line of metrics."""
        self.latest: dict[str, Any] = {}
        """The last line."""
        if world.rank:
            self._seed_rank()

    def _seed_rank(self) -> None:
        """Dropout has a stream for each rank; weights were drawn alike."""
        mixed = (self.config.run.seed * _RANK_SEEDS + (self.update << 20) + self.world.rank) % (1 << 63)
        torch.manual_seed(mixed)

    # ---- one update -------------------------------------------------------------------------------------------

    def run_update(self, batches: list[Batch]) -> Step:
        """One update from this rank's micro-batches; returns the first forward, and never the rest."""
        objective = self.objective
        objective.begin_update(self.update + 1)
        total = self._weigh(batches)
        self.model.train()
        sums: dict[str, Tensor] = {}
        first: Step | None = None
        for number, batch in enumerate(batches):
            with accumulating(self.network, number == len(batches) - 1):
                step = objective.forward(self.network, batch, self.world)
                first = first or step
                parts = {name: value / total for name, value in step.losses.items()}
                loss = torch.stack(list(parts.values())).sum()
                with span("backward"):
                    # Gradients are averaged over the ranks; theirs is a sum.
                    self.scaler.scale(loss * self.world.size if self.world.size > 1 else loss).backward()
            self._add({"loss": loss, **(parts if len(parts) > 1 else {}), **step.values}, sums)
            self.window.count(**objective.work(batch))
        applied = self._step(sums)
        objective.end_update(self.update, applied)
        self.window.add(sums)
        assert first is not None
        return first

    def _weigh(self, batches: list[Batch]) -> float | Tensor:
        """What the losses are divided by; known on the host for one rank, on the device for several."""
        own = sum(self.objective.weigh(batch) for batch in batches)
        if self.world.size == 1:
            return max(own, 1.0)
        total = torch.full((), own, dtype=torch.float32, device=self.world.device)
        return self.world.sum_(total).clamp_(min=1.0)

    @staticmethod
    def _add(values: Mapping[str, Tensor], sums: dict[str, Tensor]) -> None:
        for name, value in values.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()

    def _step(self, sums: dict[str, Tensor]) -> Tensor | None:
        """Clips and applies the gradients. With a scaled loss: 0-D float64, 0 where they overflowed and were not."""
        with span("optimiser"):
            self.scaler.unscale_(self.optimiser)
            norm = clip_gradients(self.parameters, self.config.optim.clip)
            self.update += 1
            self.rate = learning_rate_at(self.config.optim, self.update, self.config.run.steps)
            set_learning_rate(self.optimiser, self.rate)
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self.optimiser.zero_grad(set_to_none=True)
        applied = None
        if self.scaler.is_enabled():
            applied = norm.isfinite().double()
            norm = norm.nan_to_num(0.0, 0.0, 0.0)
            sums["skipped"] = (1.0 - applied) / self.world.size
        sums["grad_norm"] = norm / self.world.size  # the same on every rank
        return applied

    # ---- what is shown ----------------------------------------------------------------------------------------

    def make_line(self, step: Step, batch: Batch) -> dict[str, Any]:
        """A line of metrics, on every rank: means over the window, and monitors of this rank's micro-batch."""
        world, window = self.world, self.window
        means = window.means(world.sum_)
        rates = window.rates(world.sum_, world.device)
        step_seconds = window.step_seconds()
        samples = self.config.data.global_batch
        line = {
            "step": self.update,
            **means,
            **(self.objective.monitor(step, batch) if world.is_first else {}),
            "learning_rate": self.rate,
            **self.objective.describe(self.update),
            "samples_per_second": samples / step_seconds if step_seconds else math.nan,
            **self.objective.describe_rates(rates, world),
            "step_seconds": step_seconds,
            "data_wait": window.data_wait(),
            "memory_bytes": memory_bytes(world.device),
            **self.pending,
        }
        self.pending = {}
        self.latest = line
        window.reset()
        return line

    def validate(self) -> None:
        """Measures the held-out samples; the result goes into the next line of metrics."""
        self.window.pause_clock()
        self.pending = {**self.objective.validate(self.network, self.world), "valid_step": self.update}
        self.window.resume_clock()

    # ---- state ------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything of a checkpoint that is a tensor. Random states have a name for each rank."""
        tensors = self._model_tensors()
        tensors |= optimiser_tensors(self.model, self.optimiser) | self.window.tensors(self.world.sum_)
        tensors[f"rng.cpu.{self.world.rank}"] = torch.get_rng_state()
        if self.world.device.type == "cuda":
            tensors[f"rng.cuda.{self.world.rank}"] = torch.cuda.get_rng_state(self.world.device)
        return tensors

    def _model_tensors(self) -> dict[str, Tensor]:
        """The model's tensors, in place, by their names in a checkpoint."""
        return {f"{MODEL_PREFIX}{name}": value for name, value in self.model.state_dict().items()}

    def texts(self, bad: Mapping[str, Any]) -> dict[str, str]:
        """The JSON files of a checkpoint; `bad`: the account of bad samples."""
        state = {
            "step": self.update,
            "ranks": self.world.size,
            "torch": torch.__version__,
            "metrics": {k: v for k, v in {**self.latest, **self.pending}.items() if _is_plain(v)},
            "window": self.window.state(),
            "pending": self.pending,
            "scaler": self.scaler.state_dict(),
            "bad": bad,
            "data": self.data_identity(),
        }
        return {CONFIG: self.config.to_json(), STATE: json.dumps(state, indent=1)}

    def data_identity(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        return {"samples": len(self.objective.source), "names": self.objective.source.digest()}

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Takes up a checkpoint, of any number of ranks; returns its state.

        `ValueError` where the data or the tensors do not fit.
        """
        state = load_json(checkpoint / STATE)
        self._compare_data(state["data"], checkpoint)
        index = read_index(checkpoint)
        model = self._model_tensors()
        stored = {n: torch.empty(e["shape"], device="meta") for n, e in index.items() if n.startswith(MODEL_PREFIX)}
        if problem := describe_mismatch(model, stored):
            raise ValueError(f"checkpoint {str(checkpoint)!r}: {problem}")
        moments = make_state(self.model, self.optimiser, [n for n in index if n.startswith(PREFIX)])
        own = [f"rng.{kind}.{self.world.rank}" for kind in ("cpu", "cuda")]
        host = {
            n: torch.empty(index[n]["shape"], dtype=getattr(torch, index[n]["dtype"]))
            for n in (*own, "metrics.sums")
            if n in index
        }
        load_into(checkpoint, {**model, **moments, **host}, self.world)
        self.update = int(state["step"])
        self.pending, self.latest = dict(state["pending"]), dict(state["metrics"])
        self.window.restore(state["window"], host, self.world.device, main=self.world.is_first)
        self.scaler.load_state_dict(state["scaler"])
        self._restore_random(host, own)
        return state

    def _compare_data(self, stored: Mapping[str, Any], checkpoint: Path) -> None:
        found = self.data_identity()
        if stored != found:
            same = stored["samples"] == found["samples"]
            raise ValueError(
                f"data.path: expected the {stored['samples']} samples that {str(checkpoint)!r} was trained on, "
                f"got {found['samples']} with {'other' if same else ''} names"
            )

    def _restore_random(self, host: Mapping[str, Tensor], names: list[str]) -> None:
        if names[0] not in host:  # of a run with fewer ranks
            self._seed_rank()
            return
        torch.set_rng_state(host[names[0]])
        if self.world.device.type == "cuda" and names[1] in host:
            torch.cuda.set_rng_state(host[names[1]], self.world.device)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
