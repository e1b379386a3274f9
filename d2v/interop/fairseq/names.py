"""Where the published fairseq models keep their tensors: our names, theirs, and how one becomes the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2v.model.data2vec import Data2Vec
from d2v.model.teacher import PARTS

FAMILIES = ("d2v1_audio", "d2v1_vision", "d2v1_text", "d2v2_audio", "d2v2_image", "d2v2_text")
_MODALITIES = {"speech": "audio", "vision": "image", "text": "text"}

# Our name (a regular expression) to the published name; the first match counts. `{qkv}` splits the fused projection
# into three, `{next}` is the first group plus one.
Rules = tuple[tuple[str, str], ...]


def _second(modality: str) -> Rules:
    """Rules of a 2.0 family."""
    p = f"modality_encoders.{modality}."
    return (
        (r"stem\.convs\.(\d+)\.(.*)", p + r"local_encoder.conv_layers.\1.0.\2"),
        (r"stem\.norms\.(\d+)\.(.*)", p + r"local_encoder.conv_layers.\1.2.1.\2"),
        *(
            ((r"stem\.norm\.(.*)", p + r"project_features.1.\1"), (r"stem\.proj\.(.*)", p + r"project_features.2.\1"))
            if modality == "AUDIO"
            else ((r"stem\.norm\.(.*)", p + r"local_encoder.layernorm_embedding.\1"),)
        ),
        (r"stem\.(.*)", p + r"local_encoder.\1"),
        (r"positions\.table", p + "fixed_positional_encoder.positions"),
        (r"positions\.convs\.(\d+)\.(.*)", p + r"relative_positional_encoder.{next}.0.\2"),
        (r"positions\.alibi\.scale", p + "alibi_scale"),
        (r"context\.extra_tokens", p + "extra_tokens"),
        (r"context\.(.*)", p + r"context_encoder.\1"),
        (r"blocks\.blocks\.(.*)", r"blocks.\1"),
        (r"blocks\.norm\.(.*)", r"norm.\1"),
        (r"decoder\.blocks\.(\d+)\.(.*)", p + r"decoder.blocks.\1.0.\2"),
        (r"decoder\.proj\.(.*)", p + r"decoder.proj.\1"),
    )


def _first_blocks(prefix: str) -> Rules:
    """Rules of the blocks of 1.0 speech and text."""
    block = r"blocks\.blocks\.(\d+)\."
    return (
        (block + r"attn\.qkv\.(.*)", prefix + r"layers.\1.self_attn.{qkv}_proj.\2"),
        (block + r"attn\.proj\.(.*)", prefix + r"layers.\1.self_attn.out_proj.\2"),
        (block + r"norm1\.(.*)", prefix + r"layers.\1.self_attn_layer_norm.\2"),
        (block + r"norm2\.(.*)", prefix + r"layers.\1.final_layer_norm.\2"),
        (block + r"mlp\.(.*)", prefix + r"layers.\1.\2"),
        (r"(?:context|blocks)\.norm\.(.*)", prefix + r"layer_norm.\1"),
    )


_TEXT = "encoder.sentence_encoder."
_VISION_BLOCK = r"blocks\.blocks\.(\d+)\."
RULES: dict[str, Rules] = {
    "d2v2_audio": _second("AUDIO"),
    "d2v2_image": _second("IMAGE"),
    "d2v2_text": _second("TEXT"),
    "d2v1_audio": (
        (r"mask_token", "mask_emb"),
        (r"stem\.convs\.(\d+)\.(.*)", r"feature_extractor.conv_layers.\1.0.\2"),
        (r"stem\.norms\.(\d+)\.(.*)", r"feature_extractor.conv_layers.\1.2.1.\2"),
        (r"stem\.norm\.(.*)", r"layer_norm.\1"),
        (r"stem\.proj\.(.*)", r"post_extract_proj.\1"),
        (r"positions\.convs\.(\d+)\.(.*)", r"encoder.pos_conv.\1.0.\2"),
        *_first_blocks("encoder."),
        (r"head\.layers\.0\.(.*)", r"final_proj.\1"),
    ),
    "d2v1_text": (
        (r"stem\.norm\.(.*)", _TEXT + r"layernorm_embedding.\1"),
        (r"stem\.(.*)", _TEXT + r"\1"),
        *_first_blocks(_TEXT),
        (r"head\.layers\.(.*)", r"encoder.regression_head.\1"),
    ),
    "d2v1_vision": (
        (r"mask_token", "mask_emb"),
        (r"context\.extra_tokens", "cls_emb"),
        (r"stem\.proj\.(.*)", r"patch_embed.conv.\1"),
        (r"positions\.table", "encoder.rel_pos_bias.relative_position_bias_table"),
        (r"positions\.index", "encoder.rel_pos_bias.relative_position_index"),
        (_VISION_BLOCK + r"scale(\d)", r"encoder.blocks.\1.gamma_\2"),
        (_VISION_BLOCK + r"mlp\.fc1\.(.*)", r"encoder.blocks.\1.mlp.0.\2"),
        (_VISION_BLOCK + r"mlp\.fc2\.(.*)", r"encoder.blocks.\1.mlp.2.\2"),
        (r"blocks\.blocks\.(.*)", r"encoder.blocks.\1"),
        (r"blocks\.norm\.(.*)", r"encoder.norm.\1"),
        (r"head\.layers\.0\.(.*)", r"final_proj.\1"),
    ),
}
# Prefix of the student's names below which the 1.0 teacher lives; its names have no prefix.
TEACHER_PREFIX = {"d2v1_audio": "encoder.", "d2v1_vision": "encoder.", "d2v1_text": _TEXT}
# In checkpoints, but no weights: a format number, and a table that follows from the image size.
DERIVED = ("version", "rel_pos_bias.relative_position_index")


@dataclass(frozen=True)
class Entry:
    """A published tensor as a piece of one of ours."""

    name: str
    """Published name."""
    view: Callable[[Tensor], Tensor]
    """The piece, of the tensor or of its gradient."""
    tensor: Tensor
    """Ours."""


def family_of(model: Data2Vec) -> str:
    """Published family of a model."""
    config = model.config
    if config.stem.kind != "stock":
        raise ValueError(f"stem.kind: expected stock for a published name, got {config.stem.kind}")
    if config.version == 1:
        return "d2v1_vision" if config.stem.modality == "vision" else f"d2v1_{_MODALITIES[config.stem.modality]}"
    return f"d2v2_{_MODALITIES[config.stem.modality]}"


def published_names(model: Data2Vec, name: str) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """Published names of one of our tensors, and the piece of it that each one is."""
    family = family_of(model)
    for pattern, template in RULES[family]:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        if "{next}" in template:
            template = template.replace("{next}", str(int(match.group(1)) + 1))
        renamed = match.expand(template)
        if "relative_positional_encoder" in renamed and model.config.stem.position_norm:
            # With a norm before them the published convolutions lie one level deeper.
            renamed = renamed.replace("relative_positional_encoder.", "relative_positional_encoder.1.")
        if "{qkv}" in renamed:
            return [(renamed.replace("{qkv}", letter), _third(i)) for i, letter in enumerate("qkv")]
        if family == "d2v1_vision" and name == "mask_token":
            return [(renamed, lambda t: t.view(1, 1, -1))]
        return [(renamed, lambda t: t)]
    if name.startswith("positions.norm."):
        prefix = "modality_encoders.AUDIO.relative_positional_encoder.0."
        return [(name.replace("positions.norm.", prefix), lambda t: t)]
    raise KeyError(f"{name}: no published name in {family}")


def _third(index: int) -> Callable[[Tensor], Tensor]:
    def view(t: Tensor) -> Tensor:
        size = t.shape[0] // 3
        return t[index * size : (index + 1) * size]

    return view


def student_entries(model: Data2Vec) -> Iterator[Entry]:
    """Weights and fixed tables of the student."""
    for part in (*PARTS, "decoder", "head"):
        module = getattr(model, part)
        if module is not None:
            yield from _entries(model, part, module)
    if model.mask_token is not None:
        for name, view in published_names(model, "mask_token"):
            yield Entry(name, view, model.mask_token)


def teacher_entries(model: Data2Vec) -> Iterator[tuple[Entry, bool]]:
    """What the published `_ema` entry holds, and whether it is averaged here or the student's own."""
    prefix = TEACHER_PREFIX.get(family_of(model))
    for part in PARTS:
        averaged = part in model.teacher.owned
        module = model.teacher.get_submodule(part) if averaged else model.get_submodule(part)
        if prefix is not None:
            for entry in _entries(model, part, module, derived=True):
                if entry.name.startswith(prefix):
                    yield Entry(entry.name.removeprefix(prefix), entry.view, entry.tensor), averaged
        elif averaged:
            for entry in _entries(model, part, module):
                if model.config.ema.scope == "blocks":
                    if entry.name.startswith("blocks."):  # the final norm is the student's
                        yield Entry(entry.name.removeprefix("blocks."), entry.view, entry.tensor), True
                else:
                    yield entry, True


def _entries(model: Data2Vec, part: str, module: nn.Module, derived: bool = False) -> Iterator[Entry]:
    if not getattr(module, "enabled", True):
        return
    for name, tensor in module.state_dict(keep_vars=True).items():
        if derived or tensor.is_floating_point():
            for published, view in published_names(model, f"{part}.{name}"):
                yield Entry(published, view, tensor)


def format_number() -> Tensor:
    """What the published text encoder stores as `version`."""
    return torch.tensor([3.0])
