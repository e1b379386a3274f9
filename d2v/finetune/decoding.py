"""Transcripts from the outputs of CTC: the best label of each frame, or a beam search with a language model.

The beam search is flashlight-text's (pip install flashlight-text), as in the published evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2v.config.finetune import Decoding
from d2v.data.sources import read_text_file
from d2v.finetune.spelling import SPECIALS, Spelling


class Answer(NamedTuple):
    """Prediction of one sample."""

    value: Any
    """Class number, probabilities (K,) of labels, number or transcript."""
    confidence: float
    """Probability of the class, or of the most probable label; transcripts: mean log-probability of the best labels;
    numbers: nan."""
    path: Sequence[int] = ()
    """Transcripts: the label of each frame."""


class Word(NamedTuple):
    """A word of a transcript."""

    text: str
    first: int
    """Frame of its first letter."""
    last: int
    """Frame behind its last letter."""


def find_words(path: Sequence[int], spelling: Spelling, blank: int) -> list[Word]:
    """The words that the labels of frames spell, and where."""
    groups: list[list[tuple[int, int]]] = [[]]
    for frame, label in enumerate(path):
        again = frame > 0 and path[frame - 1] == label
        if label != blank and not again and spelling.starts_word(label):
            groups.append([])
        if label != blank and not (again and not groups[-1]):
            groups[-1].append((frame, label))
    words = []
    for group in groups:
        labels = [label for i, (frame, label) in enumerate(group) if not i or group[i - 1] != (frame - 1, label)]
        frames = [frame for frame, label in group if spelling.decode([label])]
        if frames and (text := spelling.decode(labels)):
            words.append(Word(text, frames[0], frames[-1] + 1))
    return words


def find_seam(before: Tensor, behind: Tensor, blank: int) -> int:
    """Where the outputs of two pieces of a recording are joined, such that no label is lost or doubled: a place near
    the middle at which both have the same best labels to both sides, blanks if possible.

    Args:
        before, behind: (W,K) of the same frames, of the first and of the second piece.

    Returns:
        The first of the W frames that is the second piece's.
    """
    if len(before) < 2:
        return len(before) // 2
    a, b = before.argmax(-1), behind.argmax(-1)
    cost = (a != b)[1:].double() + (a != b)[:-1] + 0.5 * ((a[:-1] != blank) | (b[1:] != blank))
    middle = torch.arange(1, len(a)) - len(a) / 2
    return 1 + int((cost + 0.1 * middle.abs() / len(a)).argmin())


def read_logits(logits: Tensor, frames: int | None, task: str, decoder: Decoder | None) -> Answer:
    """Prediction of one sample.

    Args:
        logits: (K,), or (T,K) of CTC, on the host.
        frames: CTC: valid frames.
        task: of the head.
        decoder: of CTC.
    """
    if decoder is not None:
        log_p = logits[:frames].log_softmax(-1)
        text, path = decoder.search(log_p)
        return Answer(text, float(log_p.max(-1).values.mean()), path)
    if task == "regression":
        return Answer(float(logits[0]), math.nan)
    if task == "multi-label":
        each = logits.float().sigmoid()
        return Answer(each.numpy(), float(each.max()))
    probabilities = logits.softmax(-1)
    best = int(probabilities.argmax())
    return Answer(best, float(probabilities[best]))


class Decoder:
    """Finds transcripts in outputs of CTC."""

    def __init__(self, settings: Decoding, spelling: Spelling, blank: int) -> None:
        """Raises `ValueError` for settings that do not go together, or a library or file that is not there."""
        self.settings, self.spelling, self.blank = settings, spelling, blank
        self._search: _Search | None = None
        if settings.beam < 1:
            raise ValueError(f"decode.beam: expected 1 or more, got {settings.beam}")
        if settings.method == "greedy" and (settings.lm is not None or settings.lexicon is not None):
            raise ValueError("decode.lm: expected --decode.method beam with a language model or lexicon, got greedy")
        if settings.method == "beam":
            self._search = _make_search(settings, spelling, blank)

    def decode(self, log_probabilities: Tensor) -> str:
        """Transcript of one utterance from (T,K) log-probabilities of its valid frames."""
        return self.search(log_probabilities)[0]

    def search(self, log_probabilities: Tensor) -> tuple[str, list[int]]:
        """The same, and the label (or blank) of each frame in its best alignment."""
        path: list[int] = log_probabilities.argmax(dim=-1).tolist()
        if self._search is not None:
            emissions = log_probabilities.float().cpu().contiguous()
            best = self._search.decoder.decode(emissions.data_ptr(), *emissions.shape)[0]
            path = list(best.tokens[1:-1])  # between the silence that it puts before and behind
            if self.settings.lexicon is not None:
                return " ".join(self._search.words[i] for i in best.words if i >= 0), path
        labels = [i for n, i in enumerate(path) if i not in (self.blank, -1) and (n == 0 or i != path[n - 1])]
        return self.spelling.decode(labels), path


def _import_library() -> tuple[Any, Any, Any]:
    try:
        from flashlight.lib.text import decoder, dictionary
        from flashlight.lib.text.decoder import kenlm
    except ImportError as error:
        raise ValueError(
            f"decode.method: expected flashlight-text for beam (pip install flashlight-text), got {error}"
        ) from None
    return decoder, dictionary, kenlm


class _Search(NamedTuple):
    """A decoder of the library with what it must not outlive."""

    decoder: Any
    words: list[str]
    kept: tuple[Any, ...]


def _make_search(settings: Decoding, spelling: Spelling, blank: int) -> _Search:
    library, dictionary, kenlm = _import_library()
    labels = spelling.labels
    common = {
        "beam_size": settings.beam, "beam_size_token": min(len(labels), 100), "beam_threshold": 50.0,
        "sil_score": settings.space_score, "log_add": True, "criterion_type": library.CriterionType.CTC,
    }  # fmt: skip
    if settings.lexicon is None:
        if settings.lm is not None:
            raise ValueError("decode.lexicon: expected a file of words with --decode.lm, got nothing")
        options = library.LexiconFreeDecoderOptions(lm_weight=0.0, **common)
        model = library.ZeroLM()
        return _Search(library.LexiconFreeDecoder(options, model, spelling.space, blank, []), [], (model,))
    words = read_words(settings.lexicon)
    spelled = [(word, spelling.encode(word)) for word in words if not spelling.unknown(word)]
    spelled = [(word, ids) for word, ids in spelled if ids]
    if not spelled:
        raise ValueError(f"decode.lexicon: expected words that the model can spell, got none in {settings.lexicon!r}")
    names = dictionary.Dictionary()
    for word, _ in spelled:
        names.add_entry(word)
    names.add_entry("<unk>")
    model = library.ZeroLM()
    if settings.lm is not None:
        if not Path(settings.lm).is_file():
            raise ValueError(f"decode.lm: expected a KenLM file, found none at {settings.lm!r}")
        try:
            model = kenlm.KenLM(settings.lm, names)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"decode.lm: expected a KenLM file, got {settings.lm!r}: {reason}") from None
    trie = library.Trie(len(labels), spelling.space)
    start = model.start(False)
    for word, ids in spelled:
        index = names.get_index(word)
        _, score = model.score(start, index)
        trie.insert(ids, index, score)
    trie.smear(library.SmearingMode.MAX)
    options = library.LexiconDecoderOptions(
        lm_weight=settings.lm_weight if settings.lm is not None else 0.0, word_score=settings.word_score,
        unk_score=-float("inf"), **common,
    )  # fmt: skip
    unknown = names.get_index("<unk>")
    search = library.LexiconDecoder(options, trie, model, spelling.space, blank, unknown, [], False)
    return _Search(search, [word for word, _ in spelled], (trie, model, names))


def read_words(path: str) -> list[str]:
    """Words of a file, one a line, each once; `ValueError` where there are none."""
    try:
        lines = read_text_file(Path(path)).split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"decode.lexicon: expected a text file with a word a line, got {path!r}: {error}") from None
    words = list(dict.fromkeys(w for line in lines if (w := line.strip()) and w not in SPECIALS))
    if any(" " in word or "\t" in word for word in words) or not words:
        raise ValueError(f"decode.lexicon: expected a word a line in {path!r}, got {words[:1]}")
    return words
