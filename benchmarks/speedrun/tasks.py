"""Real data to learn from: where the samples come from and how they are split."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2v import recipes
from d2v.config import Config
from d2v.data.decoding.sound import SAMPLE_RATE, decode_audio
from d2v.tools.textures import write_textures

from ..training.cases import change

Changes = dict[str, dict[str, Any]]
"""Section -> field -> value."""
FEW = 10
"""Labels a class of the few-label measure."""


class Fold(NamedTuple):
    """Paths that `d2v` commands take."""

    pretrain: str
    """Unlabelled."""
    train: str
    few: str
    """`FEW` samples a class of the training set."""
    test: str


class Splits(NamedTuple):
    """What a task is measured on."""

    final: Fold
    """Its test data are looked at with the chosen settings only."""
    choose: tuple[Fold, ...]
    """Parts of the training data that settings are chosen by: the mean over the folds decides."""


@dataclass(frozen=True)
class Task:
    """One data set with the models that fit it."""

    name: str
    title: str
    prepare: Callable[[Path, Path, int], Splits]
    """(folder with the data sets, folder to write into, seed) -> folds."""
    recipe: str
    """data2vec 2.0; 1.0 is the same with its own recipe."""
    first_recipe: str
    finetune: str
    baselines: tuple[str, ...]
    """Raw features."""
    steps: int
    """Updates of data2vec 2.0; the others get the same FLOPs."""
    reached: str = ""
    """How the record was reached: the settings and why."""
    changes: Changes = dataclasses.field(default_factory=dict)
    """Settings that differ from the recipes."""
    own: dict[str, Changes] = dataclasses.field(default_factory=dict)
    """Settings of single methods."""
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    """Learning rates over the recipe's (from scratch and fine-tuned: over 1e-3), chosen on held-out data; else 1."""
    epochs: float = 30.0
    """Passes of the training from scratch over all labels."""
    pool: str = "mean"
    """Of the probes, for every trained and untrained network; see `evaluate probe`."""
    redrawn: bool = False
    """Whether every seed has samples of its own; else raw features are measured once."""
    methods: tuple[str, ...] = ("data2vec2", "data2vec1", "autoencoder", "scratch", "finetuned")

    def config(self, method: str = "data2vec2") -> Config:
        """The configuration of a method; from scratch and fine-tuned: the network of data2vec 2.0."""
        recipe = recipes.get(self.first_recipe if method == "data2vec1" else self.recipe)
        return change(change(recipe, **self.changes), **self.own.get(method, {}))

    def splits(self, data: Path, folder: Path, seed: int) -> Splits:
        """What `prepare` makes in a folder, whole: what was begun there and not ended is made again."""
        done = folder.with_name(f"{folder.name}.done")
        if not done.is_file():
            shutil.rmtree(folder, ignore_errors=True)
        found = self.prepare(data, folder, seed)
        done.touch()
        return found

    def rate(self, method: str) -> float:
        """Factor on the learning rate of a method."""
        return self.rates.get(method, 1.0)

    def with_changes(self, given: Sequence[str]) -> Task:
        """With settings SECTION.FIELD=VALUE of all methods.

        Raises:
            ValueError: another form, or a setting that there is not.
        """
        changes = {section: dict(values) for section, values in self.changes.items()}
        for text in given:
            name, _, value = text.partition("=")
            section, _, field = name.partition(".")
            try:
                changes.setdefault(section, {})[field] = as_tuples(json.loads(value))
            except ValueError:
                raise ValueError(f"set: expected SECTION.FIELD=VALUE in JSON, got {text!r}") from None
        return dataclasses.replace(self, changes=changes)


def as_tuples(value: Any) -> Any:
    """Lists, also inside lists, as tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def link(source: Path, target: Path) -> None:
    """A symbolic link, in a folder that is made for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()))


def choose_few(train: Path, few: Path, seed: int, count: int = FEW) -> None:
    """Links to `count` random samples of every class folder; the first ones stay the same for larger counts."""
    rng = np.random.default_rng(seed)
    for folder in sorted(p for p in train.iterdir() if p.is_dir()):
        files = sorted(folder.iterdir())
        for i in rng.permutation(len(files))[:count]:
            link(files[i], few / folder.name / files[i].name)


