"""What all kinds of data share: samples, batches with their masks, and the interface of a modality.

Everything random about a sample - crop, speed, mirror, turn, masks, decoder noise - is a function of (seed, epoch,
sample id), so a run does not depend on the number of loader workers and can be resumed exactly.

A sample that cannot be decoded is replaced at its position by another one chosen by the same rule; shapes and order
stay as they were. The position keeps its own crop, masks and noise; a speed goes with the sample.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2v.config import Config, Stem
from d2v.config.inputs import Grid
from d2v.data.cache import CACHE, IndexCache
from d2v.data.index import open_source
from d2v.data.sources import Kind, Measure, ShardLost, Source, describe_error
from d2v.data.storage.ahead import ReadAhead
from d2v.model.masking import make_mask_sampler
from d2v.model.stems import InputStem, make_stem
from d2v_kernels import Masks, MaskSampler, masks_from_bool

ATTEMPTS = 64
"""Replacements tried for one position before the data counts as unusable."""

STREAM_CROP, STREAM_REPLACE, STREAM_ORDER, STREAM_CUT, STREAM_LAYERS, STREAM_SPEED = 0, 1, 2, 3, 4, 5
_U64 = 0xFFFFFFFFFFFFFFFF


def random_stream(seed: int, epoch: int, sample_id: int, purpose: int) -> np.random.Generator:
    """Philox generator keyed by (seed, epoch), with sample id and purpose in the counter: independent streams."""
    key = np.array([seed & _U64, epoch & _U64], dtype=np.uint64)
    counter = np.array([0, 0, purpose, sample_id & _U64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class Group(NamedTuple):
    """Samples that are made equal, in length and in how much is masked, on whatever rank each of them is."""

    places: tuple[tuple[int, int], ...]
    """(sample id, epoch) of each."""
    lengths: tuple[int, ...] | None
    """Length of each by the index, as training sees it; None: no lengths in this kind of data."""
    crop: int | None
    """The length that all are cropped to; None: they are not."""


class SampleRef(NamedTuple):
    """One position of the stream: which sample, and what it is made equal to."""

    sample_id: int
    epoch: int
    group: Group | None = None
    place: int = 0
    """Number in the group."""


class Note(NamedTuple):
    """What the loader has to say about a sample. `kind`: "bad", "converted", "cut", or one after which no run goes on:
    "fatal" (no sample of many can be decoded), "lost" (a shard is gone)."""

    sample_id: int
    epoch: int
    kind: str
    text: str
    number: int = 1
    """Things that were converted."""


class Sample(NamedTuple):
    """One decoded sample and what happened on the way."""

    sample_id: int
    epoch: int
    value: np.ndarray
    notes: tuple[Note, ...]
    group: Group | None = None
    """What it is made equal to; None: its batch."""
    place: int = 0
    """Its number in the group."""


JOINED_BYTES = 1 << 19
"""Largest tensor of a batch that is sent from a loader worker together with others."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples; all tensors on the host."""

    inputs: Tensor
    """As the modality stacks them; `Modality.prepare` makes the model's inputs of them."""
    lengths: Tensor | None
    """(B,) int64: samples or tokens of a row before its padding; None: no padding."""
    token_lengths: Tensor | None
    """(B,) int64: the same in tokens of the model."""
    masks: Masks | None
    """Of B*M rows; None for evaluation."""
    noise_keys: Tensor | None
    """int64 (B*M,); None without decoder noise."""
    notes: tuple[Note, ...]

    def __len__(self) -> int:
        return len(self.inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        """On its way from a loader worker the small tensors of a batch are one piece of shared memory: each piece costs
        the main process time. Large ones are not copied once more."""
        values = {**vars(self), "masks": None}
        leaves: list[Any] = [*values.values(), *(self.masks or ())]
        small = [i for i, v in enumerate(leaves) if isinstance(v, Tensor) and v.nbytes <= JOINED_BYTES]
        small.sort(key=lambda i: -leaves[i].itemsize)  # each then begins at a multiple of its item size
        tensors = [leaves[i] for i in small]
        joined = torch.cat([torch.empty(0, dtype=torch.uint8), *(t.reshape(-1).view(torch.uint8) for t in tensors)])
        for i, tensor in zip(small, tensors, strict=True):
            leaves[i] = (tensor.dtype, tuple(tensor.shape))
        return _rebuild_batch, (type(self), list(values), leaves, small, joined)

    def pin_memory(self) -> Batch:
        """Copies for asynchronous transfer; called by the loader. Lengths are read on the host and stay as they are."""
        masks = None if self.masks is None else self.masks.pin_memory()
        keys = None if self.noise_keys is None else self.noise_keys.pin_memory()
        return replace(self, inputs=self.inputs.pin_memory(), masks=masks, noise_keys=keys)


def _rebuild_batch(kind: type[Batch], names: list[str], leaves: list[Any], small: list[int], joined: Tensor) -> Batch:
    start = 0
    for i in small:
        dtype, shape = leaves[i]
        stop = start + math.prod(shape) * dtype.itemsize
        leaves[i], start = joined[start:stop].view(dtype).view(shape), stop
    values, masks = dict(zip(names, leaves, strict=False)), leaves[len(names) :]
    return kind(**{**values, "masks": Masks(*masks) if masks else None})


class Modality:
    """One kind of data: where its samples are, how one is decoded, how a batch is made of some.

    The trainer and the probes know data by this interface only. A kind of one's own is a subclass that
    `d2v.register_modality` has been given; it needs `name`, `make_stem`, `suffixes` (or `open`), `load`, `placeholder`,
    `stack`, and `grid` where masks are blocks in two dimensions.
    """

    name = ""
    """In `stem.modality`."""
    words: Collection[str] = ()
    """See `InputKind`."""
    noun = "samples"
    """What a sample is called in messages, plural."""
    suffixes: Collection[str] = ()
    """Endings of its files, lower case, with the dot."""
    baselines: tuple[str, ...] = ()
    """Names that `raw_features` knows."""
    rate = 1  # values of a second, where lengths are given in seconds
    shortest = 1  # values of the shortest sample

    @staticmethod
    def make_stem(config: Config) -> InputStem:
        """What turns inputs into tokens."""
        raise NotImplementedError

    @staticmethod
    def grid(stem: Stem) -> Grid | None:
        """Rows and columns of a sample's tokens, which are masked in 2-D blocks; None: a sequence, masked in spans."""
        return None

    def __init__(self, config: Config) -> None:
        """Raises `ValueError` for settings that this kind of data cannot have."""
        self.config = config

    @cached_property
    def stem(self) -> InputStem:
        """That of the model, without weights: its arithmetic of lengths and its checks are used."""
        with torch.device("meta"):
            return make_stem(self.config)

    @cached_property
    def index_cache(self) -> IndexCache:
        """In data.cache, else in the folder of the run."""
        data, run = self.config.data, self.config.run.dir
        folder = Path(data.cache) if data.cache is not None else Path(run) / CACHE if run else None
        return IndexCache(folder, shared=data.cache is not None)

    def open(self, path: str, *, labelled: bool = False, option: str = "data.path") -> Source:
        """The samples at `path`; reads only. `ValueError`, beginning with `option`, where there are none.

        By default a folder of files, of class folders, a `.tsv` list or .tar shards."""
        places = f"a folder of {self.noun}, a .tsv list or .tar shards"
        kind = Kind(self.noun, frozenset(self.suffixes), places, lists=True)
        return self.open_encoded(path, kind, labelled, option, measure=None)

    def open_encoded(
        self, path: str | Sequence[str], kind: Kind, labelled: bool, option: str, measure: Measure | None
    ) -> Source:
        """Files at `path`, with what their index learns kept in `index_cache`."""
        commands, cache = self.config.data.allow_commands, self.index_cache
        return open_source(
            path, kind, labelled=labelled, option=option, commands=commands, cache=cache, measure=measure
        )

    def open_whole(self, path: str, *, option: str) -> Source:
        """What is at `path` as it is evaluated without labels: whole samples, nothing to prepare."""
        return self.open(path, option=option)

    def load(self, source: Source, index: int) -> tuple[Any, tuple[str, ...]]:
        """A decoded sample and what was converted; `ValueError` or `OSError` where it cannot be used."""
        raise NotImplementedError

    def speed_perturb(self, value: Any, epoch: int, sample_id: int) -> Any:
        """A decoded sample with the length that it has in an epoch of the training."""
        return value

    def perturbed_lengths(self, lengths: np.ndarray, epoch: int) -> np.ndarray:
        """(n,) int64: lengths that `speed_perturb` gives all n samples, whose lengths by the index are these."""
        return lengths

    def longest_perturbed(self, length: int) -> int:
        """Greatest length that `speed_perturb` gives samples of at most this length by the index."""
        return length

    def read_crop(self, value: Any, rng: np.random.Generator, length: int | None) -> Any:
        """The part that training sees of a sample that `load` left for later because it is long (its group's crop, or
        None: as long as may be); other samples as they are."""
        return value

    def train_transform(self, value: Any, rng: np.random.Generator) -> np.ndarray:
        """A decoded sample, after `speed_perturb`, as training sees it; by default as it is."""
        return np.asarray(value)

    def eval_transform(self, value: Any) -> np.ndarray:
        """A decoded sample as evaluation sees it, nothing random; by default as it is."""
        return np.asarray(value)

    def describe_cut(self, value: Any) -> str | None:
        """What `eval_transform` leaves out of a decoded sample; None: nothing."""
        return None

    def placeholder(self) -> np.ndarray:
        """What stands for a sample that cannot be decoded, so that shapes stay as they are."""
        raise NotImplementedError

    def stack(self, samples: list[Sample], training: bool) -> tuple[Tensor, Tensor | None]:
        """Inputs and lengths of a batch."""
        raise NotImplementedError

    def measure(self, inputs: Tensor, lengths: Tensor | None) -> tuple[int | None, Tensor | None]:
        """Tokens T of a row (images: None, their stem knows), and the token lengths of the rows or None: all T."""
        return self.stem.measure(inputs, lengths)

    def count_tokens(self, length: int) -> int:
        """Tokens of a sample whose length by the index is `length`; where there are lengths."""
        return self.stem.count_tokens(length)

    def prepare(self, inputs: Tensor) -> Tensor:
        """Inputs of the model, on the device of the stacked inputs; by default as they are."""
        return inputs

    def raw_features(self, name: str, batch: Batch) -> Tensor:
        """Baseline features (B,F) float32 of a batch without any network."""
        raise NotImplementedError

    # Samples that are longer than those of the training are evaluated in pieces (`d2v.evaluate.pieces`).

    def longest_piece(self) -> int | None:
        """Tokens of a piece; None: samples are never longer than in training."""
        return None

    def lift_limits(self) -> Config:
        """The configuration with which samples keep their whole length."""
        return self.config

    def take(self, value: np.ndarray, start: int, stop: int | None) -> np.ndarray:
        """These values of a sample as a sample of its own."""
        return value[start:stop]


def _count_of(text: str) -> tuple[str, int]:
    """("3 pages ...") -> ("pages ...", 3)."""
    match = re.fullmatch(r"(\d+) ((?:pages|frames) .*)", text)
    return (match[2], int(match[1])) if match is not None else (text, 1)


class TrainSamples(torch.utils.data.Dataset[Sample]):
    """Map from a `SampleRef`, or (sample id, epoch), to an augmented sample.

    A sample that is shorter than its group's crop, against what the index says, counts as bad.
    """

    def __init__(self, source: Source, modality: Modality, seed: int) -> None:
        self.source, self.modality, self.seed = source, modality, seed
        self.ahead: ReadAhead | None = None

    def __len__(self) -> int:
        return len(self.source)

    def read_ahead(self, threads: int) -> None:
        """From now on so many threads of a process read what it will be asked for."""
        self.ahead = ReadAhead(self.source, threads)
        self.source.read = self.ahead.read  # type: ignore[method-assign]

    def __getitems__(self, batch: list[Any]) -> list[Sample]:
        """Those of a batch; samples of `Following.following` are read meanwhile."""
        if self.ahead is not None:
            self.ahead.ask([*(index[0] for index in batch), *getattr(batch, "following", ())])
        return [self[index] for index in batch]

    def __getitem__(self, index: Any) -> Sample:
        sample_id, epoch, group, place = SampleRef(*index)
        length = group.crop if group is not None else None
        notes: list[Note] = []
        picks: np.random.Generator | None = None  # made for the rare sample that needs it
        candidate = sample_id
        for _ in range(ATTEMPTS):
            try:
                value, converted = self.modality.load(self.source, candidate)
                value = self.modality.speed_perturb(value, epoch, candidate)
                if length is not None and len(value) < length:
                    raise ValueError(f"shorter than the index says: {len(value)}, needed {length}")
                rng = random_stream(self.seed, epoch, sample_id, STREAM_CROP)
                value = self.modality.read_crop(value, rng, length)
            except ShardLost as error:
                notes.append(Note(candidate, epoch, "lost", str(error)))
                break
            except Exception as error:  # whatever is wrong with one sample stays with it
                notes.append(Note(candidate, epoch, "bad", describe_error(error)))
                picks = picks or random_stream(self.seed, epoch, sample_id, STREAM_REPLACE)
                candidate = self._pick(picks, length, epoch)
                continue
            notes.extend(Note(candidate, epoch, "converted", *_count_of(text)) for text in converted)
            return Sample(sample_id, epoch, self.modality.train_transform(value, rng), tuple(notes), group, place)
        else:
            notes.append(Note(sample_id, epoch, "fatal", f"{ATTEMPTS} samples in a row cannot be decoded"))
        value = self.modality.placeholder()
        if length is not None:
            value = np.resize(value, (length, *value.shape[1:]))
        return Sample(sample_id, epoch, value, tuple(notes), group, place)

    def _pick(self, rng: np.random.Generator, length: int | None, epoch: int) -> int:
        """A replacement, as long as the group's samples are."""
        if length is None or self.source.lengths is None:
            return int(rng.integers(len(self.source)))
        lengths = self.modality.perturbed_lengths(self.source.lengths, epoch)
        return int(rng.choice(np.flatnonzero(lengths >= length)))


class EvaluationSamples(torch.utils.data.Dataset[Sample]):
    """Map from a sample id to the sample; one that cannot be decoded is a placeholder and has a "bad" note."""

    def __init__(self, source: Source, modality: Modality) -> None:
        self.source, self.modality = source, modality

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            value, _ = self.modality.load(self.source, index)
            text = self.modality.describe_cut(value)
            notes = () if text is None else (Note(index, 0, "cut", text),)
            return Sample(index, 0, self.modality.eval_transform(value), notes)
        except Exception as error:  # whatever is wrong with one sample stays with it
            kind = "lost" if isinstance(error, ShardLost) else "bad"
            return Sample(index, 0, self.modality.placeholder(), (Note(index, 0, kind, describe_error(error)),))


class Collate:
    """Samples -> batch without masks."""

    def __init__(self, modality: Modality) -> None:
        self.modality = modality

    def __call__(self, samples: list[Sample]) -> Batch:
        inputs, lengths = self.modality.stack(samples, training=False)
        valid = self.modality.measure(inputs, lengths)[1]
        return Batch(inputs, lengths, valid, None, None, tuple(n for s in samples for n in s.notes))


class MaskingCollate:
    """Samples -> batch with masks and noise keys. Runs in the loader workers, so masks cost the GPU nothing.

    Masks are drawn for the tokens that the batch has after its cropping: mask and sample are never cropped apart.
    """

    def __init__(self, config: Config, modality: Modality, training: bool = True) -> None:
        self.config, self.modality, self.training = config, modality, training
        # Published random masks of 2.0 text know nothing of padding.
        self.hits_padding = "loss-on-padding" in config.published and config.mask.kind == "random"
        self._samplers: dict[int | None, MaskSampler] = {}

    def __call__(self, samples: list[Sample]) -> Batch:
        inputs, lengths = self.modality.stack(samples, self.training)
        tokens, valid = self.modality.measure(inputs, lengths)
        masks, keys = self._draw(samples, tokens, valid)
        notes = tuple(n for s in samples for n in s.notes)
        return Batch(inputs, lengths, valid, masks, keys if self.config.version == 2 else None, notes)

    def _sampler(self, tokens: int | None) -> MaskSampler:
        if tokens not in self._samplers:
            self._samplers[tokens] = make_mask_sampler(self.config, tokens=tokens)
        return self._samplers[tokens]

    def _draw(self, samples: list[Sample], tokens: int | None, valid: Tensor | None) -> tuple[Masks, Tensor]:
        """Masks and noise keys. Where rows are cut to the fewest masked positions, it is those of the whole group."""
        sampler, group = self._sampler(tokens), samples[0].group
        places = [(s.sample_id, s.epoch) for s in samples]
        if self.hits_padding:
            return self._draw_rows(sampler, places, None)
        if group is None or not sampler.equal_counts or len(group.places) == len(samples):
            return self._draw_rows(sampler, places, valid)
        lengths = None
        if group.crop is None and tokens is not None:
            if group.lengths is None:
                return self._draw_rows(sampler, places, valid)
            lengths = torch.tensor([self.modality.count_tokens(n) for n in group.lengths])
            # A replacement has a length of its own.
            lengths[[s.place for s in samples]] = torch.tensor([tokens] * len(samples)) if valid is None else valid
            sampler = self._sampler(int(lengths.max()))
        masks, keys = self._draw_rows(sampler, group.places, lengths)
        copies = self.config.mask.copies
        rows = slice(samples[0].place * copies, (samples[-1].place + 1) * copies)
        return masks_from_bool(masks.mask[rows, :tokens].contiguous()), keys[rows]

    def _draw_rows(
        self, sampler: MaskSampler, places: Sequence[tuple[int, int]], lengths: Tensor | None
    ) -> tuple[Masks, Tensor]:
        """The same of samples (id, epoch) alone."""
        copies = self.config.mask.copies
        masks: list[Masks] = []
        keys: list[Tensor] = []
        start = 0
        for epoch, part in groupby(places, key=itemgetter(1)):  # a batch may straddle the end of an epoch
            ids = [sample_id for sample_id, _ in part]
            own = None if lengths is None else lengths[start : start + len(ids)]
            masks.append(sampler.draw(ids, epoch, copies=copies, lengths=own))
            keys.append(sampler.noise_keys(ids, epoch, copies=copies))
            start += len(ids)
        joined, noise = masks[0], torch.cat(keys)
        if len(masks) > 1:
            mask = torch.cat([m.mask for m in masks])
            joined = masks_from_bool(cut_to_smallest(mask, noise) if sampler.equal_counts else mask)
        return joined, noise


def cut_to_smallest(mask: Tensor, keys: Tensor) -> Tensor:
    """Mask (N,T) bool in which every row masks as many positions as the row with the fewest; `keys` (N,) choose which.

    The sampler does this for the samples of one epoch; here parts of two epochs meet.
    """
    counts = mask.sum(dim=1)
    smallest = int(counts.min())
    mask = mask.clone()
    for row in (counts > smallest).nonzero()[:, 0].tolist():
        masked = mask[row].nonzero()[:, 0].numpy()
        rng = random_stream(int(keys[row]), 0, 0, STREAM_CUT)
        surplus = rng.choice(masked, size=len(masked) - smallest, replace=False)
        mask[row, torch.from_numpy(surplus)] = False
    return mask
