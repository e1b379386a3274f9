"""data2vec 1.0 models in the format of transformers (Data2VecAudio, Data2VecText, Data2VecVision), in and out."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v.files import write_atomically
from d2v.folder import copy_into
from d2v.interop import fairseq
from d2v.interop.fairseq.names import family_of
from d2v.interop.huggingface.config import FAMILIES, read_config, write_config
from d2v.interop.huggingface.heads import choose_model, describe_head, find_model, name_tensors, read_head, read_labels
from d2v.model.data2vec import Data2Vec, strip_pretraining
from d2v.model.finetuned import FineTuned
from d2v.model.task_heads import make_head

PREFIXES = {"d2v1_audio": "data2vec_audio.", "d2v1_text": "data2vec_text.", "d2v1_vision": "data2vec_vision."}
"""What checkpoints of task models put before the encoder's names."""
_AUDIO_LAYER, _TEXT_LAYER = r"encoder\.layers\.(\d+)\.", r"encoder\.layer\.(\d+)\."
_TEXT = "encoder.sentence_encoder."
_QKV = {"query": 0, "key": 1, "value": 2}
# (pattern of a transformers name, published fairseq name). The first that fits is taken.
RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "d2v1_audio": (
        (r"masked_spec_embed", "mask_emb"),
        (r"feature_extractor\.conv_layers\.(\d+)\.conv\.(.*)", r"feature_extractor.conv_layers.\1.0.\2"),
        (r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.(.*)", r"feature_extractor.conv_layers.\1.2.1.\2"),
        (r"feature_projection\.layer_norm\.(.*)", r"layer_norm.\1"),
        (r"feature_projection\.projection\.(.*)", r"post_extract_proj.\1"),
        (r"encoder\.pos_conv_embed\.layers\.(\d+)\.conv\.(.*)", r"encoder.pos_conv.\1.0.\2"),
        (_AUDIO_LAYER + r"attention\.(.*)", r"encoder.layers.\1.self_attn.\2"),
        (_AUDIO_LAYER + r"feed_forward\.intermediate_dense\.(.*)", r"encoder.layers.\1.fc1.\2"),
        (_AUDIO_LAYER + r"feed_forward\.output_dense\.(.*)", r"encoder.layers.\1.fc2.\2"),
        (_AUDIO_LAYER + r"layer_norm\.(.*)", r"encoder.layers.\1.self_attn_layer_norm.\2"),
        (_AUDIO_LAYER + r"final_layer_norm\.(.*)", r"encoder.layers.\1.final_layer_norm.\2"),
        (r"encoder\.layer_norm\.(.*)", r"encoder.layer_norm.\1"),
    ),
    "d2v1_text": (
        (r"embeddings\.LayerNorm\.(.*)", _TEXT + r"layernorm_embedding.\1"),
        (r"embeddings\.position_embeddings\.(.*)", _TEXT + r"embed_positions.\1"),
        (r"embeddings\.word_embeddings\.(.*)", _TEXT + r"embed_tokens.\1"),
        *(
            (_TEXT_LAYER + rf"attention\.self\.{name}\.(.*)", _TEXT + rf"layers.\1.self_attn.{name[0]}_proj.\2")
            for name in _QKV
        ),
        (_TEXT_LAYER + r"attention\.output\.dense\.(.*)", _TEXT + r"layers.\1.self_attn.out_proj.\2"),
        (_TEXT_LAYER + r"attention\.output\.LayerNorm\.(.*)", _TEXT + r"layers.\1.self_attn_layer_norm.\2"),
        (_TEXT_LAYER + r"intermediate\.dense\.(.*)", _TEXT + r"layers.\1.fc1.\2"),
        (_TEXT_LAYER + r"output\.dense\.(.*)", _TEXT + r"layers.\1.fc2.\2"),
        (_TEXT_LAYER + r"output\.LayerNorm\.(.*)", _TEXT + r"layers.\1.final_layer_norm.\2"),
    ),
    "d2v1_vision": (
        (r"embeddings\.cls_token", "cls_emb"),
        (r"embeddings\.mask_token", "mask_emb"),
        (r"embeddings\.patch_embeddings\.projection\.(.*)", r"patch_embed.conv.\1"),
        (
            r"encoder\.relative_position_bias\.relative_position_bias_table",
            "encoder.rel_pos_bias.relative_position_bias_table",
        ),
        (_TEXT_LAYER + r"attention\.attention\.(?:query|key|value)\.weight", r"encoder.blocks.\1.attn.qkv.weight"),
        (_TEXT_LAYER + r"attention\.attention\.query\.bias", r"encoder.blocks.\1.attn.q_bias"),
        (_TEXT_LAYER + r"attention\.attention\.value\.bias", r"encoder.blocks.\1.attn.v_bias"),
        (_TEXT_LAYER + r"attention\.output\.dense\.(.*)", r"encoder.blocks.\1.attn.proj.\2"),
        (_TEXT_LAYER + r"intermediate\.dense\.(.*)", r"encoder.blocks.\1.mlp.0.\2"),
        (_TEXT_LAYER + r"output\.dense\.(.*)", r"encoder.blocks.\1.mlp.2.\2"),
        (_TEXT_LAYER + r"lambda_(\d)", r"encoder.blocks.\1.gamma_\2"),
        (_TEXT_LAYER + r"layernorm_before\.(.*)", r"encoder.blocks.\1.norm1.\2"),
        (_TEXT_LAYER + r"layernorm_after\.(.*)", r"encoder.blocks.\1.norm2.\2"),
        (r"(?:pooler\.)?layernorm\.(.*)", r"encoder.norm.\1"),
    ),
}
_NOT_LOADED = {
    "d2v1_audio": r"(adapter|lm_head|classifier|projector)\..*",
    "d2v1_text": r"(pooler|lm_head|classifier|qa_outputs)\..*|embeddings\.(position_ids|token_type_ids)",
    "d2v1_vision": r"classifier\..*|.*\.relative_position_index",
}
"""Heads, and tables that follow from the configuration."""


