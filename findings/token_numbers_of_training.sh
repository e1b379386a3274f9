#!/bin/sh
# tokenizers 0.23.3: training on one text twice gives the tokens other numbers.
#
# Seen here, on 300 lines, five trainings in one process on one thread:
#   WordPiece, Unigram, and BPE with a prefix for continued words ("##"): one set of tokens, but numbers that differ, so
#   that the ids of the first line differ each time, and embeddings trained with one file do not fit the other;
#   BPE without such a prefix: the same numbers each time.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" tokenizers==0.23.3
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import os

os.environ["RAYON_NUM_THREADS"] = "1"
import json
import sys

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

LINES = [f"the cat sat on the mat and the dog ran away from the cat {i % 17}" for i in range(300)]
PLAIN = {"vocab_size": 60, "show_progress": False}


def train(kind: str) -> Tokenizer:
    made = {
        "WordPiece": lambda: (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(**PLAIN)),
        "Unigram": lambda: (models.Unigram(), trainers.UnigramTrainer(special_tokens=["[UNK]"], unk_token="[UNK]", **PLAIN)),
        "BPE with ##": lambda: (
            models.BPE(continuing_subword_prefix="##"), trainers.BpeTrainer(continuing_subword_prefix="##", **PLAIN)
        ),
        "BPE": lambda: (models.BPE(), trainers.BpeTrainer(**PLAIN)),
    }
    model, trainer = made[kind]()
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


print(f"tokenizers {tokenizers.__version__}")
found = {}
for kind in ("WordPiece", "Unigram", "BPE with ##", "BPE"):
    trained = [train(kind) for _ in range(5)]
    sets = len({tuple(sorted(t.get_vocab())) for t in trained})
    numbers = len({json.dumps(t.get_vocab(), sort_keys=True) for t in trained})
    ids = len({tuple(t.encode(LINES[0]).ids) for t in trained})
    found[kind] = (sets, numbers > 1, ids > 1)
    print(f"{kind}: sets of tokens {sets}, numberings {numbers}, ids of the first line {ids}")
same = found == {
    "WordPiece": (1, True, True), "Unigram": (1, True, True), "BPE with ##": (1, True, True), "BPE": (1, False, False)
}
print("as stated" if same else "changed")
sys.exit(not same)
PY
