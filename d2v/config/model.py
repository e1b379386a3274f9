"""Every setting of a run, as nested dataclasses.

A recipe (`d2v.recipes`) is a function that returns a `Config`; the command line overrides single fields by their
dotted names (`--optim.learning-rate 1e-3`). The doc text under a field is its help text. Symbols: B samples,
M masked copies per sample, T tokens, C width, K averaged blocks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from d2v.config.run import Data, Ema, Optim, Run, check_run, require

PUBLISHED_BEHAVIOURS = frozenset(
    {
        "statistics-over-padding",
        "loss-on-padding",
        "positions-see-padding",
        "class-loss-per-micro-batch",
        "no-head-1.0-vision",
        "pre-norm-without-residual",
        "visible-count-of-row-0",
        "masked-tokens-only-teacher",
        "equal-mask-counts",
        "norms-over-batch",
    }
)


SPEECH_CONVOLUTIONS = ((512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 2, 2), (512, 2, 2))
"""The published waveform extractor: one frame every 320 samples, each of 400."""


@dataclass(frozen=True)
class Stem:
    """What turns raw input into T features of width C, and where the features stand.

    The first five fields concern every kind of input, the next images, then speech, then text.
    """

    modality: Literal["speech", "vision", "text"] = "vision"
    """Kind of input."""
    kind: Literal["stock", "log-mel"] = "stock"
    """stock: the published stem of the modality. log-mel, for speech: a log-mel spectrogram, a few of its frames a
    token; not a published stem, quicker to train on little data."""
    positions: Literal["sincos", "conv", "relative", "none"] = "sincos"
    """sincos: fixed, added (2.0 images); conv: of a stack of convolutions (speech); relative: a learned bias of
    attention (1.0 images); none (text, whose stem has learned positions)."""
    dropout: float = 0.0
    """Dropout on the features. Text: inside the stem; speech: on what the student sees only."""
    norm_eps: float = 1e-5
    """Epsilon of the layer norm on embeddings (text) or on the convolutions' output (speech)."""
    image_size: int = 224
    """Height and width of an image in pixels."""
    patch_size: int = 16
    """Height and width of a patch in pixels."""
    channels: int = 3
    """Colour channels of an image."""
    position_scale: float = 1.0
    """Factor on the fixed sin-cos positions. Published: 1."""
    convolutions: tuple[tuple[int, int, int], ...] = SPEECH_CONVOLUTIONS
    """Speech: channels, kernel and stride of each convolution of the waveform."""
    convolution_bias: bool = False
    """Speech: these convolutions have a bias."""
    gradient_scale: float = 1.0
    """Speech: factor on the gradient that enters them; 0 freezes them."""
    position_layers: int = 5
    """Speech: convolutions of the positions."""
    position_width: int = 95
    """Speech: reach of the positions in frames, shared by their convolutions."""
    position_groups: int = 16
    """Speech: groups of these convolutions."""
    position_norm: bool = False
    """Speech: layer norm before them."""
    mel_bins: int = 40
    """Log-mel stem: bands of the spectrogram."""
    mel_frames: int = 3
    """Log-mel stem: spectrogram frames, 10 ms each, in a token."""
    vocabulary: int = 50_265
    """Text: number of token ids; 1 is padding."""
    max_tokens: int = 512
    """Text: longest sequence, in tokens."""
    mask_token: int | None = None
    """Text, 1.0: id of the mask token."""
    learned_positions: bool = True
    """Text: add learned positions."""
    embedding_norm: bool = True
    """Text: layer norm on the embeddings."""
    embedding_scale: float = 1.0
    """Text: factor on the token embeddings before the positions are added."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row of an image."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def summary(self) -> str:
        """The input in a few words."""
        if self.modality == "vision":
            return f"{self.image_size} px, patch {self.patch_size}"
        if self.modality == "text":
            return f"{self.vocabulary} token ids, at most {self.max_tokens} tokens"
        return "log-mel spectrogram" if self.kind == "log-mel" else f"waveform, {len(self.convolutions)} convolutions"


@dataclass(frozen=True)
class Encoder:
    """Transformer blocks of student and teacher."""

    width: int = 768
    """Channels C of a token."""
    heads: int = 12
    """Attention heads; divides the width."""
    prenet_depth: int = 0
    """Blocks before the main ones; never used as targets."""
    depth: int = 12
    """Main blocks."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over C."""
    norm_order: Literal["post", "pre"] = "post"
    """Layer norm after each residual sum (published 2.0) or before each branch."""
    norm_eps: float = 1e-5
    """Epsilon of the layer norms."""
    norm_affine: bool = True
    """Layer norms have a learned gain and bias."""
    input_norm: bool = True
    """Post-norm models: layer norm on the tokens that enter the first block."""
    layer_scale: float = 0.0
    """Initial value of a learned factor per channel on both branches of a block; 0: no such factor."""
    key_bias: bool = True
    """Keys have a bias, as queries and values do."""
    alibi: Literal["none", "fixed", "learned"] = "none"
    """Attention bias of -slope * distance in tokens (Press et al. 2021, symmetric), with a fixed or learned factor."""
    alibi_scale: float = 1.0
    """Initial factor on the slopes; negative factors count as 0."""
    alibi_heads: int | None = None
    """Heads that have the bias, the first ones; unset: all."""
    alibi_distance: Literal["sequence", "manhattan", "euclidean"] = "sequence"
    """Distance of two tokens: in the sequence, or of two patches on their grid."""
    alibi_per_head: bool = True
    """One factor for each head, or one for all."""
    alibi_per_layer: bool = False
    """One factor for each block, prenet blocks first, or one for all."""
    extra_tokens: int = 0
    """Learned tokens put before the others; they have no position and are never masked. The last is the class token."""
    init_std: float | None = 0.02
    """Standard deviation of the linear layers' initial weights (published: 0.02); unset: PyTorch's default."""
    init_rescale: bool = False
    """Divide the initial output weights of main block i (from 1) by sqrt(2 i), and cut initial weights at two standard
    deviations (published 1.0 images)."""
    dropout: float = 0.0
    """Dropout after attention projection and MLP."""
    attention_dropout: float = 0.0
    """Dropout on attention weights."""
    activation_dropout: float = 0.0
    """Dropout inside the MLP, after the activation."""
    prenet_dropout: float = 0.0
    """Dropout on the tokens that enter the first block."""
    layer_drop: float = 0.0
    """Probability that the student skips a main block."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, rising linearly from 0."""


