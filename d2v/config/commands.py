"""Options of the `d2v` commands: a dataclass for each, whose text is the command's description; the text under a field
is its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from d2v.config.fields import setting
from d2v.config.finetune import Decoding, TaskOptions
from d2v.config.model import Config
from d2v.config.run import Data, Optim, Run


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pre-trains a data2vec model. Goes on from the last checkpoint where --run.dir holds one."""

    config: Config = field(default_factory=Config)
    file: str | None = setting(None, option="config")
    """TOML or JSON file with a recipe's name and settings that replace the recipe's, such as a run's config.json;
    options on the command line replace both (docs/settings.md)."""
    recipe: str | None = None
    """The recipe, in place of RECIPE; or FILE.py:FUNCTION, a function of a Python file of yours that returns a
    d2v.Config: the file is run."""
    init: str | None = setting(None, option="model.init")
    """Run folder, checkpoint or exported folder whose student and teacher are loaded; unset: random weights."""
    dry_run: bool = False
    """Build everything, run one update without writing anything, print shapes and sizes, and where settings that differ
    from the recipe's came from."""
    profile: int = setting(0, low=0, rare=True)
    """Updates to record, after two others: a trace with named ranges and a table in RUN/profile; 0: none."""
    plan: str | None = setting(None, option="run.plan", rare=True)
    """File of `d2v plan --output`; it is copied into the run folder and compared with the run at its end."""
    track: tuple[str, ...] = setting((), option=None)
    base: Config = field(default_factory=Config, metadata={"option": None})
    origin: str = setting("recipe", option=None)
    sources: tuple[tuple[str, str], ...] = setting((), option=None)


@dataclass(frozen=True, kw_only=True)
class Sweep(Pretrain):
    """Pre-trains a model for every combination of the options that have several values, such as --run.seed 0 1 2, in
    folders of --run.dir: one after the other; what is finished is skipped, what was stopped goes on."""

    slurm: bool = False
    """Write DIR/sweep.sbatch, a Slurm array with a task a run, in place of running."""


