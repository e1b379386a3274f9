"""Settings that each task starts from; the published ones where they do not depend on the size of data or model."""

from __future__ import annotations

from dataclasses import replace

from d2v.config import Config, Data, Optim, Run
from d2v.config.finetune import TASKS, TaskOptions

MODALITIES = dict(zip(TASKS, ("speech", "speech", "vision", "text"), strict=True))
"""What each task's inputs are: a task is of one kind, for which fine-tuning may therefore ask."""
PUBLISHED_WIDTH = 768
"""Channels of the model whose spans of masked channels are published: a narrower one has spans of the same share, or
one span would hide all that it has."""

_OPTIMS = {
    # wav2vec 2.0's schedule for 10 hours of labels: .1 rising, .4 at the peak, .5 falling to 5 %.
    "speech-ctc": Optim(
        warmup_steps=0, learning_rate=5e-5, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, schedule="tri-stage",
        final_rate=0.05,
    ),
    "speech-classify": Optim(warmup_steps=0, learning_rate=6e-5, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0),
    "vision-classify": Optim(
        warmup_steps=0, learning_rate=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, decay_all=False,
        final_rate=1e-3,
    ),
    "text-classify": Optim(
        warmup_steps=0, learning_rate=2e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, schedule="linear",
    ),
}  # fmt: skip
_OPTIONS = {
    "speech-ctc": TaskOptions(
        epochs=50.0, hold=0.4, time_mask=0.65, time_span=10, channel_mask=0.5, channel_span=64, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.1, layer_drop=0.05,
    ),
    "speech-classify": TaskOptions(epochs=30.0, time_mask=0.6, time_span=5, freeze_stem=True),
    "vision-classify": TaskOptions(
        epochs=100.0, warmup=0.065, layer_decay=0.65, drop_path=0.1, label_smoothing=0.1, mixup=0.7, cutmix=1.0,
        mix_probability=0.9, erasing=0.25,
    ),
    "text-classify": TaskOptions(epochs=10.0, warmup=0.06),
}  # fmt: skip
_BATCH = {"speech-ctc": 32, "speech-classify": 32, "vision-classify": 128, "text-classify": 32}


def default_sections(task: str, config: Config) -> tuple[Optim, Data, Run, TaskOptions]:
    """Optimiser, data, run and task options of a task on a pre-trained model.

    How samples look - size, colours, normalisation, tokenizer, speed - stays as it was pre-trained.

    Raises:
        ValueError: an unknown task, or one of another modality than the model's.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    modality = config.stem.modality
    if MODALITIES[task] != modality:
        fitting = ", ".join(name for name, kind in MODALITIES.items() if kind == modality)
        raise ValueError(f"task: expected {fitting or 'none'} for a model of {modality}, got {task}")
    fresh = Data()
    data = replace(
        config.data, path="", valid=None, global_batch=_BATCH[task], micro_batch=None, shuffle="full", unequal="pad",
        batch_seconds=None, min_seconds=0.0, cache=None, workers=fresh.workers, bad_fraction=fresh.bad_fraction,
        crop_scale=(0.08, 1.0) if task == "vision-classify" else config.data.crop_scale,
    )  # fmt: skip
    run = Run(steps=0, precision=config.run.precision, seed=0, keep_checkpoints=1)
    options = _OPTIONS[task]
    span = min(options.channel_span, max(1, options.channel_span * config.encoder.width // PUBLISHED_WIDTH))
    return _OPTIMS[task], data, run, replace(options, channel_span=span)
