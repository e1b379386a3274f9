"""Our configurations as the `model` section of a published one: the inverse of `fairseq_config`."""

from __future__ import annotations

from typing import Any

from d2v.config import Config

_LAYER_NORMS = ("batch", "instance", "group", "layer")
_OUT_NORMS = ("layer", "instance")


def describe(config: Config, family: str) -> dict[str, Any]:
    """Options of the published model of `family` that has this configuration.

    Raises:
        NotImplementedError: something that the published code has no option for.
    """
    _refuse(config.stem.norm_eps != 1e-5, "stem.norm_eps", "1e-05", config.stem.norm_eps)
    if family == "d2v1_audio":
        return _describe_audio1(config)
    if family == "d2v1_text":
        return _describe_text1(config)
    if family == "d2v1_vision":
        return _describe_vision1(config)
    return _describe_second(config, family.removeprefix("d2v2_"))


def _refuse(condition: bool, name: str, expected: str, got: object) -> None:
    if condition:
        raise NotImplementedError(f"format fairseq: {name}: expected {expected}, got {got}")


def _describe_second(config: Config, name: str) -> dict[str, Any]:
    encoder, loss = config.encoder, config.loss
    ema_local = config.ema.scope == "all"
    _refuse(config.ema.scope in ("transformer", "layers"), "ema.scope", "all, encoder or blocks", config.ema.scope)
    modality = {
        "type": name.upper(), "prenet_depth": encoder.prenet_depth, "prenet_dropout": encoder.prenet_dropout,
        "num_extra_tokens": encoder.extra_tokens, "init_extra_token_zero": False, "ema_local_encoder": ema_local,
        "mask_prob": config.mask.ratio, "mask_prob_adjust": config.mask.adjust, "mask_length": config.mask.span,
        "inverse_mask": config.mask.inverse, "mask_noise_std": config.mask.noise_std,
        "use_alibi_encoder": encoder.alibi != "none", "alibi_scale": encoder.alibi_scale,
        "num_alibi_heads": encoder.alibi_heads or encoder.heads, "learned_alibi_scale": encoder.alibi == "learned",
        "learned_alibi_scale_per_head": encoder.alibi_per_head,
        "learned_alibi_scale_per_layer": encoder.alibi_per_layer,
        "decoder": {
            "decoder_layers": config.decoder.layers, "decoder_dim": config.decoder.width,
            "decoder_kernel": config.decoder.kernel, "decoder_groups": config.decoder.groups,
            "decoder_residual": config.decoder.residual, "projection_layers": config.decoder.projection_layers,
            "projection_ratio": config.decoder.projection_ratio, "input_dropout": config.decoder.input_dropout,
            "add_positions_masked": config.decoder.positions_masked,
            "add_positions_all": config.decoder.positions_all,
        },
        **_STEMS[name](config),
    }  # fmt: skip
    scale = config.loss_scale
    return {
        "_name": "data2vec_multi", "embed_dim": encoder.width, "num_heads": encoder.heads, "depth": encoder.depth,
        "mlp_ratio": encoder.mlp_ratio, "layer_norm_first": encoder.norm_order == "pre",
        "norm_eps": encoder.norm_eps, "norm_affine": encoder.norm_affine, "encoder_dropout": encoder.dropout,
        "post_mlp_drop": encoder.dropout, "attention_dropout": encoder.attention_dropout,
        "activation_dropout": encoder.activation_dropout, "dropout_input": 0.0, "layerdrop": encoder.layer_drop,
        "start_drop_path_rate": 0.0, "end_drop_path_rate": encoder.drop_path, "clone_batch": config.mask.copies,
        "d2v_loss": 1.0, "cls_loss": loss.class_weight, "recon_loss": 0.0, "loss_beta": loss.beta,
        "loss_scale": None if scale == encoder.width**-0.5 else scale,
        "ema_encoder_only": config.ema.scope == "blocks", "max_update": config.run.steps,
        **_describe_target(config), **_describe_ema(config), "supported_modality": name.upper(),
        "modalities": {name: modality},
    }  # fmt: skip


def _image_stem(config: Config) -> dict[str, Any]:
    stem = config.stem
    _refuse(stem.position_scale not in (0.0, 1.0), "stem.position_scale", "0 or 1", stem.position_scale)
    return {
        "embed_dim": config.encoder.width, "input_size": stem.image_size, "patch_size": stem.patch_size,
        "in_chans": stem.channels, "fixed_positions": stem.position_scale == 1.0,
    }  # fmt: skip


def _text_stem(config: Config) -> dict[str, Any]:
    stem = config.stem
    return {
        "dropout": stem.dropout, "max_source_positions": stem.max_tokens,
        "no_token_positional_embeddings": not stem.learned_positions, "layernorm_embedding": stem.embedding_norm,
        "no_scale_embedding": stem.embedding_scale == 1.0,
    }  # fmt: skip


def _audio_stem(config: Config) -> dict[str, Any]:
    stem = config.stem
    _refuse(stem.positions != "conv", "stem.positions", "conv", stem.positions)
    _refuse(stem.convolution_bias, "stem.convolution_bias", "False", True)
    return {
        "extractor_mode": "layer_norm", "feature_encoder_spec": _list_convolutions(config),
        "local_grad_mult": stem.gradient_scale, "conv_pos_depth": stem.position_layers,
        "conv_pos_width": stem.position_width, "conv_pos_groups": stem.position_groups,
        "conv_pos_pre_ln": stem.position_norm,
    }  # fmt: skip


