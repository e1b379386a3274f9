"""Byte-level BPE: ids, fillers, the published files, and what a text cannot do."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from support.sounds import write_text

from d2v.cli import main
from d2v.data.tokenizer import BytePairs, DocumentReader, save_tokenizer, train_tokenizer
from d2v.interop.tokenizer import convert_tokenizer, import_gpt2, write_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def test_special_tokens_stand_where_roberta_has_them(text: Path, tmp_path: Path) -> None:
    trained, unused = train_tokenizer(DocumentReader([text]), 300)
    assert unused == 0
    save_tokenizer(trained, tmp_path / "t")
    tokenizer = BytePairs(tmp_path / "t")
    assert tokenizer.vocabulary == 300
    assert tokenizer.mask_token == 299
    for sample in ("Kan sota!", "äöü ☃ 漢字 \x00\x7f", " two  spaces\n\tand a tab ", "<s> <mask> </s> <pad> <unk>"):
        (ids,) = tokenizer.encode([sample])
        assert all(4 <= i < 299 for i in ids), "a text never yields a special token"
        assert tokenizer.decode(ids) == sample
    assert train_tokenizer(DocumentReader([text]), 300)[0] == trained, "the same text, the same tokenizer"


def test_a_small_text_is_filled_up(tmp_path: Path) -> None:
    trained, unused = train_tokenizer(["aa bb aa bb"] * 4, 400)
    assert 100 < unused < 139
    save_tokenizer(trained, tmp_path / "t")
    tokenizer = BytePairs(tmp_path / "t")
    assert tokenizer.vocabulary == 400
    assert max(tokenizer.encode(["aa bb cc <unused0>"])[0]) < 400 - unused - 1
    with pytest.raises(ValueError, match="vocabulary: expected at least 261"):
        train_tokenizer(["a"], 260)
    with pytest.raises(ValueError, match="expected text, found none"):
        train_tokenizer([], 300)


def published(folder: Path) -> Path:
    """The three published files, in small: three merges, a dictionary in its own order that lacks a piece."""
    from tokenizers import pre_tokenizers

    folder.mkdir()
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["th", "the", "Ġthe", "<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\nĠ the\n", encoding="utf-8")
    numbers = [str(i) for i in reversed(range(len(pieces))) if pieces[i] != "z"]
    (folder / "dict.txt").write_text("".join(f"{n} 7\n" for n in [*numbers, "madeupword0000"]))
    return folder


def test_published_files_keep_the_ids_of_their_dictionary(tmp_path: Path) -> None:
    folder = published(tmp_path / "gpt2")
    save_tokenizer(import_gpt2(folder), tmp_path / "t")
    tokenizer = BytePairs(tmp_path / "t")
    assert tokenizer.vocabulary == 4 + 256 + 4 - 1 + 1 + 1
    pieces = json.loads((folder / "encoder.json").read_text())
    names = [line.split()[0] for line in (folder / "dict.txt").read_text().splitlines()]

    def expected(*parts: str) -> list[int]:
        return [4 + names.index(str(pieces[p])) for p in parts]

    assert tokenizer.encode(["the the th"]) == [expected("the", "Ġthe", "Ġ", "th")]
    assert tokenizer.encode(["azb"]) == [[*expected("a"), 3, *expected("b")]], "a piece without a line is unknown"
    assert tokenizer.decode(expected("the", "Ġthe")) == "the the"
    (folder / "dict.txt").unlink()
    with pytest.raises(ValueError, match=r"gpt2: expected .* no dict\.txt"):
        import_gpt2(folder)


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer: expected a folder with tokenizer\.json, found none"):
        BytePairs(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.tokenizer: cannot read"):
        BytePairs(tmp_path)
    from tokenizers import Tokenizer, models

    (tmp_path / "tokenizer.json").write_text(Tokenizer(models.BPE()).to_str())
    with pytest.raises(ValueError, match="expected <s> 0, <pad> 1"):
        BytePairs(tmp_path)


def test_the_command(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "t"
    command = ["data", "tokenizer", "--data.path", str(text), "--output", str(output), "--vocabulary", "280"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{output}: 280 tokens\n"
    assert main(command) == 2
    assert "output: expected an absent or empty folder" in capsys.readouterr().err
    assert main(["data", "tokenizer", "--output", str(tmp_path / "u")]) == 2
    assert "expected one of --data.path, --gpt2, --from, got none" in capsys.readouterr().err
    assert "tokens" in write_tokenizer(tmp_path / "g", None, vocabulary=0, gpt2=str(published(tmp_path / "gpt2")))
    assert [p.name for p in output.iterdir()] == ["tokenizer.json"]


def test_what_a_tokenizer_carries_from_its_last_use_is_switched_off(text: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    save_tokenizer(train_tokenizer(DocumentReader([text]), 300)[0], tmp_path / "plain")
    plain = BytePairs(tmp_path / "plain")
    long = ["many words of a sentence " * 20, "few"]
    digests = {plain.digest}
    for name in ("truncation", "padding", "dropout"):
        stored = Tokenizer.from_file(str(tmp_path / "plain" / "tokenizer.json"))
        if name == "truncation":
            stored.enable_truncation(max_length=8)
        elif name == "padding":
            stored.enable_padding(pad_id=1, pad_token="<pad>", length=4096)
        else:
            stored.model.dropout = 0.9
        (tmp_path / name).mkdir()
        stored.save(str(tmp_path / name / "tokenizer.json"))
        file = tmp_path / name / "tokenizer.json"
        file.write_bytes("\ufeff".encode() + file.read_bytes())
        tokenizer = BytePairs(tmp_path / name)
        assert tokenizer.encode(long) == plain.encode(long), name
        # Tokens that a cache has from before are not taken for those of now.
        assert tokenizer.digest != hashlib.sha256(file.read_bytes()).hexdigest()
        digests.add(tokenizer.digest)
    assert len(digests) == 4
    assert plain.digest == hashlib.sha256((tmp_path / "plain" / "tokenizer.json").read_bytes()).hexdigest()


# ---- made elsewhere ----------------------------------------------------------------------------------------------

WORDS = ["the cat sat on the mat, [MASK] and all", "a dog and another dog", "na\u00efve caf\u00e9"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def foreign(kind: str) -> Any:
    """A small tokenizer of a kind of model, with its special tokens where its makers usually have them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    quiet: dict[str, Any] = {"show_progress": False}
    if kind == "WordPiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=120, special_tokens=BERT, **quiet)
    elif kind == "Unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        names = ["<cls>", "<pad>", "<sep>", "<unk>", "<mask>", "<odd>"]
        trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=names, unk_token="<unk>", **quiet)
    elif kind == "WordLevel":
        made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=BERT[::-1], **quiet)
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        names = {"BPE": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "GPT-2": []}[kind]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=alphabet, **quiet)
    made.train_from_iterator(WORDS * 5, trainer)
    if kind == "GPT-2":
        made.add_special_tokens(["<|endoftext|>"])
        made.add_tokens(["caterpillar"])
    return made


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "WordLevel", "BPE", "GPT-2"])
def test_other_layouts_are_converted_and_nothing_else_changes(kind: str, tmp_path: Path) -> None:
    made, folder = foreign(kind), tmp_path / "made"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    if kind == "Unigram":  # names that nobody could guess
        (folder / "tokenizer_config.json").write_text('{"sep_token": {"content": "<odd>"}, "cls_token": "<sep>"}')
    with pytest.raises(ValueError, match="`d2v data tokenizer --from` makes it fit a new model"):
        BytePairs(folder)
    text, ids, added = convert_tokenizer(folder)
    save_tokenizer(text, tmp_path / "new")
    new = BytePairs(tmp_path / "new")
    made.encode_special_tokens = True
    for words in [*WORDS, "unseen caterpillar \u2603 zzz"]:
        got, want = new.encode([words])[0], made.encode(words, add_special_tokens=False).ids
        assert [ids[i] for i in got] == want
        assert new.decode(got) == made.decode(want)
    lacking = {"GPT-2": ["<s>", "<pad>", "<unk>", "<mask>"]}.get(kind, [])
    assert added == lacking
    assert new.vocabulary == len(ids) == made.get_vocab_size() + len(lacking)
    old = {
        "WordPiece": [2, 0, 3, 1, 4], "Unigram": [2, 1, 5, 3, 4], "WordLevel": [2, 4, 1, 3, 0], "BPE": [0, 1, 2, 3, 4],
        "GPT-2": [None, None, made.token_to_id("<|endoftext|>"), None, None],
    }  # fmt: skip
    assert [*ids[:4], ids[-1]] == old[kind]
    again, same, _ = convert_tokenizer(tmp_path / "new")
    assert json.loads(again) == json.loads(text)
    assert same == list(range(len(ids)))


