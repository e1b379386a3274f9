"""Settings of how a run trains: moving average, optimiser, data, length and numerics; see `d2v.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from d2v.config.fields import setting


@dataclass(frozen=True)
class Ema:
    """The teacher's moving average."""

    start: float = setting(0.999, low=0, high=1)
    """Decay at update 0."""
    end: float = setting(0.9999, low=0, high=1)
    """Decay after the annealing."""
    anneal_steps: int | None = None
    """Updates over which the decay rises linearly; unset: the whole run."""
    scope: Literal["all", "encoder", "transformer", "layers", "blocks"] = setting("all", rare=True)
    """What is averaged: all: everything but decoder and head (published: images); encoder: not the stem (2.0 speech);
    transformer: blocks, attention biases (1.0 images in fairseq); layers: blocks and the norm before them (1.0 speech);
    blocks: only the main blocks (text). The teacher uses the student's own parts for the rest."""
    freeze_after: int | None = setting(None, low=0, rare=True)
    """Updates after which the averages stay as they are; 0 with --model.init: those of the checkpoint from the
    beginning. The whole teacher stands still with ema.scope all only; then targets are rounded to bfloat16, as
    target.cache keeps them. Unset: never."""

    def is_frozen(self, update: int) -> bool:
        """Whether the averages no longer move at update number `update` (1-based)."""
        return self.freeze_after is not None and update > self.freeze_after

    def decay(self, update: int, steps: int) -> float:
        """Decay used after optimiser update number `update` (1-based) of a run of `steps` updates; 1: frozen."""
        if self.is_frozen(update):
            return 1.0
        anneal = self.anneal_steps if self.anneal_steps is not None else steps
        if update >= anneal:
            return self.end
        return self.end - (self.end - self.start) * (1.0 - update / anneal)


@dataclass(frozen=True)
class Optim:
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = setting(1e-3, low=0)
    """Peak learning rate."""
    betas: tuple[float, float] = setting((0.9, 0.98), rare=True)
    """Decay rates of Adam's moments."""
    eps: float = setting(1e-6, rare=True)
    """Added to the root of Adam's second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay, per unit of learning rate."""
    decay_all: bool = setting(True, rare=True)
    """Decay biases and norm gains too, as the published runs did."""
    clip: float | None = None
    """Largest global gradient norm; unset: no clipping."""
    warmup_steps: int = setting(10_000, low=0)
    """Updates of linear warm-up from 0."""
    schedule: Literal["cosine", "tri-stage", "linear"] = "cosine"
    """After the warm-up: half a cosine; constant, then an exponential fall (1.0 speech); or a straight line (GLUE)."""
    final_rate: float = setting(0.0, low=0)
    """Learning rate at the end of the run, over the peak; tri-stage: also at its start."""
    hold_steps: int = setting(0, low=0, rare=True)
    """Updates at the peak (tri-stage)."""