_STEMS = {"audio": _audio_stem, "image": _image_stem, "text": _text_stem}


def _describe_audio1(config: Config) -> dict[str, Any]:
    stem, encoder = config.stem, config.encoder
    _refuse(config.ema.scope not in ("layers", "encoder"), "ema.scope", "layers or encoder", config.ema.scope)
    _refuse(encoder.norm_eps != 1e-5, "encoder.norm_eps", "1e-05", encoder.norm_eps)
    _refuse(encoder.prenet_dropout != encoder.dropout, "encoder.prenet_dropout", "encoder.dropout", "another")
    return {
        "_name": "data2vec_audio", "extractor_mode": "layer_norm", "conv_feature_layers": _list_convolutions(config),
        "conv_bias": stem.convolution_bias, "feature_grad_mult": stem.gradient_scale,
        "dropout_input": stem.dropout, "conv_pos": stem.position_width, "conv_pos_groups": stem.position_groups,
        "pos_conv_depth": stem.position_layers, **_describe_blocks1(config), "encoder_layers": encoder.depth,
        "encoder_embed_dim": encoder.width, "encoder_attention_heads": encoder.heads,
        "encoder_ffn_embed_dim": round(encoder.width * encoder.mlp_ratio), "encoder_layerdrop": encoder.layer_drop,
        "layer_norm_first": encoder.norm_order == "pre", "mask_prob": config.mask.ratio,
        "mask_length": config.mask.span, "require_same_masks": "equal-mask-counts" in config.published,
        "ema_layers_only": config.ema.scope == "layers", "ema_transformer_only": True,
        "max_update": config.run.steps, **_describe_target(config), **_describe_loss1(config),
        **_describe_ema(config),
    }  # fmt: skip


def _describe_blocks1(config: Config) -> dict[str, Any]:
    encoder = config.encoder
    return {
        "dropout": encoder.dropout, "attention_dropout": encoder.attention_dropout,
        "activation_dropout": encoder.activation_dropout,
    }  # fmt: skip


def _describe_text1(config: Config) -> dict[str, Any]:
    stem, encoder = config.stem, config.encoder
    _refuse(config.ema.scope not in ("blocks", "all"), "ema.scope", "blocks or all", config.ema.scope)
    _refuse(stem.dropout != encoder.dropout, "stem.dropout", f"encoder.dropout {encoder.dropout}", stem.dropout)
    return {
        "_name": "data2vec_text", "head_layers": config.head.layers,
        "ema_transformer_layers_only": config.ema.scope == "blocks",
        "transformer": {
            **_describe_blocks1(config), "activation_fn": "gelu", "max_source_positions": stem.max_tokens,
            "no_token_positional_embeddings": not stem.learned_positions,
            "layernorm_embedding": stem.embedding_norm, "no_scale_embedding": stem.embedding_scale == 1.0,
            "encoder": {
                "embed_dim": encoder.width, "ffn_embed_dim": round(encoder.width * encoder.mlp_ratio),
                "layers": encoder.depth, "attention_heads": encoder.heads, "learned_pos": True,
                "normalize_before": encoder.norm_order == "pre", "layerdrop": encoder.layer_drop,
            },
        },
        **_describe_target(config), **_describe_loss1(config), **_describe_ema(config),
    }  # fmt: skip


def _describe_vision1(config: Config) -> dict[str, Any]:
    stem, encoder = config.stem, config.encoder
    _refuse(config.target.source != "block", "target.source", "block", config.target.source)
    return {
        "_name": "data2vec_vision", "image_size": stem.image_size, "patch_size": stem.patch_size,
        "in_channels": stem.channels, "embed_dim": encoder.width, "num_heads": encoder.heads,
        "depth": encoder.depth, "layer_scale_init_value": encoder.layer_scale,
        "attention_dropout": encoder.attention_dropout, "drop_path": encoder.drop_path,
        "num_mask_patches": round(config.mask.ratio * stem.grid[0] * stem.grid[1]),
        "min_mask_patches_per_block": config.mask.span**2, "shared_rel_pos_bias": True,
        "ema_transformer_only": True, **_describe_target(config), **_describe_loss1(config),
        **_describe_ema(config),
    }  # fmt: skip


def _describe_loss1(config: Config) -> dict[str, Any]:
    return {"loss_beta": config.loss.beta, "loss_scale": config.loss.scale}


def _describe_target(config: Config) -> dict[str, Any]:
    target = config.target
    on = _split(target.norm, _LAYER_NORMS, "target.norm")
    out = _split(target.out_norm, _OUT_NORMS, "target.out_norm")
    return {
        "average_top_k_layers": target.top_k, "end_of_block_targets": target.source == "block",
        **{f"{name}_norm_target_layer": name in on for name in _LAYER_NORMS},
        **{f"{name}_norm_targets": name in out for name in _OUT_NORMS},
    }  # fmt: skip


def _split(norms: str, order: tuple[str, ...], name: str) -> list[str]:
    """Names of a norm setting; the published code applies them in a fixed order."""
    parts = [] if norms == "none" else norms.split(",")
    _refuse(parts != [n for n in order if n in parts], name, f"some of {', '.join(order)} in this order", norms)
    return parts


def _describe_ema(config: Config) -> dict[str, Any]:
    ema = config.ema
    anneal = ema.anneal_steps if ema.anneal_steps is not None else config.run.steps
    return {"ema_decay": ema.start, "ema_end_decay": ema.end, "ema_anneal_end_step": anneal}


def _list_convolutions(config: Config) -> str:
    return str([tuple(layer) for layer in config.stem.convolutions])