def test_what_is_no_name_of_a_special_token_is_passed_over(tmp_path: Path) -> None:
    foreign("WordPiece").save(str(tmp_path / "tokenizer.json"))
    wanted = convert_tokenizer(tmp_path)
    odd = {"pad_token": {"content": ["x"]}, "mask_token": ["x"], "bos_token": {"lstrip": True}, "unk_token": 7}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(odd))
    assert convert_tokenizer(tmp_path) == wanted


def test_names_of_special_tokens_in_a_text_are_no_special_tokens(tmp_path: Path) -> None:
    for kind in ("WordPiece", "Unigram", "BPE"):
        foreign(kind).save(str(tmp_path / "tokenizer.json"))
        save_tokenizer(convert_tokenizer(tmp_path / "tokenizer.json")[0], tmp_path / kind)
        tokens = BytePairs(tmp_path / kind)
        ids = tokens.encode(["the <s> cat <mask> [PAD] </s>"])[0]
        assert not {0, 1, 2, tokens.mask_token} & set(ids)


def test_a_vocabulary_with_merges(text: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    save_tokenizer(train_tokenizer(DocumentReader([text]), 280)[0], tmp_path / "whole")
    whole = BytePairs(tmp_path / "whole")
    (tmp_path / "pair").mkdir()
    Tokenizer.from_file(str(tmp_path / "whole" / "tokenizer.json")).model.save(str(tmp_path / "pair"))
    summary = write_tokenizer(tmp_path / "new", None, vocabulary=0, source=str(tmp_path / "pair"))
    assert summary.startswith(f"{tmp_path / 'new'}: {whole.vocabulary} tokens, ")
    assert BytePairs(tmp_path / "new").encode(["words of a text"]) == whole.encode(["words of a text"])


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"from: expected tokenizer\.json, or a folder with it or with vocab\.json"):
        convert_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="from: cannot read"):
        convert_tokenizer(tmp_path)
    made = foreign("WordPiece")
    made.add_tokens(["<pad>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    with pytest.raises(ValueError, match=r"from: expected one token a role, got <pad> beside '\[PAD\]'"):
        convert_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text("[1]")
    with pytest.raises(ValueError, match="from: "):
        convert_tokenizer(tmp_path)