def load(folder: str | Path) -> Data2Vec | FineTuned:
    """The encoder of a transformers folder (`config.json`, `model.safetensors`), or, of a task model, a `FineTuned`.

    Heads of a folder whose `architectures` name no task model are left out, with a warning that names them; the
    pre-training head, which the format does not have, starts at random. Padding is treated as transformers does
    ("positions-see-padding"). Labels are those of `id2label`, or of the `vocab.json` of a CTC tokenizer.

    Raises:
        ValueError: files or tensors missing, unexpected or misshapen. NotImplementedError: an option or a task model
            that is not built.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(
                f"checkpoint: expected {name} in {str(folder)!r}, found none (pickled weights are not read)"
            )
    given = _read_json(folder / "config.json")
    family, config = read_config(given)
    task = find_model(given)
    tensors = _read_tensors(folder / "model.safetensors", PREFIXES[family])
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
    return fine_tuned


def save(model: Data2Vec | FineTuned, folder: str | Path) -> Path:
    """Writes the student's encoder as `AutoModel.from_pretrained` reads it, or a fine-tuned model as its task class
    does; returns the folder.

    The format has no pre-training head and no teacher: they are not written. transformers lets convolutional positions
    of speech see padded frames, whatever the model was trained with. The labels of CTC go to `vocab.json`.

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
    from safetensors.torch import save as to_bytes

    tensors = _name_tensors(encoder, family)
    vocabulary = None
    if isinstance(model, FineTuned):
        description, tensors = _add_head(model, family, description, tensors)
        if model.head.settings.task == "ctc":
            vocabulary = {label: i for i, label in enumerate(model.labels)}
    folder.mkdir(parents=True, exist_ok=True)
    if vocabulary is not None:
        write_atomically(folder / "vocab.json", json.dumps(vocabulary, indent=1) + "\n")
    write_atomically(folder / "model.safetensors", to_bytes(tensors, metadata={"format": "pt"}))
    write_atomically(folder / "config.json", json.dumps(description, indent=2) + "\n")
    return folder


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
    return description, tensors


