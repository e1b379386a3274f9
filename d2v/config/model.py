"""Every setting of a run, as nested dataclasses.

A recipe (`d2v.recipes`) is a function that returns a `Config`; the command line overrides single fields by their
dotted names (`--optim.learning-rate 1e-3`). The doc text under a field is its help text. Symbols: B samples,
M masked copies per sample, T tokens, C width, K averaged blocks.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from d2v.config.fields import build_section, check_ranges, find_nearest, flat_fields, replace_fields, require, setting
from d2v.config.inputs import Grid, find_kind
from d2v.config.run import Data, Ema, Optim, Probe, Run
from d2v.files import parse_json

if TYPE_CHECKING:
    from typing_extensions import Self

PUBLISHED_BEHAVIOURS = frozenset(
    [
        "statistics-over-padding", "loss-on-padding", "positions-see-padding", "class-loss-per-micro-batch",
        "no-head-1.0-vision", "pre-norm-without-residual", "visible-count-of-row-0", "masked-tokens-only-teacher",
        "equal-mask-counts", "norms-over-batch",
    ]
)  # fmt: skip

SPEECH_CONVOLUTIONS = ((512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 3, 2), (512, 2, 2), (512, 2, 2))
"""The published waveform extractor: one frame every 320 samples, each of 400."""


@dataclass(frozen=True)
class Stem:
    """What turns raw input into T features of width C, and where the features stand.

    The first five fields concern every kind of input, the next images, then waveforms (speech, signals), then text.
    """

    modality: str = setting("vision", rare=True)
    """Kind of input: speech, vision, text, signals, spectrograms, or a registered one."""
    kind: Literal["stock", "log-mel"] = setting("stock", only="speech", rare=True)
    """stock: the published stem of the modality. log-mel, for speech: a log-mel spectrogram, a few of its frames a
    token; not a published stem, quicker to train on little data."""
    positions: Literal["sincos", "conv", "relative", "none"] = setting("sincos", rare=True)
    """sincos: fixed, added (2.0 images); conv: of a stack of convolutions (speech); relative: a learned bias of
    attention (1.0 images); none (text, whose stem has learned positions)."""
    dropout: float = setting(0.0, rare=True)
    """Dropout on the features. Text: inside the stem; speech: on what the student sees only."""
    width: int | None = setting(None, low=1, only="projected", rare=True)
    """Channels of the embeddings of patches or tokens, which a linear layer brings to encoder.width; unset:
    encoder.width, without such a layer."""
    norm_eps: float = setting(1e-5, only="sequence", rare=True)
    """Epsilon of the layer norm on embeddings (text) or on the convolutions' output (speech)."""
    image_size: int = setting(224, low=1, only="vision")
    """Height and width of an image in pixels."""
    patch_size: int = setting(16, low=1, only="patches")
    """Height and width of a patch in pixels; of spectrograms in frames and bands."""
    channels: int = setting(3, low=1, only="channels")
    """Channels of images, of which those of 1 or 3 are grey or colour; channels of signals."""
    sample_rate: int = setting(100, low=1, only="signals")
    """Signals: samples of a second; files that say another rate are resampled."""
    position_scale: float = setting(1.0, only="sincos")
    """Factor on the fixed sin-cos positions. Published: 1."""
    convolutions: tuple[tuple[int, int, int], ...] = setting(SPEECH_CONVOLUTIONS, only="waveform stock", rare=True)
    """Waveforms: channels, kernel and stride of each convolution."""
    convolution_bias: bool = setting(False, only="waveform stock", rare=True)
    """Waveforms: these convolutions have a bias."""
    convolution_norm: Literal["layer", "group"] = setting("layer", only="waveform stock", rare=True)
    """Waveforms: layer: a norm over channels behind each convolution; group: one norm of each channel over time behind
    the first convolution, none behind the others (published as extractor_mode default)."""
    gradient_scale: float = setting(1.0, low=0, only="waveform stock", rare=True)
    """Waveforms: factor on the gradient that enters them; 0 freezes them."""
    position_layers: int = setting(5, low=1, only="conv", rare=True)
    """Speech: convolutions of the positions."""
    position_width: int = setting(95, low=1, only="conv", rare=True)
    """Speech: reach of the positions in frames, shared by their convolutions."""
    position_groups: int = setting(16, low=1, only="conv", rare=True)
    """Speech: groups of these convolutions."""
    position_norm: bool = setting(False, only="conv", rare=True)
    """Speech: layer norm before them."""
    frames: int = setting(1024, low=1, only="spectrograms")
    """Spectrograms: their length in frames of 10 ms; shorter ones are padded, longer ones cut."""
    frame_mean: float = setting(-4.268, only="spectrograms")
    """Spectrograms: what is taken off every value, the mean over the training data; the default is that of AudioSet."""
    frame_deviation: float = setting(4.569, above=0, only="spectrograms")
    """Spectrograms: what they are then divided by is twice this, the standard deviation over the training data."""
    mel_bins: int = setting(40, low=1, only="log-mel")
    """Log-mel stem: bands of the spectrogram."""
    mel_frames: int = setting(3, low=1, only="log-mel")
    """Log-mel stem: spectrogram frames, 10 ms each, in a token."""
    vocabulary: int = setting(50_265, low=1, only="text")
    """Text: number of token ids; 1 is padding."""
    max_tokens: int = setting(512, low=1, only="text")
    """Text: longest sequence, in tokens."""
    mask_token: int | None = setting(None, only="text 1.0")
    """Text, 1.0: id of the mask token."""
    learned_positions: bool = setting(True, only="text", rare=True)
    """Text: add learned positions."""
    embedding_norm: bool = setting(True, only="text", rare=True)
    """Text: layer norm on the embeddings."""
    embedding_scale: float = setting(1.0, only="text", rare=True)
    """Text: factor on the token embeddings before the positions are added."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row of an image."""
        side = self.image_size // self.patch_size
        return side, side