def prepare_textures(_: Path, folder: Path, seed: int) -> Splits:
    """Crops of photographs inside the scikit-image package; see the quick start."""
    if not folder.exists():
        counts = {"train": 200, "valid": 100, "test": 100, "pretrain": 2000}
        write_textures(folder, seed=seed, size=32, counts=counts)
        choose_few(folder / "train", folder / "few", seed)
    pretrain, train, few, valid, test = (str(folder / n) for n in ("pretrain", "train", "few", "valid", "test"))
    return Splits(Fold(pretrain, train, few, test), (Fold(pretrain, train, few, valid),))


def write_resampled(file: Path, target: Path) -> None:
    """A recording at the models' rate, so that no epoch resamples it again."""
    import soundfile

    values, _ = decode_audio(file.read_bytes())
    target.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(target, values, SAMPLE_RATE, subtype="PCM_16")


SPEAKERS = ("george", "jackson", "lucas")
"""Who trains; nicolas tests."""


def prepare_digits(data: Path, folder: Path, seed: int) -> Splits:
    """Spoken digits (files DIGIT_SPEAKER_NUMBER.wav) of three speakers; the test speaker is never heard before.
    Settings are chosen alike, in three folds: everything from two of the speakers, measured on the third."""
    parts = {"": SPEAKERS, **{f"without-{s}": tuple(o for o in SPEAKERS if o != s) for s in SPEAKERS}}
    if not folder.exists():
        files = sorted((data / "spoken-digits").glob("*.wav"))
        if not files:
            raise ValueError(f"data: expected recordings in {str(data / 'spoken-digits')!r}, found none")
        for file in files:
            digit, speaker, _ = file.stem.split("_")
            resampled = folder / "resampled" / file.name
            write_resampled(file, resampled)
            link(resampled, folder / "by-speaker" / speaker / digit / file.name)
            for part in (p for p, speakers in parts.items() if speaker in speakers):
                link(resampled, folder / part / "train" / digit / file.name)
        for part in parts:
            choose_few(folder / part / "train", folder / part / "few", seed)

    def fold(part: str, test: str) -> Fold:
        train, few, by = folder / part / "train", folder / part / "few", folder / "by-speaker"
        return Fold(str(train), str(train), str(few), str(by / test))

    return Splits(fold("", "nicolas"), tuple(fold(f"without-{s}", s) for s in SPEAKERS))


def prepare_cifar(data: Path, folder: Path, seed: int) -> Splits:
    """Shards 0 to 7 of 5,000 images each train, 9 tests; few labels: the first images of each class in shard `seed`.
    Settings are chosen by the labels of two shards, measured on 8."""
    shards = data / "cifar10-train"
    pattern, choose_train = (str(shards / f"cifar10-train-{{0000..{last:04d}}}.tar") for last in (7, 1))
    valid, test = (str(shards / f"cifar10-train-{n:04d}.tar") for n in (8, 9))
    few = folder / "few"
    if not few.is_dir():
        count: Counter[str] = Counter()
        with tarfile.open(shards / f"cifar10-train-{seed % 8:04d}.tar") as shard:
            members = {m.name: m for m in shard.getmembers()}
            for name in sorted(n for n in members if n.endswith(".cls")):
                label = _read_member(shard, members[name]).decode().strip()
                if count[label] < FEW:
                    image = name.removesuffix("cls") + "jpg"
                    (few / label).mkdir(parents=True, exist_ok=True)
                    (few / label / image).write_bytes(_read_member(shard, members[image]))
                    count[label] += 1
    return Splits(Fold(pattern, pattern, str(few), test), (Fold(pattern, choose_train, str(few), valid),))


