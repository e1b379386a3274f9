"""Models in the configuration and the parameter names of the published fairseq code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, Decoder, Ema, Encoder, Loss, Mask, Run, Stem, Target
from ..data2vec import Data2Vec
from ..teacher import PARTS

FAMILIES = ("d2v1_audio", "d2v1_vision", "d2v1_text", "d2v2_audio", "d2v2_image", "d2v2_text")


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its tensors: (prefix of our name, prefix of the published name), the first match counts."""

    student: tuple[tuple[str, str], ...]
    """Of the student; our names are those of `Data2Vec`."""
    teacher_blocks_only: tuple[tuple[str, str], ...]
    """Of a teacher that averages the main blocks only; in other scopes the student's names hold."""
    published: frozenset[str]
    """Behaviours that the family's published code has."""


_IMAGE = "modality_encoders.IMAGE."
LAYOUTS = {
    "d2v2_image": Layout(
        student=(
            ("stem.", _IMAGE + "local_encoder."),
            ("positions.table", _IMAGE + "fixed_positional_encoder.positions"),
            ("context.extra_tokens", _IMAGE + "extra_tokens"),
            ("context.", _IMAGE + "context_encoder."),
            ("blocks.blocks.", "blocks."),
            ("blocks.norm.", "norm."),
            ("decoder.blocks.", _IMAGE + "decoder.blocks."),
            ("decoder.proj.", _IMAGE + "decoder.proj."),
        ),
        teacher_blocks_only=(("blocks.blocks.", ""),),
        published=frozenset({"class-loss-per-micro-batch", "pre-norm-without-residual", "visible-count-of-row-0"}),
    ),
}

# Options that change the result and are not built, with the values that leave them out.
_MODEL_OFF: dict[str, tuple[Any, ...]] = {
    "start_drop_path_rate": (0,),
    "dropout_input": (0,),
    "shared_decoder": (None,),
    "recon_loss": (0,),
    "mae_init": (False,),
    "skip_ema": (False,),
}
_MODALITY_OFF: dict[str, tuple[Any, ...]] = {
    "prenet_layerdrop": (0,),
    "start_drop_path_rate": (0,),
    "end_drop_path_rate": (0,),
    "mask_prob_min": (None,),
    "keep_masked_pct": (0,),
    "mask_dropout": (0,),
    "local_grad_mult": (1,),
    "use_alibi_encoder": (False,),
    "transformer_decoder": (False,),
    "enc_dec_transformer": (False,),
}
_DECODER_OFF: dict[str, tuple[Any, ...]] = {"add_positions_masked": (False,), "add_positions_all": (False,)}


def build(
    config: dict[str, Any],
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor] | None,
    *,
    family: str,
    mask_token: int | None = None,
) -> Data2Vec:
    """A model from a fairseq model configuration and named tensors.

    It reproduces every behaviour of the family's published code (`Config.published`).

    Args:
        config: the `model` section of a fairseq configuration, resolved to plain values.
        student: tensors by published names; kept in float32.
        teacher: tensors by the names of the published `_ema` entry; None: a copy of the student.
        family: one of `FAMILIES`; built now: d2v2_image.
        mask_token: id of the mask token of 1.0 text; other families take None.

    Raises:
        ValueError: unknown family, missing, unexpected or misshapen tensors. NotImplementedError: a family or an
            option that is not built, by name.
    """
    layout = _layout(family)
    if mask_token is not None:
        raise ValueError(f"mask_token: expected None for {family}, got {mask_token}")
    translated = _translate_image(config, layout.published)
    # The averages are used as they are; the random weights drawn here are all overwritten.
    with torch.random.fork_rng(devices=[]):
        model = Data2Vec(translated)
    _load("student", parameters(model), student)
    if teacher is None:
        for name in model.teacher.owned:
            model.teacher.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
    else:
        _load("teacher", teacher_parameters(model), teacher)
    return model


def parameters(model: Data2Vec) -> dict[str, Tensor]:
    """The student's tensors by published names, fixed positions included: live views without gradient."""
    layout = _layout(_family(model))
    return {_rename(name, layout.student): t.detach() for name, t in _student_tensors(model)}


