"""Labelled samples: opened, checked before anything is trained, split, and stacked with their targets.

What is wrong with labels is an error that says how many samples it concerns and names one; with `task.bad_labels skip`
those samples are left out and counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2v.config.finetune import FineTuneConfig
from d2v.data.dataset import Batch, Modality, Sample
from d2v.data.sources import Rejected, Source, Subset, check_classes, number_classes
from d2v.evaluate.multilabel import split_labels, stack_labels
from d2v.finetune.spelling import Spelling, normalise_transcript
from d2v_kernels import MaskSampler

STREAM_SPLIT = 101
"""Purpose of the random stream that chooses held-out samples."""


class LabelledSource(Subset):
    """Some samples of a modality's source with a target each: a class number or several, a number, or a transcript."""

    def __init__(self, base: Source, rows: np.ndarray, targets: Sequence[Any]) -> None:
        super().__init__(base, rows)
        self.targets = list(targets)

    def take(self, rows: np.ndarray) -> LabelledSource:
        """Some of these samples."""
        return LabelledSource(self.base, self.rows[rows], [self.targets[i] for i in rows])

    def join(self, other: LabelledSource) -> LabelledSource:
        """These and others of the same base."""
        return LabelledSource(self.base, np.append(self.rows, other.rows), [*self.targets, *other.targets])

    def digest(self) -> str:
        return hashlib.sha256(f"{super().digest()} {self.targets!r}".encode()).hexdigest()


class Labelled(Modality):
    """A modality whose samples are pairs of the modality's value and a target."""

    def __init__(self, inner: Modality) -> None:
        super().__init__(inner.config)
        self.inner, self.noun = inner, inner.noun
        # What concerns inputs alone: as the modality.
        self.measure, self.count_tokens, self.prepare = inner.measure, inner.count_tokens, inner.prepare  # type: ignore[method-assign]

    def load(self, source: Source, index: int) -> tuple[Any, tuple[str, ...]]:
        """(value, target)."""
        assert isinstance(source, LabelledSource)
        value, converted = self.inner.load(source.base, int(source.rows[index]))
        return (value, source.targets[index]), converted

    def speed_perturb(self, value: Any, epoch: int, sample_id: int) -> Any:
        """(stretched value, target)."""
        return self.inner.speed_perturb(value[0], epoch, sample_id), value[1]

    def perturbed_lengths(self, lengths: np.ndarray, epoch: int) -> np.ndarray:
        """As the modality."""
        return self.inner.perturbed_lengths(lengths, epoch)

    def read_crop(self, value: Any, rng: np.random.Generator, length: int | None) -> Any:
        """(part of a long value, target)."""
        return self.inner.read_crop(value[0], rng, length), value[1]

    def train_transform(self, value: Any, rng: np.random.Generator) -> Any:
        """(augmented value, target)."""
        return self.inner.train_transform(value[0], rng), value[1]

    def eval_transform(self, value: Any) -> Any:
        """(value as evaluation sees it, target)."""
        return self.inner.eval_transform(value[0]), value[1]

    def describe_cut(self, value: Any) -> str | None:
        """As the modality."""
        return self.inner.describe_cut(value[0])

    def placeholder(self) -> Any:
        """(blank value, no target)."""
        return self.inner.placeholder(), None

    def stack(self, samples: list[Sample], training: bool) -> tuple[Tensor, Tensor | None]:
        """Inputs and lengths, without the targets."""
        return self.inner.stack([s._replace(value=s.value[0]) for s in samples], training)


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """A micro-batch with targets; all tensors on the host."""

    targets: Tensor
    """(B,) int64 classes, or float32 numbers; (B,K) float32, 1 for a label; CTC: int64 labels of all transcripts,
    joined."""
    target_lengths: Tensor | None
    """CTC: (B,) int64 labels of each transcript."""
    hidden: Tensor | None
    """Speech: bool (B,T), frames that are masked."""
    channels: Tensor | None
    """Speech: bool (B,C), channels that are masked."""
    rows: tuple[int, ...]
    """Numbers of the samples in their source."""
    bad: tuple[int, ...]
    """Rows of the batch that could not be decoded."""

    def pin_memory(self) -> LabelledBatch:
        """See `Batch`."""
        pinned = super().pin_memory()
        assert isinstance(pinned, LabelledBatch)
        return replace(pinned, targets=self.targets.pin_memory())


