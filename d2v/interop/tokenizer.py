"""Writes tokenizers: trained, or made elsewhere and given the layout of ids that text models have here, RoBERTa's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d2v.data.sources import check_output, for_example, read_text_file
from d2v.data.tokenizer import (
    FILE,
    MASK,
    SPECIALS,
    BytePairs,
    DocumentReader,
    find_texts,
    save_tokenizer,
    train_tokenizer,
)
from d2v.folder import load_json

_ROLES = {
    "<s>": ("cls_token", "bos_token", "<s>", "[CLS]", "<cls>", "<bos>", "[BOS]", "<|begin_of_text|>"),
    "<pad>": ("pad_token", "<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "</s>": ("sep_token", "eos_token", "</s>", "[SEP]", "<sep>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>"),
    "<unk>": ("unk_token", "<unk>", "[UNK]", "<|unk|>"),
    MASK: ("mask_token", MASK, "[MASK]", "<|mask|>"),
}
"""What a token is here: its names in `tokenizer_config.json` and `special_tokens_map.json`, then usual contents."""


def write_tokenizer(
    output: Path, path: str | None, *, vocabulary: int, gpt2: str | None = None, source: str | None = None
) -> str:
    """Trains a tokenizer on the text at `path`, imports the published files in `gpt2` or converts the one in `source`;
    returns a summary.

    Raises:
        ValueError: not one of the three is given, no text, an `output` that is not empty.
    """
    given = {"--data.path": path, "--gpt2": gpt2, "--from": source}
    if sum(value is not None for value in given.values()) != 1:
        names = " and ".join(name for name, value in given.items() if value is not None)
        raise ValueError(f"data.path: expected one of {', '.join(given)}, got {names or 'none'}")
    check_output(output)
    note = ""
    if gpt2 is not None:
        text = import_gpt2(Path(gpt2))
    elif source is not None:
        text, ids, added = convert_tokenizer(Path(source))
        moved = sum(old not in (new, None) for new, old in enumerate(ids))
        note = f", {moved} of them with another id than before"
        note += f"; added {', '.join(added)}, which it lacked" if added else ""
    else:
        reader = DocumentReader(find_texts(path or "", "data.path"))
        text, unused = train_tokenizer(reader, vocabulary)
        note = f", {unused} of them never occur" if unused else ""
        if reader.rejected:
            note += f"; left out {len(reader.rejected)}{for_example(reader.rejected)}"
    save_tokenizer(text, output)
    return f"{output}: {BytePairs(output, 'output').vocabulary} tokens{note}"


def convert_tokenizer(source: Path, option: str = "from") -> tuple[str, list[int | None], list[str]]:
    """A tokenizer with its special tokens where RoBERTa has them; nothing else about it changes.

    Args:
        source: `tokenizer.json`, a folder with it, or a folder with `vocab.json` and `merges.txt` (byte-level BPE).
            `tokenizer_config.json` and `special_tokens_map.json` beside them say which token is which, else usual
            names.
        option: what messages begin with.

    Returns:
        text: JSON of the tokenizer.
        ids: for every new id the old one, None for a token that had to be added.
        added: names of the added tokens.

    Raises:
        ValueError: no such files, or not what they should be.
    """
    folder = source if source.is_dir() else source.parent
    spec = _read(source, option)
    old: dict[str, int] = {t["content"]: t["id"] for t in spec["added_tokens"]} | _vocabulary(spec["model"])
    roles = _find_roles(folder, spec["model"], old, option)
    others = [piece for piece in sorted(old, key=old.__getitem__) if piece not in roles.values()]
    if taken := sorted({*SPECIALS, MASK} & set(others)):
        raise ValueError(f"{option}: expected one token a role, got {taken[0]} beside {roles[taken[0]]!r}")
    order = [*SPECIALS, *others, MASK]
    _rewrite(spec, roles, {piece: i for i, piece in enumerate(order)})
    added = [name for name in (*SPECIALS, MASK) if name not in roles]
    return json.dumps(spec, ensure_ascii=False), [old.get(roles.get(piece, piece)) for piece in order], added


def _read(source: Path, option: str) -> dict[str, Any]:
    """The parsed JSON of a tokenizer that the library can read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    file = source / FILE if source.is_dir() else source
    pair = [source / name for name in ("vocab.json", "merges.txt")]
    if not file.is_file() and not all(f.is_file() for f in pair):
        places = f"{FILE}, or a folder with it or with vocab.json and merges.txt"
        raise ValueError(f"{option}: expected {places}, got {str(source)!r}")
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_str(read_text_file(file))
        else:
            tokenizer = Tokenizer(models.BPE.from_file(*map(str, pair)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{option}: cannot read {str(source)!r}: {error}") from None
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    if spec["model"]["type"] not in ("BPE", "WordPiece", "WordLevel", "Unigram"):
        raise ValueError(f"{option}: expected BPE, WordPiece, WordLevel or Unigram, got {spec['model']['type']}")
    return spec


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    """Pieces of a model with their ids."""
    pieces = model["vocab"]
    return {piece: i for i, (piece, _) in enumerate(pieces)} if isinstance(pieces, list) else dict(pieces)


def _find_roles(folder: Path, model: dict[str, Any], pieces: dict[str, int], option: str) -> dict[str, str]:
    """For each of our special tokens the piece that plays its part, where there is one; each piece plays one part."""
    given: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                given |= load_json(folder / name)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{option}: {error}") from None
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    roles: dict[str, str] = {} if unknown is None else {"<unk>": unknown}
    for role in (MASK, "<pad>", "</s>", "<s>", "<unk>"):  # one token for both ends is the end
        named = [given.get(n) if n.endswith("_token") else n for n in _ROLES[role]]
        contents = [n.get("content") if isinstance(n, dict) else n for n in named]
        found = next((n for n in contents if isinstance(n, str) and n in pieces and n not in roles.values()), None)
        if found is not None:
            roles.setdefault(role, found)
    return roles


def _rewrite(spec: dict[str, Any], roles: dict[str, str], ids: dict[str, int]) -> None:
    """Gives a tokenizer's JSON other ids, and its special tokens our names."""
    names = {piece: role for role, piece in roles.items()}
    plain = [t for t in spec["added_tokens"] if t["content"] not in names]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [{"id": ids[n], "content": n, "special": True, **flags} for n in (*SPECIALS, MASK)]
    spec["added_tokens"] = sorted([*({**t, "id": ids[t["content"]]} for t in plain), *special], key=lambda t: t["id"])
    model, sides = spec["model"], {"sep": ["</s>", ids["</s>"]], "cls": ["<s>", ids["<s>"]]}
    spec["post_processor"] = {"type": "RobertaProcessing", **sides, "trim_offsets": True, "add_prefix_space": False}
    if isinstance(model["vocab"], list):
        scores = {names.get(piece, piece): score for piece, score in model["vocab"]}
        model["vocab"] = [[piece, scores.get(piece, 0.0)] for piece in ids]
        model["unk_id"] = ids["<unk>"]
        return
    model["vocab"] = ids
    if model.get("unk_token") is not None or model["type"] != "BPE":
        model["unk_token"] = "<unk>"


# ---- the published one ---------------------------------------------------------------------------------------------


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
            texts[name] = read_text_file(folder / name)
        except (OSError, ValueError):
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