def _read_member(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(member)
    assert file is not None, member.name
    return file.read()


def prepare_sst(data: Path, folder: Path, seed: int) -> Splits:
    """Film reviews, positive or negative; tests on dev; pre-trains on the training sentences and WikiText."""
    source = data / "sst2"
    if not folder.exists():
        folder.mkdir(parents=True)
        lines = (source / "train.tsv").read_text(encoding="utf-8").splitlines()
        order = np.random.default_rng(0).permutation(len(lines))
        held = len(lines) // 10
        parts = {"valid": order[:held], "train": order[held:]}
        for name, rows in parts.items():
            (folder / f"{name}.tsv").write_text("".join(f"{lines[i]}\n" for i in rows), encoding="utf-8")
        chosen, rng = [], np.random.default_rng([seed, 1])
        for label in "01":
            fitting = [i for i in parts["train"] if lines[i].endswith(f"\t{label}")]
            chosen += [lines[i] for i in rng.permutation(fitting)[:FEW]]
        (folder / "few.tsv").write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
        text = folder / "text"
        text.mkdir()
        sentences = "\n\n".join(lines[i].rsplit("\t", 1)[0] for i in parts["train"])
        (text / "reviews.txt").write_text(sentences + "\n", encoding="utf-8")
        link(data / "wikitext" / "wikitext-2-valid.txt", text / "wikitext.txt")
    train, valid, few = (str(folder / f"{name}.tsv") for name in ("train", "valid", "few"))
    learned = (str(folder / "text"), train, few)
    return Splits(Fold(*learned, str(source / "dev.tsv")), (Fold(*learned, valid),))


WAVEFORM = ((64, 10, 5), (64, 8, 4), (64, 6, 4), (64, 4, 3), (64, 3, 2))
"""(channels, kernel, stride) of a waveform stem whose tokens are 30 ms, as those of the log-mel stem."""

TASKS = {
    "textures": Task(
        "textures", "textures of photographs", prepare_textures, "vision-tiny", "vision1-tiny", "vision-classify",
        ("pixels", "sorted_pixels", "power_spectrum"), 3000, redrawn=True,
        rates={"data2vec2": 2.0, "autoencoder": 2.0, "finetuned": 2.0},
        reached="The recipes as they are, half of the quick start's updates at twice its rate. The autoencoder is a "
        "point ahead on linear, and three with 1,500 updates: its target does not move, while the teacher follows a "
        "student that is still far away.",
    ),
    "digits": Task(
        "digits", "spoken digits, unseen speaker, log-mel", prepare_digits, "speech-tiny", "speech1-tiny",
        "speech-classify", ("log_mel",), 1000, changes={"data": {"speed": 0.2}}, pool="mean-std",
        rates={"data2vec2": 2.0, "data2vec1": 0.5, "scratch": 0.5, "finetuned": 2.0},
        reached="All methods hear recordings at a random speed, 0.82 to 1.22 times their own (`data.speed` 0.2): in "
        "three folds, each measured on a speaker who was not heard in pre-training, that gave data2vec 2.0 8 points of "
        "the linear probe and 4 with ten labels a class, and took 2 from kNN. Features: mean, deviation over tokens.",
    ),
    "waveforms": Task(
        "waveforms", "spoken digits, unseen speaker, waveform", prepare_digits, "speech-tiny", "speech1-tiny",
        "speech-classify", ("log_mel",), 500, changes={"stem": {"kind": "stock", "convolutions": WAVEFORM}},
        pool="mean-std", methods=("data2vec2", "data2vec1", "scratch"), rates={"data2vec1": 2.0, "scratch": 2.0},
        reached="A stem of convolutions in place of the filter bank.",
    ),
    "cifar": Task(
        "cifar", "CIFAR-10", prepare_cifar, "vision-tiny", "vision1-tiny", "vision-classify", ("pixels",), 4000,
        changes={"data": {"grey": False, "rotate": False, "crop_scale": (0.4, 1.0), "global_batch": 32}}, epochs=3.0,
        methods=("data2vec2", "autoencoder", "scratch"), rates={"autoencoder": 2.0, "scratch": 0.5},
        reached="Crops from 40 % of an image, batches of 32, 4,000 updates: with 1,000 the autoencoder is ahead.",
    ),
    "sentences": Task(
        "sentences", "SST-2", prepare_sst, "text-tiny", "text1-tiny", "text-classify", ("bag_of_words",), 500,
        epochs=3.0, rates={"autoencoder": 2.0},
        reached="The recipe as it is, which learns nothing here: 6,227 sentences and a part of WikiText are too few. "
        "The autoencoder is ahead; both are behind a bag of words.",
    ),
}  # fmt: skip