@dataclass(frozen=True, kw_only=True)
class Plan(Pretrain):
    """Says whether a run fits on so many GPUs, what it takes in time, on disk and on the network, and which settings go
    with another batch. Takes the options of d2v pretrain and runs nothing: every figure is an estimate
    (docs/scaling.md)."""

    gpus: tuple[int, ...]
    """Numbers of GPUs; with several only the table."""
    machine: str
    """h200, h100, a100, b200 or mi300x; or a .toml file with the figures of your own (docs/scaling.md)."""
    hours: float | None = setting(None, above=0)
    """Hours that there are: prints how many updates fit, and how many GPUs all of them need."""
    mfu: float | None = setting(None, above=0, high=1)
    """Share of the GPUs' peak that is reached; unset: 0.4, an assumption. Counted kernel by kernel it is 0.2 for the
    base recipes on an H200 (docs/gpu-first-run.md)."""
    measured: float | None = setting(None, above=0)
    """In place of that share: seconds that an update of this run took on --measured-gpus of these GPUs."""
    measured_gpus: int | None = setting(None, low=1)
    """GPUs of that update; unset: the first of --gpus."""
    run_folder: Path | None = setting(None, option="run")  # noqa: RUF009
    """In place of that share: folder of a pre-training run on such GPUs, whose step_seconds count."""
    network: float | None = setting(None, above=0)
    """Gbit/s between nodes, of a node and direction; unset: the machine's."""
    failures: float | None = setting(None, low=0)
    """Failures of a GPU in an hour, for example 2e-5: 419 in 54 days of 16,384 H100s (Llama Team 2024, The Llama 3 Herd
    of Models, arXiv:2407.21783); unset: no estimate of restarts."""
    output: Path | None = None
    """File for the figures as JSON, which --run.plan takes; unset: none."""


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Trains a head, and the encoder under it, on labelled samples. Checkpoints come at the end of each epoch; the one
    with the best score on held-out samples is chosen and evaluated once on the test set."""

    task: str = setting("", option=None)
    track: tuple[str, ...] = setting((), option=None)
    file: str | None = setting(None, option="config")
    """TOML or JSON file with settings of the sections task, decode, optim, data and run, or the config.json of another
    fine-tuning run; options on the command line replace them (docs/settings.md)."""
    checkpoint: str = ""
    """Pre-trained model: run folder, checkpoint inside it, or exported folder."""
    train: str = ""
    """Labelled training data. speech-ctc: audio files with a .txt beside each or LibriSpeech's .trans.txt, a .tsv
    manifest with an .ltr beside it, or .tar shards with .txt members; speech-classify: class folders, a .tsv of
    path<TAB>label, or shards with .cls members; vision-classify: class folders, or shards with .cls members; of all
    these also Hugging Face's metadata.csv, .jsonl and .parquet; text-classify: a .tsv of text<TAB>label or
    text<TAB>text<TAB>label."""
    valid: str | None = None
    """Held-out data that choose the checkpoint, same formats; unset: task.valid_share of the training data."""
    test: str | None = None
    """Test data, same formats; unset: none."""
    worst: int = setting(50, rare=True)
    """Number of test samples with the largest errors to list."""
    image_size: int | None = setting(None, low=1, option="stem.image-size", only="vision")
    """Another size than in pre-training, to which the positions are interpolated; unset: that of the model."""
    options: TaskOptions = field(default_factory=TaskOptions, metadata={"option": "task"})
    decode: Decoding = field(default_factory=Decoding, metadata={"only": "ctc"})
    optim: Optim = field(default_factory=Optim)
    data: Data = field(default_factory=Data)
    run: Run = field(default_factory=Run)


@dataclass(frozen=True, kw_only=True)
class _OfModel:
    checkpoint: str
    """Run folder, checkpoint inside it, or exported folder."""
    batch: int = 64
    """Samples per forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU when there is one."""


@dataclass(frozen=True, kw_only=True)
class _OfWhole(_OfModel):
    precision: Literal["fp32", "bf16", "fp16"] = setting("fp32", rare=True)
    """Dtype of matrix products, whatever the model was trained in."""
    max_seconds: float | None = None
    """Speech: cut longer recordings, and count them; unset: recordings of any length go through the model in
    overlapping pieces as long as it was trained on."""
    max_tokens: int | None = None
    """Text: the same for longer texts."""
    allow_commands: bool = setting(False, rare=True)
    """Run `pipe:COMMAND` inputs and commands in lists; what the checkpoint allowed does not count."""


@dataclass(frozen=True, kw_only=True)
class _OfFeatures(_OfModel):
    weights: Literal["student", "teacher"] = "teacher"
    """Network whose features are taken."""
    layer: str | None = None
    """Number of blocks that run before the features are taken; unset: every block, then the final norm. features and
    evaluate probe: also several, as in 1,5,9, or the word all: from 0 (the input of the first block) to the last. The
    probe then learns the weights of their sum."""
    image_size: int | None = setting(None, low=1, option="stem.image-size")
    """Images: another size than in training, to which the positions are interpolated; unset: that of the model."""
    frames: int | None = setting(None, low=1, option="stem.frames")
    """Spectrograms: another length than in training, in frames of 10 ms; unset: that of the model."""


@dataclass(frozen=True, kw_only=True)
class Probe(_OfFeatures, _OfWhole):
    """Accuracy of a linear classifier, of k nearest neighbours (kNN) and of a classifier trained on a few labels, on
    frozen features, one vector a sample."""

    train: str
    """Labelled training data. Images: a folder of class folders or with metadata.csv, .tar shards with .cls members, or
    parquet files; speech: the same, or a .tsv of path<TAB>label; text: a .tsv of text<TAB>label or
    text<TAB>text<TAB>label."""
    test: str
    """Labelled test data, same formats."""
    baselines: tuple[
        Literal["random_init", "pixels", "sorted_pixels", "power_spectrum", "log_mel", "bag_of_words"], ...
    ] = ()
    """Features to compare with, probed in exactly the same way: random_init for all data; pixels, sorted_pixels,
    power_spectrum for images; log_mel (mean and deviation over time) for speech and spectrograms; bag_of_words for
    text."""
    pool: Literal["mean", "mean-std", "segments", "class"] = "mean"
    """How a sample's tokens become one vector: their mean; mean and standard deviation; the means of four equal parts
    in order; the class token, of models that have one. Raw features have their own."""
    multi_label: bool = False
    """A sample has any number of labels, separated by `;` or `,`: mean average precision in place of accuracy."""
    neighbours: int = 5
    """Neighbours k of the kNN classifier."""
    labels_per_class: int = 10
    """Labelled samples per class of the few-label probe."""
    draws: int = 5
    """Random draws of the few-label probe; mean and spread over them are reported."""
    seed: int = 0
    """Seed of these draws."""
    output: str | None = None
    """File for the result; unset: probe.json in the run folder, where --checkpoint names one."""


@dataclass(frozen=True, kw_only=True)
class EvaluateModel(_OfWhole):
    """Scores of a fine-tuned model with 95 % confidence intervals: accuracy, F1 and Matthews correlation; Pearson and
    Spearman correlation; or word and character error rates. Writes the confusion matrix and the samples with the
    largest errors."""

    test: str
    """Labelled data, as for fine-tuning."""
    decode: Decoding = field(default_factory=Decoding)
    """How transcripts are found."""
    labels: str | None = None
    """Text file with the names of the model's outputs, one a line, in place of those it has."""
    bad_labels: Literal["refuse", "skip"] = "refuse"
    """What to do about samples without a usable label: refuse the data, or leave them out and count them."""
    batch: int = 32
    """Samples per forward pass."""
    worst: int = 50
    """Number of samples with the largest errors to list."""
    output: str | None = None
    """Folder for result.json, worst.tsv and tables of classes; unset: evaluation/ in the run folder, where --checkpoint
    names one."""