@dataclass(frozen=True)
class Decoder:
    """Convolutional decoder of data2vec 2.0: predicts masked tokens from visible tokens and noise."""

    layers: int = 6
    """Convolutions."""
    width: int = 768
    """Channels of a convolution's output."""
    kernel: int = 3
    """Kernel size (both axes for images)."""
    groups: int = 16
    """Groups of a convolution."""
    residual: bool = True
    """Add a layer's input to its output where the channel counts agree."""
    projection_layers: int = 1
    """Linear layers of the last projection, with GELU between."""
    projection_ratio: float = 2.0
    """Hidden width of the projection over C."""
    input_dropout: float = 0.0
    """Dropout on the encoder output that enters the decoder."""
    positions_masked: bool = False
    """Add the fixed positions at the masked tokens of the decoder's input."""
    positions_all: bool = False
    """Add the fixed positions at all tokens of the decoder's input."""


@dataclass(frozen=True)
class Head:
    """What data2vec 1.0 has instead of a decoder: linear layers on the encoder's output at masked tokens."""

    layers: int = 1
    """Linear layers of width 2 C, with GELU between; the last has width C."""


@dataclass(frozen=True)
class Mask:
    """Which tokens the student does not see."""

    kind: Literal["block", "random", "span", "rectangles", "token-span"] = "block"
    """Sampling rule; see `d2v_kernels.MaskSampler`."""
    ratio: float = 0.8
    """Masked fraction of the tokens."""
    adjust: float = 0.0
    """Added to the ratio when block centres are counted, before the exact count is enforced."""
    span: int = 1
    """Side of a block, or length of a span, in tokens."""
    inverse: bool = False
    """Draw the visible blocks instead of the masked ones."""
    copies: int = 1
    """Masked copies M of each sample; the teacher runs once for all of them."""
    noise_std: float = 0.01
    """Standard deviation of the noise that stands for masked tokens in the decoder."""