@dataclass(frozen=True)
class Data:
    """Where samples come from and how they are batched."""

    path: str = setting(
        "", only="pretrain", free=True, outside=True
    )  # may have moved: a resumed run compares the samples themselves by name
    """Folder, file, or shard pattern to train on."""
    valid: str | None = setting(None, only="pretrain", free=True, outside=True)
    """Held-out data, same formats; unset: none."""
    global_batch: int = setting(256, low=1)
    """Samples per optimiser update, over all ranks and accumulation steps."""
    # Memory; with statistics over a batch, numbers too: a resumed run reports it.
    micro_batch: int | None = setting(None, low=1, free=True)
    """Samples per forward on one rank; unset: the whole share of a rank."""
    workers: int = setting(1, low=0, high=4096, free=True)
    """Loader processes per rank; masks are drawn there."""
    shuffle: Literal["full", "shards"] = setting("full", rare=True)
    """full: an epoch is a random permutation of all samples. shards: .tar shards are read in random order, several in
    turn and each in its own order, and windows of data.shuffle_buffer samples are permuted: for slow storage."""
    shuffle_buffer: int = setting(10_000, low=1, rare=True)
    """Samples of a window with data.shuffle shards."""
    shuffle_shards: int = setting(8, low=1, rare=True)
    """Shards that are read in turn with data.shuffle shards; better at least as many as hosts."""
    crop_scale: tuple[float, float] = setting((0.2, 1.0), only="vision")
    """Area of a random crop over the area of the image."""
    flip: bool = setting(True, only="vision")
    """Mirror half of the images left to right."""
    rotate: bool = setting(False, only="vision")
    """Turn each image by a random multiple of 90 degrees."""
    grey: bool = setting(False, only="vision")
    """Convert to grey, repeated to the stem's channels."""
    image_range: tuple[str, ...] = setting(("auto",), only="vision", rare=True)
    """Images of more than 8 bits a value: which values become 0 to 255. dtype: all that the type has; minmax,
    percentile (0.5 to 99.5): of each image, where stem.channels is not 1 or 3 of each channel; LO HI: these two; auto:
    0 to the largest of the 8, 10, 12 (and so on) bits that the image uses, floating point 0 to 1, else minmax."""
    exif_orientation: Literal["ignore", "apply"] = setting("ignore", only="vision", rare=True)
    """Turn and mirror images as their EXIF orientation says, or leave them as they are stored (published); counted."""
    resize: Literal["pillow", "torch"] = setting("pillow", only="vision", rare=True)
    """What resizes training crops (bicubic, antialiased): Pillow, as published, or PyTorch, quicker and for photographs
    within 2 of 255 levels of it (noise: 20); where simplejpeg is installed it then decodes JPEG, to the same values."""
    standardise: Literal["imagenet", "sample"] = setting("imagenet", only="vision")
    """Fixed ImageNet mean and deviation per channel, or zero mean and unit variance per image."""
    bad_fraction: float = setting(0.05, low=0, high=1, free=True, rare=True)
    """Stop when more than this share of the samples cannot be decoded."""
    min_seconds: float = setting(2.0, only="waveform")
    """Waveforms: shorter ones are left out and counted. Published: 2."""
    max_seconds: float = setting(20.0, only="waveform")
    """Waveforms: longest crop, and longest sample of an evaluation. Published: 20."""
    batch_seconds: float | None = setting(None, only="waveform")
    """Waveforms: most seconds of a micro-batch, padding included; an update has as many micro-batches as this
    needs, the same number on all ranks. Unset: data.micro_batch alone decides."""
    speed: float = setting(0.0, low=0, high=1, only="speech")
    """Speech: each utterance is played at a random speed of e^-s to e^s, pitch and length change together (Ko et al.
    2015); s at most 1. Only in training. Published: 0."""
    unequal: Literal["crop", "pad"] = setting("crop", only="waveform")
    """Waveforms: random crops of the length of the batch's shortest one (published), or padding to its longest."""
    tokenizer: str | None = setting(
        None, only="text", free=True, outside=True
    )  # a resumed run compares the tokens themselves
    """Text: folder of a tokenizer (`d2v data tokenizer`); unset: one of stem.vocabulary tokens is trained on the data
    and kept in the run folder."""
    blocks: Literal["stream", "documents"] | None = setting(None, only="text")
    """Text: cut the stream of all documents (published 2.0), or every document by itself (published 1.0); unset: as
    published."""
    block_tokens: int | None = setting(None, only="text", rare=True)
    """Text: tokens of a block, the leading <s> included; unset: stem.max_tokens."""
    cache: str | None = setting(None, free=True, rare=True, outside=True)
    """Folder for what is made of the data once and shared by runs on it: tokenised text, the index of shards, lengths
    of speech; unset: in the run folder."""
    readers: int | None = setting(None, low=0, free=True, rare=True)
    """Encoded samples that each loader worker reads at the same time, of its batch and its next one, which hides the
    time that a slow storage takes for each; 0: one at a time, when it is needed; unset: 16 at URLs, else 0. Files and
    shards at URLs."""
    allow_commands: bool = setting(False, free=True, rare=True, outside=True)
    """Run shell commands that a data path or a manifest names (pipe:COMMAND, COMMAND |)."""


