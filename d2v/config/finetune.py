"""Settings of a fine-tuned model and of the run that made it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from d2v.config.fields import check_ranges, forget_places, setting
from d2v.config.model import Config
from d2v.files import parse_json

TASKS = ("speech-ctc", "speech-classify", "vision-classify", "text-classify")
SECTION = "finetune"
"""Name of the section in `config.json` that a pre-trained model does not have."""
MEANINGS = ("classification", "regression", "multi-label", "ctc", "tokens")
"""What the outputs of a head mean."""


@dataclass(frozen=True)
class HeadSettings:
    """Everything that decides a head but its weights."""

    kind: Literal["tokens", "pooled", "sentence", "votes", "vocabulary"] = "pooled"
    """tokens: a linear layer on every token (CTC, tagging). pooled: on the pooled tokens (images, speech). sentence: on
    the first token, behind a dense layer with tanh (text). votes: tokens, then the mean of the tokens' probabilities
    weighted with themselves (sound events). vocabulary: token prediction of text."""
    outputs: int = 1
    """Numbers that come out: classes, letters, 1 for regression."""
    task: Literal["classification", "regression", "multi-label", "ctc", "tokens"] = "classification"
    """What they mean."""
    dropout: float = 0.0
    """Dropout before each linear layer."""
    pool: Literal["mean", "class", "linear-softmax"] = "mean"
    """pooled: the mean of the valid tokens, the class token, or per channel the mean of the tokens' sigmoids weighted
    with themselves, as a logit."""
    norm_eps: float | None = None
    """pooled: epsilon of a layer norm behind the pool; None: no norm."""
    hidden: int = 0
    """pooled: width of a linear layer between tokens and pool; sentence: of the dense layer; 0: none, or C."""
    skip_tokens: int = 0
    """pooled: first tokens that the mean leaves out. The published 1.0 image classifier leaves out patch 0."""
    blank: int = 0
    """ctc: output that means no letter."""

    def __post_init__(self) -> None:
        if self.outputs < 1:
            raise ValueError(f"head: expected 1 output or more, got {self.outputs}")
        if self.task not in MEANINGS:
            raise ValueError(f"head: expected a task of {', '.join(MEANINGS)}, got {self.task!r}")
        if not 0 <= self.blank < self.outputs:
            raise ValueError(f"head: expected a blank of 0 to {self.outputs - 1}, got {self.blank}")


@dataclass(frozen=True)
class Decoding:
    """How transcripts are found."""

    method: Literal["greedy", "beam"] = "greedy"
    """greedy: the best label of each frame; beam: the best transcripts, all their alignments counted together."""
    beam: int = 50
    """Beam: hypotheses that are kept at each frame."""
    lm: str | None = None
    """Beam: KenLM language model of words, .arpa or .bin; with it, only words of --decode.lexicon are found."""
    lexicon: str | None = None
    """Beam: text file with a word a line."""
    lm_weight: float = 2.0
    """Beam: factor on the language model's log-probability."""
    word_score: float = 0.0
    """Beam: added for every word."""
    space_score: float = 0.0
    """Beam: added for every space."""


