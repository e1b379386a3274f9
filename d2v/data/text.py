"""Text: tokens on disk, packed blocks of them, whole documents, labelled texts.

Tokens are made once and read through a memory map by every loader worker. Files of their cache folder, all plain:
`tokens.bin` (the ids of all documents in order, each document ended by `</s>`), `ends.bin` (int64, where each document
ends), `index.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2v.config import Config
from d2v.config.finetune import FineTuneConfig
from d2v.data.cache import CACHE, stamps_of
from d2v.data.dataset import Batch, Modality, Sample
from d2v.data.sources import (
    Rejected,
    Source,
    find_files,
    for_example,
    is_header,
    number_classes,
    printable,
)
from d2v.data.tokenizer import (
    END,
    FILE,
    PADDING,
    START,
    BytePairs,
    DocumentReader,
    find_texts,
    pass_mark,
    save_tokenizer,
    train_tokenizer,
)
from d2v.files import PARTIAL, open_regular, write_atomically
from d2v.folder import clean_folder, latest_checkpoint
from d2v.model.stems.text import make_stem
from d2v.runtime import Reporter

TOKENIZER = "tokenizer"
"""Folder inside a run folder."""
MIN_BLOCK = 8
"""Shortest block in tokens, <s> included; shorter ends of documents are left out: there is hardly a token to mask."""
WORD_BINS = 1024
"""Features of the bag of words. More of them do worse: rare words weigh too much once features are standardised."""
FORMAT = 1
TOKENS, ENDS, INDEX = "tokens.bin", "ends.bin", "index.json"
ENDLESS = 1 << 24  # tokens of the longest text that a configuration allows
GROUP_CHARACTERS = 1 << 20
"""Text that is tokenised at a time, by several threads."""


class Tokens(NamedTuple):
    """The tokens of a set of files."""

    ids: np.ndarray
    """(tokens,) uint16 or int32."""
    ends: np.ndarray
    """(documents,) int64: a document's tokens end here, `</s>` included; the next one's begin."""
    rejected: list[Rejected]
    digest: str
    """SHA-256 of ids and ends."""


def open_tokens(files: list[Path], tokenizer: BytePairs, folder: Path) -> Tokens:
    """The tokens of `files`, from a cache under `folder` that is made where it is missing or damaged.

    A cache belongs to the files' paths, sizes and times of change, and to the tokenizer. Two processes that make the
    same one do not disturb each other.
    """
    status = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) if f.exists() else str(f) for f in files]
    identity = json.dumps([FORMAT, tokenizer.digest, status]).encode()
    place = folder / f"tokens-{hashlib.sha256(identity).hexdigest()[:16]}"
    found = _read(place)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        _build(files, tokenizer, place)
        found = _read(place)
    if found is None:
        raise ValueError(f"data.cache: cannot read {str(place)!r} back after it was written")
    return found


def _read(place: Path) -> Tokens | None:
    """A whole cache, or None."""
    try:
        index: dict[str, Any] = json.loads((place / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT or not index["tokens"]:
            return None
        ids = np.memmap(place / TOKENS, dtype=index["dtype"], mode="r")
        ends = np.memmap(place / ENDS, dtype=np.int64, mode="r")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if len(ids) != index["tokens"] or len(ends) != index["documents"]:
        return None
    return Tokens(ids, ends, [Rejected(*entry) for entry in index["rejected"]], index["sha256"])


def _build(files: list[Path], tokenizer: BytePairs, place: Path) -> None:
    """Writes a cache; it appears whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{place.name}-", dir=place.parent))
    partial.chmod(0o755)  # others may share the cache
    try:
        reader = DocumentReader(files)
        dtype = np.dtype(np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.int32)
        hashes = [hashlib.sha256(), hashlib.sha256()]
        total, documents = 0, 0
        report = Reporter("tokenising", reader.bytes / 1e6, "MB")
        with (partial / TOKENS).open("wb") as tokens, (partial / ENDS).open("wb") as ends:
            for group in group_documents(reader):
                lists = [[*ids, END] for ids in tokenizer.encode(group)]
                sizes = np.array([len(ids) for ids in lists], dtype=np.int64)
                pair = np.concatenate([np.array(ids, dtype=dtype) for ids in lists]), total + np.cumsum(sizes)
                for file, values, digest in zip((tokens, ends), pair, hashes, strict=True):
                    file.write(values.tobytes())
                    digest.update(values.tobytes())
                total, documents = total + int(sizes.sum()), documents + len(lists)
                report.show(reader.done / 1e6)
            for file in (tokens, ends):
                file.flush()
                os.fsync(file.fileno())
        report.finish()
        if not total:
            first = for_example(reader.rejected)
            raise ValueError(f"data.path: expected text in {len(files)} files, found none{first}")
        index = {
            "format": FORMAT, "dtype": dtype.name, "tokens": total, "documents": documents,
            "sha256": hashlib.sha256(hashes[0].digest() + hashes[1].digest()).hexdigest(), "rejected": reader.rejected,
        }  # fmt: skip
        write_atomically(partial / INDEX, json.dumps(index))
        try:
            partial.rename(place)
        except OSError:
            if _read(place) is None:  # damaged; the cache of a process that was quicker stays
                shutil.rmtree(place, ignore_errors=True)
                partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def group_documents(reader: DocumentReader) -> Iterator[list[str]]:
    """Lists of documents to tokenise at a time."""
    group: list[str] = []
    characters = 0
    for text in reader:
        group.append(text)
        characters += len(text)
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