class LabelledCollate:
    """Samples -> batch with targets and, in training, masks of speech; runs in the loader's workers."""

    def __init__(self, config: FineTuneConfig, modality: Labelled, spelling: Spelling | None, training: bool) -> None:
        self.config, self.modality, self.spelling, self.training = config, modality, spelling, training
        self._samplers: dict[tuple[str, int], MaskSampler] = {}

    def __call__(self, samples: list[Sample]) -> LabelledBatch:
        inputs, lengths = self.modality.stack(samples, self.training)
        tokens, valid = self.modality.measure(inputs, lengths)
        values = [s.value[1] for s in samples]
        targets, counts = self.stack_targets(values)
        hidden = channels = keys = None
        options = self.config.finetune.options
        if self.training and self.config.stem.modality == "speech":
            if options.time_mask > 0.0 and tokens is not None:
                hidden, keys = self._draw("time", samples, tokens, valid)
            if options.channel_mask > 0.0:
                channels, _ = self._draw("channel", samples, self.config.encoder.width, None)
        return LabelledBatch(
            inputs, lengths, valid, None, keys, tuple(n for s in samples for n in s.notes), targets, counts, hidden,
            channels, tuple(s.sample_id for s in samples), tuple(i for i, v in enumerate(values) if v is None),
        )  # fmt: skip

    def stack_targets(self, values: list[Any]) -> tuple[Tensor, Tensor | None]:
        """Targets of samples, None for one without, and their numbers of labels, as `LabelledBatch` has them."""
        task = self.config.finetune.head.task
        if task == "ctc":
            assert self.spelling is not None
            spelled = [[] if v is None else self.spelling.encode(v) for v in values]
            joined = torch.tensor([i for ids in spelled for i in ids], dtype=torch.int64)
            return joined, torch.tensor([len(ids) for ids in spelled])
        if task == "multi-label":
            hot = stack_labels([v or () for v in values], len(self.config.finetune.labels))
            return torch.from_numpy(hot).float(), None
        dtype = torch.float32 if task == "regression" else torch.int64
        return torch.tensor([0 if v is None else v for v in values], dtype=dtype), None

    def _draw(self, axis: str, samples: list[Sample], length: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Span masks (B,length) along time or channels and noise keys (B,): a function of seed, epoch and sample id."""
        options = self.config.finetune.options
        if (axis, length) not in self._samplers:
            ratio, span = getattr(options, f"{axis}_mask"), min(getattr(options, f"{axis}_span"), length)
            seed = self.config.run.seed + (1 << 20) * (axis == "channel")  # the two must not draw alike
            self._samplers[axis, length] = MaskSampler("span", tokens=length, ratio=ratio, span=span, seed=seed)
        sampler = self._samplers[axis, length]
        masks, keys = [], []
        for i, sample in enumerate(samples):
            own = None if valid is None else valid[i : i + 1]
            mask = sampler.draw([sample.sample_id], sample.epoch, lengths=own).mask
            count = length if own is None else int(own)
            masks.append(mask & (mask.sum(dim=1, keepdim=True) < count))  # a row that would show nothing shows all
            keys.append(sampler.noise_keys([sample.sample_id], sample.epoch))
        return torch.cat(masks), torch.cat(keys)


# ---- opening ----------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Samples whose label cannot be used."""

    rows: list[int]
    reason: str
    expected: str


def _leave_out(source: Source, targets: list[Any], problems: list[Problem], option: str, skip: bool) -> LabelledSource:
    """The samples without the problematic ones; `ValueError` for the first problem unless they are skipped."""
    bad: set[int] = set()
    for rows, reason, expected in problems:
        if not rows:
            continue
        first = source.describe(rows[0])
        if not skip:
            raise ValueError(
                f"{option}: expected {expected}, got {len(rows)} of {len(source)} {reason}; first: {first} "
                "(--task.bad-labels skip leaves them out)"
            )
        source.left_out[f"{reason}, first {first}"] = len(rows)
        bad |= set(rows)
    kept = np.array([i for i in range(len(source)) if i not in bad], dtype=np.int64)
    if not len(kept):
        raise ValueError(f"{option}: expected samples with a label, got {len(source)} without a usable one")
    return LabelledSource(source, kept, [targets[i] for i in kept])


def _open_labelled(modality: Modality, path: str, option: str, skip: bool) -> Source:
    """The samples with their labels; `ValueError` for entries without a text or a label, unless they are skipped."""
    source = modality.open(path, labelled=True, option=option)
    if source.incomplete:
        count, (first, reason) = len(source.incomplete), source.incomplete[0]
        if not skip:
            raise ValueError(
                f"{option}: expected a text and a label in every line, got {count} of {source.indexed} without; first: "
                f"{first}: {reason} (--task.bad-labels skip leaves them out)"
            )
        skipped = set(source.incomplete)
        source.rejected = [entry for entry in source.rejected if entry not in skipped]
        source.left_out[f"lines without a text or a label, first {first}: {reason}"] = count
    return source


def open_classes(
    modality: Modality, path: str, option: str, known: Sequence[str] | None, skip: bool, several: bool = False
) -> tuple[LabelledSource, list[str]]:
    """Samples with class numbers, and the names of the classes: `known` ones, or those that the data has. several: each
    has a tuple of them.

    Raises:
        ValueError: a class that is not known; fewer than two classes in training data, or labels that are none.
    """
    source = _open_labelled(modality, path, option, skip)
    assert source.labels is not None and source.classes is not None
    present = sorted(set(source.labels.tolist()))
    found = [source.classes[i] for i in present]
    sets: list[tuple[str, ...]] = [(name,) for name in found]
    if several:
        sets = split_labels(found, known or ())
        found = number_classes([name for one in sets for name in one])[1]
    classes = list(known) if known is not None else found
    if known is None and len(classes) < 2:
        raise ValueError(f"{option}: expected at least 2 classes, got {len(source)} samples of {classes} at {path!r}")
    if known is None and not several:
        check_classes(source, option)
    numbers = {name: i for i, name in enumerate(classes)}
    named = dict(zip(present, sets, strict=True))
    own = [named[i] for i in source.labels.tolist()]
    targets: list[Any] = [tuple(numbers.get(name) for name in names) for names in own]
    strange = [i for i, target in enumerate(targets) if None in target]
    names = sorted({name for i in strange for name in own[i]}.difference(numbers))
    targets = targets if several else [target[0] for target in targets]
    reason = f"of classes that the training data lacks ({', '.join(names[:5])})"
    problem = Problem(strange, reason, "the classes of the training data")
    return _leave_out(source, targets, [problem], option, skip), classes


def open_numbers(modality: Modality, path: str, option: str, skip: bool) -> LabelledSource:
    """Samples with numbers to predict."""
    source = _open_labelled(modality, path, option, skip)
    assert source.labels is not None and source.classes is not None
    values = [_to_number(name) for name in source.classes]
    targets = [values[i] for i in source.labels.tolist()]
    odd = [i for i, value in enumerate(targets) if value is None]
    return _leave_out(source, targets, [Problem(odd, "that are not finite numbers", "numbers as labels")], option, skip)


def _to_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def open_transcripts(
    modality: Modality, path: str, option: str, *, case: str, longest: int, skip: bool,
    check: Callable[[str], str] | None = None,
) -> LabelledSource:  # fmt: skip
    """Utterances with transcripts.

    Args:
        case: see `normalise_transcript`.
        longest: samples at 16 kHz; longer utterances, whose end would be cut off, are left out and counted.
        check: the characters of a transcript that cannot be spelled; None: all can.
    """
    source = modality.open(path, option=option)
    texts: list[str | None] = []
    reasons = ""
    for index in range(len(source)):
        try:
            texts.append(normalise_transcript(source.read_transcript(index), case))
        except (ValueError, OSError) as error:
            reasons = reasons or (error.strerror if isinstance(error, OSError) and error.strerror else str(error))
            texts.append(None)
    long: list[int] = []
    if source.lengths is not None:
        long = np.flatnonzero(source.lengths >= longest).tolist()
        if long:
            source.left_out[f"utterances of {longest / modality.rate:g} s or more (--data.max-seconds)"] = len(long)
    absent, empty = ([i for i, text in enumerate(texts) if text == value] for value in (None, ""))
    problems = [
        Problem(absent, f"without a transcript ({reasons})", "a transcript for each"),
        Problem(empty, "that are empty", "transcripts"),
    ]
    if check is not None:
        odd = {i: found for i, text in enumerate(texts) if text and (found := check(text))}
        letters = "".join(sorted(set("".join(odd.values()))))
        reason = f"with characters outside the alphabet ({letters[:20]!r})"
        problems.append(Problem(list(odd), reason, "the characters of the training"))
    usable = _leave_out(source, texts, problems, option, skip)
    if not long:
        return usable
    kept = np.flatnonzero(~np.isin(usable.rows, long))
    if not len(kept):
        raise ValueError(
            f"{option}: expected utterances below {longest / modality.rate:g} s (--data.max-seconds), got none"
        )
    return usable.take(kept)


def list_cut(source: LabelledSource, modality: Modality) -> list[Rejected]:
    """Samples that training and validation cut: recordings to data.max_seconds, texts to stem.max_tokens."""
    config = modality.config
    if config.stem.modality == "speech" and source.lengths is not None:
        limit = config.data.max_seconds
        rows = np.flatnonzero(source.lengths >= round(limit * modality.rate)).tolist()
        return [Rejected(source.describe(i), f"{limit:g} s or more, of which so much is taken") for i in rows]
    texts, longest, found = getattr(source.base, "texts", None), config.stem.max_tokens, []
    if texts is None:
        return []
    tokenizer: Any = modality.tokenizer  # type: ignore[attr-defined]
    for number, row in enumerate(source.rows.tolist()):
        # A token has a byte or more: most texts need not be tokenised.
        if sum(len(text.encode()) for text in texts[row]) + 2 * len(texts[row]) > longest:
            count = sum(len(ids) + 2 for ids in tokenizer.encode(texts[row]))
            if count > longest:
                found.append(Rejected(source.describe(number), f"cut to {longest} of {count} tokens"))
    return found


def list_unfitting(source: LabelledSource, modality: Modality, spelling: Spelling) -> list[Rejected]:
    """Utterances with transcripts that CTC cannot align: longer than their frames, a blank between equal labels."""
    assert source.lengths is not None
    found = []
    for row, (length, text) in enumerate(zip(source.lengths.tolist(), source.targets, strict=True)):
        labels, frames = spelling.encode(text), modality.count_tokens(length)
        needed = len(labels) + sum(a == b for a, b in pairwise(labels))
        if needed > frames:
            found.append(Rejected(source.describe(row), f"{needed} frames needed, got {frames}"))
    return found


def hold_out(source: LabelledSource, share: float, seed: int) -> tuple[LabelledSource, LabelledSource]:
    """Training samples and a random share of them that is held out; of each class about the same share.

    Raises:
        ValueError: so few samples that one part would be empty.
    """
    rng = np.random.default_rng([seed, STREAM_SPLIT])
    order = rng.permutation(len(source))
    if source.targets and isinstance(source.targets[0], int):
        # Every class's samples in random order, spread evenly over the whole.
        targets = np.array(source.targets)[order]
        places = np.empty(len(order))
        for target in np.unique(targets):
            own = np.flatnonzero(targets == target)
            places[own] = (np.arange(len(own)) + rng.random()) / len(own)
        order = order[np.argsort(places, kind="stable")]
    count = max(1, round(share * len(source)))
    if count >= len(source):
        raise ValueError(f"train: expected at least 2 samples to hold one out, got {len(source)}; pass --valid")
    return source.take(np.sort(order[count:])), source.take(np.sort(order[:count]))