@dataclass(frozen=True)
class TaskOptions:
    """How a task is learned; each concerns the tasks that its text names, or all."""

    weights: Literal["student", "teacher"] = "student"
    """Pre-trained weights to start from; published: the student's."""
    pool: Literal["mean", "class"] = setting("mean", only="vision")
    """Images: classify the mean of the patches (published 2.0), or the class token."""
    head_dropout: float = setting(0.0, low=0, below=1)
    """Dropout before the last layer."""
    regression: bool = setting(False, only="text")
    """Text: labels are numbers (STS-B)."""
    multi_label: bool = setting(False, only="classify")
    """A sample has any number of labels, separated by `;` or `,`: binary cross entropy of each, mean average
    precision."""
    units: Literal["letters", "bpe"] = setting("letters", only="ctc")
    """CTC: what the model spells with: the characters of the training transcripts, or byte-level byte pairs of
    task.bpe."""
    bpe: str | None = setting(None, only="ctc", outside=True)
    """CTC, units bpe: folder of a tokenizer (`d2v data tokenizer`)."""
    case: Literal["lower", "upper", "keep"] = setting("lower", only="ctc")
    """CTC: case of the transcripts."""
    bad_labels: Literal["refuse", "skip"] = setting("refuse", rare=True)
    """What to do about samples without a usable label (none, empty, not a number, an unknown class or character):
    refuse the data, or leave them out and count them."""
    epochs: float = 10.0
    """Passes over the training samples, where run.steps is 0; the checkpoints then stand at the ends of epochs."""
    warmup: float = setting(0.1, low=0, high=1)
    """Share of the updates with a rising learning rate, where optim.warmup_steps is 0."""
    hold: float = setting(0.0, low=0, high=1, rare=True)
    """Share of the updates at the peak, where optim.hold_steps is 0 (tri-stage)."""
    freeze_encoder: int = setting(0, low=0)
    """Updates during which only the head is trained."""
    freeze_stem: bool = setting(False, only="speech")
    """Speech: never train the convolutions of the waveform."""
    layer_decay: float = setting(1.0, above=0, high=1)
    """Learning rate of a block over that of the block behind it."""
    decay_stem: bool = setting(False, rare=True)
    """Let stem, positions and class token have the rate before the first block's, as BEiT does; published 2.0: the full
    one."""
    valid_share: float = setting(0.1, low=0, below=1)
    """Share of the training samples that is held out to choose the checkpoint where no --valid is given; 0: none, and
    the last checkpoint is taken."""
    label_smoothing: float = setting(0.0, low=0, below=1)
    """Share of a target that is spread over all classes."""
    mixup: float = setting(0.0, low=0, only="vision")
    """Images: alpha of mixup; 0: none."""
    cutmix: float = setting(0.0, low=0, only="vision")
    """Images: alpha of CutMix; 0: none."""
    mix_probability: float = setting(1.0, low=0, high=1, only="vision")
    """Images: share of the batches that are mixed."""
    switch_probability: float = setting(0.5, low=0, high=1, only="vision", rare=True)
    """Images: share of the mixed batches that get CutMix, where both are on."""
    erasing: float = setting(0.0, low=0, high=1, only="vision")
    """Images: probability that a rectangle is replaced by noise."""
    time_mask: float = setting(0.0, low=0, high=1, only="speech")
    """Speech: share of the frames at which a masked span may begin, times its length."""
    time_span: int = setting(10, low=1, only="speech")
    """Speech: frames of a masked span."""
    channel_mask: float = setting(0.0, low=0, high=1, only="speech")
    """Speech: the same for channels of the features."""
    channel_span: int = setting(64, low=1, only="speech")
    """Speech: channels of a masked span; speech-ctc has 64 of 768, of a narrower model the same share."""
    drop_path: float | None = None
    """Stochastic depth of the last block; unset: as pre-trained."""
    dropout: float | None = setting(None, rare=True)
    """Dropout of the encoder; unset: as pre-trained."""
    attention_dropout: float | None = setting(None, rare=True)
    """Dropout on attention weights; unset: as pre-trained."""
    activation_dropout: float | None = setting(None, rare=True)
    """Dropout inside the MLPs; unset: as pre-trained."""
    layer_drop: float | None = setting(None, rare=True)
    """Probability of skipping a block in training; unset: as pre-trained."""


@dataclass(frozen=True)
class FineTune:
    """What a fine-tuned model has besides its encoder."""

    task: str = ""
    """One of `TASKS`; empty: a model of another program."""
    head: HeadSettings = field(default_factory=HeadSettings)
    labels: tuple[str, ...] = ()
    """Names of the head's outputs."""
    options: TaskOptions = field(default_factory=TaskOptions)


@dataclass(frozen=True)
class FineTuneConfig(Config):
    """Configuration of the encoder, of the head, and of the fine-tuning run."""

    finetune: FineTune = field(default_factory=FineTune)

    def __post_init__(self) -> None:
        check_ranges(self.finetune.options, "task")
        super().__post_init__()

    @staticmethod
    def of(config: Config, **changes: Any) -> FineTuneConfig:
        """A configuration of an encoder with other sections, `finetune` among them."""
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}
        return FineTuneConfig(**{**values, **changes})


def read_config(file: Path) -> Config | FineTuneConfig:
    """The configuration in a file, of a pre-trained or of a fine-tuned model; `ValueError` where it cannot be read.

    Without its places (`forget_places`): whoever wrote the file does not choose what is opened, run or written here.
    """
    try:
        text = file.read_text(encoding="utf-8")
        tuned = SECTION in parse_json(text)
        config: Config | FineTuneConfig = forget_places((FineTuneConfig if tuned else Config).from_json(text))
        return config
    except (OSError, ValueError, ArithmeticError, TypeError) as error:
        raise ValueError(f"checkpoint: cannot read {str(file)!r}: {error}") from None