class TextSource(Source):
    """Texts as token ids."""

    documents = 0
    """Documents that were found, rejected ones not counted."""

    def __init__(self, files: list[Path], modality: Texts, option: str, left_out: dict[str, int] | None = None) -> None:
        self.files, self.modality, self.option = files, modality, option
        self.rejected, self.left_out = [], left_out or {}
        self.stamps = stamps_of([str(file) for file in files])
        self.where = printable(str(files[0])) if len(files) == 1 else f"{len(files)} files"

    def file_path(self, number: int) -> str:
        return printable(str(self.files[number]))

    def block(self, index: int) -> np.ndarray:
        """int64 (tokens,) of a sample, `<s>` first."""
        raise NotImplementedError

    @property
    def indexed(self) -> int:
        return self.documents + len(self.rejected)


class BlockSource(TextSource):
    """Blocks of at most `data.block_tokens` tokens, `<s>` included, of a set of files.

    "stream": the documents, each ended by `</s>`, are joined and cut. "documents": every document is cut by itself.
    """

    def __init__(self, files: list[Path], modality: Texts, option: str, left_out: dict[str, int] | None = None) -> None:
        super().__init__(files, modality, option, left_out)
        self._passed_over = dict(self.left_out)
        self._starts = self._sizes = np.zeros(0, dtype=np.int64)
        self._digest = ""

    def prepare(self, folder: Path, fresh: bool) -> None:
        """Tokenises the files into a cache. A `fresh` run without a given tokenizer trains one on them first."""
        tokenizer = self.modality.settle_tokenizer(folder, self.files if fresh else None)
        cache = self.modality.config.data.cache
        if cache is None:
            clean_folder(folder / CACHE)
        tokens = open_tokens(self.files, tokenizer, Path(cache) if cache is not None else folder / CACHE)
        self._ids, self.rejected, self.documents = tokens.ids, list(tokens.rejected), len(tokens.ends)
        payload, mode = self.modality.block_tokens - 1, self.modality.blocks
        total = len(tokens.ids)
        starts, sizes = cut_stream(total, payload) if mode == "stream" else cut_documents(tokens.ends, payload)
        # A short end of the stream would cut the masks of its whole batch to its own few.
        shortest = payload if mode == "stream" and total >= payload else MIN_BLOCK - 1
        kept = sizes >= shortest
        if not kept.any():
            raise ValueError(f"{self.option}: expected a text of at least {MIN_BLOCK} tokens, got {total} in all")
        self.left_out = dict(self._passed_over)
        if not kept.all():
            self.left_out[f"blocks shorter than {shortest + 1} tokens"] = int((~kept).sum())
        self._starts, self._sizes = starts[kept], sizes[kept]
        self._digest = hashlib.sha256(f"{tokens.digest} {mode} {payload}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def describe(self, index: int) -> str:
        start = int(self._starts[index])
        return f"tokens {start} to {start + int(self._sizes[index])} of {self.where}"

    def block(self, index: int) -> np.ndarray:
        start, size = int(self._starts[index]), int(self._sizes[index])
        result = np.empty(size + 1, dtype=np.int64)
        result[0], result[1:] = START, self._ids[start : start + size]
        return result

    def digest(self) -> str:
        return self._digest


def cut_stream(tokens: int, payload: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes) of pieces of `payload` tokens; the last may be shorter."""
    starts = np.arange(0, tokens, payload, dtype=np.int64)
    return starts, np.minimum(payload, tokens - starts)


def cut_documents(ends: np.ndarray, payload: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes) of pieces of `payload` tokens of each document; the last of each may be shorter."""
    stops = np.asarray(ends, dtype=np.int64)
    begins = np.concatenate([[0], stops[:-1]])
    counts = -(-(stops - begins) // payload)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins, counts) + (np.arange(len(first)) - first) * payload
    return starts, np.minimum(payload, np.repeat(stops, counts) - starts)


class WholeTexts(TextSource):
    """Documents as `<s> ... </s>`, cut to the longest sequence of the model; their ids are held in memory."""

    def __init__(self, files: list[Path], modality: Texts, option: str, left_out: dict[str, int] | None = None) -> None:
        super().__init__(files, modality, option, left_out)
        reader, longest = DocumentReader(files), modality.config.stem.max_tokens
        self._ids: list[np.ndarray] = []
        self.cut = {}
        for ids in (ids for group in group_documents(reader) for ids in modality.tokenizer.encode(group)):
            if len(ids) > longest - 2:
                self.cut[len(self._ids)] = f"cut to {longest} of {len(ids) + 2} tokens"
            self._ids.append(np.array([START, *ids[: longest - 2], END], dtype=np.int32))
        self.rejected, self.documents = reader.rejected, len(self._ids)
        if not self._ids:
            raise ValueError(f"{option}: expected text in {len(files)} files, found none{for_example(self.rejected)}")

    def __len__(self) -> int:
        return len(self._ids)

    def describe(self, index: int) -> str:
        return f"document {index + 1} of {self.where}"

    def block(self, index: int) -> np.ndarray:
        return self._ids[index].astype(np.int64)

    def digest(self) -> str:
        return hashlib.sha256(b"".join(hashlib.sha256(ids.tobytes()).digest() for ids in self._ids)).hexdigest()


class LabelledTexts(TextSource):
    """Lines `text<TAB>label` or `text<TAB>text<TAB>label` of `.tsv` files, tokenised as `<s> a </s>` or
    `<s> a </s> </s> b </s>` and cut to the longest sequence of the model. `texts` keeps the columns."""

    def __init__(self, files: list[Path], modality: Texts, option: str) -> None:
        super().__init__(files, modality, option)
        self.incomplete: list[Rejected] = []
        self.texts: list[tuple[str, ...]] = []
        self.values: list[str] = []
        self._places: list[str] = []
        for file in files:
            self._read(file, option)
        if not self.texts:
            raise ValueError(f"{option}: expected lines text<TAB>label, found none{for_example(self.rejected)}")
        self.documents = len(self.texts)
        self.labels, self.classes = number_classes(self.values)

    def _read(self, file: Path, option: str) -> None:
        columns = 0
        with open_regular(file) as stream:
            try:
                pass_mark(stream)
            except ValueError as error:
                raise ValueError(f"{option}: {file}: {error}") from None
            for number, data in enumerate(stream, start=1):
                if not data.strip():
                    continue
                where = f"{file}:{number}"
                try:
                    parts = data.decode("utf-8").rstrip("\r\n").split("\t")
                except UnicodeDecodeError as error:
                    self.rejected.append(Rejected(where, f"not UTF-8 from byte {error.start}"))
                    continue
                first, columns = not columns, columns or len(parts)
                if columns not in (2, 3):
                    raise ValueError(f"{option}: expected text<TAB>label or text<TAB>text<TAB>label in {where}")
                if first and is_header(parts):
                    self.left_out[f"line of column names, {where}"] = 1
                    continue
                reason = None if all(part.strip() for part in parts) else "an empty column"
                if len(parts) != columns:
                    reason = f"expected {columns} columns, got {len(parts)}"
                if reason is not None:
                    self.rejected.append(Rejected(where, reason))
                    self.incomplete.append(self.rejected[-1])
                else:
                    self.texts.append(tuple(parts[:-1]))
                    self.values.append(parts[-1].strip())
                    self._places.append(where)

    def __len__(self) -> int:
        return len(self.texts)

    def describe(self, index: int) -> str:
        return self._places[index]

    def block(self, index: int) -> np.ndarray:
        tokenizer = self.modality.tokenizer
        joint: list[int] = [START]
        for ids in tokenizer.encode(self.texts[index]):
            joint += ([END, END] if len(joint) > 1 else []) + ids
        longest = self.modality.config.stem.max_tokens
        return np.array([*joint[: longest - 1], END], dtype=np.int64)

    def digest(self) -> str:
        return hashlib.sha256(repr((self.texts, self.values)).encode()).hexdigest()


class Texts(Modality):
    """Blocks of text as token ids, padded to the longest of a batch."""

    name, noun, words = "text", "texts", ("ids", "projected")
    baselines = ("bag_of_words",)
    shortest = 4
    make_stem = staticmethod(make_stem)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        data = config.data
        self.block_tokens = data.block_tokens if data.block_tokens is not None else config.stem.max_tokens
        if not MIN_BLOCK <= self.block_tokens <= config.stem.max_tokens:
            raise ValueError(
                f"data.block_tokens: expected {MIN_BLOCK} to stem.max_tokens {config.stem.max_tokens}, "
                f"got {self.block_tokens}"
            )
        self.blocks = data.blocks if data.blocks is not None else ("documents" if config.version == 1 else "stream")
        _ = self.stem  # its checks
        self._tokenizer: BytePairs | None = None

    # ---- tokenizer --------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> BytePairs:
        """The tokenizer of data.tokenizer, or the one that the run has made."""
        if self._tokenizer is None:
            given = self.config.data.tokenizer
            self._tokenizer = self._read_tokenizer(Path(given or Path(self.config.run.dir) / TOKENIZER))
        return self._tokenizer

    def _read_tokenizer(self, folder: Path) -> BytePairs:
        """A tokenizer that fits the model."""
        tokenizer = BytePairs(folder)
        stem, size = self.config.stem, tokenizer.vocabulary
        masks = self.config.version == 1
        hint = f"--stem.vocabulary {size}" + (f" --stem.mask-token {tokenizer.mask_token}" if masks else "")
        if size > stem.vocabulary:
            raise ValueError(
                f"stem.vocabulary: expected at least {size}, the tokens of {str(folder)!r}, got {stem.vocabulary}; "
                f"pass {hint}"
            )
        if masks and stem.mask_token != tokenizer.mask_token:
            raise ValueError(
                f"stem.mask_token: expected {tokenizer.mask_token}, <mask> in {str(folder)!r}, got {stem.mask_token}; "
                f"pass {hint}"
            )
        return tokenizer

    def settle_tokenizer(self, folder: Path, files: list[Path] | None) -> BytePairs:
        """The tokenizer of a run, kept in its `folder`: the given one is copied there.

        Where none is given, one of stem.vocabulary ids is trained on `files`; None: the one that the run has.
        """
        kept = folder / TOKENIZER
        given = self.config.data.tokenizer
        if given is not None and not (kept.is_dir() and Path(given).resolve() == kept.resolve()):
            tokenizer = self._read_tokenizer(Path(given))
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(given) / FILE, kept / FILE)
        elif given is None and files is not None and latest_checkpoint(folder) is None:
            size = self.config.stem.vocabulary
            print(f"no data.tokenizer: training one of {size} tokens on the data, into {kept}", file=sys.stderr)
            text, unused = train_tokenizer(DocumentReader(files), size)
            if unused:
                print(f"the text has too few pairs: {unused} of {size} tokens never occur", file=sys.stderr)
            save_tokenizer(text, kept)
            tokenizer = self._read_tokenizer(kept)
        else:
            tokenizer = self._read_tokenizer(kept)
        self._tokenizer = tokenizer
        return tokenizer

    # ---- samples ----------------------------------------------------------------------------------------------

    def open(self, path: str, *, labelled: bool = False, option: str = "data.path") -> Source:
        """`.txt` and `.jsonl` files, or a folder of them; labelled: `.tsv` files."""
        if not labelled:
            left_out: dict[str, int] = {}
            files = find_texts(path, option, left_out)
            if self.config.data.tokenizer is not None:
                _ = self.tokenizer  # says at once what does not fit
            return BlockSource(files, self, option, left_out)
        places = "a .tsv file of text<TAB>label"
        if not path or path.startswith("pipe:"):
            raise ValueError(f"{option}: expected {places}, got {path!r}")
        files = find_files(path, places, option)
        if odd := next((f for f in files if f.suffix.lower() != ".tsv" or not f.is_file()), None):
            raise ValueError(f"{option}: expected {places}, got {str(odd)!r}")
        return LabelledTexts(files, self, option)

    def open_whole(self, path: str, *, option: str) -> Source:
        """Every document a sample."""
        left_out: dict[str, int] = {}
        return WholeTexts(find_texts(path, option, left_out), self, option, left_out)

    def load(self, source: Source, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """int64 (tokens,)."""
        assert isinstance(source, TextSource)
        return source.block(index), ()

    def placeholder(self) -> np.ndarray:
        """`<s> </s>`."""
        return np.array([START, END], dtype=np.int64)

    def stack(self, samples: list[Sample], training: bool) -> tuple[Tensor, Tensor]:
        """Ids (B,T) int64, padded on the right."""
        lengths = [len(s.value) for s in samples]
        inputs = torch.full((len(samples), max(lengths)), PADDING, dtype=torch.int64)
        for row, sample in zip(inputs, samples, strict=True):
            row[: len(sample.value)] = torch.from_numpy(sample.value)
        return inputs, torch.tensor(lengths)

    def describe_cut(self, value: np.ndarray) -> str | None:
        return f"cut to {len(value)} tokens" if len(value) >= ENDLESS else None

    def longest_piece(self) -> int:
        """Pre-training knows the positions of its blocks only, fine-tuning all."""
        return self.config.stem.max_tokens if isinstance(self.config, FineTuneConfig) else self.block_tokens

    def lift_limits(self) -> Config:
        return self.config.change(stem=dict(max_tokens=ENDLESS))

    def take(self, value: np.ndarray, start: int, stop: int | None) -> np.ndarray:
        """Begins with `<s>` and ends with `</s>`, as in training."""
        return np.array([START, *value[start:stop][1:-1], END])

    def raw_features(self, name: str, batch: Batch) -> Tensor:
        """bag_of_words: how often each word occurs in what the model sees, log(1 + n), words hashed to WORD_BINS."""
        assert batch.lengths is not None
        counts = torch.zeros(len(batch), WORD_BINS)
        for row, ids, length in zip(counts, batch.inputs, batch.lengths.tolist(), strict=True):
            for word in re.findall(r"\w+|[^\w\s]", self.tokenizer.decode(ids[:length].tolist()).lower()):
                row[zlib.crc32(word.encode()) % WORD_BINS] += 1.0
        return counts.log1p()
