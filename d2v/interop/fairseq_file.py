"""Published checkpoint files, in and out (their structure: fairseq's `torch.save` of one dict)."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data2vec import Data2Vec
from .fairseq_config import translate
from .fairseq_describe import describe
from .fairseq_model import assemble, parameters, teacher_parameters
from .fairseq_names import family_of
from .fairseq_options import PUBLISHED
from .torch_file import read_torch_file, to_plain

_MARKS = {
    "d2v2_audio": "modality_encoders.AUDIO.",
    "d2v2_image": "modality_encoders.IMAGE.",
    "d2v2_text": "modality_encoders.TEXT.",
    "d2v1_text": "encoder.sentence_encoder.",
    "d2v1_audio": "feature_extractor.conv_layers.",
    "d2v1_vision": "patch_embed.conv.",
}
"""What the names of a family begin with, after the prefix of a fine-tuned model."""
_PREFIXES = ("", "w2v_encoder.w2v_model.", "model.")
_BEIT = "patch_embed.proj.weight"
_OLD_NAMES = (
    (r"^decoder\.", "encoder."),
    (r"\.emb_layer_norm\.", ".layernorm_embedding."),
    (r"^encoder\.lm_head\.", "encoder.regression_head."),
)
"""Of 1.0 text."""
_BEIT_NAMES = (
    (r"^cls_token$", "cls_emb"), (r"^mask_token$", "mask_emb"), (r"^patch_embed\.proj\.", "patch_embed.conv."),
    (r"^lm_head\.", "final_proj."), (r"\.mlp\.fc1\.", ".mlp.0."), (r"\.mlp\.fc2\.", ".mlp.2."),
    (r"^(blocks|rel_pos_bias|norm)\.", r"encoder.\1."),
)  # fmt: skip
_NOT_READ = re.compile(r".*(encoder_mask|target_proj\..*|shared_decoder.*|num_updates)$")
"""Left over from training code, without effect on what a model computes."""
_PRE_TRAINING = re.compile(r"(modality_encoders\.\w+\.decoder|encoder\.regression_head|final_proj|mask_emb)\b")
"""What only pre-training uses: a fine-tuned file may lack it."""


@dataclass(frozen=True)
class Origin:
    """Where a model came from: saving it again gives the same names, dtypes and options."""

    config: dict[str, Any]
    dtypes: dict[str, torch.dtype]
    heads: tuple[str, ...]


def load(path: str | Path) -> Data2Vec:
    """A model from a published checkpoint file, 1.0 or 2.0, or from the separate 1.0 vision repository.

    Nothing in the file is executed. Padding is treated as in the published code where positions are convolutions
    ("positions-see-padding"); all other behaviours are the default ones. Heads of fine-tuned files are left out with a
    warning that names them, and what only pre-training uses starts at random where such a file lacks it.

    Raises:
        ValueError: not such a file; tensors missing, unexpected or misshapen. NotImplementedError: an option that is
            not built, by name.
    """
    state = read_torch_file(path)
    if not isinstance(state, Mapping) or not isinstance(state.get("model", state.get("module")), Mapping):
        raise ValueError(f"checkpoint {str(path)!r}: expected a dict with the tensors under 'model', got none")
    tensors, teacher, heads, family, beit = _sort_tensors(state.get("model", state.get("module")), str(path))
    config = _describe_beit(tensors) if beit else _find_config(state, str(path))
    mask_token = _vocabulary(tensors) - 1 if family == "d2v1_text" else None
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    translated = translate(config, family, shapes, mask_token)
    translated = dataclasses.replace(
        translated, published=PUBLISHED[family] & {"positions-see-padding"},
        encoder=dataclasses.replace(translated.encoder, norm_eps=1e-6) if beit else translated.encoder,
    )  # fmt: skip
    fine_tuned = bool(heads)
    if fine_tuned:
        warnings.warn(f"checkpoint {str(path)!r}: left out the heads {', '.join(heads[:8])}", stacklevel=2)
    model = assemble(translated, tensors, teacher, optional=_PRE_TRAINING if fine_tuned or beit else None)
    dtypes = {name: t.dtype for name, t in tensors.items()}
    model.origin = Origin(config, dtypes, tuple(heads))
    return model


def save(model: Data2Vec, path: str | Path) -> Path:
    """Writes a checkpoint that the published code and `load` read; returns the path. Appears whole or not at all.

    A model that came from such a file keeps its options and dtypes.
    """
    path, family = Path(path), family_of(model)
    origin = model.origin
    config = origin.config if isinstance(origin, Origin) else describe(model.config, family)
    dtypes = origin.dtypes if isinstance(origin, Origin) else {}
    tensors: dict[str, Any] = {
        name: t.detach().cpu().to(dtypes.get(name, t.dtype)).contiguous().clone()
        for name, t in parameters(model).items()
    }
    teacher = {n: t.detach().cpu().contiguous().clone() for n, t in teacher_parameters(model).items()}
    tensors["encoder._ema" if family == "d2v1_text" else "_ema"] = teacher
    state: dict[str, Any] = {
        "args": None, "cfg": {"model": config}, "model": tensors, "criterion": None, "optimizer_history": [],
        "task_state": {}, "extra_state": {}, "last_optimizer_state": None,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{path.name}")
    try:
        torch.save(state, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


Sorted = tuple[dict[str, Tensor], dict[str, Tensor] | None, list[str], str, bool]


def _sort_tensors(given: Mapping[str, Any], where: str) -> Sorted:
    """Tensors of the model by published names, those of the teacher, names of heads, the family, BEiT names or not."""
    given = dict(given)
    entries = [given.pop(key) for key in ("_ema", "encoder._ema") if key in given]
    teacher = dict(entries[0]) if entries else None
    beit = _BEIT in given
    if beit:
        given = {_rename(name, _BEIT_NAMES): t for name, t in given.items()}
    elif any(name.startswith(("encoder.sentence_encoder", "decoder.sentence_encoder")) for name in given):
        given = {_rename(name, _OLD_NAMES): t for name, t in given.items()}
    found = [(f, p) for p in _PREFIXES for f, mark in _MARKS.items() if any(n.startswith(p + mark) for n in given)]
    if not found:
        raise ValueError(f"checkpoint {where!r}: expected names of a data2vec model, got {sorted(given)[:4]}")
    family, prefix = found[0]
    tensors: dict[str, Tensor] = {}
    heads: list[str] = []
    for name, value in given.items():
        inner = name.removeprefix(prefix).replace("positional_encoder.pos_embed", "positional_encoder.positions")
        if not isinstance(value, Tensor) or _NOT_READ.fullmatch(inner):
            continue
        if not name.startswith(prefix) or _is_head(inner):
            heads.append(name)
        else:
            tensors[inner] = value
    return tensors, teacher, heads, family, beit


def _is_head(name: str) -> bool:
    return name.startswith(("head.", "fc_norm.", "classification_heads.", "encoder.classification_heads.", "proj."))


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _find_config(state: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of the model that was pre-trained: those of a fine-tuned file hold them one level deeper."""
    config = to_plain(state.get("cfg") or state.get("args"))
    if isinstance(config, dict) and isinstance(config.get("model"), dict):
        config = config["model"]
    for key in ("w2v_args", "pretrained_model_args"):
        inner = config.get(key) if isinstance(config, dict) else None
        if isinstance(inner, dict):
            config = inner["model"] if isinstance(inner.get("model"), dict) else inner
    if not isinstance(config, dict) or not config:
        raise ValueError(f"checkpoint {where!r}: expected the model's options under 'cfg' or 'args', got none")
    return config


