"""Options of the published fairseq models beside our settings: a table for each section, read in both directions.

Defaults are those of the published code.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from d2v.config import SPEECH_CONVOLUTIONS, Config
from d2v.interop.options import Option, as_bool, as_float, hidden_option


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


def _switch(name: str, field: str, default: bool, on: Any, off: Any) -> Option:
    """A truth value that chooses one of two values of a setting."""
    return Option(name, field, default, lambda v, _: on if v else off, lambda v, _: v == on)


def _refine(name: str, field: str, needed: str, on: str) -> Option:
    """A truth value that matters where the setting read before has the value `needed`."""
    return Option(name, field, False, lambda v, own: on if v and own[field] == needed else own[field],
                  lambda v, _: v == on)  # fmt: skip


def _read_table(learned: bool, own: dict[str, Any]) -> int | None:
    """The size of the table, which the option before named."""
    size: int | None = own["encoder.alibi_table"]
    if not learned or own["encoder.alibi"] == "none":
        return None
    if size is None:
        raise ValueError("alibi_max_pos: expected a number with learned_alibi, got None")
    return size


def _whole(needed: str) -> Option:
    """Whether a 1.0 teacher is part of a model or a whole one, which the setting read before allows."""
    return Option("ema_transformer_only", "ema.scope", True,
                  lambda v, own: own["ema.scope"] if v or own["ema.scope"] != needed else "all",
                  lambda v, _: v != "all")  # fmt: skip


def _agree(name: str, where: str, field: str, default: Any, expected: str = "") -> Option:
    """A second option for a setting: another value than the first one's is refused."""

    def read(value: Any, own: dict[str, Any]) -> Any:
        if value != own[field]:
            raise NotImplementedError(f"{where}{name}: expected {expected}{own[field]}, got {value}")
        return own[field]

    return Option(name, field, default, read)


def _scale_option(default: bool) -> Option:
    return Option(
        "no_scale_embedding",
        "stem.embedding_scale",
        default,
        lambda v, own: 1.0 if v else math.sqrt(own["encoder.width"]),
        lambda v, _: v == 1.0,
    )


def _convolutions(name: str) -> Option:
    return Option(name, "stem.convolutions", None, lambda v, _: parse_convolutions(v),
                  lambda v, _: str([tuple(layer) for layer in v]))  # fmt: skip


def _extractor(default: str) -> Option:
    return Option("extractor_mode", "stem.convolution_norm", default,
                  lambda v, _: "group" if v == "default" else "layer",
                  lambda v, _: "default" if v == "group" else "layer_norm")  # fmt: skip


