"""Byte-level byte-pair encoding through the `tokenizers` library: trained on the user's text, or the published one.

A tokenizer is a folder with `tokenizer.json`. Ids are RoBERTa's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` the
last. Special tokens are never read out of a text: "<mask>" in a document is six characters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from d2v.data.documents import DocumentReader, find_texts
from d2v.data.progress import Reporter
from d2v.files import write_atomically

FILE = "tokenizer.json"
START, PADDING, END, UNKNOWN = 0, 1, 2, 3
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
SMALLEST = len(SPECIALS) + 256 + 1
"""Special tokens and one token for each byte."""
TRAINING_BYTES = 256 << 20
"""Text that a tokenizer is trained on at most, from the beginning of the data."""
MIN_FREQUENCY = 2


class BytePairs:
    """A tokenizer: texts to ids and back."""

    def __init__(self, folder: Path, option: str = "data.tokenizer") -> None:
        """Reads `folder`/tokenizer.json, a plain JSON file; nothing in it is executed.

        Raises `ValueError`, beginning with `option`, where there is none or its special tokens stand elsewhere.
        """
        from tokenizers import Tokenizer

        file = folder / FILE
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise ValueError(f"{option}: expected a folder with {FILE}, found none at {str(folder)!r}") from None
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{option}: cannot read {str(file)!r}: {error}") from None
        self._tokenizer.encode_special_tokens = True
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        ids = {name: self._tokenizer.token_to_id(name) for name in (*SPECIALS, MASK)}
        mask = ids[MASK]
        wrong = {name: ids[name] for i, name in enumerate(SPECIALS) if ids[name] != i}
        if wrong or mask is None:
            found = wrong or {MASK: None}
            raise ValueError(
                f"{option}: expected <s> 0, <pad> 1, </s> 2, <unk> 3 and <mask> in {str(file)!r}, got {found}"
            )
        self.mask_token: int = mask
        # Pieces that the published dictionary lacks have ids behind the mask; they are unknown.
        self._has_more = self._tokenizer.get_vocab_size() > self.vocabulary

    @property
    def vocabulary(self) -> int:
        """Number of ids: `<mask>` is the last."""
        return self.mask_token + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        encoded = [e.ids for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        if self._has_more:
            encoded = [[i if i < self.vocabulary else UNKNOWN for i in ids] for ids in encoded]
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""
        result: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return result


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> tuple[str, int]:
    """JSON of a byte-level BPE tokenizer with exactly `vocabulary` ids, trained on `texts`; and the number of fillers.

    Fillers are tokens that never occur, for text that has not enough different pairs: the size and the id of `<mask>`
    are what was asked for.

    Raises:
        ValueError: fewer ids than there are bytes and special tokens; no text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocabulary < SMALLEST:
        raise ValueError(f"vocabulary: expected at least {SMALLEST}, 256 bytes and special tokens, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1, special_tokens=list(SPECIALS), show_progress=False, min_frequency=MIN_FREQUENCY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    found = 0

    def count(some: Iterator[str]) -> Iterator[str]:
        nonlocal found
        for text in some:
            found += len(text)
            yield text

    tokenizer.train_from_iterator(count(_take_some(texts)), trainer)
    if not found:
        raise ValueError("data.path: expected text, found none")
    missing = vocabulary - 1 - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(f"<unused{i}>", special=True) for i in range(missing)])
    tokenizer.add_special_tokens([AddedToken(MASK, special=True)])
    text: str = tokenizer.to_str()
    return text, missing


def _take_some(texts: Iterable[str]) -> Iterator[str]:
    """The first TRAINING_BYTES of text."""
    report = Reporter("reading text for the tokenizer", TRAINING_BYTES / 1e6, "MB")
    taken = 0
    for text in texts:
        taken += len(text)
        report.show(taken / 1e6)
        yield text
        if taken >= TRAINING_BYTES:
            return


def import_gpt2(folder: Path) -> str:
    """JSON of the published tokenizer: GPT-2's `encoder.json` and `vocab.bpe`, with the ids of fairseq's `dict.txt`.

    Id 4 + i is the GPT-2 piece named in line i of the dictionary; `<mask>` comes behind its last line. Pieces that the
    dictionary does not name become `<unk>`.

    Raises:
        ValueError: a file is missing or is not what it should be.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces, merges, names = _read_published(folder)
    by_number = {str(number): piece for piece, number in pieces.items()}
    ids = {name: i for i, name in enumerate(SPECIALS)}
    for i, name in enumerate(names):
        # Names that are no GPT-2 number are fillers, which never occur.
        ids[by_number.get(name, f"<{name}>")] = len(SPECIALS) + i
    mask = len(SPECIALS) + len(names)
    ids[MASK] = mask
    for piece in pieces:
        ids.setdefault(piece, len(ids))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (*SPECIALS, MASK)])
    text: str = tokenizer.to_str()
    return text


def _read_published(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[str]]:
    """GPT-2's pieces with their numbers, its merges, and the names in the order of fairseq's dictionary."""
    texts: dict[str, str] = {}
    for name in ("encoder.json", "vocab.bpe", "dict.txt"):
        try:
            texts[name] = (folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise ValueError(
                f"gpt2: expected encoder.json, vocab.bpe and dict.txt in {str(folder)!r}, no {name}"
            ) from None
    try:
        pieces: Any = json.loads(texts["encoder.json"])
    except ValueError as error:
        raise ValueError(f"gpt2: cannot read {str(folder / 'encoder.json')!r}: {error}") from None
    if not isinstance(pieces, dict) or not all(isinstance(v, int) for v in pieces.values()):
        raise ValueError(f"gpt2: expected pieces with numbers in {str(folder / 'encoder.json')!r}")
    merges = [
        (first, second)
        for line in texts["vocab.bpe"].split("\n")
        if line and not line.startswith("#version")
        for first, second in [line.rstrip("\r").split(" ", 1)]
    ]
    names = [line.split(" ", 1)[0] for line in texts["dict.txt"].split("\n") if line.strip()]
    return pieces, merges, names


def write_tokenizer(output: Path, path: str | None, *, vocabulary: int, gpt2: str | None = None) -> str:
    """Trains a tokenizer on the text at `path`, or imports the published files in `gpt2`; returns a summary.

    Raises:
        ValueError: both or none are given, no text, an `output` that is not empty.
    """
    if (path is None) == (gpt2 is None):
        raise ValueError(
            "data.path: expected one of --data.path and --gpt2, got " + ("none" if path is None else "both")
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output: expected an absent or empty folder, got {str(output)!r}")
    note = ""
    if gpt2 is not None:
        text = import_gpt2(Path(gpt2))
    else:
        reader = DocumentReader(find_texts(path or "", "data.path"))
        text, unused = train_tokenizer(reader, vocabulary)
        note = f", {unused} of them never occur" if unused else ""
        if reader.rejected:
            first = reader.rejected[0]
            note += f"; left out {len(reader.rejected)}, for example {first.name}: {first.reason}"
    save_tokenizer(text, output)
    return f"{output}: {BytePairs(output, 'output').vocabulary} tokens{note}"


def save_tokenizer(text: str, folder: Path) -> None:
    """Writes `folder`/tokenizer.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, text)
