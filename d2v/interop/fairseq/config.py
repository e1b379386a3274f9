"""Configurations of the published fairseq models in our own terms, and ours in theirs.

Every option is translated, refused where its value is not built, or without effect on the model
(`options.NO_EFFECT`); others raise a warning once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2v.config import Config
from d2v.interop.fairseq.options import PUBLISHED, Section
from d2v.interop.fairseq.tables import EMBEDDINGS, FIXED, NEEDED, PARTS, parse_convolutions
from d2v.interop.options import apply, read_options, setting_of, write_options

__all__ = ["describe", "parse_convolutions", "translate"]
Shapes = Mapping[str, tuple[int, ...]]
_LAYER_NORMS = ("batch", "instance", "group", "layer")
_OUT_NORMS = ("layer", "instance")


def translate(config: Mapping[str, Any], family: str, shapes: Shapes, mask_token: int | None) -> Config:
    """Our configuration of a published model.

    Args:
        config: the `model` section.
        shapes: of the student's tensors by published names: the vocabulary is in no configuration.
        mask_token: id of the mask token (1.0 text).
    """
    own, published = dict(FIXED[family]), PUBLISHED[family]
    sections = _open_sections(config, family)
    for name, part in PARTS[family].items():
        for option, values in part.built.items():
            sections[name].only(option, *values)
    for name, part in PARTS[family].items():
        read_options(part.options, sections[name].get, own)
    model = sections[""]
    own["target.norm"] = _join_norms(model, _LAYER_NORMS, "norm_target_layer")
    own["target.out_norm"] = _join_norms(model, _OUT_NORMS, "norm_targets")
    if family in EMBEDDINGS:
        own["stem.vocabulary"] = _vocabulary(shapes, EMBEDDINGS[family])
    if "run.steps" in own:
        own["run.steps"] = int(own["run.steps"] or 0)
    if family.startswith("d2v2"):
        _finish_second(own, sections, family.removeprefix("d2v2_"))
    elif family == "d2v1_text":
        own |= {"stem.dropout": own["encoder.dropout"], "stem.mask_token": mask_token}
    elif family == "d2v1_audio":
        published = _finish_audio1(own, model)
    result = apply(Config(), own, version=int(family[3]), published=published)
    for name in sorted(sections, key=len):
        if name != "transformer.quant_noise":
            sections[name].close()
    return result


def _open_sections(config: Mapping[str, Any], family: str) -> dict[str, Section]:
    sections: dict[str, Section] = {}
    for name in sorted(PARTS[family], key=len):
        part, values = PARTS[family][name], config
        for key in name.split(".") if name else ():
            values = values.get(key)  # type: ignore[assignment]
            if values is None and key == "decoder":
                raise NotImplementedError(f"{name}: expected a section, got None")
            values = {} if values is None else values
        sections[name] = Section(values, f"{name}." if name else "", part.kind)
    for name in sections:  # what holds a section has been read
        outer, _, inner = name.rpartition(".")
        sections[outer if outer in sections else ""].read.add(inner if outer in sections else outer)
    return sections


def _finish_second(own: dict[str, Any], sections: dict[str, Section], name: str) -> None:
    model, modality = sections[""], sections[f"modalities.{name}"]
    if name != "audio":
        modality.read.add("encoder_zero_mask")  # masked tokens are removed
    if name == "image":
        own["encoder.alibi_distance"] = modality.get("alibi_distance", "manhattan")
        if modality.get("alibi_dims", 2) == 1:
            own["encoder.alibi_distance"] = "sequence"
        own |= {"decoder.projection_layers": 1, "decoder.projection_ratio": 2.0}  # the 2-D decoder ignores both
        frames = modality.get("target_length")
        if frames is not None and own["stem.channels"] == 1:  # EAT
            own |= {"stem.modality": "spectrograms", "stem.frames": frames}
    if model.get("shared_decoder") is None:
        own["shared_decoder.layers"] = 0
    elif own["shared_decoder.layers"] == 0:
        raise NotImplementedError("shared_decoder.decoder_layers: expected 1 or more, got 0")
    if name == "text" and own["encoder.prenet_depth"] == 0:
        # Without prenet blocks, text has neither norm nor dropout before the main blocks.
        own |= {"encoder.input_norm": False, "encoder.prenet_dropout": 0.0}
    own["mask.kind"] = "block" if own["mask.span"] > 1 else "random"
    regression = float(model.get("d2v_loss", 1))
    if regression <= 0.0:
        raise NotImplementedError(f"d2v_loss: expected above 0, got {regression}")
    scale = own["loss.scale"]
    own["loss.scale"] = (own["encoder.width"] ** -0.5 if scale is None else float(scale)) * regression
    # d2v_loss scales the regression only, so the other weights are divided by it.
    own["loss.class_weight"] /= regression
    own["loss.reconstruction"] /= regression


def _finish_audio1(own: dict[str, Any], model: Section) -> frozenset[str]:
    """The published behaviours, which an option decides."""
    if own["ema.scope"] == "all":
        own["target.top_k"] = own["encoder.depth"]  # a whole model as the teacher averages all its layers
    if own["stem.position_layers"] < 2:
        raise NotImplementedError(f"pos_conv_depth: expected at least 2, got {own['stem.position_layers']}")
    own["encoder.prenet_dropout"] = own["encoder.dropout"]
    same = model.get("require_same_masks", True)
    return PUBLISHED["d2v1_audio"] - (set() if same else {"equal-mask-counts"})


def _join_norms(model: Section, norms: tuple[str, ...], suffix: str) -> str:
    """The norms whose options are on, in the order in which the published code applies them."""
    return ",".join(norm for norm in norms if model.get(f"{norm}_{suffix}")) or "none"


def _vocabulary(shapes: Shapes, name: str) -> int:
    if name not in shapes or len(shapes[name]) != 2:
        raise ValueError(f"student: expected a tensor {name} (vocabulary, C), got {shapes.get(name)}")
    return shapes[name][0]


def describe(config: Config, family: str) -> dict[str, Any]:
    """Options of the published model of `family` that has this configuration: `translate` read backwards.

    Raises:
        NotImplementedError: something that the published code has no option for.
    """
    for name, expected, fits in (*NEEDED[""], *NEEDED[family]):
        if not fits(value := setting_of(config, name), config):
            if expected == "encoder.dropout":
                expected = f"encoder.dropout {config.encoder.dropout}"
            raise NotImplementedError(f"format fairseq: {name}: expected {expected}, got {value}")
    result: dict[str, Any] = {}
    for name in sorted(PARTS[family], key=len):
        part, values = PARTS[family][name], result
        if part.options:
            for key in name.split(".") if name else ():
                values = values.setdefault(key, {})
            values |= {**part.written, **write_options(part.options, config)}
    if config.stem.modality == "spectrograms":
        result["modalities"]["image"] |= {"in_chans": 1, "target_length": config.stem.frames}
    target = config.target
    for norms, order, name, suffix in (
        (target.norm, _LAYER_NORMS, "target.norm", "norm_target_layer"),
        (target.out_norm, _OUT_NORMS, "target.out_norm", "norm_targets"),
    ):
        on = [] if norms == "none" else norms.split(",")  # the published code applies them in a fixed order
        if on != [n for n in order if n in on]:
            raise NotImplementedError(
                f"format fairseq: {name}: expected some of {', '.join(order)} in this order, got {norms}"
            )
        result |= {f"{n}_{suffix}": n in on for n in order}
    if family.startswith("d2v2"):
        result["supported_modality"] = family.removeprefix("d2v2_").upper()
        if config.shared_decoder.layers == 0:
            result["shared_decoder"] = None
    if family == "d2v1_audio":
        result["require_same_masks"] = "equal-mask-counts" in config.published
    return result