@dataclass(frozen=True)
class Encoder:
    """Transformer blocks of student and teacher."""

    width: int = setting(768, low=1)
    """Channels C of a token."""
    heads: int = setting(12, low=1)
    """Attention heads; divides the width."""
    prenet_depth: int = setting(0, low=0)
    """Blocks before the main ones; never used as targets."""
    depth: int = setting(12, low=1)
    """Main blocks."""
    mlp_ratio: float = setting(4.0, above=0, rare=True)
    """Hidden width of the MLP over C."""
    norm_order: Literal["post", "pre"] = setting("post", rare=True)
    """Layer norm after each residual sum (published 2.0) or before each branch."""
    norm_eps: float = setting(1e-5, rare=True)
    """Epsilon of the layer norms."""
    norm_affine: bool = setting(True, rare=True)
    """Layer norms have a learned gain and bias."""
    input_norm: bool = setting(True, only="post", rare=True)
    """Post-norm models: layer norm on the tokens that enter the first block."""
    layer_scale: float = setting(0.0, rare=True)
    """Initial value of a learned factor per channel on both branches of a block; 0: no such factor."""
    key_bias: bool = setting(True, rare=True)
    """Keys have a bias, as queries and values do."""
    alibi: Literal["none", "fixed", "learned"] = setting("none", rare=True)
    """Attention bias of -slope * distance in tokens (Press et al. 2021, symmetric), with a fixed or learned factor."""
    alibi_scale: float = setting(1.0, rare=True)
    """Initial factor on the slopes; negative factors count as 0."""
    alibi_heads: int | None = setting(None, rare=True)
    """Heads that have the bias, the first ones; unset: all."""
    alibi_distance: Literal["sequence", "manhattan", "euclidean"] = setting("sequence", rare=True)
    """Distance of two tokens: in the sequence, or of two patches on their grid."""
    alibi_table: int | None = setting(None, low=1, rare=True)
    """A learned table in place of -slope * distance, which it starts from: a bias for each head and pair of so many
    positions (later ones take the last); images: of all patches. Memory grows with the tokens squared. Unset: none."""
    alibi_per_head: bool = setting(True, rare=True)
    """One factor for each head, or one for all."""
    alibi_per_layer: bool = setting(False, rare=True)
    """One factor for each block, prenet blocks first, or one for all."""
    extra_tokens: int = setting(0, low=0)
    """Learned tokens put before the others; they have no position and are never masked. The last is the class token."""
    init_std: float | None = setting(0.02, rare=True)
    """Standard deviation of the linear layers' initial weights (published: 0.02); unset: PyTorch's default."""
    init_rescale: bool = setting(False, rare=True)
    """Divide the initial output weights of main block i (from 1) by sqrt(2 i), and cut initial weights at two standard
    deviations (published 1.0 images)."""
    dropout: float = 0.0
    """Dropout after attention projection and MLP."""
    attention_dropout: float = 0.0
    """Dropout on attention weights."""
    activation_dropout: float = setting(0.0, rare=True)
    """Dropout inside the MLP, after the activation."""
    prenet_dropout: float = setting(0.0, rare=True)
    """Dropout on the tokens that enter the first block."""
    layer_drop: float = 0.0
    """Probability that the student skips a main block."""
    drop_path: float = 0.0
    """Stochastic depth of the last block, rising linearly from 0."""


