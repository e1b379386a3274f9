"""data2vec 1.0 models in the format of transformers (Data2VecAudio, Data2VecText, Data2VecVision), in and out."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v.files import write_atomically
from d2v.finetune.spelling import SPACE
from d2v.folder import copy_into
from d2v.interop import fairseq
from d2v.interop.fairseq.names import family_of
from d2v.interop.huggingface.config import (
    FAMILIES,
    PREPROCESSOR,
    TOKENIZER_CONFIG,
    compare_inputs,
    describe_inputs,
    read_config,
    write_config,
)
from d2v.interop.huggingface.heads import choose_model, describe_head, find_model, name_tensors, read_head, read_labels
from d2v.interop.renaming import Pairs, renamed, reverse
from d2v.interop.torch_file import check_weights, check_whole, read_torch_file, strip_wrappers
from d2v.model.data2vec import Data2Vec, strip_pretraining
from d2v.model.finetuned import FineTuned
from d2v.model.task_heads import make_head

PREFIXES = {"d2v1_audio": "data2vec_audio.", "d2v1_text": "data2vec_text.", "d2v1_vision": "data2vec_vision."}
"""What checkpoints of task models put before the encoder's names."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TEXT = "encoder.sentence_encoder."
_QKV = {"query": 0, "key": 1, "value": 2}


def _layers(theirs: str, published: str, *names: tuple[str, str]) -> Pairs:
    return tuple((f"{theirs}.#.{a}.*", f"{published}.#.{b}.*") for a, b in names)


NAMES: dict[str, Pairs] = {
    "d2v1_audio": (
        ("masked_spec_embed", "mask_emb"),
        ("feature_extractor.conv_layers.#.conv.*", "feature_extractor.conv_layers.#.0.*"),
        ("feature_extractor.conv_layers.#.layer_norm.*", "feature_extractor.conv_layers.#.2.1.*"),
        ("feature_projection.layer_norm.*", "layer_norm.*"),
        ("feature_projection.projection.*", "post_extract_proj.*"),
        ("encoder.pos_conv_embed.layers.#.conv.*", "encoder.pos_conv.#.0.*"),
        *_layers(
            "encoder.layers", "encoder.layers", ("attention", "self_attn"), ("feed_forward.intermediate_dense", "fc1"),
            ("feed_forward.output_dense", "fc2"), ("layer_norm", "self_attn_layer_norm"),
            ("final_layer_norm", "final_layer_norm"),
        ),
        ("encoder.layer_norm.*", "encoder.layer_norm.*"),
    ),
    "d2v1_text": (
        ("embeddings.LayerNorm.*", _TEXT + "layernorm_embedding.*"),
        ("embeddings.position_embeddings.*", _TEXT + "embed_positions.*"),
        ("embeddings.word_embeddings.*", _TEXT + "embed_tokens.*"),
        *_layers(
            "encoder.layer", _TEXT + "layers", *((f"attention.self.{n}", f"self_attn.{n[0]}_proj") for n in _QKV),
            ("attention.output.dense", "self_attn.out_proj"), ("intermediate.dense", "fc1"), ("output.dense", "fc2"),
            ("attention.output.LayerNorm", "self_attn_layer_norm"), ("output.LayerNorm", "final_layer_norm"),
        ),
    ),
    "d2v1_vision": (
        ("embeddings.cls_token", "cls_emb"),
        ("embeddings.mask_token", "mask_emb"),
        ("embeddings.patch_embeddings.projection.*", "patch_embed.conv.*"),
        (
            "encoder.relative_position_bias.relative_position_bias_table",
            "encoder.rel_pos_bias.relative_position_bias_table",
        ),
        *((f"encoder.layer.#.attention.attention.{n}.weight", "encoder.blocks.#.attn.qkv.weight") for n in _QKV),
        ("encoder.layer.#.attention.attention.query.bias", "encoder.blocks.#.attn.q_bias"),
        ("encoder.layer.#.attention.attention.value.bias", "encoder.blocks.#.attn.v_bias"),
        *_layers(
            "encoder.layer", "encoder.blocks", ("attention.output.dense", "attn.proj"),
            ("intermediate.dense", "mlp.0"), ("output.dense", "mlp.2"), ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
        ),
        ("encoder.layer.#.lambda_#", "encoder.blocks.#.gamma_#"),
        ("pooler.layernorm.*", "encoder.norm.*"),
    ),
}  # fmt: skip
"""Names of transformers to the published ones."""
_NOT_LOADED = {
    "d2v1_audio": r"(adapter|lm_head|classifier|projector)\..*",
    "d2v1_text": r"(pooler|lm_head|classifier|qa_outputs)\..*|embeddings\.(position_ids|token_type_ids)",
    "d2v1_vision": r"classifier\..*|.*\.relative_position_index",
}
"""Heads, and tables that follow from the configuration."""


