"""`d2v pretrain --dry-run`: one update on real data, nothing written, sizes printed."""

from __future__ import annotations

import resource
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from d2v.config import Config
from d2v.data.loader import BadSamples, train_updates
from d2v.data.samples import Batch
from d2v.train import Trainer, choose_device, load_weights, open_data, prepare_data


def dry_run(config: Config, *, init: str | None = None) -> str:
    """Builds everything and runs one update on real data; returns a description. Leaves nothing behind."""
    source, valid = open_data(config)
    device = choose_device(config)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    trainer = Trainer(config, source, device)
    if init is not None:
        load_weights(trainer.model, init, "model.init")
    with tempfile.TemporaryDirectory(prefix="d2v-dry-run-") as folder:
        prepare_data(source, valid, Path(folder), fresh=True)
        batches = next(train_updates(_without_workers(config), source, 0, device))
        shapes = _describe_shapes(trainer, batches[0])
        trainer.run_update(batches)
        bad = BadSamples(source, config.data.bad_fraction, None)
        for batch in batches:
            bad.add(batch.notes)
        bad.check(config.data.global_batch)
        left_out = "".join(f", {n} {reason} left out" for reason, n in source.left_out.items())
        samples = f"{len(source)} {trainer.modality.noun}{left_out}, {len(bad.entries)} bad in the first batch"
        return "\n".join([f"data         {samples}", *shapes])


def _without_workers(config: Config) -> Config:
    steps = max(config.run.steps, 1)
    return replace(config, data=replace(config.data, workers=0), run=replace(config.run, steps=steps))


@torch.no_grad()
def _describe_shapes(trainer: Trainer, batch: Batch) -> list[str]:
    assert batch.masks is not None
    out = trainer.forward(batch)
    trainable = sum(p.numel() for p in trainer.parameters)
    total = sum(p.numel() for p in trainer.model.parameters())
    masks = batch.masks
    rows, tokens = masks.mask.shape
    visible = masks.keep.shape[1] if masks.keep is not None else -1
    static = 4 * (4 * trainable + (total - trainable))
    if trainer.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(trainer.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    mib = float(1 << 20)
    return [
        f"inputs       {tuple(trainer.inputs_of(batch).shape)} per micro-batch, "
        f"{trainer.config.data.global_batch} samples per update",
        f"student      {rows} rows of {tokens} tokens, {visible} visible, {len(masks.rows)} masked positions",
        f"prediction   {tuple(out.prediction.shape)}, targets {tuple(out.targets.shape)}, loss {float(out.loss):.4f}",
        f"parameters   {trainable:,} trained, {total - trainable:,} averaged",
        f"memory       {static / mib:.1f} MiB for weights, gradients, Adam moments and teacher; "
        f"{peak / mib:.0f} MiB peak {'on the GPU' if trainer.device.type == 'cuda' else 'of the process'} so far",
    ]