def gradients(model: Data2Vec) -> dict[str, Tensor]:
    """Gradients of the student's parameters by published names; those without a gradient are absent."""
    layout = _layout(_family(model))
    return {_rename(name, layout.student): t.grad for name, t in _student_tensors(model) if t.grad is not None}


def teacher_parameters(model: Data2Vec) -> dict[str, Tensor]:
    """The teacher's tensors by the names of the published `_ema` entry: live views of averages and fixed tables."""
    layout = _layout(_family(model))
    if model.config.ema.scope == "blocks":
        blocks = model.teacher.get_submodule("blocks.blocks")
        return {
            _rename("blocks.blocks." + name, layout.teacher_blocks_only): t.detach()
            for name, t in blocks.named_parameters()
        }
    return {
        _rename(name, layout.student): t.detach()
        for part in model.teacher.owned
        for name, t in _tensors(part, model.teacher.get_submodule(part))
    }


def _layout(family: str) -> Layout:
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    if family not in LAYOUTS:
        raise NotImplementedError(f"family: expected one of {', '.join(LAYOUTS)}, got {family!r}")
    return LAYOUTS[family]


def _family(model: Data2Vec) -> str:
    return {("vision", 2): "d2v2_image"}[model.config.stem.modality, model.config.version]


def _tensors(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and enabled fixed tables, under our names."""
    for name, parameter in module.named_parameters():
        yield f"{prefix}.{name}", parameter
    if getattr(module, "enabled", True):
        for name, buffer in module.named_buffers():
            yield f"{prefix}.{name}", buffer


def _student_tensors(model: Data2Vec) -> Iterator[tuple[str, Tensor]]:
    for part in (*PARTS, "decoder"):
        yield from _tensors(part, model.get_submodule(part))


def _rename(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for ours, published in prefixes:
        if name.startswith(ours):
            renamed = published + name[len(ours) :]
            # A convolution is the first layer of its published block.
            if ours == "decoder.blocks.":
                index, leaf = name[len(ours) :].split(".")
                renamed = f"{published}{index}.0.{leaf}"
            return renamed
    raise KeyError(name)


@torch.no_grad()
def _load(what: str, own: dict[str, Tensor], given: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"{what}: expected the tensors of the configuration; missing {missing}, unexpected {unexpected}"
        )
    for name, tensor in own.items():
        if given[name].shape != tensor.shape:
            raise ValueError(f"{what}: {name}: expected shape {tuple(tensor.shape)}, got {tuple(given[name].shape)}")
        tensor.copy_(given[name])


def _require_off(where: str, section: Mapping[str, Any], off: dict[str, tuple[Any, ...]]) -> None:
    for name, values in off.items():
        if name in section and section[name] not in values:
            raise NotImplementedError(f"{where}{name}: expected {values[0]}, got {section[name]!r}")


def _joined_norm(config: Mapping[str, Any], options: tuple[tuple[str, str], ...]) -> str:
    """The norms whose options are on, in the order in which the published code applies them."""
    return ",".join(norm for option, norm in options if config.get(option)) or "none"


def _translate_image(config: Mapping[str, Any], published: frozenset[str]) -> Config:
    """Our configuration of a 2.0 image model; defaults are those of the published code."""
    image = config["modalities"]["image"]
    _require_off("", config, _MODEL_OFF)
    _require_off("modalities.image.", image, _MODALITY_OFF)
    width = config.get("embed_dim", 768)
    if image.get("embed_dim", 768) != width:
        raise NotImplementedError(f"modalities.image.embed_dim: expected {width}, got {image.get('embed_dim', 768)}")
    return Config(
        stem=Stem(
            image_size=image.get("input_size", 224),
            patch_size=image.get("patch_size", 16),
            channels=image.get("in_chans", 3),
            position_scale=1.0 if image.get("fixed_positions", True) else 0.0,
        ),
        encoder=_translate_encoder(config, image, width),
        decoder=_translate_decoder(image.get("decoder")),
        mask=_translate_mask(config, image),
        target=Target(
            source="block" if config.get("end_of_block_targets") else "ffn",
            top_k=config.get("average_top_k_layers", 8),
            norm=_joined_norm(
                config,
                (
                    ("batch_norm_target_layer", "batch"),
                    ("instance_norm_target_layer", "instance"),
                    ("layer_norm_target_layer", "layer"),
                ),
            ),
            out_norm=_joined_norm(config, (("layer_norm_targets", "layer"), ("instance_norm_targets", "instance"))),
        ),
        loss=_translate_loss(config, width),
        ema=_translate_ema(config, image),
        run=Run(steps=int(config.get("max_update") or 0)),
        published=published,
    )


def _translate_encoder(config: Mapping[str, Any], image: Mapping[str, Any], width: int) -> Encoder:
    dropout = config.get("encoder_dropout", 0.1)
    if config.get("post_mlp_drop", 0.1) != dropout:
        raise NotImplementedError(
            f"post_mlp_drop: expected encoder_dropout {dropout}, got {config.get('post_mlp_drop', 0.1)}"
        )
    return Encoder(
        width=width,
        heads=config.get("num_heads", 12),
        prenet_depth=image.get("prenet_depth", 4),
        depth=config.get("depth", 8),
        mlp_ratio=config.get("mlp_ratio", 4),
        norm_order="pre" if config.get("layer_norm_first") else "post",
        norm_eps=config.get("norm_eps", 1e-6),
        norm_affine=config.get("norm_affine", True),
        extra_tokens=image.get("num_extra_tokens", 0),
        dropout=dropout,
        attention_dropout=config.get("attention_dropout", 0.1),
        activation_dropout=config.get("activation_dropout", 0.0),
        prenet_dropout=image.get("prenet_dropout", 0.0),
        layer_drop=config.get("layerdrop", 0.0),
        drop_path=config.get("end_drop_path_rate", 0.0),
    )


def _translate_decoder(decoder: Mapping[str, Any] | None) -> Decoder:
    if decoder is None:
        raise NotImplementedError("modalities.image.decoder: expected a section, got None")
    _require_off("modalities.image.decoder.", decoder, _DECODER_OFF)
    # The published 2-D decoder ignores projection_layers and projection_ratio.
    return Decoder(
        layers=decoder.get("decoder_layers", 5),
        width=decoder.get("decoder_dim", 384),
        kernel=decoder.get("decoder_kernel", 5),
        groups=decoder.get("decoder_groups", 16),
        residual=decoder.get("decoder_residual", True),
        input_dropout=decoder.get("input_dropout", 0.1),
    )


def _translate_mask(config: Mapping[str, Any], image: Mapping[str, Any]) -> Mask:
    span = image.get("mask_length", 5)
    return Mask(
        kind="block" if span > 1 else "random",
        ratio=image.get("mask_prob", 0.7),
        adjust=image.get("mask_prob_adjust", 0.0),
        span=max(span, 1),
        inverse=bool(image.get("inverse_mask", False)) and span > 1,
        copies=config.get("clone_batch", 1),
        noise_std=image.get("mask_noise_std", 0.01),
    )


def _translate_loss(config: Mapping[str, Any], width: int) -> Loss:
    regression = float(config.get("d2v_loss", 1))
    if regression <= 0.0:
        raise NotImplementedError(f"d2v_loss: expected above 0, got {regression}")
    scale = config.get("loss_scale")
    scale = width**-0.5 if scale is None else float(scale)
    # d2v_loss scales the regression only, so the class weight is divided by it.
    return Loss(
        beta=float(config.get("loss_beta", 0)),
        scale=scale * regression,
        class_weight=config.get("cls_loss", 0) / regression,
    )


def _translate_ema(config: Mapping[str, Any], image: Mapping[str, Any]) -> Ema:
    if config.get("ema_encoder_only", True):
        scope = "blocks"
    else:
        scope = "all" if image.get("ema_local_encoder", False) else "encoder"
    anneal = config.get("ema_anneal_end_step", config.get("max_update"))
    return Ema(
        start=config.get("ema_decay", 0.999),
        end=config.get("ema_end_decay", 0.9999),
        anneal_steps=None if anneal is None else int(anneal),
        scope=scope,  # type: ignore[arg-type]
    )