def load(folder: str | Path) -> Data2Vec | FineTuned:
    """The encoder of a transformers folder (`config.json` and weights), or, of a task model, a `FineTuned`.

    Weights: `model.safetensors`, its shards with `model.safetensors.index.json`, or `pytorch_model.bin`, of which
    nothing is executed.

    Heads of a folder whose `architectures` name no task model are left out, with a warning that names them; the
    pre-training head, which the format does not have, starts at random. Padding is treated as transformers does
    ("positions-see-padding"). Labels are those of `id2label`, or of the `vocab.json` of a CTC tokenizer.

    Raises:
        ValueError: files or tensors missing, damaged, unexpected, misshapen or not finite. NotImplementedError: an
            option or a task model that is not built.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"checkpoint: expected config.json in {str(folder)!r}, found none")
    given = _read_json(folder / "config.json")
    family, config = read_config(given)
    task = find_model(given)
    if (folder / PREPROCESSOR).is_file() and (odd := compare_inputs(config, _load_json(folder / PREPROCESSOR))):
        warnings.warn(
            f"checkpoint {str(folder)!r}: {PREPROCESSOR}: {odd}; d2v prepares inputs its own way", stacklevel=2
        )
    tensors = _read_tensors(folder, PREFIXES[family])
    with torch.random.fork_rng(devices=[]):
        model = Data2Vec(config)
    if task is None:
        _fill(model, family, tensors, str(folder))
        model.teacher.copy_student()
        return model
    settings, own = read_head(task, given, tensors)
    strip_pretraining(model)
    if family == "d2v1_vision" and "embeddings.mask_token" not in tensors:
        model.mask_token = None
    head = make_head(settings, config.encoder.width)
    fine_tuned = FineTuned(model, head, read_labels(folder, given, settings))
    _fill(model, family, tensors, str(folder))
    copy_into(head.state_dict(), own, f"checkpoint {str(folder)!r}: head")
    for name, tensor in own.items():
        check_weights(tensor, f"checkpoint {str(folder)!r}: head: {name}")
    return fine_tuned


def save(model: Data2Vec | FineTuned, folder: str | Path) -> Path:
    """Writes the student's encoder as `AutoModel.from_pretrained` reads it, or a fine-tuned model as its task class
    does; returns the folder.

    The format has no pre-training head and no teacher: they are not written. transformers lets convolutional positions
    of speech see padded frames, whatever the model was trained with, of which a warning tells. The labels of CTC go to
    `vocab.json`; what the Auto classes prepare inputs by to `preprocessor_config.json` and `tokenizer_config.json`.

    Raises:
        NotImplementedError: data2vec 2.0, or a variant that transformers has no model for.
    """
    if model.config.version != 1:
        raise NotImplementedError(
            "format huggingface: expected a data2vec 1.0 model, got 2.0, which transformers lacks"
        )
    encoder = model.encoder if isinstance(model, FineTuned) else model
    family, folder = family_of(encoder), Path(folder)
    description = write_config(model.config)
    if family == "d2v1_audio" and "positions-see-padding" not in model.config.published:
        warnings.warn(
            "format huggingface: in transformers the features of a recording change with the padding of its batch, as "
            "this model was not trained; to get those of d2v, give it recordings of one length or one at a time",
            stacklevel=2,
        )
    from safetensors.torch import save as to_bytes

    tensors, files = _name_tensors(encoder, family), describe_inputs(model.config)
    if isinstance(model, FineTuned):
        description, tensors = _add_head(model, family, description, tensors)
        if model.head.settings.task == "ctc":
            files |= _describe_labels(model.labels, model.head.settings.blank)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "model.safetensors", to_bytes(tensors, metadata={"format": "pt"}))
    for name, content in {**files, "config.json": description}.items():
        write_atomically(folder / name, json.dumps(content, indent=2) + "\n")
    return folder


def _describe_labels(labels: Sequence[str], blank: int) -> dict[str, dict[str, Any]]:
    """Files with the labels of CTC, and, where these are letters, their tokenizer."""
    files: dict[str, dict[str, Any]] = {"vocab.json": {label: i for i, label in enumerate(labels)}}
    if SPACE in labels:
        files[TOKENIZER_CONFIG] = {
            "tokenizer_class": "Wav2Vec2CTCTokenizer", "pad_token": labels[blank], "unk_token": "<unk>",
            "bos_token": None, "eos_token": None, "word_delimiter_token": SPACE,
        }  # fmt: skip
    return files


def _add_head(
    model: FineTuned, family: str, description: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    width = model.config.encoder.width
    name = choose_model(model.head, model.config, model.labels)
    if family == "d2v1_vision":
        description["use_mask_token"] = model.encoder.mask_token is not None
        if model.head.settings.pool == "class":  # the norm is the encoder's, before the class token is taken
            tensors = {n.replace("pooler.layernorm", "layernorm"): t for n, t in tensors.items()}
    embeddings = tensors.get("embeddings.word_embeddings.weight")
    tensors = {PREFIXES[family] + n: t for n, t in tensors.items()}
    inner = ("pooler.",)  # inside the encoder of transformers
    for key, tensor in name_tensors(name, model.head, embeddings, width).items():
        tensors[PREFIXES[family] + key if key.startswith(inner) else key] = tensor
    description |= describe_head(name, model.head.settings, model.labels, width)
    if name == "Data2VecTextForMaskedLM":
        description["tie_word_embeddings"] = "lm_head.decoder.weight" not in tensors
    return description, tensors


def _view(tensors: dict[str, Tensor], published: str, name: str) -> Tensor:
    """The tensor, or its third that `name` means: query, key or value."""
    tensor = tensors[published]
    return tensor.chunk(3)[_QKV[name.split(".")[-2]]] if published.endswith(".qkv.weight") else tensor


@torch.no_grad()
def _fill(model: Data2Vec, family: str, given: dict[str, Tensor], where: str) -> None:
    own = fairseq.parameters(model)
    missing = {
        n for n in own if not re.match(r"final_proj|encoder\.regression_head|.*relative_position_index|.*version", n)
    }
    if family == "d2v1_vision":
        missing.discard("mask_emb")  # only pre-training has it
    types = given.pop("embeddings.token_type_embeddings.weight", None)
    unknown, heads = [], set()
    for name, value in given.items():
        # Without a pooling layer the last norm is the encoder's own.
        form = f"pooler.{name}" if family == "d2v1_vision" and name.startswith("layernorm.") else name
        found = next(renamed(form, NAMES[family]), None)
        if found is None or found not in own:
            heads.add(name.split(".")[0]) if re.fullmatch(_NOT_LOADED[family], name) else unknown.append(name)
            continue
        view = _view(own, found, name)
        if view.numel() != value.numel():
            raise ValueError(f"checkpoint {where!r}: {name}: expected {tuple(view.shape)}, got {tuple(value.shape)}")
        check_weights(value, f"checkpoint {where!r}: {name}")
        view.copy_(value.reshape(view.shape))
        missing.discard(found)
    if missing or unknown:
        raise ValueError(
            f"checkpoint {where!r}: expected the tensors of the configuration, got {sorted(missing)[:5]} missing and "
            f"{unknown[:5]} unknown"
        )
    if types is not None:  # all tokens are of type 0, which is added to every embedding but the padding's
        embeddings = own[_TEXT + "embed_tokens.weight"]
        padding = embeddings[1].clone()
        embeddings += types[0]
        embeddings[1] = padding
    if heads - {"pooler"}:
        warnings.warn(f"checkpoint {where!r}: left out the heads {sorted(heads - {'pooler'})}", stacklevel=3)


def _name_tensors(model: Data2Vec, family: str) -> dict[str, Tensor]:
    """The student's tensors by transformers names, as copies: the names read backwards."""
    own, tensors = fairseq.parameters(model), dict[str, Tensor]()
    for published in own:
        for name in renamed(published, reverse(NAMES[family])):
            tensors[name] = _view(own, published, name).cpu().contiguous().clone()
    if family == "d2v1_text":
        tensors["embeddings.token_type_embeddings.weight"] = torch.zeros(1, model.config.encoder.width)
    return tensors


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"checkpoint: expected JSON in {str(path)!r}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    value = _load_json(path)
    if not isinstance(value, dict) or value.get("model_type") not in FAMILIES:
        kind = value.get("model_type") if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"checkpoint: expected a model_type of {', '.join(FAMILIES)}, got {kind!r} in {str(path)!r}")
    return value


