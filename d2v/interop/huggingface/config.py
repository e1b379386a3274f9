"""Configurations of transformers' Data2Vec models, to ours and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from d2v import recipes
from d2v.config import Config
from d2v.interop.fairseq.config import hidden_ratio

FAMILIES = {"data2vec-audio": "d2v1_audio", "data2vec-text": "d2v1_text", "data2vec-vision": "d2v1_vision"}
"""`model_type` of transformers -> published family."""
_SHARED = {"hidden_act": "gelu"}
_REQUIRED: dict[str, dict[str, Any]] = {
    "data2vec-audio": {**_SHARED, "feat_extract_activation": "gelu", "add_adapter": False},
    "data2vec-text": {**_SHARED, "is_decoder": False, "pad_token_id": 1},
    "data2vec-vision": {
        **_SHARED, "use_absolute_position_embeddings": False, "use_relative_position_bias": False,
    },
}  # fmt: skip
"""Options that have one value in published data2vec models; another one is refused by name."""


def read_config(given: Mapping[str, Any]) -> tuple[str, Config]:
    """Family and configuration of a transformers `config.json`. Keys without effect on the encoder are not read.

    Raises:
        NotImplementedError: an option with a value that is not built. ValueError: a required number is missing.
    """
    kind = given["model_type"]
    for name, value in _REQUIRED[kind].items():
        if given.get(name, value) != value:
            raise NotImplementedError(f"config.json: {name}: expected {value}, got {given[name]}")
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "layer_norm_eps")
    if absent := [name for name in needed if name not in given]:
        raise ValueError(f"config.json: expected {', '.join(needed)}, found no {', '.join(absent)}")
    family = FAMILIES[kind]
    config = _READERS[kind](given)
    width = int(given["hidden_size"])
    encoder = dataclasses.replace(
        config.encoder, width=width, heads=int(given["num_attention_heads"]), depth=int(given["num_hidden_layers"]),
        mlp_ratio=hidden_ratio(int(given["intermediate_size"]), width), norm_eps=float(given["layer_norm_eps"]),
    )  # fmt: skip
    stem = dataclasses.replace(config.stem, norm_eps=encoder.norm_eps)
    target = dataclasses.replace(config.target, top_k=min(config.target.top_k, encoder.depth))
    published = frozenset({"positions-see-padding"}) if kind == "data2vec-audio" else frozenset()
    return family, dataclasses.replace(
        config, recipe="", stem=stem, encoder=encoder, target=target, published=published
    )


def _read_audio(given: Mapping[str, Any]) -> Config:
    base = recipes.speech1_base()
    layers, kernel = int(given.get("num_conv_pos_embeddings", 5)), int(given.get("conv_pos_kernel_size", 19))
    convolutions = zip(given["conv_dim"], given["conv_kernel"], given["conv_stride"], strict=True)
    stem = dataclasses.replace(
        base.stem, convolutions=tuple((int(c), int(k), int(s)) for c, k, s in convolutions),
        convolution_bias=bool(given.get("conv_bias", False)), position_layers=layers, position_width=layers * kernel,
        position_groups=int(given.get("num_conv_pos_embedding_groups", 16)),
    )  # fmt: skip
    encoder = dataclasses.replace(
        base.encoder, dropout=float(given.get("hidden_dropout", 0.1)), layer_drop=float(given.get("layerdrop", 0.05)),
        attention_dropout=float(given.get("attention_dropout", 0.1)),
    )  # fmt: skip
    return dataclasses.replace(base, stem=stem, encoder=encoder)


def _read_text(given: Mapping[str, Any]) -> Config:
    base = recipes.text1_base()
    vocabulary = int(given["vocab_size"])
    stem = dataclasses.replace(
        base.stem, vocabulary=vocabulary, max_tokens=int(given["max_position_embeddings"]) - 2,
        mask_token=vocabulary - 1, dropout=float(given.get("hidden_dropout_prob", 0.1)),
    )  # fmt: skip
    encoder = dataclasses.replace(
        base.encoder, dropout=float(given.get("hidden_dropout_prob", 0.1)),
        attention_dropout=float(given.get("attention_probs_dropout_prob", 0.1)),
    )  # fmt: skip
    return dataclasses.replace(base, stem=stem, encoder=encoder)


def _read_vision(given: Mapping[str, Any]) -> Config:
    base = recipes.vision1_base()
    stem = dataclasses.replace(
        base.stem, image_size=int(given["image_size"]), patch_size=int(given["patch_size"]),
        channels=int(given.get("num_channels", 3)),
        positions="relative" if given.get("use_shared_relative_position_bias", True) else "none",
    )  # fmt: skip
    encoder = dataclasses.replace(
        base.encoder, drop_path=float(given.get("drop_path_rate", 0.0)),
        attention_dropout=float(given.get("attention_probs_dropout_prob", 0.0)),
        layer_scale=float(given.get("layer_scale_init_value", 1e-4)),
    )  # fmt: skip
    return dataclasses.replace(base, stem=stem, encoder=encoder)


_READERS: dict[str, Callable[[Mapping[str, Any]], Config]] = {
    "data2vec-audio": _read_audio,
    "data2vec-text": _read_text,
    "data2vec-vision": _read_vision,
}


def write_config(config: Config) -> dict[str, Any]:
    """The transformers `config.json` of a data2vec 1.0 configuration.

    Raises:
        NotImplementedError: a variant for which transformers has no model.
    """
    stem, encoder = config.stem, config.encoder
    order = "pre" if stem.modality == "vision" else "post"
    if encoder.norm_order != order or encoder.prenet_depth or encoder.alibi != "none" or not encoder.norm_affine:
        raise NotImplementedError(
            f"format huggingface: expected {order}-norm blocks with learned norms, no prenet blocks and no ALiBi, "
            f"got norm_order {encoder.norm_order}, prenet_depth {encoder.prenet_depth}, alibi {encoder.alibi}"
        )
    if stem.modality != "vision" and stem.norm_eps != encoder.norm_eps:
        raise NotImplementedError(
            f"format huggingface: stem.norm_eps: expected encoder.norm_eps {encoder.norm_eps}, got {stem.norm_eps}"
        )
    common: dict[str, Any] = {
        "hidden_size": encoder.width, "num_attention_heads": encoder.heads, "num_hidden_layers": encoder.depth,
        "intermediate_size": round(encoder.width * encoder.mlp_ratio), "layer_norm_eps": encoder.norm_eps,
        "hidden_act": "gelu", "initializer_range": encoder.init_std or 0.02, "dtype": "float32",
    }  # fmt: skip
    return {**_WRITERS[stem.modality](config), **common}


def _write_audio(config: Config) -> dict[str, Any]:
    stem, encoder = config.stem, config.encoder
    channels, kernels, strides = (list(column) for column in zip(*stem.convolutions, strict=True))
    return {
        "model_type": "data2vec-audio", "architectures": ["Data2VecAudioModel"], "conv_dim": channels,
        "conv_kernel": kernels, "conv_stride": strides, "conv_bias": stem.convolution_bias,
        "num_feat_extract_layers": len(channels), "feat_extract_activation": "gelu",
        "num_conv_pos_embeddings": stem.position_layers,
        "conv_pos_kernel_size": max(3, stem.position_width // stem.position_layers),
        "num_conv_pos_embedding_groups": stem.position_groups, "hidden_dropout": encoder.dropout,
        "attention_dropout": encoder.attention_dropout, "activation_dropout": encoder.activation_dropout,
        "feat_proj_dropout": 0.0, "layerdrop": encoder.layer_drop, "mask_time_prob": config.mask.ratio,
        "mask_time_length": config.mask.span, "add_adapter": False,
    }  # fmt: skip


def _write_text(config: Config) -> dict[str, Any]:
    stem, encoder = config.stem, config.encoder
    if not stem.learned_positions or not stem.embedding_norm or stem.embedding_scale != 1.0:
        raise NotImplementedError("format huggingface: expected learned positions and a norm on unscaled embeddings")
    return {
        "model_type": "data2vec-text", "architectures": ["Data2VecTextModel"], "vocab_size": stem.vocabulary,
        "max_position_embeddings": stem.max_tokens + 2, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0,
        "eos_token_id": 2, "hidden_dropout_prob": encoder.dropout,
        "attention_probs_dropout_prob": encoder.attention_dropout,
    }  # fmt: skip


def _write_vision(config: Config) -> dict[str, Any]:
    stem, encoder = config.stem, config.encoder
    if stem.positions == "sincos" or encoder.key_bias or encoder.layer_scale <= 0.0 or encoder.extra_tokens != 1:
        raise NotImplementedError(
            "format huggingface: expected relative positions, layer scale, no key bias and one class token"
        )
    return {
        "model_type": "data2vec-vision", "architectures": ["Data2VecVisionModel"], "image_size": stem.image_size,
        "patch_size": stem.patch_size, "num_channels": stem.channels, "layer_scale_init_value": encoder.layer_scale,
        "drop_path_rate": encoder.drop_path, "hidden_dropout_prob": encoder.dropout,
        "attention_probs_dropout_prob": encoder.attention_dropout, "use_mask_token": True, "use_mean_pooling": True,
        "use_shared_relative_position_bias": stem.positions == "relative", "use_relative_position_bias": False,
        "use_absolute_position_embeddings": False,
    }  # fmt: skip


_WRITERS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "speech": _write_audio,
    "text": _write_text,
    "vision": _write_vision,
}
