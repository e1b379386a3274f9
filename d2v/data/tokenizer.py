"""Documents of plain text, and their byte-level byte-pair encoding through the `tokenizers` library.

Documents are the blocks between blank lines of `.txt` files, and the `text` fields of `.jsonl` files.

A tokenizer, trained on the user's text or the published one, is a folder with `tokenizer.json`. Ids are RoBERTa's:
`<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` the last. Special tokens are never read out of a text: "<mask>" in a
document is six characters.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from d2v.data.sources import (
    Rejected,
    check_encoding,
    count_endings,
    describe_error,
    ending_of,
    find_files,
    list_left_out,
    printable,
    read_text_file,
    walk_files,
)
from d2v.files import open_regular, write_atomically
from d2v.runtime import Reporter

FILE = "tokenizer.json"
START, PADDING, END, UNKNOWN = 0, 1, 2, 3
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
SMALLEST = len(SPECIALS) + 256 + 1
"""Special tokens and one token for each byte."""
TRAINING_BYTES = 256 << 20
"""Text that a tokenizer is trained on at most, from the beginning of the data."""
MIN_FREQUENCY = 2
SUFFIXES = (".txt", ".jsonl")
PLACES = "a .txt or .jsonl file, or a folder of them"
MAX_DOCUMENT_BYTES = 1 << 20
"""A longer block is cut, at the end of a line where it has any."""
MAX_LINE_BYTES = 64 << 20
"""Longest line of a .jsonl file."""
MAX_REJECTED = 1000
"""Documents of one file that may be undecodable before the rest of the file is left alone."""


# ---- documents --------------------------------------------------------------------------------------------------


def find_texts(path: str, option: str, left_out: dict[str, int] | None = None) -> list[Path]:
    """The `.txt` and `.jsonl` files that a path means; `ValueError`, beginning with `option`, where there are none.

    What else is in a folder is counted in `left_out`, by ending.
    """
    if not path:
        raise ValueError(f"{option}: expected {PLACES}, got nothing")
    if path.startswith("pipe:"):
        raise ValueError(f"{option}: expected {PLACES}, got the shell command {path!r}")
    root = Path(path)
    if root.is_dir():
        left = Counter[str]()
        names = sorted(walk_files(root, left))
        files = [root / name for name in names if ending_of(name) in SUFFIXES]
        left.update(ending for ending in map(ending_of, names) if ending not in SUFFIXES)
        counted = count_endings(+left, "files")
        if not files:
            raise ValueError(
                f"{option}: expected {PLACES}, found none in {len(names)} files under {path!r}{list_left_out(counted)}"
            )
        if left_out is not None:
            left_out.update(counted)
        return files
    files = find_files(path, PLACES, option)
    odd = next((f for f in files if f.suffix.lower() not in SUFFIXES or not f.is_file()), None)
    if odd is not None:
        raise ValueError(f"{option}: expected {PLACES}, got {str(odd)!r}")
    return files


class DocumentReader:
    """Iterates over the documents of files; `rejected` grows with what is not text."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.rejected: list[Rejected] = []
        self.bytes = sum(file.stat().st_size for file in files if file.exists())
        self.done = 0
        """Bytes of the files that were read."""

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            before, found = len(self.rejected), 0
            try:
                with open_regular(file) as stream:
                    pass_mark(stream)
                    pieces = _json_lines(stream) if file.suffix.lower() == ".jsonl" else _blocks(stream)
                    for line, data, reason in pieces:
                        self.done += len(data)
                        text = None
                        if reason is None:
                            text, reason = _decode(data, file.suffix.lower())
                        if reason is not None:
                            self.rejected.append(Rejected(printable(f"{file}:{line}"), reason))
                            if len(self.rejected) - before >= MAX_REJECTED:
                                self.rejected.append(
                                    Rejected(printable(str(file)), "too many such lines: the rest is not read")
                                )
                                break
                        elif text:
                            found += 1
                            yield text
            except (OSError, ValueError) as error:
                self.rejected.append(Rejected(printable(str(file)), describe_error(error)))
            if not found and len(self.rejected) == before:
                self.rejected.append(Rejected(printable(str(file)), "no text"))


def pass_mark(stream: BinaryIO) -> None:
    """Passes over a byte-order mark; `ValueError` for that of UTF-16."""
    start = stream.read(3)
    check_encoding(start)
    if start != b"\xef\xbb\xbf":
        stream.seek(0)