@dataclass(frozen=True)
class SharedDecoder:
    """Second convolutional decoder of data2vec 2.0, always over a sequence, with a regression loss of its own."""

    layers: int = setting(0, low=0, rare=True)
    """Convolutions; 0: there is no such decoder."""
    width: int = setting(768, low=1, rare=True)
    """Channels of a convolution's output."""
    kernel: int = setting(3, low=1, rare=True)
    """Kernel size."""
    groups: int = setting(16, low=1, rare=True)
    """Groups of a convolution."""
    residual: bool = setting(True, rare=True)
    """Add a layer's input to its output where the channel counts agree."""
    projection_layers: int = setting(1, low=1, rare=True)
    """Linear layers of the last projection, with GELU between."""
    projection_ratio: float = setting(2.0, above=0, rare=True)
    """Hidden width of the projection over C."""


@dataclass(frozen=True)
class Decoder(SharedDecoder):
    """Decoder of data2vec 2.0: predicts masked tokens from visible tokens and noise."""

    layers: int = setting(6, low=0)
    """Convolutions, or transformer blocks."""
    width: int = setting(768, low=1)
    """Channels of a convolution's output, or of a block."""
    kernel: int = setting(3, low=1)
    """Kernel size (both axes for images)."""
    groups: int = setting(16, low=1)
    """Groups of a convolution."""
    kind: Literal["conv", "transformer", "cross"] = setting("conv", rare=True)
    """conv: convolutions; transformer: blocks over visible tokens and noise; cross: blocks in which the positions of
    masked patches attend to visible ones, without noise (images)."""
    heads: int = setting(8, low=1, rare=True)
    """Attention heads of transformer and cross. Published: 8."""
    input_dropout: float = 0.0
    """Dropout on the encoder output that enters the decoder."""
    positions_masked: bool = setting(False, only="sincos", rare=True)
    """Add the fixed positions at the masked tokens of the decoder's input."""
    positions_all: bool = setting(False, only="sincos", rare=True)
    """Add the fixed positions at all tokens of the decoder's input."""


@dataclass(frozen=True)
class Head:
    """What data2vec 1.0 has instead of a decoder: linear layers on the encoder's output at masked tokens."""

    layers: int = setting(1, low=1)
    """Linear layers of width 2 C, with GELU between; the last has width C."""


@dataclass(frozen=True)
class Mask:
    """Which tokens the student does not see."""

    kind: Literal["block", "random", "span", "rectangles", "token-span"] = "block"
    """Sampling rule; see `d2v_kernels.MaskSampler`."""
    ratio: float = setting(0.8, above=0, below=1)
    """Masked fraction of the tokens."""
    adjust: float = setting(0.0, only="block")
    """Added to the ratio when block centres are counted, before the exact count is enforced."""
    span: int = setting(1, low=1)
    """Side of a block, or length of a span, in tokens."""
    inverse: bool = setting(False, only="block")
    """Draw the visible blocks instead of the masked ones."""
    copies: int = setting(1, low=1)
    """Masked copies M of each sample; the teacher runs once for all of them."""
    keep_masked: float = setting(0.0, low=0, below=1, only="2.0", rare=True)
    """Share of the masked tokens that the student sees all the same; they stay in the loss."""
    noise_std: float = setting(0.01, only="2.0")
    """Standard deviation of the noise that stands for masked tokens in the decoder."""

    def count_shown(self, masked: int) -> int:
        """Of so many masked tokens of a row, those that the student sees."""
        return round(masked * self.keep_masked)


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
    cache: str | None = setting(None, only="pretrain", free=True, rare=True, outside=True)
    """With ema.freeze_after: folder in which the targets of samples are kept in bfloat16 once the teacher stands still,
    so that its forward is needed once a sample; of samples that are the same each time: no crops, mirroring, turns or
    speed. Unset: none."""


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
    reconstruction: float = setting(0.0, low=0, only="pixels 2.0", rare=True)
    """Weight of a second loss: a linear layer on the predictions against the pixels of the masked patches, each patch
    with mean 0 and variance 1."""