@dataclass(frozen=True, kw_only=True)
class Transcribe(_OfModel):
    """Prints the text of recordings with a model of speech-ctc, FILE<TAB>TEXT in each line. Recordings longer than
    those of the training go through the model in overlapping pieces."""

    files: tuple[str, ...] = setting(option="files", positional=True)
    """Recordings; or folders, .tsv manifests, .tar shards and .parquet files of them."""
    words: bool = False
    """Print each word with its time: FILE<TAB>START<TAB>END<TAB>WORD, in seconds from the beginning."""
    as_json: bool = setting(False, option="json")
    """Print a JSON object for each recording: file, text, confidence (mean log-probability of the best labels); with
    --words, words with start and end."""
    decode: Decoding = field(default_factory=Decoding)
    """How transcripts are found."""
    batch: int = 16
    """Recordings per forward pass."""
    max_seconds: float | None = None
    """Cut longer recordings, and count them; unset: none is."""


@dataclass(frozen=True, kw_only=True)
class Maps(_OfFeatures):
    """Pictures of what a model has learned: OUTPUT/maps.png, samples with their masks and the similarity of their
    features, and OUTPUT/embedding.png, a point for every labelled sample in the colour of its class."""

    output: str
    """Folder for the two files."""
    input: str | None = None
    """Images, speech or text, as for pre-training, for maps.png; unset: none."""
    labelled: str | None = None
    """Labelled data, as for evaluate probe, for embedding.png; unset: none."""
    count: int = 6
    """Samples in maps.png."""
    samples: int = 1000
    """Most samples in embedding.png, of every class as many."""
    method: Literal["pca", "tsne"] = "pca"
    """Two directions of largest variance, or t-SNE (van der Maaten and Hinton 2008)."""
    seed: int = 0
    """Seed of the choice of samples and of t-SNE."""


