"""Where the published fairseq models keep their tensors: our names, theirs, and how one becomes the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2v.interop.renaming import Pairs, renamed
from d2v.model.data2vec import Data2Vec
from d2v.model.teacher import PARTS

FAMILIES = ("d2v1_audio", "d2v1_vision", "d2v1_text", "d2v2_audio", "d2v2_image", "d2v2_text")
_MODALITIES = {"speech": "audio", "vision": "image", "text": "text", "spectrograms": "image"}

# Our name to the published name; the first pair that fits counts. `{qkv}` splits the fused projection into three.


def _second(modality: str) -> Pairs:
    """Names of a 2.0 family."""
    p = f"modality_encoders.{modality}."
    audio = modality == "AUDIO"
    return (
        ("stem.convs.#.*", p + "local_encoder.conv_layers.#.0.*"),
        ("stem.norms.#.*", p + "local_encoder.conv_layers.#.2.1.*"),
        ("stem.norm.*", p + ("project_features.1.*" if audio else "local_encoder.layernorm_embedding.*")),
        *((("stem.proj.*", p + "project_features.2.*"),) if audio else ()),
        ("stem.project.*", p + "local_encoder.1.*"),
        ("stem.*", p + "local_encoder.*"),
        ("positions.table", p + "fixed_positional_encoder.positions"),
        ("positions.convs.#.*", p + "relative_positional_encoder.#+1.0.*"),
        ("positions.norm.*", p + "relative_positional_encoder.0.*"),
        ("positions.alibi.scale", p + "alibi_scale"),
        ("positions.alibi.table", p + "alibi_bias"),
        ("context.extra_tokens", p + "extra_tokens"),
        ("context.*", p + "context_encoder.*"),
        ("blocks.blocks.*", "blocks.*"),
        ("blocks.norm.*", "norm.*"),
        *(
            (f"{ours}blocks.#.{leaf}", f"{theirs}blocks.#.0.{leaf}")
            for ours, theirs in (("decoder.", p + "decoder."), ("shared_decoder.", "shared_decoder."))
            for leaf in ("weight", "bias")
        ),
        ("decoder.blocks.*", p + "decoder.encoder.blocks.*"),
        ("decoder.embed.*", p + "decoder.input_proj.*"),
        ("decoder.proj.*", p + "decoder.proj.*"),
        ("shared_decoder.proj.*", "shared_decoder.proj.*"),
        ("reconstruction.*", "recon_proj.*"),
    )


def _first_blocks(prefix: str) -> Pairs:
    """Names of the blocks of 1.0 speech and text."""
    block = "blocks.blocks.#."
    return (
        (block + "attn.qkv.*", prefix + "layers.#.self_attn.{qkv}_proj.*"),
        (block + "attn.proj.*", prefix + "layers.#.self_attn.out_proj.*"),
        (block + "norm1.*", prefix + "layers.#.self_attn_layer_norm.*"),
        (block + "norm2.*", prefix + "layers.#.final_layer_norm.*"),
        (block + "mlp.*", prefix + "layers.#.*"),
        ("context.norm.*", prefix + "layer_norm.*"),
        ("blocks.norm.*", prefix + "layer_norm.*"),
    )


_TEXT = "encoder.sentence_encoder."
NAMES: dict[str, Pairs] = {
    "d2v2_audio": _second("AUDIO"),
    "d2v2_image": _second("IMAGE"),
    "d2v2_text": _second("TEXT"),
    "d2v1_audio": (
        ("mask_token", "mask_emb"),
        ("stem.convs.#.*", "feature_extractor.conv_layers.#.0.*"),
        ("stem.norms.#.*", "feature_extractor.conv_layers.#.2.1.*"),
        ("stem.norm.*", "layer_norm.*"),
        ("stem.proj.*", "post_extract_proj.*"),
        ("positions.convs.#.*", "encoder.pos_conv.#.0.*"),
        *_first_blocks("encoder."),
        ("head.layers.0.*", "final_proj.*"),
    ),
    "d2v1_text": (
        ("stem.norm.*", _TEXT + "layernorm_embedding.*"),
        ("stem.*", _TEXT + "*"),
        *_first_blocks(_TEXT),
        ("head.layers.*", "encoder.regression_head.*"),
    ),
    "d2v1_vision": (
        ("mask_token", "mask_emb"),
        ("context.extra_tokens", "cls_emb"),
        ("stem.proj.*", "patch_embed.conv.*"),
        ("positions.table", "encoder.rel_pos_bias.relative_position_bias_table"),
        ("positions.index", "encoder.rel_pos_bias.relative_position_index"),
        ("blocks.blocks.#.scale#", "encoder.blocks.#.gamma_#"),
        ("blocks.blocks.#.mlp.fc1.*", "encoder.blocks.#.mlp.0.*"),
        ("blocks.blocks.#.mlp.fc2.*", "encoder.blocks.#.mlp.2.*"),
        ("blocks.blocks.*", "encoder.blocks.*"),
        ("blocks.norm.*", "encoder.norm.*"),
        ("head.layers.0.*", "final_proj.*"),
    ),
}
BEIT: Pairs = (
    ("cls_token", "cls_emb"),
    ("mask_token", "mask_emb"),
    ("patch_embed.proj.*", "patch_embed.conv.*"),
    ("lm_head.*", "final_proj.*"),
    ("blocks.#.mlp.fc1.*", "encoder.blocks.#.mlp.0.*"),
    ("blocks.#.mlp.fc2.*", "encoder.blocks.#.mlp.2.*"),
    *((f"{part}.*", f"encoder.{part}.*") for part in ("blocks", "rel_pos_bias", "norm")),
)
"""Names of the separate 1.0 vision repository to those of fairseq."""
# Prefix of the student's names below which the 1.0 teacher lives, unless it is a whole model; its names have no prefix.
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
    if config.stem.modality not in _MODALITIES:
        raise ValueError(f"stem.modality: expected {', '.join(_MODALITIES)}, got {config.stem.modality}")
    if config.stem.kind != "stock":
        raise ValueError(f"stem.kind: expected stock for a published name, got {config.stem.kind}")
    if config.version == 1:
        if config.stem.modality == "spectrograms":
            raise ValueError("stem.modality: expected speech, vision or text in 1.0, got spectrograms")
        return "d2v1_vision" if config.stem.modality == "vision" else f"d2v1_{_MODALITIES[config.stem.modality]}"
    return f"d2v2_{_MODALITIES[config.stem.modality]}"


def published_names(model: Data2Vec, name: str) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """Published names of one of our tensors, and the piece of it that each one is."""
    family = family_of(model)
    found = next(renamed(name, NAMES[family]), None)
    if found is None:
        raise KeyError(f"{name}: no published name in {family}")
    if name.startswith("stem.norms.") and model.config.stem.convolution_norm == "group":
        found = found.replace(".2.1.", ".2.")  # no layers around it that transpose
    if name.startswith("stem.proj.") and getattr(model.stem, "project", None) is not None:
        found = found.replace("local_encoder.", "local_encoder.0.")
    if name.startswith("decoder.blocks.") and model.config.decoder.kind == "cross":
        found = found.replace("decoder.encoder.", "decoder.")
    if name.startswith("positions.convs.") and model.config.stem.position_norm:
        # With a norm before them the published convolutions lie one level deeper.
        found = found.replace("relative_positional_encoder.", "relative_positional_encoder.1.")
    if "{qkv}" in found:
        return [(found.replace("{qkv}", letter), _third(i)) for i, letter in enumerate("qkv")]
    if family == "d2v1_vision" and name == "mask_token":
        return [(found, lambda t: t.view(1, 1, -1))]
    return [(found, lambda t: t)]


def _third(index: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.chunk(3)[index]


def student_entries(model: Data2Vec) -> Iterator[Entry]:
    """Weights and fixed tables of the student."""
    for part in (*PARTS, "decoder", "shared_decoder", "head", "reconstruction"):
        module = getattr(model, part)
        if module is not None:
            yield from _entries(model, part, module)
    if model.mask_token is not None:
        for name, view in published_names(model, "mask_token"):
            yield Entry(name, view, model.mask_token)


def teacher_entries(model: Data2Vec) -> Iterator[tuple[Entry, bool]]:
    """What the published `_ema` entry holds, and whether it is averaged here or the student's own."""
    prefix = TEACHER_PREFIX.get(family_of(model))
    if model.config.ema.scope == "all" and prefix == "encoder.":
        prefix = ""
        unused = ("mask_emb", "final_proj.")
        yield from ((entry, False) for entry in student_entries(model) if entry.name.startswith(unused))
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
