"""Transcripts as sequences of labels and back: letters as the published speech recognisers have them, or byte pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from d2v.data.tokenizer import FILE, BytePairs

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
"""First labels of a published dictionary; `<s>` is the blank of CTC, the others are never spelled with."""
SPACE = "|"
"""Stands between words."""


CASES: dict[str, Callable[[str], str]] = {"lower": str.lower, "upper": str.upper, "keep": str}


def normalise_transcript(text: str, case: str) -> str:
    """Words separated by single spaces; `case`: lower, upper or keep."""
    return CASES[case](" ".join(text.split()))


class Letters:
    """A label for each character; `|` between words and at the end, as published."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self._ids = {label: i for i, label in enumerate(self.labels) if label not in SPECIALS}

    @staticmethod
    def learn(texts: Iterable[str]) -> Letters:
        """The characters of transcripts, the most frequent ones first."""
        counts = Counter(character for text in texts for character in text if character != " ")
        del counts[SPACE]
        letters = sorted(counts, key=lambda c: (-counts[c], c))
        return Letters([*SPECIALS, SPACE, *letters])

    def unknown(self, text: str) -> str:
        """Characters of a transcript that have no label."""
        return "".join(sorted({c for c in text if c != " " and (c not in self._ids or c == SPACE)}))

    def encode(self, text: str) -> list[int]:
        """Labels of a transcript; characters without one are left out."""
        kept = " ".join("".join(c for c in text if c == " " or (c in self._ids and c != SPACE)).split())
        return [self._ids[SPACE if c == " " else c] for c in f"{kept} "] if kept else []

    def decode(self, ids: Sequence[int]) -> str:
        """Text of labels; special ones are left out."""
        text = "".join(label for label in (self.labels[i] for i in ids) if label not in SPECIALS)
        return " ".join(text.replace(SPACE, " ").split())

    def starts_word(self, label: int) -> bool:
        """Whether a word begins at a label, or behind it."""
        return self.labels[label] == SPACE

    @property
    def case(self) -> str:
        """Case of the letters, for transcripts to be compared with."""
        letters = "".join(label for label in self.labels if label not in SPECIALS)
        return "upper" if letters == letters.upper() != letters.lower() else "keep"

    @property
    def space(self) -> int:
        """Label between words; the blank where there is none."""
        return self._ids.get(SPACE, 0)


class Pieces:
    """The tokens of a byte-level byte-pair encoding; `<s>` is the blank."""

    def __init__(self, labels: Sequence[str], folder: str | None = None) -> None:
        """`folder`: of the tokenizer, to encode; decoding needs the labels alone."""
        self.labels, self._folder = tuple(labels), folder
        self._tokenizer: BytePairs | None = None

    @staticmethod
    def read(folder: str) -> Pieces:
        """Of a tokenizer folder; `ValueError` where there is none."""
        from tokenizers import Tokenizer

        size = BytePairs(Path(folder), "task.bpe").vocabulary
        tokenizer = Tokenizer.from_file(str(Path(folder) / FILE))
        return Pieces([tokenizer.id_to_token(i) or "" for i in range(size)], folder)

    def unknown(self, text: str) -> str:
        """Nothing: every byte has a token."""
        return ""

    def encode(self, text: str) -> list[int]:
        """Tokens of a transcript."""
        if self._tokenizer is None:
            if self._folder is None:
                raise ValueError("task.bpe: expected the folder of the tokenizer, got nothing")
            self._tokenizer = BytePairs(Path(self._folder), "task.bpe")
        return self._tokenizer.encode([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; special ones are left out."""
        from tokenizers.decoders import ByteLevel

        pieces = [label for label in (self.labels[i] for i in ids) if label not in (*SPECIALS, "<mask>")]
        return " ".join(str(ByteLevel().decode(pieces)).split())

    def starts_word(self, label: int) -> bool:
        """Whether a word begins at a label."""
        return self.labels[label].startswith("Ġ")

    @property
    def space(self) -> int:
        """The blank: tokens hold their spaces."""
        return 0


Spelling = Letters | Pieces


def spelling_of(units: str, labels: Sequence[str], folder: str | None = None) -> Spelling:
    """The spelling that a model was trained with."""
    return Pieces(labels, folder) if units == "bpe" else Letters(labels)