@dataclass(frozen=True, kw_only=True)
class Features(_OfFeatures, _OfWhole):
    """Writes features of a data set to one file; OUTPUT.index.tsv says which rows belong to which sample, and
    why a sample has none."""

    input: str
    """Images, speech or text, as for pre-training."""
    output: str
    """File to write: .npy (an array), or .safetensors (a tensor "features"); float32 rows of C numbers, of K layers of
    (K, C)."""
    layer_weights: tuple[float, ...] = ()
    """A number for each of several layers: their weighted sum is written; unset: all of them."""
    pool: Literal["tokens", "mean", "class"] = "tokens"
    """tokens: a row for every valid token; mean: one row a sample; class: its class token, of models that have one."""
    batch: int = 16
    """Samples per forward pass."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Reads a published data2vec checkpoint and writes a folder that --checkpoint and --model.init take.

    Nothing in the file is executed: objects of unknown classes are read as plain data.
    """

    source: str = setting(option="from")
    """A fairseq file (1.0, 2.0, or of the separate 1.0 vision repository), or a transformers folder."""
    output: str
    """Folder to write; absent or empty."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes the model of a checkpoint in another format."""

    checkpoint: str
    """Run folder, checkpoint inside it, or exported folder."""
    format: Literal["safetensors", "huggingface", "fairseq", "program", "onnx"]
    """safetensors: config and weights with a loading example; huggingface: for transformers (data2vec 1.0: the
    student's encoder); fairseq: a file that the published code reads; program: the encoder with averaged weights for
    torch.export.load; onnx: the same for ONNX runtimes."""
    output: str
    """Folder to write, absent or empty; for fairseq also a file that ends in .pt."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draws DIR/report.png: all that metrics.jsonl holds over the updates, probe bars, similarity of the features of
    a few samples. Works for runs that are going on or were cut off."""

    folder: Path = setting(option="dir", positional=True)  # noqa: RUF009
    """Run folder."""
    images: str | None = None
    """Images, speech or text for the similarity panels; unset: none, as a run's files do not say what is opened."""
    count: int = 6
    """Number of samples in them."""
    output: str | None = None
    """File to write; unset: report.png in the run folder."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Prints what runs reached, the options in which they differ, means over seeds, and tests of the differences
    between groups of runs that have the same options but for the seed."""

    runs: tuple[Path, ...] = setting(option="runs", positional=True)
    """Run folders, or folders of `d2v sweep`."""
    metrics: tuple[str, ...] = ()
    """Keys of metrics.jsonl, linear_probe, knn, few_label, or scores such as test.accuracy; unset: loss, what was
    measured on held-out data, and what evaluations found."""
    output: Path | None = None
    """File for a picture with the curves of all runs; unset: none."""
    as_json: bool = setting(False, option="json")
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Replays updates of a pre-training run from its checkpoint and compares losses, gradient norms and, with
    --run.digest-every, weights with those that the run wrote down: the same bits, equal within a limit, or what differs
    first. Writes nothing; ends with 1 where they differ. Under torchrun on any number of ranks; D2V_KERNELS_BACKEND
    chooses other operators."""

    folder: Path = setting(option="dir", positional=True)  # noqa: RUF009
    """Run folder."""
    steps: str
    """FIRST:LAST, in updates: from the state after FIRST to that after LAST. It begins at the newest checkpoint up to
    FIRST that is kept (--run.keep-every), or at the beginning of the run."""
    path: str | None = setting(None, option="data.path")
    """The training data; unset: where they lay."""
    threads: int | None = setting(None, low=1, option="run.threads")
    """CPU threads; unset: as the run."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto", option="run.device")
    """auto: a GPU when there is one."""
    parallel: Literal["ddp", "fsdp"] | None = setting(None, option="run.parallel")
    """As for pretrain; unset: as the run."""
    allow_commands: bool = setting(False, option="data.allow-commands")
    """Run shell commands that the data path or a manifest names."""
    limit: float = setting(1e-6, low=0)
    """Largest relative difference of losses and gradient norms that counts as equal."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Shows how runs go, a line each, until all have ended: progress, numbers, time left, and what is wrong: failed,
    dead (its process is gone), stalled, lost (a rank). Ends with 1 where something is."""

    runs: tuple[Path, ...] = setting(option="runs", positional=True)
    """Folders of runs, or of sweeps."""
    every: float = setting(10.0, low=0.1)
    """Seconds between looks."""
    once: bool = False
    """Look once."""
    stall: float | None = setting(None, low=0.0)
    """Seconds without a line of metrics after which a run counts as stalled; unset: five times what the last lines
    took, at least a minute."""
    on_alert: str | None = None
    """Command to run where something is wrong or an effective rank has collapsed, once for each run and kind; it gets
    the run folder and a sentence as two more arguments."""


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """Lists the recipes: what they are for, size of the model, masks, number of updates."""

    show: str | None = None
    """Recipe, or FILE.py:FUNCTION, whose settings are printed as TOML for --config in place of the list."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Prints versions and, for every operator and backend, whether it is used or why not."""

    probe: bool = False
    """Run each operator on a small input; time attention and products."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Textures:
    """Writes train/, valid/ and test/ class folders of 32 x 32 grey crops from photographs that ship with scikit-image.

    Train crops come from the left 60 % of each photograph, validation from the next 10 %, test from the right 30 %.
    """

    output: Path
    """Folder to write; absent or empty."""
    seed: int = 0
    """Seed of crop positions, rotations and mirroring."""
    size: int = 32
    """Height and width of a crop in pixels."""
    train_crops: int = 200
    """Labelled training crops per class."""
    valid_crops: int = 100
    """Validation crops per class."""
    test_crops: int = 100
    """Test crops per class."""
    pretrain_crops: int = 0
    """Further crops per class from the training regions, written unlabelled to pretrain/; 0: none."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Writes images or recordings as .tar shards of even size, or text as .jsonl files, in random order.

    The same input and options give the same bytes. What cannot be decoded is left out and listed in pack.json; images
    and recordings are listed in contents.jsonl. A pack that was interrupted goes on when the command is given again.
    """

    input: str
    """Images: a folder or .tar shards; speech: the same, or a .tsv manifest; text: .txt or .jsonl files or a folder."""
    output: Path
    """Folder to write; absent or empty."""
    kind: Literal["images", "speech", "text"] = "images"
    """What the samples are."""
    labelled: bool = False
    """Class folders, or the labels of shards and tables, become .cls members. Transcripts of speech are always kept."""
    shard_megabytes: float = 256.0
    """Most megabytes (10^6 bytes) of a shard."""
    shard_samples: int | None = None
    """Most samples of a shard; unset: any number."""
    seed: int = 0
    """Seed of the order."""
    in_order: bool = False
    """Keep the order of the input."""
    unchecked: bool = False
    """Take samples without decoding them, which is quicker."""
    workers: int = 2
    """Threads that read and decode."""
    allow_commands: bool = False
    """Run shell commands that the input or a manifest names (pipe:COMMAND, COMMAND |)."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Writes a tokenizer for --data.tokenizer: byte-level BPE trained on text, the published one, or your own.

    Models here have the special tokens where RoBERTa has them: <s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last. A
    tokenizer made elsewhere gets new ids and these names for its special tokens, and is otherwise what it was.
    """

    output: Path
    """Folder to write; absent or empty."""
    path: str | None = setting(None, option="data.path")
    """A .txt file (documents between blank lines), a .jsonl file with `text`, or a folder of them."""
    vocabulary: int = 50_265
    """Tokens, with the 5 special ones and 256 for single bytes."""
    gpt2: str | None = None
    """Folder with encoder.json, vocab.bpe and dict.txt of the published models, in place of --data.path."""
    source: str | None = setting(None, option="from")
    """Your own, in place of --data.path: tokenizer.json, or a folder with it or with vocab.json and merges.txt."""