@dataclass(frozen=True)
class Probe:
    """Accuracy of a linear classifier and of k nearest neighbours on the teacher's features, while the run goes on."""

    train: str | None = setting(None, free=True, outside=True)
    """Labelled training data, as for d2v evaluate probe; unset: no probe."""
    test: str | None = setting(None, free=True, outside=True)
    """Labelled test data."""
    every: int | None = setting(None, low=1, free=True)
    """Updates between probes; unset: run.checkpoint_every."""
    pool: Literal["mean", "mean-std", "segments", "class"] = setting("mean", free=True)
    """How a sample's tokens become one vector, as for d2v evaluate probe."""
    samples: int = setting(5_000, low=2, free=True)
    """Most samples of each of the two sets: of larger ones a random choice, always the same."""


@dataclass(frozen=True)
class Run:
    """Length, logging, checkpoints, numerics."""

    dir: str = setting("", free=True, outside=True)
    """Run folder; resumes if it holds a checkpoint."""
    steps: int = setting(400_000, low=0)
    """Optimiser updates."""
    extend: int = setting(0, low=0, rare=True)
    """Updates after run.steps: the schedule of the learning rate is gone through once more over them, warm-up and hold
    shortened in proportion; the moving average keeps its last decay."""
    seed: int = 0
    """Seed of weights, masks, noise, crops and order."""
    log_every: int = setting(50, low=1, free=True)
    """Updates between lines of metrics.jsonl."""
    checkpoint_every: int = setting(5_000, low=1, free=True)
    """Updates between checkpoints."""
    digest_every: int | None = setting(None, low=1, free=True, rare=True)
    """Updates between lines of digests.jsonl, from which `d2v audit` tells whether a run can be repeated; copies of the
    model on several ranks that are no longer equal stop the run. Unset: none."""
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio", "prometheus", "none"], ...] = setting(
        ("tensorboard",), free=True
    )
    """Programs that get the lines of metrics, too, in the run folder and offline (docs/monitoring.md); none: none. On
    the command line also FILE.py:FUNCTION, a function of (step, values) or a class of yours: the file is run."""
    keep_checkpoints: int = setting(2, low=1, free=True)
    """Most recent checkpoints kept."""
    keep_every: int | None = setting(None, low=1, free=True, rare=True)
    """Checkpoints of updates that are a multiple of this are kept for good; unset: none."""
    keep_best: str | None = setting(None, free=True, rare=True)
    """Metric, for example valid_loss, whose best checkpoint is kept for good, too; unset: none."""
    best: Literal["lowest", "highest"] = setting("lowest", free=True, rare=True)
    """Which value of keep_best is the best."""
    local_checkpoint: str | None = setting(None, free=True, rare=True, outside=True)
    """Folder on each node's own memory or disk (/dev/shm, NVMe) for checkpoints between those of the run folder: the
    newest two, from which a restart on the same nodes goes on where they are newer. Removed when the run ends or saves
    on a signal. Counts only where it is given in the call."""
    local_every: int = setting(100, low=1, free=True, rare=True)
    """Updates between checkpoints in local_checkpoint."""
    async_checkpoint: bool = setting(True, free=True, rare=True)
    """Write checkpoints from a copy in memory while the training goes on."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16: matrix products under autocast, fp32 master weights; fp16: the same with a scaled loss; an update whose
    gradients overflow changes neither weights nor teacher."""
    reduce_precision: Literal["fp32", "bf16"] = setting("fp32", rare=True)
    """What gradients are rounded to on their way between ranks: bf16 sends half the bytes; sums are float32 with
    either."""
    parallel: Literal["ddp", "fsdp"] = setting("ddp", free=True)
    """Under torchrun. ddp: every rank has the whole model (DistributedDataParallel); fsdp: weights, gradients, Adam's
    moments and teacher are split over the ranks (fully_shard)."""
    shard_ranks: int | None = setting(None, low=1, free=True, rare=True)
    """fsdp: neighbouring ranks that a model is split over; such groups hold copies of each other (hybrid sharding).
    Unset: all ranks."""
    timeout: float = setting(600.0, low=5, free=True, rare=True)
    """Seconds of silence after which a rank counts as lost and the others stop, naming it."""
    compile: bool = setting(False, free=True)
    """torch.compile the model; compile_scope says how much of it."""
    compile_scope: Literal["blocks", "network"] = setting("blocks", free=True, rare=True)
    """With compile. blocks: each transformer block of student and teacher. network: all of a training forward as one
    graph, in pre-training from the stem to the loss with the teacher in it: quicker where the calls between the blocks
    count, and slower to compile; without layer drop and fsdp."""
    compile_cache: str | None = setting(None, free=True, rare=True, outside=True)
    """With compile: folder for compiled code, which ranks of a node share and later starts take up; unset: PyTorch's
    in the node's /tmp. Its code is executed: nobody else may be able to write there, and only the call can give it."""
    convolution: Literal["auto", "library", "fused"] = setting("auto", free=True, rare=True)
    """Grouped convolutions of decoder and speech positions. library: PyTorch's (cuDNN, oneDNN), then norm, GELU and
    residual; fused: all in one operator, Triton's on GPUs, which is not measured there yet; auto: fused on CPUs in
    bf16, else the library's."""
    packed: Literal["auto", "always", "never"] = setting("auto", free=True, rare=True)
    """Blocks take the valid tokens of padded rows alone: student and teacher of 1.0, teacher of 2.0, fine-tuning,
    features; not with compile or drop path. The same but for rounding, and dropout drops other elements. auto: on GPUs
    with xformers for fp16 and bf16; on CPUs never, though always is quicker there but for tiny models."""
    teacher_graph: bool = setting(False, free=True, rare=True)
    """Run the teacher as a CUDA graph: on GPUs, with ddp, without compile, for batches without padding."""
    activation_checkpointing: bool = setting(False, free=True)
    """Compute the student's blocks a second time in the backward pass in place of keeping their activations."""
    threads: int | None = setting(None, low=1, free=True, rare=True)
    """CPU threads of PyTorch; unset: its default."""
    keep_pages: bool = setting(True, free=True, rare=True)
    """Keep freed memory in the process rather than give it back to the system and ask again at every update; false
    leaves malloc as it is. Only with glibc's malloc."""
    products: Literal["auto", "library", "onednn"] = setting("auto", free=True, rare=True)
    """Who multiplies fp32 matrices on a CPU. library: as PyTorch does, by MKL; onednn: oneDNN, which rounds otherwise;
    auto: oneDNN on AMD's processors from Zen 5 on, where it is twice as quick."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", free=True)
    """auto: a GPU when there is one."""
    collapse_after: int | None = setting(None, low=0, free=True, rare=True)
    """Updates after which the collapse rule applies: the run stops when two monitors are under their limit, or one of
    the targets and the local encoder in three lines running; NaN counts. Unset: a fortieth of run.steps, at most 5000.
    A loss that is not finite, or five times that of predicting 0, stops the run at any time."""
    collapse_prediction_std: float = setting(0.01, free=True, rare=True)
    """Limit on prediction_std; 0 turns the rules of collapse and of a diverging loss off."""
    collapse_content_spread: float = setting(0.1, free=True, rare=True)
    """Limit on content_spread, for targets whose norms give them a mean square of 1; 0 turns both rules off."""

    @property
    def stops_on_collapse(self) -> bool:
        """Whether the rules of collapse and of a diverging loss are on."""
        return min(self.collapse_prediction_std, self.collapse_content_spread) > 0.0

    @property
    def collapse_begin(self) -> int:
        """`collapse_after`, also where it is unset: a warm-up of 5000 updates would outlast a short run."""
        return min(5_000, self.steps // 40) if self.collapse_after is None else self.collapse_after

    @property
    def last(self) -> int:
        """Number of the last update."""
        return self.steps + self.extend