def _read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from the shards that an index names; safetensors come first."""
    for name in WEIGHTS:
        if (folder / f"{name}.index.json").is_file() and not (folder / name).is_file():
            shards = sorted(set(_read_index(folder / f"{name}.index.json").values()))
            tensors = {n: t for shard in shards for n, t in _read_file(folder / shard).items()}
            break
        if (folder / name).is_file():
            tensors = _read_file(folder / name)
            break
    else:
        found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise ValueError(
            f"checkpoint: expected {' or '.join(WEIGHTS)}, or shards with an index, in {str(folder)!r}, found {found}"
        )
    return {name.removeprefix(prefix): tensor for name, tensor in strip_wrappers(tensors).items()}


def _read_index(path: Path) -> dict[str, str]:
    """Name -> file of every tensor; files lie in the index's own folder."""
    value = _load_json(path)
    shards = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(f, str) and Path(f).name == f for f in shards.values()):
        raise ValueError(f"checkpoint: expected a weight_map of names of files in {str(path)!r}, got another structure")
    return shards


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        value = read_torch_file(path)
        if not isinstance(value, Mapping) or not all(isinstance(t, Tensor) for t in value.values()):
            raise ValueError(f"checkpoint: expected a dict of tensors in {str(path)!r}, got other contents")
        return dict(value)
    check_whole(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: expected safetensors in {str(path)!r}: {error}") from None
