"""Settings of how a run trains: moving average, optimiser, data, length and numerics; see `d2v.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Ema:
    """The teacher's moving average."""

    start: float = 0.999
    """Decay at update 0."""
    end: float = 0.9999
    """Decay after the annealing."""
    anneal_steps: int | None = None
    """Updates over which the decay rises linearly; unset: the whole run."""
    scope: Literal["all", "encoder", "transformer", "layers", "blocks"] = "all"
    """What is averaged: all: everything but decoder and head (published: images); encoder: not the stem (2.0 speech);
    transformer: blocks, attention biases (1.0 images in fairseq); layers: blocks and the norm before them (1.0 speech);
    blocks: only the main blocks (text). The teacher uses the student's own parts for the rest."""

    def decay(self, update: int, steps: int) -> float:
        """Decay used after optimiser update number `update` (1-based) of a run of `steps` updates."""
        anneal = self.anneal_steps if self.anneal_steps is not None else steps
        if update >= anneal:
            return self.end
        return self.end - (self.end - self.start) * (1.0 - update / anneal)


@dataclass(frozen=True)
class Optim:
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of Adam's moments."""
    eps: float = 1e-6
    """Added to the root of Adam's second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay, per unit of learning rate."""
    decay_all: bool = True
    """Decay biases and norm gains too, as the published runs did."""
    clip: float | None = None
    """Largest global gradient norm; unset: no clipping."""
    warmup_steps: int = 10_000
    """Updates of linear warm-up from 0."""
    schedule: Literal["cosine", "tri-stage", "linear"] = "cosine"
    """After the warm-up: half a cosine; constant, then an exponential fall (1.0 speech); or a straight line (GLUE)."""
    final_rate: float = 0.0
    """Learning rate at the end of the run, over the peak; tri-stage: also at its start."""
    hold_steps: int = 0
    """Updates at the peak (tri-stage)."""


@dataclass(frozen=True)
class Data:
    """Where samples come from and how they are batched."""

    path: str = ""
    """Folder, file, or shard pattern to train on."""
    valid: str | None = None
    """Held-out data, same formats; unset: none."""
    global_batch: int = 256
    """Samples per optimiser update, over all ranks and accumulation steps."""
    micro_batch: int | None = None
    """Samples per forward on one rank; unset: the whole share of a rank."""
    workers: int = 1
    """Loader processes per rank; masks are drawn there."""
    shuffle: Literal["full", "shards"] = "full"
    """full: an epoch is a random permutation of all samples. shards: .tar shards are read in random order, several in
    turn and each in its own order, and windows of data.shuffle_buffer samples are permuted: for slow storage."""
    shuffle_buffer: int = 10_000
    """Samples of a window with data.shuffle shards."""
    shuffle_shards: int = 8
    """Shards that are read in turn with data.shuffle shards; better at least as many as hosts."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random crop over the area of the image."""
    flip: bool = True
    """Mirror half of the images left to right."""
    rotate: bool = False
    """Turn each image by a random multiple of 90 degrees."""
    grey: bool = False
    """Convert to grey, repeated to the stem's channels."""
    standardise: Literal["imagenet", "sample"] = "imagenet"
    """Fixed ImageNet mean and deviation per channel, or zero mean and unit variance per image."""
    bad_fraction: float = 0.05
    """Stop when more than this share of the samples cannot be decoded."""
    min_seconds: float = 2.0
    """Speech: shorter utterances are left out and counted. Published: 2."""
    max_seconds: float = 20.0
    """Speech: longest crop, and longest utterance of an evaluation. Published: 20."""
    batch_seconds: float | None = None
    """Speech: most seconds of audio of a micro-batch, padding included; an update has as many micro-batches as this
    needs, the same number on all ranks. Unset: data.micro_batch alone decides."""
    speed: float = 0.0
    """Speech: each utterance is played at a random speed of e^-s to e^s, pitch and length change together (Ko et al.
    2015); s at most 1. Only in training. Published: 0."""
    unequal: Literal["crop", "pad"] = "crop"
    """Speech: random crops of the length of the batch's shortest utterance (published), or padding to its longest."""
    tokenizer: str | None = None
    """Text: folder of a tokenizer (`d2v data tokenizer`); unset: one of stem.vocabulary tokens is trained on the data
    and kept in the run folder."""
    blocks: Literal["stream", "documents"] | None = None
    """Text: cut the stream of all documents (published 2.0), or every document by itself (published 1.0); unset: as
    published."""
    block_tokens: int | None = None
    """Text: tokens of a block, the leading <s> included; unset: stem.max_tokens."""
    cache: str | None = None
    """Folder for what is made of the data once and shared by runs on it: tokenised text, the index of shards, lengths
    of speech; unset: in the run folder."""
    allow_commands: bool = False
    """Run shell commands that a data path or a manifest names (pipe:COMMAND, COMMAND |)."""