def _decode(data: bytes, suffix: str) -> tuple[str | None, str | None]:
    """A document's bytes -> (text, None), or (None, reason); an empty text is None without a reason."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 from byte {error.start}"
    if suffix == ".jsonl":
        try:
            value: Any = json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            return None, "not JSON"
        value = value.get("text") if isinstance(value, dict) else None
        if not isinstance(value, str):
            return None, "expected a JSON object with text"
        text = value
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return None, "not Unicode text: a surrogate by itself"
    return text.strip() or None, None


def _blocks(stream: BinaryIO) -> Iterator[tuple[int, bytes, str | None]]:
    """(line number, bytes, None) of the blocks between blank lines."""
    block: list[bytes] = []
    size = number = first = 0
    rest = b""
    while line := rest + stream.readline(MAX_DOCUMENT_BYTES):
        rest = b""
        ended = line.endswith(b"\n")
        if not ended and len(line) >= MAX_DOCUMENT_BYTES:
            cut = _whole_characters(line)
            line, rest = line[:cut], line[cut:]
        number += ended
        blank = not line.strip()
        if block and (blank or size + len(line) > MAX_DOCUMENT_BYTES):
            yield first, b"".join(block), None
            block, size = [], 0
        if not blank:
            first = first if block else number or 1
            block.append(line)
            size += len(line)
    if block:
        yield first, b"".join(block), None


def _whole_characters(data: bytes) -> int:
    """Length of the longest beginning that does not end inside a UTF-8 character."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # the first byte of a character
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if back >= length else len(data) - back
    return len(data)


def _json_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes, str | None]]:
    """(line number, bytes, reason not to use it or None) of the lines that are not blank."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        reason = None
        while not line.endswith(b"\n") and len(line) >= MAX_LINE_BYTES:
            reason = f"line is longer than {MAX_LINE_BYTES} bytes"
            line = stream.readline(MAX_LINE_BYTES)
        if reason or line.strip():
            yield number, line, reason


# ---- tokenizer --------------------------------------------------------------------------------------------------


class BytePairs:
    """A tokenizer: texts to ids and back."""

    def __init__(self, folder: Path, option: str = "data.tokenizer") -> None:
        """Reads `folder`/tokenizer.json, a plain JSON file; nothing in it is executed.

        Raises `ValueError`, beginning with `option`, where there is none or its special tokens stand elsewhere.
        """
        from tokenizers import Tokenizer

        file = folder / FILE
        try:
            text = read_text_file(file)
        except OSError:
            raise ValueError(
                f"{option}: expected a folder with {FILE}, found none at {str(folder)!r} "
                "(`d2v data tokenizer` makes one)"
            ) from None
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{option}: cannot read {str(file)!r}: {error}") from None
        self._tokenizer.encode_special_tokens = True
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if stored := switch_off(self._tokenizer):
            # What was made of text before, with these in force, is not what they make of it now.
            self.digest = hashlib.sha256(f"{self.digest} without {stored}".encode()).hexdigest()
        ids = {name: self._tokenizer.token_to_id(name) for name in (*SPECIALS, MASK)}
        mask = ids[MASK]
        wrong = {name: ids[name] for i, name in enumerate(SPECIALS) if ids[name] != i}
        if wrong or mask in (None, len(SPECIALS)):  # nothing before the mask: pieces stand behind it
            found = wrong or {MASK: mask}
            raise ValueError(
                f"{option}: expected <s> 0, <pad> 1, </s> 2, <unk> 3 and <mask> last of all in {str(file)!r}, got "
                f"{found}; `d2v data tokenizer --from` makes it fit a new model"
            )
        assert mask is not None
        self.mask_token: int = mask
        # Pieces that the published dictionary lacks have ids behind the mask; they are unknown. So is the name of a
        # special token in a text, which a unigram model takes for any other piece.
        more = self._tokenizer.get_vocab_size() > self.vocabulary
        self._has_odd = more or type(self._tokenizer.model).__name__ == "Unigram"

    @property
    def vocabulary(self) -> int:
        """Number of ids: `<mask>` is the last."""
        return self.mask_token + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        mask = self.mask_token
        encoded = [e.ids for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        if self._has_odd:
            encoded = [[i if len(SPECIALS) <= i < mask else UNKNOWN for i in ids] for ids in encoded]
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""
        result: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return result


def switch_off(tokenizer: Any) -> list[str]:
    """Switches off what a `tokenizer.json` may carry from its last use: truncation, padding, random merges; their
    names."""
    stored = [name for name in ("truncation", "padding") if getattr(tokenizer, name) is not None]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
        stored.append("dropout")
    return stored


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
    report = Reporter("reading text for the tokenizer", TRAINING_BYTES / 1e6, "MB")
    taken = 0

    def take() -> Iterator[str]:
        nonlocal taken
        for text in texts:
            taken += len(text)
            report.show(taken / 1e6)
            yield text
            if taken >= TRAINING_BYTES:
                return

    tokenizer.train_from_iterator(take(), trainer)
    if not taken:
        raise ValueError("data.path: expected text, found none")
    missing = vocabulary - 1 - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(f"<unused{i}>", special=True) for i in range(missing)])
    tokenizer.add_special_tokens([AddedToken(MASK, special=True)])
    text: str = tokenizer.to_str()
    return text, missing


def save_tokenizer(text: str, folder: Path) -> None:
    """Writes `folder`/tokenizer.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, text)