def published_name(family: str, name: str) -> tuple[str, int | None] | None:
    """Published name of a transformers name, and which third of it (query, key, value rows); None: no counterpart."""
    for pattern, template in RULES[family]:
        match = re.fullmatch(pattern, name)
        if match is not None:
            part = re.search(r"\.(query|key|value)\.weight$", name) if family == "d2v1_vision" else None
            return match.expand(template), _QKV[part[1]] if part else None
    return None


def _view(tensors: dict[str, Tensor], found: tuple[str, int | None]) -> Tensor:
    name, third = found
    return tensors[name] if third is None else tensors[name].chunk(3)[third]


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
        found = published_name(family, name)
        if found is None or found[0] not in own:
            heads.add(name.split(".")[0]) if re.fullmatch(_NOT_LOADED[family], name) else unknown.append(name)
            continue
        view = _view(own, found)
        if view.numel() != value.numel():
            raise ValueError(f"checkpoint {where!r}: {name}: expected {tuple(view.shape)}, got {tuple(value.shape)}")
        view.copy_(value.view(view.shape))
        missing.discard(found[0])
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
    """The student's tensors by transformers names, as copies: the rules read backwards."""
    own = fairseq.parameters(model)
    tensors: dict[str, Tensor] = {}
    for name in _candidates(model, family):
        found = published_name(family, name)
        if found is not None and found[0] in own:
            tensors[name] = _view(own, found).cpu().contiguous().clone()
    if family == "d2v1_text":
        tensors["embeddings.token_type_embeddings.weight"] = torch.zeros(1, model.config.encoder.width)
    return tensors


def _candidates(model: Data2Vec, family: str) -> list[str]:
    """All names that a model of this size may have."""
    config = model.config
    ends, layers = ("weight", "bias"), range(config.encoder.depth)
    if family == "d2v1_audio":
        stems = [
            f"feature_extractor.conv_layers.{i}.{p}"
            for i in range(len(config.stem.convolutions))
            for p in ("conv", "layer_norm")
        ]
        stems += ["feature_projection.layer_norm", "feature_projection.projection", "encoder.layer_norm"]
        stems += [f"encoder.pos_conv_embed.layers.{i}.conv" for i in range(config.stem.position_layers)]
        parts = [f"attention.{p}_proj" for p in ("q", "k", "v", "out")]
        parts += ["feed_forward.intermediate_dense", "feed_forward.output_dense", "layer_norm", "final_layer_norm"]
        stems += [f"encoder.layers.{i}.{p}" for i in layers for p in parts]
        return ["masked_spec_embed", *(f"{s}.{e}" for s in stems for e in ends)]
    if family == "d2v1_text":
        stems = [f"embeddings.{p}" for p in ("word_embeddings", "position_embeddings", "LayerNorm")]
        parts = [f"attention.self.{p}" for p in _QKV] + ["attention.output.dense", "attention.output.LayerNorm"]
        parts += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    else:
        stems = ["embeddings.patch_embeddings.projection", "pooler.layernorm"]
        parts = [f"attention.attention.{p}" for p in _QKV] + ["attention.output.dense", "intermediate.dense"]
        parts += ["output.dense", "layernorm_before", "layernorm_after"]
    stems += [f"encoder.layer.{i}.{p}" for i in layers for p in parts]
    extra = ["embeddings.cls_token", "embeddings.mask_token"]
    extra += ["encoder.relative_position_bias.relative_position_bias_table"]
    extra += [f"encoder.layer.{i}.lambda_{n}" for i in layers for n in (1, 2)]
    return [*extra, *(f"{s}.{e}" for s in stems for e in ends)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"checkpoint: expected JSON in {str(path)!r}: {error}") from None
    if not isinstance(value, dict) or value.get("model_type") not in FAMILIES:
        kind = value.get("model_type") if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"checkpoint: expected a model_type of {', '.join(FAMILIES)}, got {kind!r} in {str(path)!r}")
    return value


def _read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: expected safetensors in {str(path)!r}: {error}") from None
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