def _patches(own: dict[str, Any]) -> int:
    return int((own["stem.image_size"] // own["stem.patch_size"]) ** 2)


_EMA = (
    Option("ema_decay", "ema.start", 0.999),
    Option("ema_end_decay", "ema.end", 0.9999),
    Option(
        "ema_anneal_end_step",
        "ema.anneal_steps",
        lambda own: own.get("run.steps"),
        lambda v, _: None if v is None else int(v),
        lambda v, config: config.run.steps if v is None else v,
    ),
    # As published: at most all layers.
    Option("average_top_k_layers", "target.top_k", 8, lambda v, own: min(v, own["encoder.depth"])),
    Option("loss_beta", "loss.beta", 0, as_float),
)
_BLOCK_TARGETS = _switch("end_of_block_targets", "target.source", False, "block", "ffn")
# Text takes 0 and below for "unset", too.
_LOSS_SCALE1 = Option("loss_scale", "loss.scale", None, lambda v, _: None if v is None or v <= 0 else float(v))
_STEPS = Option("max_update", "run.steps")
_SECOND = (
    Option("embed_dim", "encoder.width", 768),
    Option("num_heads", "encoder.heads", 12),
    Option("depth", "encoder.depth", 8),
    Option("mlp_ratio", "encoder.mlp_ratio", 4),
    _switch("layer_norm_first", "encoder.norm_order", False, "pre", "post"),
    Option("norm_eps", "encoder.norm_eps", 1e-6),
    Option("norm_affine", "encoder.norm_affine", True),
    Option("encoder_dropout", "encoder.dropout", 0.1),
    _agree("post_mlp_drop", "", "encoder.dropout", 0.1, "encoder_dropout "),
    Option("attention_dropout", "encoder.attention_dropout", 0.1),
    Option("activation_dropout", "encoder.activation_dropout", 0.0),
    Option("layerdrop", "encoder.layer_drop", 0.0),
    Option("end_drop_path_rate", "encoder.drop_path", 0.0),
    Option("clone_batch", "mask.copies", 1),
    Option("cls_loss", "loss.class_weight", 0),
    Option("recon_loss", "loss.reconstruction", 0, as_float),
    Option("loss_scale", "loss.scale", None,
           write=lambda _, c: None if c.loss_scale == c.encoder.width**-0.5 else c.loss_scale),
    _switch("ema_encoder_only", "ema.scope", True, "blocks", "encoder"),
    _STEPS,
    _BLOCK_TARGETS,
    *_EMA,
)  # fmt: skip
_MODALITY = (
    Option("prenet_depth", "encoder.prenet_depth", 4),
    Option("prenet_dropout", "encoder.prenet_dropout", 0.0),
    Option("num_extra_tokens", "encoder.extra_tokens", 0),
    _refine("ema_local_encoder", "ema.scope", "encoder", "all"),
    Option("mask_prob", "mask.ratio", 0.7),
    Option("mask_prob_adjust", "mask.adjust", 0.0),
    Option("mask_length", "mask.span", 5, lambda v, _: max(v, 1)),
    Option("inverse_mask", "mask.inverse", False, lambda v, own: bool(v) and own["mask.span"] > 1),
    Option("keep_masked_pct", "mask.keep_masked", 0.0, lambda v, own: float(v) if own["mask.span"] > 1 else 0.0),
    Option("mask_noise_std", "mask.noise_std", 0.01),
    Option("use_alibi_encoder", "encoder.alibi", False,
           lambda v, _: "fixed" if v else "none", lambda v, _: v != "none"),
    _refine("learned_alibi_scale", "encoder.alibi", "fixed", "learned"),
    Option("alibi_scale", "encoder.alibi_scale", 1.0, as_float),
    Option("num_alibi_heads", "encoder.alibi_heads", lambda own: own["encoder.heads"],
           write=lambda v, config: v or config.encoder.heads),
    Option("alibi_max_pos", "encoder.alibi_table"),
    Option("learned_alibi", "encoder.alibi_table", False, _read_table, lambda v, _: v is not None),
    Option("learned_alibi_scale_per_head", "encoder.alibi_per_head", False, as_bool),
    Option("learned_alibi_scale_per_layer", "encoder.alibi_per_layer", False, as_bool),
)  # fmt: skip
_DECODER = (
    Option("decoder_layers", "decoder.layers", 5),
    Option("decoder_dim", "decoder.width", 384),
    Option("decoder_kernel", "decoder.kernel", 5),
    Option("decoder_groups", "decoder.groups", 16),
    Option("decoder_residual", "decoder.residual", True),
    Option("projection_layers", "decoder.projection_layers", 1),
    Option("projection_ratio", "decoder.projection_ratio", 2.0),
    Option("input_dropout", "decoder.input_dropout", 0.1),
    Option("add_positions_masked", "decoder.positions_masked", False),
    Option("add_positions_all", "decoder.positions_all", False),
)
_SHARED = tuple(dataclasses.replace(option, field=f"shared_{option.field}") for option in _DECODER[:7])
_AUDIO2 = (
    _extractor("layer_norm"),
    _convolutions("feature_encoder_spec"),
    Option("local_grad_mult", "stem.gradient_scale", 1.0, as_float),
    Option("conv_pos_depth", "stem.position_layers", 5),
    Option("conv_pos_width", "stem.position_width", 95),
    Option("conv_pos_groups", "stem.position_groups", 16),
    Option("conv_pos_pre_ln", "stem.position_norm", False),
)
_IMAGE2 = (
    Option(
        "embed_dim",
        "stem.width",
        768,
        lambda v, own: None if v == own["encoder.width"] else v,
        lambda v, config: v or config.encoder.width,
    ),
    Option("input_size", "stem.image_size", 224),
    Option("patch_size", "stem.patch_size", 16),
    Option("in_chans", "stem.channels", 3),
    _switch("fixed_positions", "stem.position_scale", True, 1.0, 0.0),
    _switch("transformer_decoder", "decoder.kind", False, "transformer", "conv"),
    _refine("enc_dec_transformer", "decoder.kind", "transformer", "cross"),
)
_NO_POSITIONS = _switch("no_token_positional_embeddings", "stem.learned_positions", False, False, True)
_TEXT2 = (
    Option("dropout", "stem.dropout", 0.1),
    Option("max_source_positions", "stem.max_tokens", 512),
    _NO_POSITIONS,
    Option("layernorm_embedding", "stem.embedding_norm", True),
    _scale_option(True),
)
_AUDIO1 = (
    _extractor("default"),
    _convolutions("conv_feature_layers"),
    Option("conv_bias", "stem.convolution_bias", False),
    Option("feature_grad_mult", "stem.gradient_scale", 1.0, as_float),
    Option("dropout_input", "stem.dropout", 0.0),
    Option("pos_conv_depth", "stem.position_layers", 1),
    Option("conv_pos", "stem.position_width", 128),
    Option("conv_pos_groups", "stem.position_groups", 16),
    Option("encoder_embed_dim", "encoder.width", 768),
    Option("encoder_attention_heads", "encoder.heads", 12),
    Option("encoder_layers", "encoder.depth", 12),
    hidden_option("encoder_ffn_embed_dim", 3072),
    _switch("layer_norm_first", "encoder.norm_order", False, "pre", "post"),
    Option("dropout", "encoder.dropout", 0.1),
    Option("attention_dropout", "encoder.attention_dropout", 0.1),
    Option("activation_dropout", "encoder.activation_dropout", 0.0),
    Option("encoder_layerdrop", "encoder.layer_drop", 0.0),
    Option("mask_prob", "mask.ratio", 0.65),
    Option("mask_length", "mask.span", 10),
    _switch("ema_layers_only", "ema.scope", True, "layers", "encoder"),
    _whole("encoder"),
    _STEPS,
    _BLOCK_TARGETS,
    _LOSS_SCALE1,
    *_EMA,
)
_TEXT1 = (
    Option("head_layers", "head.layers", 1),
    _switch("ema_transformer_layers_only", "ema.scope", True, "blocks", "all"),
    _BLOCK_TARGETS,
    _LOSS_SCALE1,
    *_EMA,
)
_TRANSFORMER = (
    Option("dropout", "encoder.dropout", 0.1),
    Option("attention_dropout", "encoder.attention_dropout", 0.0),
    Option("activation_dropout", "encoder.activation_dropout", 0.0),
    Option("max_source_positions", "stem.max_tokens", 1024),
    _NO_POSITIONS,
    Option("layernorm_embedding", "stem.embedding_norm", False),
    _scale_option(False),
)
_TRANSFORMER_ENCODER = (
    Option("embed_dim", "encoder.width", 512),
    Option("attention_heads", "encoder.heads", 8),
    Option("layers", "encoder.depth", 6),
    hidden_option("ffn_embed_dim", 2048),
    _switch("normalize_before", "encoder.norm_order", False, "pre", "post"),
    Option("layerdrop", "encoder.layer_drop", 0),
)
_VISION1 = (
    Option("image_size", "stem.image_size", 224),
    Option("patch_size", "stem.patch_size", 16),
    Option("in_channels", "stem.channels", 3),
    Option("embed_dim", "encoder.width", 768),
    Option("num_heads", "encoder.heads", 12),
    Option("depth", "encoder.depth", 12),
    Option("layer_scale_init_value", "encoder.layer_scale", 1e-4, lambda v, _: max(0.0, v)),
    Option("attention_dropout", "encoder.attention_dropout", 0.0),
    Option("drop_path", "encoder.drop_path", 0.1),
    Option("num_mask_patches", "mask.ratio", 75, lambda v, own: min(v, _patches(own) - 1) / _patches(own),
           lambda v, config: round(v * config.stem.grid[0] * config.stem.grid[1])),
    Option("min_mask_patches_per_block", "mask.span", 16, lambda v, _: math.isqrt(v), lambda v, _: v**2),
    _switch("end_of_block_targets", "target.source", True, "block", "ffn"),
    _whole("transformer"),
    _LOSS_SCALE1,
    *_EMA,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A section of a published configuration."""

    options: tuple[Option, ...]
    kind: str
    """Its key in `NO_EFFECT`."""
    built: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Options with the only values that are built."""
    written: dict[str, Any] = field(default_factory=dict)
    """What is written beside `options`."""


_ZERO, _OFF, _EXTRACTORS = (0,), (False,), ("layer_norm", "default")
_MODEL2 = Part(
    _SECOND,
    "",
    {
        **dict.fromkeys(("start_drop_path_rate", "dropout_input"), _ZERO),
        **dict.fromkeys(("mae_init", "skip_ema", "utterance_level", "adversarial_training"), _OFF),
        "cls_type": ("single",),
    },
    {"_name": "data2vec_multi", "dropout_input": 0.0, "start_drop_path_rate": 0.0, "d2v_loss": 1.0},
)  # fmt: skip
_DECODER2 = Part(_DECODER, "decoder")
_SHARED2 = Part(_SHARED, "shared decoder")
_MODALITY_BUILT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("prenet_layerdrop", "start_drop_path_rate", "end_drop_path_rate"), _ZERO),
    **dict.fromkeys(("mask_dropout", "mask_channel_prob"), _ZERO),
    "mask_prob_min": (None,),
    **dict.fromkeys(("add_masks", "remove_masks", "transformer_decoder"), _OFF),
}  # fmt: skip


def _second(name: str, options: tuple[Option, ...], built: dict[str, tuple[Any, ...]], **written: Any) -> Part:
    fixed = {"type": name.upper(), "init_extra_token_zero": False, **written}
    return Part((*_MODALITY, *options), "modality", {**_MODALITY_BUILT, **built}, fixed)


PARTS: dict[str, dict[str, Part]] = {
    "d2v2_audio": {
        "": _MODEL2,
        "modalities.audio": _second(
            "audio", _AUDIO2, {"extractor_mode": _EXTRACTORS, "encoder_zero_mask": (True,)},
        ),
        "modalities.audio.decoder": _DECODER2,
        "shared_decoder": _SHARED2,
    },
    "d2v2_image": {
        "": _MODEL2,
        "modalities.image": _second(
            "image", _IMAGE2,
            {"local_grad_mult": (1,), "transformer_decoder": (False, True), "alibi_dims": (2, 1),
             "alibi_distance": ("manhattan", "euclidean")},
        ),
        "modalities.image.decoder": _DECODER2,
        "shared_decoder": _SHARED2,
    },
    "d2v2_text": {
        "": _MODEL2,
        "modalities.text": _second("text", _TEXT2, {"local_grad_mult": (1,), "learned_pos": (True,)}),
        "modalities.text.decoder": _DECODER2,
        "shared_decoder": _SHARED2,
    },
    "d2v1_audio": {
        "": Part(
            _AUDIO1,
            "audio1",
            {
                "extractor_mode": _EXTRACTORS, "activation_fn": ("gelu",), "layer_type": ("transformer",),
                "pos_enc_type": ("abs",), "mask_selection": ("static",), "no_mask_overlap": _OFF,
                **dict.fromkeys(("mask_other", "mask_dropout", "mask_channel_prob"), _ZERO),
            },
            {"_name": "data2vec_audio"},
        ),
    },
    "d2v1_text": {
        "transformer.encoder": Part(
            _TRANSFORMER_ENCODER, "transformer.encoder", {"learned_pos": (True,), "xformers_att_config": (None,)},
            {"learned_pos": True},
        ),
        "transformer": Part(
            _TRANSFORMER, "transformer", {"activation_fn": ("gelu",), "adaptive_input": _OFF, "relu_dropout": _ZERO},
            {"activation_fn": "gelu"},
        ),
        "transformer.quant_noise": Part((), "transformer", {"pq": _ZERO, "scalar": _ZERO}),
        "": Part(_TEXT1, "text1", {}, {"_name": "data2vec_text"}),
    },
    "d2v1_vision": {
        "": Part(
            _VISION1, "vision1", {"shared_rel_pos_bias": (True,)},
            {"_name": "data2vec_vision", "shared_rel_pos_bias": True},
        ),
    },
}  # fmt: skip
"""By family and dotted name of the section, in the order in which they are read."""
_SPEECH = {"stem.modality": "speech", "stem.positions": "conv"}
_TEXT = {"stem.modality": "text", "stem.positions": "none"}
FIXED: dict[str, dict[str, Any]] = {
    "d2v2_audio": _SPEECH,
    "d2v2_image": {},
    "d2v2_text": _TEXT,
    "d2v1_audio": {**_SPEECH, "mask.kind": "span"},
    # The mask is the published task's; no option of the model.
    "d2v1_text": {**_TEXT, "encoder.input_norm": False, "mask.kind": "token-span", "mask.ratio": 0.35, "mask.span": 4},
    "d2v1_vision": {
        "stem.positions": "relative", "encoder.mlp_ratio": 4.0,  # the published code ignores its own option
        "encoder.norm_order": "pre", "encoder.norm_eps": 1e-5, "encoder.key_bias": False, "encoder.extra_tokens": 1,
        "encoder.init_rescale": True, "mask.kind": "rectangles", "ema.scope": "transformer",
    },
}  # fmt: skip
"""Settings that no option of the family changes."""
EMBEDDINGS = {
    "d2v1_text": "encoder.sentence_encoder.embed_tokens.weight",
    "d2v2_text": "modality_encoders.TEXT.local_encoder.embed_tokens.weight",
}
Rule = tuple[str, str, Callable[[Any, Config], bool]]
_SECOND_RULES: tuple[Rule, ...] = (
    ("ema.scope", "all, encoder or blocks", lambda v, _: v in ("all", "encoder", "blocks")),
    ("mask.keep_masked", "0 for mask.span 1", lambda v, config: v == 0.0 or config.mask.span > 1),
)
_CONV_DECODER: Rule = ("decoder.kind", "conv", lambda v, _: v == "conv")
_NO_PROJECTION: Rule = ("stem.width", "encoder.width", lambda v, config: v in (None, config.encoder.width))
NEEDED: dict[str, tuple[Rule, ...]] = {
    "": (("stem.norm_eps", "1e-05", lambda v, _: v == 1e-5),),
    "d2v2_audio": (
        *_SECOND_RULES,
        _CONV_DECODER,
        ("stem.positions", "conv", lambda v, _: v == "conv"),
        ("stem.convolution_bias", "False", lambda v, _: not v),
    ),
    "d2v2_image": (
        *_SECOND_RULES,
        ("decoder.heads", "8", lambda v, config: v == 8 or config.decoder.kind == "conv"),
        ("stem.position_scale", "0 or 1", lambda v, _: v in (0.0, 1.0)),
    ),
    "d2v2_text": (*_SECOND_RULES, _CONV_DECODER, _NO_PROJECTION),
    "d2v1_audio": (
        ("ema.scope", "layers, encoder or all", lambda v, _: v in ("layers", "encoder", "all")),
        (
            "target.top_k",
            "encoder.depth with ema.scope all",
            lambda v, config: config.ema.scope != "all" or v == config.encoder.depth,
        ),
        ("encoder.norm_eps", "1e-05", lambda v, _: v == 1e-5),
        ("encoder.prenet_dropout", "encoder.dropout", lambda v, config: v == config.encoder.dropout),
    ),
    "d2v1_text": (
        _NO_PROJECTION,
        ("ema.scope", "blocks or all", lambda v, _: v in ("blocks", "all")),
        ("stem.dropout", "encoder.dropout", lambda v, config: v == config.encoder.dropout),
    ),
    "d2v1_vision": (
        _NO_PROJECTION,
        ("target.source", "block", lambda v, _: v == "block"),
        ("ema.scope", "transformer or all", lambda v, _: v in ("transformer", "all")),
    ),
}
"""Settings for which the published code of a family ("": of any) has no option: name, expected, test."""
