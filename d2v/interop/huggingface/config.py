"""Configurations of transformers' Data2Vec models, to ours and back: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from d2v import recipes
from d2v.config import Config
from d2v.config.fields import shorten
from d2v.data.vision import IMAGENET_MEAN, IMAGENET_STD
from d2v.interop.options import Option, apply, as_bool, as_float, as_int, hidden_option, read_options, write_options
from d2v.model.stems.speech import SAMPLE_RATE

PREPROCESSOR, TOKENIZER_CONFIG = "preprocessor_config.json", "tokenizer_config.json"


def _number(name: str, field: str, default: Any = None) -> Option:
    return Option(name, field, default, as_int if default is None or isinstance(default, int) else as_float)


_COMMON = (
    _number("hidden_size", "encoder.width"),
    _number("num_attention_heads", "encoder.heads"),
    _number("num_hidden_layers", "encoder.depth"),
    hidden_option("intermediate_size"),
    Option("layer_norm_eps", "encoder.norm_eps", None, as_float),
)
"""Options that a `config.json` must have."""
_AUDIO = (
    Option("conv_bias", "stem.convolution_bias", False, as_bool),
    _number("num_conv_pos_embeddings", "stem.position_layers", 5),
    Option("conv_pos_kernel_size", "stem.position_width", 19, lambda v, own: int(v) * own["stem.position_layers"],
           lambda v, config: max(3, v // config.stem.position_layers)),
    _number("num_conv_pos_embedding_groups", "stem.position_groups", 16),
    _number("hidden_dropout", "encoder.dropout", 0.1),
    _number("layerdrop", "encoder.layer_drop", 0.05),
    _number("attention_dropout", "encoder.attention_dropout", 0.1),
)  # fmt: skip
_TEXT = (
    _number("vocab_size", "stem.vocabulary"),
    Option("max_position_embeddings", "stem.max_tokens", None, lambda v, _: int(v) - 2, lambda v, _: v + 2),
    _number("hidden_dropout_prob", "encoder.dropout", 0.1),
    _number("attention_probs_dropout_prob", "encoder.attention_dropout", 0.1),
)
_VISION = (
    _number("image_size", "stem.image_size"),
    _number("patch_size", "stem.patch_size"),
    _number("num_channels", "stem.channels", 3),
    Option("use_shared_relative_position_bias", "stem.positions", True,
           lambda v, _: "relative" if v else "none", lambda v, _: v == "relative"),
    _number("drop_path_rate", "encoder.drop_path", 0.0),
    _number("attention_probs_dropout_prob", "encoder.attention_dropout", 0.0),
    _number("layer_scale_init_value", "encoder.layer_scale", 1e-4),
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A `model_type` of transformers."""

    family: str
    """Published family."""
    base: Callable[[], Config]
    """What no option says is as in this recipe."""
    options: tuple[Option, ...]
    needed: tuple[str, ...]
    """Options without a default."""
    built: dict[str, Any]
    """Options that have one value in published data2vec models; another one is refused by name."""
    written: dict[str, Any]
    """What is written beside `options`."""


