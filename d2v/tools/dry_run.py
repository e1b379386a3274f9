"""`d2v pretrain --dry-run`: one update on real data, nothing written, sizes printed."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

from d2v.config import Config
from d2v.data.dataset import Batch
from d2v.data.loader import BadSamples, train_updates
from d2v.data.sampler import UpdateSampler
from d2v.data.sources import Source
from d2v.runtime import choose_device, memory_bytes, prepare_process
from d2v.tools.paper import count_bytes, keeping
from d2v.train.distributed import Ranks
from d2v.train.flops import count_work
from d2v.train.pretraining import Pretraining, load_weights, open_data
from d2v.train.trainer import Trainer

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of ranks whose shares are shown, as far as the global batch reaches."""
MIB = float(1 << 20)


def dry_run(config: Config, *, init: str | None = None) -> str:
    """Builds everything and runs one update on real data in one process; returns a description: shapes, parameters,
    memory, length of the run, and the share of a rank for several numbers of ranks. Leaves nothing behind."""
    source, valid = open_data(config)
    device = choose_device(config.run.device)
    prepare_process(config.run.threads, config.run.keep_pages, config.run.products)
    objective, note = Pretraining(config, source, valid, device), None
    if init is not None:
        note = load_weights(objective.model, init, "model.init")
    trainer = Trainer(objective, Ranks(device))
    with tempfile.TemporaryDirectory(prefix="d2v-dry-run-") as folder:
        for part in (source, valid):
            if part is not None:
                part.prepare(Path(folder), fresh=part is source)
        run, data = replace(config.run, steps=max(config.run.steps, 1)), replace(config.data, workers=0)
        batches = next(train_updates(replace(config, run=run, data=data), source, 0, device))
        shapes, activations = _try_forward(trainer, objective, batches[0])
        trainer.run_update(batches)
        bad = BadSamples(source, config.data.bad_fraction, None)
        for batch in batches:
            bad.add(batch.notes)
        bad.check(config.data.global_batch)
        left_out = "".join(f", {n} {reason} left out" for reason, n in source.left_out.items())
        samples = f"{len(source)} {objective.noun}{left_out}, {len(bad.entries)} bad in the first batch"
        static = count_static(trainer, objective)
        lines = [
            f"data         {samples}",
            *([f"positions    {note}"] if note is not None else []),
            *shapes,
            *_describe_memory(static, activations, len(batches[0]), trainer),
            *_describe_run(config, len(source), batches),
            *_describe_ranks(config, source, sum(static.values()), activations / len(batches[0])),
        ]
        return "\n".join(lines)


def _try_forward(trainer: Trainer, objective: Pretraining, batch: Batch) -> tuple[list[str], int]:
    """Shapes of a micro-batch, and the bytes that its forward keeps for the backward pass."""
    assert batch.masks is not None
    device, masks = trainer.ranks.device, batch.masks
    trainer.model.train()
    with keeping() as kept:
        out = objective.run_model(trainer.network, batch, device)
    own = itertools.chain(trainer.model.parameters(), trainer.model.buffers())
    activations = count_bytes(kept, without=own)
    rows, tokens = masks.mask.shape
    visible = f"{masks.keep.shape[1]} visible" if trainer.config.version == 2 and masks.keep is not None else "all seen"
    inputs = objective.inputs_of(batch, device)
    loss = float(out.loss.detach())
    return [
        f"inputs       {tuple(inputs.shape)} per micro-batch, {trainer.config.data.global_batch} samples per update",
        f"student      {rows} rows of {tokens} tokens, {visible}, {len(masks.rows)} masked positions",
        f"prediction   {tuple(out.prediction.shape)}, targets {tuple(out.targets.shape)}, loss {loss:.4f}",
    ], activations


def count_static(trainer: Trainer, objective: Pretraining) -> dict[str, int]:
    """Bytes that stay from update to update on one rank without sharding."""
    teacher = objective.model.teacher
    trained = count_bytes(trainer.parameters)
    copies = teacher.working_parts().values() if teacher.working_dtype is not None else ()
    return {
        "weights": trained,
        "gradients": trained,
        "Adam moments": 2 * trained,
        "teacher": count_bytes(teacher.parameters()),
        "its working copies": sum(count_bytes(part.parameters()) for part in copies),
    }


def _describe_memory(static: dict[str, int], activations: int, samples: int, trainer: Trainer) -> list[str]:
    trainable = sum(p.numel() for p in trainer.parameters)
    total = sum(p.numel() for p in trainer.model.parameters())
    parts = ", ".join(f"{name} {size / MIB:.1f}" for name, size in static.items() if size)
    device = trainer.ranks.device
    where = "at its peak on the GPU" if device.type == "cuda" else "in this process, PyTorch and data included"
    return [
        f"parameters   {trainable:,} trained, {total - trainable:,} averaged",
        f"memory, MiB  {parts}: {sum(static.values()) / MIB:.1f}; "
        f"activations of a micro-batch of {samples}, measured: {activations / MIB:.4g}; "
        f"{memory_bytes(device) / MIB:.0f} {where}",
    ]


def _describe_run(config: Config, samples: int, batches: list[Batch]) -> list[str]:
    steps, total = config.run.steps, config.data.global_batch
    flops = sum(count_work(config, batch)["flops"] for batch in batches)
    return [
        f"run          {steps:,} updates of {total} samples: {steps * total / samples:.1f} epochs; "
        f"warm-up {config.optim.warmup_steps:,} updates",
        f"work         {flops:.3g} FLOPs in the first update",
    ]


def _describe_ranks(config: Config, source: Source, static: int, activations: float) -> list[str]:
    """For each number of ranks: samples, micro-batches and memory of the rank that has most. Sharding, where it is on,
    splits what is static."""
    sharded = config.run.parallel == "fsdp"
    lines = [f"ranks        samples  micro-batches  largest  MiB a rank ({config.run.parallel})"]
    for ranks in (r for r in RANKS if r <= config.data.global_batch):
        try:
            slots = UpdateSampler(config, source, 0, 1, rank=0, ranks=ranks).refs(0)
        except ValueError as error:
            lines.append(f"{ranks:>5}        {error}")
            continue
        largest = max(len(s) for s in slots)
        pieces = min(config.run.shard_ranks or ranks, ranks) if sharded else 1
        memory = (static / pieces + activations * largest) / MIB
        lines.append(f"{ranks:>5}        {sum(map(len, slots)):>7}  {len(slots):>13}  {largest:>7}  {memory:>10.1f}")
    return lines