@dataclass(frozen=True)
class Target:
    """What the student predicts: the mean of K normalised teacher tensors, normalised again."""

    source: Literal["ffn", "block"] = "ffn"
    """MLP output before the residual sum, or the block's output."""
    top_k: int = 8
    """Number K of top main blocks that are averaged."""
    norm: str = "instance"
    """Norm of each tensor: none, layer (over C), instance (over T), batch (over B, T), group (over T, C), position
    (over B at each position), or several joined by commas."""
    out_norm: str = "none"
    """Norm of the mean, same names."""


@dataclass(frozen=True)
class Loss:
    """Regression at the masked tokens, and of the class token."""

    beta: float = 0.0
    """0: squared error; above 0: smooth-L1 with this threshold."""
    scale: float | None = None
    """Factor on the summed error; unset: 1 / sqrt(C)."""
    class_weight: float = 0.0
    """Weight of the class-token loss, as published (0.01 for images)."""
    class_rows: int = 256
    """Student rows per micro-batch for which the published class weight was chosen; makes the class loss independent of
    batch size and accumulation."""


@dataclass(frozen=True)
class Config:
    """A complete run: model, data, optimisation."""

    recipe: str = ""
    """Name of the recipe this configuration came from."""
    version: Literal[1, 2] = 2
    """data2vec 1.0 or 2.0."""
    stem: Stem = field(default_factory=Stem)
    encoder: Encoder = field(default_factory=Encoder)
    decoder: Decoder = field(default_factory=Decoder)
    head: Head = field(default_factory=Head)
    mask: Mask = field(default_factory=Mask)
    target: Target = field(default_factory=Target)
    loss: Loss = field(default_factory=Loss)
    ema: Ema = field(default_factory=Ema)
    optim: Optim = field(default_factory=Optim)
    data: Data = field(default_factory=Data)
    run: Run = field(default_factory=Run)
    published: frozenset[str] = frozenset()
    """Behaviours of the published code reproduced on purpose (docs/parity.md)."""

    def __post_init__(self) -> None:
        require(self.encoder.width % self.encoder.heads == 0, "encoder.width", "a multiple of encoder.heads", self)
        require(1 <= self.target.top_k <= self.encoder.depth, "target.top_k", "1 to encoder.depth", self)
        require(0.0 < self.mask.ratio < 1.0, "mask.ratio", "above 0 and below 1", self)
        require(self.mask.copies >= 1, "mask.copies", "at least 1", self)
        needed = 1 if self.loss.class_weight > 0.0 else 0
        require(self.encoder.extra_tokens >= needed, "encoder.extra_tokens", f"at least {needed}", self)
        require(self.head.layers >= 1, "head.layers", "1 or more", self)
        require(self.decoder.projection_layers >= 1, "decoder.projection_layers", "1 or more", self)
        check_model(self)
        require(0.0 <= self.ema.start <= 1.0, "ema.start", "0 to 1", self)
        require(0.0 <= self.ema.end <= 1.0, "ema.end", "0 to 1", self)
        require(self.data.global_batch >= 1, "data.global_batch", "1 or more", self)
        require(self.data.workers >= 0, "data.workers", "0 or more", self)
        micro = self.data.micro_batch
        require(micro is None or micro >= 1, "data.micro_batch", "1 or more", self)
        require(self.data.shuffle_buffer >= 1, "data.shuffle_buffer", "1 or more", self)
        require(self.data.shuffle_shards >= 1, "data.shuffle_shards", "1 or more", self)
        require(0.0 <= self.data.bad_fraction <= 1.0, "data.bad_fraction", "0 to 1", self)
        check_run(self)
        require(self.optim.warmup_steps >= 0, "optim.warmup_steps", "0 or more", self)
        require(self.optim.hold_steps >= 0, "optim.hold_steps", "0 or more", self)
        positive = self.optim.final_rate > 0.0 or self.optim.schedule != "tri-stage"
        require(positive and self.optim.final_rate >= 0.0, "optim.final_rate", "0 or more, tri-stage above 0", self)
        require(self.optim.learning_rate >= 0.0, "optim.learning_rate", "0 or more", self)
        unknown = self.published - PUBLISHED_BEHAVIOURS
        if unknown:
            raise ValueError(f"published: expected names of {sorted(PUBLISHED_BEHAVIOURS)}, got {sorted(unknown)}")

    @property
    def loss_scale(self) -> float:
        """Factor on the summed error: `loss.scale`, or 1 / sqrt(C)."""
        return self.loss.scale if self.loss.scale is not None else 1.0 / math.sqrt(self.encoder.width)

    def to_json(self) -> str:
        """The configuration as JSON text; `from_json` reads it back."""
        value = dataclasses.asdict(self)
        value["published"] = sorted(self.published)
        return json.dumps(value, indent=2)

    @staticmethod
    def from_json(text: str) -> Config:
        """Rebuilds a configuration; unknown or missing fields raise `ValueError` with their names."""
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"config: expected a JSON object, got {type(value).__name__}")
        config: Config = build_section(Config, value, "config")
        return config