_ACTIVATION = {"hidden_act": "gelu"}
KINDS = {
    "data2vec-audio": Kind(
        "d2v1_audio", recipes.speech1_base, _AUDIO, ("conv_dim", "conv_kernel", "conv_stride"),
        {**_ACTIVATION, "feat_extract_activation": "gelu", "add_adapter": False},
        {
            "architectures": ["Data2VecAudioModel"], "feat_extract_activation": "gelu", "add_adapter": False,
            "feat_proj_dropout": 0.0,
        },
    ),
    "data2vec-text": Kind(
        "d2v1_text", recipes.text1_base, _TEXT, ("vocab_size", "max_position_embeddings"),
        {**_ACTIVATION, "is_decoder": False, "pad_token_id": 1},
        {
            "architectures": ["Data2VecTextModel"], "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "data2vec-vision": Kind(
        "d2v1_vision", recipes.vision1_base, _VISION, ("image_size", "patch_size"),
        {**_ACTIVATION, "use_absolute_position_embeddings": False, "use_relative_position_bias": False},
        {
            "architectures": ["Data2VecVisionModel"], "use_mask_token": True, "use_mean_pooling": True,
            "use_relative_position_bias": False, "use_absolute_position_embeddings": False,
        },
    ),
}  # fmt: skip
FAMILIES = {name: kind.family for name, kind in KINDS.items()}
"""`model_type` of transformers -> published family."""


def read_config(given: Mapping[str, Any]) -> tuple[str, Config]:
    """Family and configuration of a transformers `config.json`. Keys without effect on the encoder are not read.

    Raises:
        NotImplementedError: an option with a value that is not built. ValueError: a required number is missing.
    """
    kind = KINDS[given["model_type"]]
    for name, value in kind.built.items():
        if given.get(name, value) != value:
            raise NotImplementedError(f"config.json: {name}: expected {value}, got {given[name]}")
    for needed in ([option.name for option in _COMMON], kind.needed):
        if absent := [name for name in needed if name not in given]:
            raise ValueError(f"config.json: expected {', '.join(needed)}, found no {', '.join(absent)}")
    own: dict[str, Any] = {}
    read_options((*_COMMON, *kind.options), given.get, own)
    own["stem.norm_eps"] = own["encoder.norm_eps"]
    base, published = kind.base(), frozenset[str]()
    own["target.top_k"] = min(base.target.top_k, own["encoder.depth"])
    if kind.family == "d2v1_audio":
        convolutions = zip(given["conv_dim"], given["conv_kernel"], given["conv_stride"], strict=True)
        own["stem.convolutions"] = tuple((int(c), int(k), int(s)) for c, k, s in convolutions)
        published = frozenset({"positions-see-padding"})
    elif kind.family == "d2v1_text":
        own |= {"stem.mask_token": own["stem.vocabulary"] - 1, "stem.dropout": own["encoder.dropout"]}
    return kind.family, apply(base, own, recipe="", published=published)


def write_config(config: Config) -> dict[str, Any]:
    """The transformers `config.json` of a data2vec 1.0 configuration.

    Raises:
        NotImplementedError: a variant for which transformers has no model.
    """
    stem, encoder = config.stem, config.encoder
    _check_variant(config)
    model_type = {"speech": "data2vec-audio"}.get(stem.modality, f"data2vec-{stem.modality}")
    if model_type not in KINDS:
        raise NotImplementedError(f"format huggingface: expected speech, vision or text, got {stem.modality}")
    kind = KINDS[model_type]
    result: dict[str, Any] = {
        "model_type": model_type, **kind.written, **write_options((*_COMMON, *kind.options), config),
        "hidden_act": "gelu", "initializer_range": encoder.init_std or 0.02, "dtype": "float32",
    }  # fmt: skip
    if stem.modality == "speech":
        channels, kernels, strides = (list(column) for column in zip(*stem.convolutions, strict=True))
        result |= {
            "conv_dim": channels, "conv_kernel": kernels, "conv_stride": strides,
            "num_feat_extract_layers": len(channels), "activation_dropout": encoder.activation_dropout,
            "mask_time_prob": config.mask.ratio, "mask_time_length": config.mask.span,
        }  # fmt: skip
    elif stem.modality == "vision":
        result["hidden_dropout_prob"] = encoder.dropout
    return result


def describe_inputs(config: Config) -> dict[str, dict[str, Any]]:
    """Name -> content of the files by which the Auto classes of transformers make inputs as d2v does; nothing for
    images that are made as no class of transformers can."""
    stem, prepared = config.stem, config.data.standardise == "imagenet" and not config.data.grey
    if stem.modality == "speech":
        # Without a mask the padding would be a part of what a recording's mean and deviation are taken over.
        sound = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": SAMPLE_RATE, "feature_size": 1,
                 "padding_value": 0.0, "do_normalize": True, "return_attention_mask": True}  # fmt: skip
        return {PREPROCESSOR: sound}
    if stem.modality == "text":
        return {TOKENIZER_CONFIG: {"tokenizer_class": "RobertaTokenizer", "model_max_length": stem.max_tokens}}
    if stem.modality != "vision" or stem.channels != 3 or not prepared:
        return {}
    size = stem.image_size
    return {PREPROCESSOR: {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
        "size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }}  # fmt: skip


def compare_inputs(config: Config, given: Any) -> str:
    """Where a `preprocessor_config.json` asks for other values than d2v gives a model, in words; "" where it does not.
    Sizes and crops are not compared."""
    kept = ("sampling_rate", "do_normalize", "do_rescale", "image_mean", "image_std")
    own = describe_inputs(config).get(PREPROCESSOR, {})
    given = given if isinstance(given, dict) else {}
    odd = [n for n in kept if n in own and n in given and given[n] != own[n]]
    return ", ".join(f"{name}: expected {own[name]}, got {shorten(given[name])}" for name in odd)


def _check_variant(config: Config) -> None:
    stem, encoder = config.stem, config.encoder
    order = "pre" if stem.modality == "vision" else "post"
    if encoder.norm_order != order or encoder.prenet_depth or encoder.alibi != "none" or not encoder.norm_affine:
        raise NotImplementedError(
            f"format huggingface: expected {order}-norm blocks with learned norms, no prenet blocks and no ALiBi, "
            f"got norm_order {encoder.norm_order}, prenet_depth {encoder.prenet_depth}, alibi {encoder.alibi}"
        )
    for name, expected, value in (
        ("convolution_norm", "layer", stem.convolution_norm),
        ("width", encoder.width, stem.width or encoder.width),
    ):
        if value != expected:
            raise NotImplementedError(f"format huggingface: stem.{name}: expected {expected}, got {value}")
    if stem.modality != "vision" and stem.norm_eps != encoder.norm_eps:
        raise NotImplementedError(
            f"format huggingface: stem.norm_eps: expected encoder.norm_eps {encoder.norm_eps}, got {stem.norm_eps}"
        )
    embedded = stem.learned_positions and stem.embedding_norm and stem.embedding_scale == 1.0
    if stem.modality == "text" and not embedded:
        raise NotImplementedError("format huggingface: expected learned positions and a norm on unscaled embeddings")
    scaled = stem.positions != "sincos" and not encoder.key_bias and encoder.layer_scale > 0.0
    if stem.modality == "vision" and not (scaled and encoder.extra_tokens == 1):
        raise NotImplementedError(
            "format huggingface: expected relative positions, layer scale, no key bias and one class token"
        )