@dataclass(frozen=True)
class Config:
    """A complete run: model, data, optimisation."""

    recipe: str = setting("", option=None)
    """Name of the recipe this configuration came from."""
    version: Literal[1, 2] = setting(2, option=None)
    """data2vec 1.0 or 2.0."""
    stem: Stem = field(default_factory=Stem)
    encoder: Encoder = field(default_factory=Encoder)
    decoder: Decoder = field(default_factory=Decoder, metadata={"only": "2.0"})
    shared_decoder: SharedDecoder = field(default_factory=SharedDecoder, metadata={"only": "2.0"})
    head: Head = field(default_factory=Head, metadata={"only": "1.0"})
    mask: Mask = field(default_factory=Mask)
    target: Target = field(default_factory=Target)
    loss: Loss = field(default_factory=Loss)
    ema: Ema = field(default_factory=Ema)
    optim: Optim = field(default_factory=Optim)
    data: Data = field(default_factory=Data)
    probe: Probe = field(default_factory=Probe, metadata={"only": "pretrain"})
    run: Run = field(default_factory=Run)
    published: frozenset[str] = setting(frozenset(), choices=PUBLISHED_BEHAVIOURS, rare=True)
    """Behaviours of the published code reproduced on purpose (docs/parity.md)."""

    def __post_init__(self) -> None:
        check_ranges(self)
        find_kind(self.stem.modality)
        for name, expected, fits in RULES:
            require(fits(self), name, expected.format(self), self)
        if unknown := self.published - PUBLISHED_BEHAVIOURS:
            raise ValueError(f"published: expected names of {sorted(PUBLISHED_BEHAVIOURS)}, got {sorted(unknown)}")

    @property
    def loss_scale(self) -> float:
        """Factor on the summed error: `loss.scale`, or 1 / sqrt(C)."""
        return self.loss.scale if self.loss.scale is not None else 1.0 / math.sqrt(self.encoder.width)

    @property
    def traits(self) -> frozenset[str]:
        """Words for the kind of model; `setting(only=...)` names those that a field needs to have an effect."""
        stem = self.stem
        words = [stem.modality, stem.kind, stem.positions, self.encoder.norm_order, self.mask.kind, f"{self.version}.0"]
        return find_kind(stem.modality).words.union(words, ["sequence" if self.grid is None else "image"])

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of a sample's tokens; None: they are a sequence."""
        return find_kind(self.stem.modality).grid(self.stem)

    def replace(self, name: str | Mapping[str, Any], value: Any = None) -> Self:
        """The same configuration with another value of one setting, by its dotted name ("optim.learning_rate"), or of
        several that belong together: `replace({"encoder.width": 96, "encoder.heads": 6})`. Lists become tuples.

        Raises:
            ValueError: no such setting (the text gives the nearest), or a value that it cannot have.
        """
        changes, valid = {name: value} if isinstance(name, str) else name, flat_fields(type(self))
        for given in changes:
            if given not in valid:
                nearest = find_nearest(given, valid)
                raise ValueError(f"config: expected a setting, got {given!r}; did you mean {nearest!r}?")
        changed: Self = replace_fields(self, changes)
        return changed

    def change(self, **values: Any) -> Self:
        """The same configuration with other values; a dict replaces those fields of a section that it names."""
        sections = {n: dataclasses.replace(getattr(self, n), **v) for n, v in values.items() if isinstance(v, dict)}
        return dataclasses.replace(self, **{**values, **sections})

    def to_json(self) -> str:
        """The configuration as JSON text; `from_json` reads it back."""
        value = dataclasses.asdict(self)
        value["published"] = sorted(self.published)
        return json.dumps(value, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Rebuilds a configuration; unknown or missing fields raise `ValueError` with their names."""
        config: Self = build_section(cls, parse_json(text), "config")
        return config


_WITHOUT_SHAPE = {
    "stem": {"dropout", "gradient_scale", "position_scale"},
    "encoder": {
        "init_std", "init_rescale", "dropout", "attention_dropout", "activation_dropout", "prenet_dropout",
        "layer_drop", "drop_path",
    },
    "decoder": {"input_dropout"},
}  # fmt: skip


def architecture(config: Config) -> dict[str, Any]:
    """Settings that decide which tensors a model has and what they mean, by their dotted names."""
    found = {}
    sections = ("version", "stem", "encoder", "decoder", "shared_decoder", "head")
    for name in flat_fields(Config):
        section, _, last = name.partition(".")
        if section in sections and last not in _WITHOUT_SHAPE.get(section, ()):
            found[name] = operator.attrgetter(name)(config)
    return found


def take_architecture(config: Config, source: Config) -> Config:
    """A configuration with the architecture of another one of the same version and modality; `ValueError` where these
    differ."""
    for name in ("version", "stem.modality"):
        expected, got = (operator.attrgetter(name)(c) for c in (source, config))
        if expected != got:
            raise ValueError(f"{name}: expected a recipe with {expected}, got one with {got}")
    sections: dict[str, dict[str, Any]] = {"target": {"top_k": min(config.target.top_k, source.encoder.depth)}}
    for name, value in architecture(source).items():
        section, _, field_name = name.rpartition(".")
        if section:
            sections.setdefault(section, {})[field_name] = value
    return config.change(**sections)


RULES: tuple[tuple[str, str, Callable[[Config], bool]], ...] = (
    ("encoder.width", "a multiple of encoder.heads", lambda c: c.encoder.width % c.encoder.heads == 0),
    ("target.top_k", "1 to encoder.depth", lambda c: 1 <= c.target.top_k <= c.encoder.depth),
    ("loss.reconstruction", "0 unless vision of version 2",
     lambda c: c.loss.reconstruction == 0.0 or {"pixels", "2.0"} <= c.traits),
    ("encoder.extra_tokens", "at least 1", lambda c: c.loss.class_weight <= 0.0 or c.encoder.extra_tokens >= 1),
    ("stem.kind", "stock unless speech", lambda c: c.stem.kind == "stock" or "speech" in c.traits),
    ("stem.positions", "other than conv for vision", lambda c: not {"conv", "image"} <= c.traits),
    ("stem.positions", "relative for vision only", lambda c: not {"relative", "sequence"} <= c.traits),
    ("stem.width", "unset unless images or text", lambda c: c.stem.width is None or "projected" in c.traits),
    ("stem.convolutions", "at least 1", lambda c: len(c.stem.convolutions) >= 1),
    ("stem.convolutions", "numbers of 1 or more", lambda c: min(min(row) for row in c.stem.convolutions) >= 1),
    ("stem.image_size", "at most a million patches", lambda c: c.stem.grid[0] <= 1000),
    ("stem.frames", "at most 2^20", lambda c: c.stem.frames <= 1 << 20),
    ("stem.frames", "a multiple of stem.patch_size {0.stem.patch_size}",
     lambda c: "spectrograms" not in c.traits or c.stem.frames % c.stem.patch_size == 0),
    ("stem.patch_size", "a divisor of the 128 bands of spectrograms",
     lambda c: "spectrograms" not in c.traits or 128 % c.stem.patch_size == 0),
    ("stem.max_tokens", "at most 2^24", lambda c: c.stem.max_tokens <= 1 << 24),
    ("run.steps", "at most 2^40", lambda c: c.run.steps <= 1 << 40),
    ("stem.mask_token", "0 to below {0.stem.vocabulary}",
     lambda c: not {"text", "1.0"} <= c.traits or c.stem.mask_token in range(c.stem.vocabulary)),
    ("mask.kind", "a kind for sequences", lambda c: not {"rectangles", "sequence"} <= c.traits),
    ("mask.kind", "block, random or span for version 2",
     lambda c: c.version == 1 or c.mask.kind not in ("rectangles", "token-span")),
    ("data.speed", "0 unless speech", lambda c: c.data.speed == 0.0 or "speech" in c.traits),
    ("decoder.kind", "conv or transformer without fixed positions of images",
     lambda c: c.decoder.kind != "cross" or ({"image", "sincos"} <= c.traits and c.stem.position_scale != 0.0)),
    ("decoder.width", "a multiple of decoder.heads",
     lambda c: c.decoder.kind == "conv" or c.decoder.width % c.decoder.heads == 0),
    ("decoder.positions_masked", "False without sincos",
     lambda c: c.stem.positions == "sincos" or not c.decoder.positions_masked),
    ("decoder.positions_all", "False without sincos",
     lambda c: c.stem.positions == "sincos" or not c.decoder.positions_all),
    ("encoder.alibi_distance", "sequence unless vision",
     lambda c: c.encoder.alibi_distance == "sequence" or "image" in c.traits),
    ("encoder.alibi", "none with relative positions",
     lambda c: c.stem.positions != "relative" or c.encoder.alibi == "none"),
    ("encoder.alibi_table", "unset without encoder.alibi",
     lambda c: c.encoder.alibi_table is None or c.encoder.alibi != "none"),
    ("encoder.alibi_table", "as many as patches on the grid {0.grid}",
     lambda c: c.encoder.alibi_table is None or c.grid is None or c.encoder.alibi_table == math.prod(c.grid)),
    ("encoder.alibi_heads", "1 to encoder.heads",
     lambda c: c.encoder.alibi == "none" or c.encoder.alibi_heads in (None, *range(1, c.encoder.heads + 1))),
    # What cannot be one graph: each choice of skipped blocks would be another, and counts read on the host end one.
    ("run.compile_scope", "blocks with encoder.layer_drop",
     lambda c: c.run.compile_scope == "blocks" or c.encoder.layer_drop <= 0.0),
    ("run.compile_scope", "blocks with masked-tokens-only-teacher",
     lambda c: c.run.compile_scope == "blocks" or "masked-tokens-only-teacher" not in c.published),
    ("run.shard_ranks", "nothing without fsdp", lambda c: c.run.shard_ranks is None or c.run.parallel == "fsdp"),
    # The scaler of the loss would have to agree over the shards of each gradient.
    ("run.precision", "fp32 or bf16 with fsdp", lambda c: c.run.parallel == "ddp" or c.run.precision != "fp16"),
    ("run.compile_scope", "blocks without run.compile", lambda c: c.run.compile_scope == "blocks" or c.run.compile),
    ("run.compile_cache", "nothing without run.compile", lambda c: c.run.compile_cache is None or c.run.compile),
    # Sharded blocks gather their weights one by one.
    ("run.compile_scope", "blocks with fsdp", lambda c: c.run.compile_scope == "blocks" or c.run.parallel == "ddp"),
    ("run.teacher_graph", "False with fsdp or run.compile",
     lambda c: not c.run.teacher_graph or (c.run.parallel == "ddp" and not c.run.compile)),
    # A target has to be that of the sample alone, and of a teacher that no longer changes.
    ("target.cache", "nothing without ema.freeze_after, ema.scope all and ddp",
     lambda c: c.target.cache is None
     or (c.ema.freeze_after is not None and c.ema.scope == "all" and c.run.parallel == "ddp")),
    ("target.cache", "nothing with targets that depend on the rest of a batch",
     lambda c: c.target.cache is None
     or not ({"batch", "position"} & {*c.target.norm.split(","), *c.target.out_norm.split(",")}
             or {"norms-over-batch", "masked-tokens-only-teacher", "statistics-over-padding"} & c.published)),
    ("probe.test", "data to go with probe.train, or neither",
     lambda c: (c.probe.train is None) == (c.probe.test is None)),
    ("probe.pool", "another than class for a model without a class token",
     lambda c: c.probe.pool != "class" or c.encoder.extra_tokens > 0),
    ("optim.final_rate", "above 0 for tri-stage",
     lambda c: c.optim.schedule != "tri-stage" or c.optim.final_rate > 0.0),
)  # fmt: skip
"""Which settings belong together: name of one, what is expected of it, and whether it is so."""