def build_section(cls: Any, value: dict[str, Any], where: str) -> Any:
    """A dataclass of settings from JSON; `ValueError`, beginning with `where`, names unknown fields."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(value) - set(fields)):
        raise ValueError(f"{where}: unknown fields {unknown}; expected {sorted(fields)}")
    kwargs: dict[str, Any] = {}
    for name, item in value.items():
        section = fields[name].default_factory
        if dataclasses.is_dataclass(section):
            kwargs[name] = build_section(section, item, f"{where}.{name}")
        elif name == "published":
            kwargs[name] = frozenset(item)
        else:
            kwargs[name] = _to_tuples(item)
    return cls(**kwargs)


def _to_tuples(value: Any) -> Any:
    return tuple(_to_tuples(v) for v in value) if isinstance(value, list) else value


def check_model(config: Config) -> None:
    """Which stem, positions, masks, speed and version belong together."""
    stem, version = config.stem, config.version
    sequence = stem.modality != "vision"
    require(stem.kind == "stock" or stem.modality == "speech", "stem.kind", "stock unless speech", config)
    require(stem.positions != "conv" or sequence, "stem.positions", "other than conv for vision", config)
    require(stem.positions != "relative" or not sequence, "stem.positions", "relative for vision only", config)
    require(stem.gradient_scale >= 0.0, "stem.gradient_scale", "0 or more", config)
    require(len(stem.convolutions) >= 1, "stem.convolutions", "at least 1", config)
    require(stem.position_layers >= 1, "stem.position_layers", "1 or more", config)
    if version == 1 and stem.modality == "text":
        known = stem.mask_token is not None and 0 <= stem.mask_token < stem.vocabulary
        require(known, "stem.mask_token", f"0 to {stem.vocabulary - 1}", config)
    if config.mask.kind == "rectangles":
        require(not sequence, "mask.kind", "a kind for sequences", config)
    require(0.0 <= config.data.speed <= 1.0, "data.speed", "0 to 1", config)
    require(config.data.speed == 0.0 or stem.modality == "speech", "data.speed", "0 unless speech", config)
    equal = config.mask.kind not in ("rectangles", "token-span")
    require(version == 1 or equal, "mask.kind", "block, random or span for version 2", config)
    fixed = stem.positions == "sincos"
    require(fixed or not config.decoder.positions_masked, "decoder.positions_masked", "False without sincos", config)
    require(fixed or not config.decoder.positions_all, "decoder.positions_all", "False without sincos", config)
    grid = config.encoder.alibi_distance != "sequence"
    require(not (grid and sequence), "encoder.alibi_distance", "sequence unless vision", config)
    both = stem.positions == "relative" and config.encoder.alibi != "none"
    require(not both, "encoder.alibi", "none with relative positions", config)
    heads = config.encoder.alibi_heads if config.encoder.alibi != "none" else None
    require(heads is None or 1 <= heads <= config.encoder.heads, "encoder.alibi_heads", "1 to encoder.heads", config)
    check_graph(config)


def check_graph(config: Config) -> None:
    """What cannot be one graph: each choice of skipped blocks would be another, and counts read on the host end one."""
    whole = config.run.compile_scope == "network"
    dropped = config.encoder.layer_drop > 0.0
    require(not (whole and dropped), "run.compile_scope", "blocks with encoder.layer_drop", config)
    counted = "masked-tokens-only-teacher" in config.published
    require(not (whole and counted), "run.compile_scope", "blocks with masked-tokens-only-teacher", config)
