"""Configurations of the published fairseq models in our own terms.

Every option is translated, refused where its value is not built, or without effect on the model
(`fairseq_options.NO_EFFECT`); others raise a warning once. Defaults are those of the published code.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

from d2v.config import SPEECH_CONVOLUTIONS, Config, Decoder, Ema, Encoder, Head, Loss, Mask, Run, Stem, Target
from d2v.interop.fairseq.options import PUBLISHED, Section

Shapes = Mapping[str, tuple[int, ...]]


def translate(config: Mapping[str, Any], family: str, shapes: Shapes, mask_token: int | None) -> Config:
    """Our configuration of a published model.

    Args:
        config: the `model` section.
        shapes: of the student's tensors by published names: the vocabulary is in no configuration.
        mask_token: id of the mask token (1.0 text).
    """
    if family == "d2v1_audio":
        return _translate_audio1(config)
    if family == "d2v1_vision":
        return _translate_vision1(config)
    if family == "d2v1_text":
        return _translate_text1(config, shapes, mask_token)
    return _translate_second(config, family, shapes)


# ---- 2.0 --------------------------------------------------------------------------------------------------------


def _translate_second(config: Mapping[str, Any], family: str, shapes: Shapes) -> Config:
    name = family.removeprefix("d2v2_")
    model = Section(config, "", "")
    for option in ("start_drop_path_rate", "dropout_input", "recon_loss"):
        model.only(option, 0)
    model.only("shared_decoder", None)
    model.only("mae_init", False)
    model.only("skip_ema", False)
    modality = Section((model.get("modalities") or {}).get(name) or {}, f"modalities.{name}.", "modality")
    _refuse_modality(modality, name)
    width = model.get("embed_dim", 768)
    decoder = modality.get("decoder")
    if decoder is None:
        raise NotImplementedError(f"{modality.where}decoder: expected a section, got None")
    result = Config(
        version=2,
        stem=_stem_second(modality, name, width, shapes),
        encoder=_encoder_second(model, modality, name, width),
        decoder=_decoder_second(Section(decoder, f"{modality.where}decoder.", "decoder"), name),
        mask=_mask_second(model, modality),
        target=_translate_target(model, "ffn", model.get("depth", 8)),
        loss=_loss_second(model, width),
        ema=_ema_second(model, modality),
        run=Run(steps=int(model.get("max_update") or 0)),
        published=PUBLISHED[family],
    )
    model.close()
    modality.close()
    return result


def _refuse_modality(modality: Section, name: str) -> None:
    for option in ("prenet_layerdrop", "start_drop_path_rate", "end_drop_path_rate", "keep_masked_pct"):
        modality.only(option, 0)
    for option in ("mask_dropout", "mask_channel_prob"):
        modality.only(option, 0)
    modality.only("mask_prob_min", None)
    for option in ("add_masks", "remove_masks", "learned_alibi", "transformer_decoder"):
        modality.only(option, False)
    if name == "audio":
        modality.only("extractor_mode", "layer_norm")
        modality.only("encoder_zero_mask", True)
    else:
        modality.only("local_grad_mult", 1)
        modality.read.add("encoder_zero_mask")  # masked tokens are removed
    if name == "image":
        modality.only("alibi_dims", 2, 1)
        modality.only("alibi_distance", "manhattan", "euclidean")
    if name == "text":
        modality.only("learned_pos", True)


def _stem_second(modality: Section, name: str, width: int, shapes: Shapes) -> Stem:
    if name == "image":
        if (inner := modality.get("embed_dim", 768)) != width:
            raise NotImplementedError(f"{modality.where}embed_dim: expected {width}, got {inner}")
        return Stem(
            image_size=modality.get("input_size", 224),
            patch_size=modality.get("patch_size", 16),
            channels=modality.get("in_chans", 3),
            position_scale=1.0 if modality.get("fixed_positions", True) else 0.0,
        )
    if name == "text":
        return Stem(
            modality="text",
            positions="none",
            dropout=modality.get("dropout", 0.1),
            vocabulary=_vocabulary(shapes, "modality_encoders.TEXT.local_encoder.embed_tokens.weight"),
            max_tokens=modality.get("max_source_positions", 512),
            learned_positions=not modality.get("no_token_positional_embeddings", False),
            embedding_norm=modality.get("layernorm_embedding", True),
            embedding_scale=1.0 if modality.get("no_scale_embedding", True) else math.sqrt(width),
        )
    return Stem(
        modality="speech",
        positions="conv",
        convolutions=parse_convolutions(modality.get("feature_encoder_spec")),
        gradient_scale=float(modality.get("local_grad_mult", 1.0)),
        position_layers=modality.get("conv_pos_depth", 5),
        position_width=modality.get("conv_pos_width", 95),
        position_groups=modality.get("conv_pos_groups", 16),
        position_norm=modality.get("conv_pos_pre_ln", False),
    )


def _encoder_second(model: Section, modality: Section, name: str, width: int) -> Encoder:
    dropout = model.get("encoder_dropout", 0.1)
    if (other := model.get("post_mlp_drop", 0.1)) != dropout:
        raise NotImplementedError(f"post_mlp_drop: expected encoder_dropout {dropout}, got {other}")
    prenet, heads = modality.get("prenet_depth", 4), model.get("num_heads", 12)
    # Without prenet blocks, text has neither norm nor dropout before the main blocks.
    bare = name == "text" and prenet == 0
    learned = modality.get("learned_alibi_scale", False)
    prenet_dropout = modality.get("prenet_dropout", 0.0)
    return Encoder(
        width=width,
        heads=heads,
        prenet_depth=prenet,
        depth=model.get("depth", 8),
        mlp_ratio=model.get("mlp_ratio", 4),
        norm_order="pre" if model.get("layer_norm_first") else "post",
        norm_eps=model.get("norm_eps", 1e-6),
        norm_affine=model.get("norm_affine", True),
        input_norm=not bare,
        alibi=("learned" if learned else "fixed") if modality.get("use_alibi_encoder", False) else "none",
        alibi_scale=float(modality.get("alibi_scale", 1.0)),
        alibi_heads=modality.get("num_alibi_heads", heads),
        alibi_distance=_alibi_distance(modality, name),
        alibi_per_head=bool(modality.get("learned_alibi_scale_per_head", False)),
        alibi_per_layer=bool(modality.get("learned_alibi_scale_per_layer", False)),
        extra_tokens=modality.get("num_extra_tokens", 0),
        dropout=dropout,
        attention_dropout=model.get("attention_dropout", 0.1),
        activation_dropout=model.get("activation_dropout", 0.0),
        prenet_dropout=0.0 if bare else prenet_dropout,
        layer_drop=model.get("layerdrop", 0.0),
        drop_path=model.get("end_drop_path_rate", 0.0),
    )


def _alibi_distance(modality: Section, name: str) -> Any:
    if name != "image" or modality.get("alibi_dims", 2) == 1:
        return "sequence"
    return modality.get("alibi_distance", "manhattan")


def _decoder_second(decoder: Section, name: str) -> Decoder:
    layers, ratio = decoder.get("projection_layers", 1), decoder.get("projection_ratio", 2.0)
    if name == "image":  # the published 2-D decoder ignores both
        layers, ratio = 1, 2.0
    result = Decoder(
        layers=decoder.get("decoder_layers", 5),
        width=decoder.get("decoder_dim", 384),
        kernel=decoder.get("decoder_kernel", 5),
        groups=decoder.get("decoder_groups", 16),
        residual=decoder.get("decoder_residual", True),
        projection_layers=layers,
        projection_ratio=ratio,
        input_dropout=decoder.get("input_dropout", 0.1),
        positions_masked=decoder.get("add_positions_masked", False),
        positions_all=decoder.get("add_positions_all", False),
    )
    decoder.close()
    return result


def _mask_second(model: Section, modality: Section) -> Mask:
    span = modality.get("mask_length", 5)
    return Mask(
        kind="block" if span > 1 else "random",
        ratio=modality.get("mask_prob", 0.7),
        adjust=modality.get("mask_prob_adjust", 0.0),
        span=max(span, 1),
        inverse=bool(modality.get("inverse_mask", False)) and span > 1,
        copies=model.get("clone_batch", 1),
        noise_std=modality.get("mask_noise_std", 0.01),
    )


def _loss_second(model: Section, width: int) -> Loss:
    regression = float(model.get("d2v_loss", 1))
    if regression <= 0.0:
        raise NotImplementedError(f"d2v_loss: expected above 0, got {regression}")
    scale = model.get("loss_scale")
    scale = width**-0.5 if scale is None else float(scale)
    # d2v_loss scales the regression only, so the class weight is divided by it.
    return Loss(
        beta=float(model.get("loss_beta", 0)),
        scale=scale * regression,
        class_weight=model.get("cls_loss", 0) / regression,
    )


def _ema_second(model: Section, modality: Section) -> Ema:
    local = modality.get("ema_local_encoder", False)
    scope = "blocks" if model.get("ema_encoder_only", True) else "all" if local else "encoder"
    return _translate_ema(model, scope, model.get("max_update"))


# ---- 1.0 --------------------------------------------------------------------------------------------------------


def _translate_audio1(config: Mapping[str, Any]) -> Config:
    model = Section(config, "", "audio1")
    model.only("extractor_mode", "layer_norm")
    model.only("activation_fn", "gelu")
    model.only("layer_type", "transformer")
    model.only("pos_enc_type", "abs")
    model.only("mask_selection", "static")
    model.only("no_mask_overlap", False)
    for option in ("mask_other", "mask_dropout", "mask_channel_prob"):
        model.only(option, 0)
    layers_only = model.get("ema_layers_only", True)
    if not layers_only:
        model.only("ema_transformer_only", True)
    model.read.add("ema_transformer_only")
    depth = model.get("pos_conv_depth", 1)
    if depth < 2:
        raise NotImplementedError(f"pos_conv_depth: expected at least 2, got {depth}")
    width, dropout = model.get("encoder_embed_dim", 768), model.get("dropout", 0.1)
    published = PUBLISHED["d2v1_audio"]
    if not model.get("require_same_masks", True):
        published = published - {"equal-mask-counts"}
    result = Config(
        version=1,
        stem=Stem(
            modality="speech",
            positions="conv",
            dropout=model.get("dropout_input", 0.0),
            convolutions=parse_convolutions(model.get("conv_feature_layers")),
            convolution_bias=model.get("conv_bias", False),
            gradient_scale=float(model.get("feature_grad_mult", 1.0)),
            position_layers=depth,
            position_width=model.get("conv_pos", 128),
            position_groups=model.get("conv_pos_groups", 16),
        ),
        encoder=Encoder(
            width=width,
            heads=model.get("encoder_attention_heads", 12),
            depth=model.get("encoder_layers", 12),
            mlp_ratio=hidden_ratio(model.get("encoder_ffn_embed_dim", 3072), width),
            norm_order="pre" if model.get("layer_norm_first", False) else "post",
            dropout=dropout,
            attention_dropout=model.get("attention_dropout", 0.1),
            activation_dropout=model.get("activation_dropout", 0.0),
            prenet_dropout=dropout,
            layer_drop=model.get("encoder_layerdrop", 0.0),
        ),
        mask=Mask(kind="span", ratio=model.get("mask_prob", 0.65), span=model.get("mask_length", 10)),
        target=_translate_target(model, "ffn", model.get("encoder_layers", 12)),
        loss=_loss_first(model),
        ema=_translate_ema(model, "layers" if layers_only else "encoder", model.get("max_update")),
        run=Run(steps=int(model.get("max_update") or 0)),
        published=published,
    )
    model.close()
    return result


def _translate_text1(config: Mapping[str, Any], shapes: Shapes, mask_token: int | None) -> Config:
    model = Section(config, "", "text1")
    transformer = model.section("transformer", "transformer")
    encoder = transformer.section("encoder", "transformer.encoder")
    transformer.only("activation_fn", "gelu")
    transformer.only("adaptive_input", False)
    transformer.only("relu_dropout", 0)
    noise = transformer.section("quant_noise", "transformer")
    noise.only("pq", 0)
    noise.only("scalar", 0)
    encoder.only("learned_pos", True)
    encoder.only("xformers_att_config", None)
    width, dropout = encoder.get("embed_dim", 512), transformer.get("dropout", 0.1)
    result = Config(
        version=1,
        stem=Stem(
            modality="text",
            positions="none",
            dropout=dropout,
            vocabulary=_vocabulary(shapes, "encoder.sentence_encoder.embed_tokens.weight"),
            max_tokens=transformer.get("max_source_positions", 1024),
            mask_token=mask_token,
            learned_positions=not transformer.get("no_token_positional_embeddings", False),
            embedding_norm=transformer.get("layernorm_embedding", False),
            embedding_scale=1.0 if transformer.get("no_scale_embedding", False) else math.sqrt(width),
        ),
        encoder=Encoder(
            width=width,
            heads=encoder.get("attention_heads", 8),
            depth=encoder.get("layers", 6),
            mlp_ratio=hidden_ratio(encoder.get("ffn_embed_dim", 2048), width),
            norm_order="pre" if encoder.get("normalize_before", False) else "post",
            input_norm=False,
            dropout=dropout,
            attention_dropout=transformer.get("attention_dropout", 0.0),
            activation_dropout=transformer.get("activation_dropout", 0.0),
            layer_drop=encoder.get("layerdrop", 0),
        ),
        head=Head(layers=model.get("head_layers", 1)),
        mask=Mask(kind="token-span", ratio=0.35, span=4),  # the published task's; no option of the model
        target=_translate_target(model, "ffn", encoder.get("layers", 6)),
        loss=_loss_first(model),
        ema=_translate_ema(model, "blocks" if model.get("ema_transformer_layers_only", True) else "all", None),
        published=PUBLISHED["d2v1_text"],
    )
    for section in (model, transformer, encoder):
        section.close()
    return result


def _translate_vision1(config: Mapping[str, Any]) -> Config:
    model = Section(config, "", "vision1")
    model.only("shared_rel_pos_bias", True)
    model.only("ema_transformer_only", True)
    size, patch = model.get("image_size", 224), model.get("patch_size", 16)
    patches = (size // patch) ** 2
    end_of_block = model.get("end_of_block_targets", True)
    result = Config(
        version=1,
        stem=Stem(image_size=size, patch_size=patch, channels=model.get("in_channels", 3), positions="relative"),
        encoder=Encoder(
            width=model.get("embed_dim", 768),
            heads=model.get("num_heads", 12),
            depth=model.get("depth", 12),
            mlp_ratio=4.0,  # the published code ignores its own option
            norm_order="pre",
            norm_eps=1e-5,
            layer_scale=max(0.0, model.get("layer_scale_init_value", 1e-4)),
            key_bias=False,
            extra_tokens=1,
            init_rescale=True,
            attention_dropout=model.get("attention_dropout", 0.0),
            drop_path=model.get("drop_path", 0.1),
        ),
        mask=Mask(
            kind="rectangles",
            ratio=min(model.get("num_mask_patches", 75), patches - 1) / patches,
            span=math.isqrt(model.get("min_mask_patches_per_block", 16)),
        ),
        target=_translate_target(model, "block" if end_of_block else "ffn", model.get("depth", 12)),
        loss=_loss_first(model),
        ema=_translate_ema(model, "transformer", None),
        published=PUBLISHED["d2v1_vision"],
    )
    model.close()
    return result


def _loss_first(model: Section) -> Loss:
    scale = model.get("loss_scale")
    # Text takes 0 and below for "unset", too.
    return Loss(beta=float(model.get("loss_beta", 0)), scale=None if scale is None or scale <= 0 else float(scale))


# ---- all families -----------------------------------------------------------------------------------------------


def _translate_target(model: Section, source: str, depth: int) -> Target:
    if model.get("end_of_block_targets", False) and source == "ffn":
        source = "block"
    norms = ("batch_norm_target_layer", "instance_norm_target_layer", "group_norm_target_layer")
    return Target(
        source=source,  # type: ignore[arg-type]
        top_k=min(model.get("average_top_k_layers", 8), depth),  # as published: at most all
        norm=_joined_norm(model, (*norms, "layer_norm_target_layer")),
        out_norm=_joined_norm(model, ("layer_norm_targets", "instance_norm_targets")),
    )


def _joined_norm(model: Section, options: tuple[str, ...]) -> str:
    """The norms whose options are on, in the order in which the published code applies them."""
    return ",".join(option.split("_")[0] for option in options if model.get(option)) or "none"


def _translate_ema(model: Section, scope: str, updates: int | None) -> Ema:
    anneal = model.get("ema_anneal_end_step", updates)
    return Ema(
        start=model.get("ema_decay", 0.999),
        end=model.get("ema_end_decay", 0.9999),
        anneal_steps=None if anneal is None else int(anneal),
        scope=scope,  # type: ignore[arg-type]
    )


def _vocabulary(shapes: Shapes, name: str) -> int:
    if name not in shapes or len(shapes[name]) != 2:
        raise ValueError(f"student: expected a tensor {name} (vocabulary, C), got {shapes.get(name)}")
    return shapes[name][0]


def hidden_ratio(hidden: int, width: int) -> float:
    """Ratio that gives the hidden width back when multiplied by the width and cut to an integer."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def parse_convolutions(text: str | None) -> tuple[tuple[int, int, int], ...]:
    """(channels, kernel, stride) of each convolution from text such as "[(512, 10, 5)] + [(512, 3, 2)] * 4".

    Only lists of numbers, + and * are understood; nothing is executed.

    Raises:
        ValueError: any other text.
    """
    if text is None:
        return SPEECH_CONVOLUTIONS
    try:
        layers = _evaluate(ast.parse(text.strip(), mode="eval").body)
        return tuple((int(c), int(k), int(s)) for c, k, s in layers)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"conv_feature_layers: expected a list of (channels, kernel, stride), got {text!r}") from error


def _evaluate(node: ast.expr) -> list[Any]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _evaluate(node.left) + _evaluate(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        times = ast.literal_eval(node.right)
        if not isinstance(times, int) or not 0 <= times <= 64:
            raise ValueError(f"expected a factor up to 64, got {times!r}")
        return _evaluate(node.left) * times
    value = ast.literal_eval(node)
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {type(value).__name__}")
    return value