def _vocabulary(tensors: Mapping[str, Tensor]) -> int:
    name = "encoder.sentence_encoder.embed_tokens.weight"
    if name not in tensors:
        raise ValueError(f"checkpoint: expected a tensor {name}, found none")
    return int(tensors[name].shape[0])


def _describe_beit(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of a file of the separate vision repository, read off its shapes."""
    needed = ("patch_embed.conv.weight", "encoder.rel_pos_bias.relative_position_bias_table")
    if missing := [name for name in needed if name not in tensors]:
        raise NotImplementedError(f"checkpoint: expected a shared relative position bias, found no {missing[0]}")
    width, channels, patch, _ = tensors[needed[0]].shape
    distances, heads = tensors[needed[1]].shape
    side = (math.isqrt(distances - 3) + 1) // 2
    depth = 1 + max(int(m[1]) for n in tensors if (m := re.match(r"encoder\.blocks\.(\d+)\.", n)))
    scaled = "encoder.blocks.0.gamma_1" in tensors
    return {
        "_name": "data2vec_vision", "image_size": side * patch, "patch_size": patch, "in_channels": channels,
        "embed_dim": width, "num_heads": heads, "depth": depth, "layer_scale_init_value": 1e-4 if scaled else 0.0,
        "num_mask_patches": round(side * side * 120 / 196), "average_top_k_layers": max(1, depth // 2),
        "layer_norm_target_layer": True, "layer_norm_targets": True, "loss_beta": 2.0, "drop_path": 0.25,
        "attention_dropout": 0.05,
    }  # fmt: skip
