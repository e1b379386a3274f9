"""`d2v import` and `d2v export`: checkpoints of other programs in, ours out."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import torch

from d2v.config.finetune import read_config
from d2v.data.sources import read_text_file
from d2v.data.tokenizer import FILE as TOKENIZER_FILE
from d2v.data.tokenizer import BytePairs, save_tokenizer
from d2v.files import write_atomically
from d2v.folder import CONFIG, find_checkpoint, load_json
from d2v.interop import fairseq, huggingface
from d2v.interop.program import make_program, save_program
from d2v.interop.tokenizer import convert_tokenizer
from d2v.model.data2vec import Data2Vec
from d2v.model.finetuned import FineTuned
from d2v.model.saving import ORIGIN, Origin, write_folder
from d2v.saved import find_tokenizer, load_any

FORMATS = ("safetensors", "huggingface", "fairseq", "program", "onnx")
LICENCES = """Published weights have the licence of their source, not of this project. fairseq states the MIT licence
for its code and says that it applies to its pre-trained models as well; model cards of other sources state their own.
Read it before you use or pass on what was imported."""


def import_checkpoint(source: str, output: str) -> str:
    """Reads a fairseq file or a transformers folder and writes an exported folder; returns a summary.

    Raises `ValueError` or `NotImplementedError` for what cannot be read, before anything is written.
    """
    path, folder = Path(source), _new_folder(output)
    if not path.exists():
        raise ValueError(f"from: expected a checkpoint file or a transformers folder, found none at {source!r}")
    model = huggingface.load(path) if path.is_dir() else fairseq.load(path)
    encoder = _encoder_of(model)
    tokenizer, note = _take_tokenizer(path, model) if encoder.config.stem.modality == "text" else (None, "")
    write_folder(model, folder)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder / "tokenizer")
    count = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    stem = model.config.stem
    head = ""
    if isinstance(model, FineTuned):
        settings = model.head.settings
        shown = ", ".join(model.labels[:6]) + (", ..." if len(model.labels) > 6 else "")
        head = f", fine-tuned: {settings.task}, {settings.outputs} outputs ({shown})"
    return (
        f"{folder}: data2vec {model.config.version}.0, {stem.modality}, {count / 1e6:.1f} M parameters of the student"
        f"{head}{note}\n{LICENCES}"
    )


def _take_tokenizer(source: Path, model: Data2Vec | FineTuned) -> tuple[str | None, str]:
    """The tokenizer of a foreign model, where it can be taken along, and a note about it.

    Where it has its special tokens at other ids than ours, it gets ours, and the model's embeddings go with them.
    """
    folder = source if source.is_dir() else source.parent
    hint = "`d2v data tokenizer --help` says how to make one, to be put into the folder's tokenizer/."
    if not (folder / TOKENIZER_FILE).is_file():
        return None, f"\nText needs its tokenizer, and there is no {TOKENIZER_FILE} beside the weights: {hint}"
    encoder = _encoder_of(model)
    embedding = encoder.stem.embed_tokens
    assert isinstance(embedding, torch.nn.Embedding)
    try:
        with contextlib.suppress(ValueError):
            if BytePairs(folder, "from").vocabulary == embedding.num_embeddings:
                return read_text_file(folder / TOKENIZER_FILE), "\nIts tokenizer is in the folder, too."
        text, ids, added = convert_tokenizer(folder)
        if added or len(ids) != embedding.num_embeddings or isinstance(model, FineTuned):
            what = f"{len(ids)} tokens for {embedding.num_embeddings} embeddings, {len(added)} of them new"
            raise ValueError(f"from: expected special tokens at RoBERTa's ids for such a model, got others and {what}")
    except ValueError as error:
        return None, f"\nThe tokenizer was not taken along: {error}; {hint}"
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("stem.embed_tokens.weight"):  # the teacher may average the stem, too
                parameter.copy_(parameter[torch.tensor(ids)])
    return text, "\nIts tokenizer is in the folder, too, with RoBERTa's special ids; embeddings moved with them."


def export_checkpoint(checkpoint: str, format: str, output: str) -> str:
    """Writes the model of a checkpoint in another format; returns a summary.

    safetensors: a folder with config and a loading example. huggingface: a folder for transformers (1.0). fairseq: a
    file, or `model.pt` in a folder where `output` has no suffix .pt. program, onnx: the encoder with the averaged
    weights as `encoder.pt2` (`torch.export.load`) or `encoder.onnx` beside `config.json`.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    model = _load_with_origin(checkpoint)
    if format == "fairseq":
        path = Path(output) if output.endswith(".pt") else _new_folder(output) / "model.pt"
        if path.exists():
            raise ValueError(f"output: expected a new file, got {str(path)!r}, which exists")
        return f"{fairseq.save(model, path)}: fairseq checkpoint"
    folder = _new_folder(output)
    tokenizer = _find_tokenizer(checkpoint) if model.config.stem.modality == "text" else None
    if format == "huggingface":
        huggingface.save(model, folder)
        if tokenizer is not None:
            shutil.copyfile(Path(tokenizer) / TOKENIZER_FILE, folder / TOKENIZER_FILE)
        return f"{folder}: transformers folder"
    if format in ("program", "onnx"):
        encoder, file = _encoder_of(model), folder / f"encoder.{'pt2' if format == 'program' else 'onnx'}"
        program = make_program(encoder)
        folder.mkdir(parents=True, exist_ok=True)
        save_program(program, file)
        write_atomically(folder / CONFIG, encoder.config.to_json())
        done = f"{file}: features (B,T,C) of inputs, as `d2v features` has them without a pool"
    else:
        write_folder(model, folder)
        done = f"{folder}: safetensors with {CONFIG} and README.md, which shows how to load them"
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / "tokenizer")
    return done


def _encoder_of(model: Data2Vec | FineTuned) -> Data2Vec:
    return model.encoder if isinstance(model, FineTuned) else model


def _new_folder(output: str) -> Path:
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output: expected an absent or empty folder, got {output!r}")
    return folder


def _find_tokenizer(checkpoint: str) -> str | None:
    folder = find_checkpoint(checkpoint)
    try:
        return find_tokenizer(folder, read_config(folder / CONFIG))
    except ValueError:
        return None  # an imported model that nobody gave one


def _load_with_origin(checkpoint: str) -> Data2Vec | FineTuned:
    model, _, _ = load_any(checkpoint, "cpu", takes_data=False)
    file = find_checkpoint(checkpoint) / ORIGIN
    if file.is_file():
        value = load_json(file)
        dtypes = {name: getattr(torch, dtype) for name, dtype in value["dtypes"].items()}
        model.origin = Origin(value["config"], dtypes, tuple(value["heads"]), value.get("key", "model"))
    return model