@dataclass(frozen=True)
class Run:
    """Length, logging, checkpoints, numerics."""

    dir: str = ""
    """Run folder; resumes if it holds a checkpoint."""
    steps: int = 400_000
    """Optimiser updates."""
    seed: int = 0
    """Seed of weights, masks, noise, crops and order."""
    log_every: int = 50
    """Updates between lines of metrics.jsonl."""
    checkpoint_every: int = 5_000
    """Updates between checkpoints."""
    keep_checkpoints: int = 2
    """Most recent checkpoints kept."""
    keep_every: int | None = None
    """Checkpoints of updates that are a multiple of this are kept for good; unset: none."""
    keep_best: str | None = None
    """Metric, for example valid_loss, whose best checkpoint is kept for good, too; unset: none."""
    best: Literal["lowest", "highest"] = "lowest"
    """Which value of keep_best is the best."""
    async_checkpoint: bool = True
    """Write checkpoints from a copy in memory while the training goes on."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16: matrix products under autocast, fp32 master weights; fp16: the same with a scaled loss; an update whose
    gradients overflow changes neither weights nor teacher."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun. ddp: every rank has the whole model (DistributedDataParallel); fsdp: weights, gradients, Adam's
    moments and teacher are split over the ranks (fully_shard)."""
    shard_ranks: int | None = None
    """fsdp: neighbouring ranks that a model is split over; such groups hold copies of each other (hybrid sharding).
    Unset: all ranks."""
    timeout: float = 600.0
    """Seconds of silence after which a rank counts as lost and the others stop, naming it."""
    compile: bool = False
    """torch.compile the model; compile_scope says how much of it."""
    compile_scope: Literal["blocks", "network"] = "blocks"
    """With compile. blocks: each transformer block of student and teacher. network: all of a pre-training forward as
    one graph, from the stem to the loss with the teacher in it: quicker where the calls between the blocks count, and
    slower to compile; in one process, without layer drop."""
    teacher_graph: bool = False
    """Run the teacher as a CUDA graph: on GPUs, with ddp, without compile, for batches without padding."""
    activation_checkpointing: bool = False
    """Compute the student's blocks a second time in the backward pass in place of keeping their activations."""
    threads: int | None = None
    """CPU threads of PyTorch; unset: its default."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU when there is one."""
    collapse_after: int = 5_000
    """Updates after which the collapse rule applies: the run stops when both monitors below are under their limit, or
    NaN. A loss that is not finite stops the run at any time."""
    collapse_prediction_std: float = 0.01
    """Limit on prediction_std; 0 turns the collapse rule off."""
    collapse_content_spread: float = 0.01
    """Limit on content_spread; 0 turns the collapse rule off."""


def require(condition: bool, name: str, expected: str, config: Any) -> None:
    """`ValueError` naming a setting by its dotted name, what was expected and what was given."""
    if not condition:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_run(config: Any) -> None:
    """How long, how often and on how many ranks; `config` has a section `run` and one `data`."""
    run = config.run
    require(run.steps >= 0, "run.steps", "0 or more", config)
    for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
        require(getattr(run, name) >= 1, f"run.{name}", "1 or more", config)
    for name in ("threads", "keep_every", "shard_ranks"):
        value = getattr(run, name)
        require(value is None or value >= 1, f"run.{name}", "1 or more", config)
    require(run.timeout >= 5.0, "run.timeout", "5 or more", config)
    require(run.shard_ranks is None or run.parallel == "fsdp", "run.shard_ranks", "nothing without fsdp", config)
    # The scaler of the loss would have to agree over the shards of each gradient.
    require(run.parallel == "ddp" or run.precision != "fp16", "run.precision", "fp32 or bf16 with fsdp", config)
    whole = run.compile_scope == "network"
    require(run.compile or not whole, "run.compile_scope", "blocks without run.compile", config)
    # Sharded blocks gather their weights one by one.
    require(run.parallel == "ddp" or not whole, "run.compile_scope", "blocks with fsdp", config)
    alone = run.parallel == "ddp" and not run.compile
    require(alone or not run.teacher_graph, "run.teacher_graph", "False with fsdp or run.compile", config)
