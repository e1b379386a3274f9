"""Heads of published fine-tuned files: which head a file has, its options and tensors, and back.

Known are the models `wav2vec_ctc` (speech), `audio_classification` (1.0), `mae_image_classification` (2.0),
`data2vec_image_classification` (1.0), `data2vec_text_classification` (2.0), the classification heads of `data2vec_text`
(1.0), and the classifier of the separate 1.0 vision repository, whose names are BEiT's.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from d2v.config.finetune import HeadSettings
from d2v.interop.fairseq.options import Section
from d2v.model.task_heads import Head

_SENTENCE = "sentence_classification_head"
_SENTENCE_NAME = re.compile(r"((?:encoder\.|model\.)?classification_heads\.(\w+)\.)(?:dense|out_proj)\.(?:weight|bias)")
PREFIXES = ("", "w2v_encoder.w2v_model.", "d2v_model.", "model.")
"""What fine-tuned models put before the encoder's names."""
INNER = ("w2v_args", "d2v_args", "pretrained_model_args")
"""Options of a fine-tuned model that hold those of the pre-trained one."""
_POOLS = {"MEAN_POOLING": "mean", "1": "mean", "CLS_TOKEN": "class", "2": "class"}
_POOLS |= {"LIN_SOFTMAX": "linear-softmax", "3": "linear-softmax"}


@dataclass(frozen=True)
class Layout:
    """Where a kind of fine-tuned file keeps its tensors."""

    model: str
    """`_name` in its options; "beit" for the separate vision repository."""
    prefix: str
    """Before the encoder's names."""
    names: tuple[tuple[str, str], ...]
    """(beginning of our name in the head, beginning of the published one)."""

    def published(self, name: str) -> str:
        """Published name of a tensor of our head."""
        own, theirs = next(pair for pair in self.names if name.startswith(pair[0]))
        return theirs + name.removeprefix(own)


def find_layout(names: Mapping[str, Any], family: str, prefix: str, beit: bool) -> Layout | None:
    """The layout of a file with a head, or None: no head, or one that is not known."""
    if prefix == "w2v_encoder.w2v_model." and "w2v_encoder.proj.weight" in names:
        return _CTC
    if prefix == "d2v_model." and "proj.weight" in names:
        return _AUDIO
    if beit and "head.weight" in names:
        return _BEIT
    if prefix == "model." and "head.weight" in names:
        return _IMAGE if family == "d2v2_image" else _IMAGE1
    found = {m[1]: m[2] for name in names if (m := _SENTENCE_NAME.fullmatch(name))}
    if found:
        chosen = next((p for p, head in found.items() if head == _SENTENCE), None)
        if chosen is None and len(found) > 1:
            raise NotImplementedError(f"checkpoint: expected one classification head, got {', '.join(found.values())}")
        chosen = chosen or next(iter(found))
        return _text_layout(family, prefix, chosen)
    return None


def _text_layout(family: str, prefix: str, head: str) -> Layout:
    model = "data2vec_text" if family == "d2v1_text" else "data2vec_text_classification"
    return Layout(model, prefix, (("dense.", f"{head}dense."), ("out.", f"{head}out_proj.")))


_CTC = Layout("wav2vec_ctc", "w2v_encoder.w2v_model.", (("out.", "w2v_encoder.proj."),))
_AUDIO = Layout("audio_classification", "d2v_model.", (("out.", "proj."),))
_IMAGE = Layout("mae_image_classification", "model.", (("norm.", "fc_norm."), ("out.", "head.")))
_IMAGE1 = Layout("data2vec_image_classification", "model.", _IMAGE.names)
_BEIT = Layout("beit", "", _IMAGE.names)


def read_settings(layout: Layout, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> HeadSettings:
    """Head of a file from its options and the shapes of its tensors.

    Raises:
        NotImplementedError: an option that is not built, by name.
    """
    name = layout.published("out.weight")
    if tensors[name].dim() != 2:
        raise NotImplementedError(
            f"checkpoint: {name}: expected a linear layer, got shape {tuple(tensors[name].shape)}"
        )
    outputs = int(tensors[name].shape[0])
    normed = layout.names[0][0] == "norm." and layout.published("norm.weight") in tensors
    if layout.model == "beit":
        return HeadSettings("pooled", outputs, pool="mean" if normed else "class", norm_eps=1e-6 if normed else None)
    if layout.model == "data2vec_image_classification":
        # Its code takes the first patch for the class token, which the encoder has already cut off.
        return HeadSettings("pooled", outputs, norm_eps=1e-5, skip_tokens=1)
    return _READERS[layout.model](options, outputs, normed)


def _read_ctc(options: Mapping[str, Any], outputs: int, _: bool) -> HeadSettings:
    section = Section(options, "", "speech head")
    section.only("blank_weight", 0)
    section.only("autoregressive", False)
    _warn_unless_normalised(section)
    dropout = float(section.get("final_dropout", 0.0))
    section.close()
    return HeadSettings("tokens", outputs, task="ctc", dropout=dropout)


def _read_audio(options: Mapping[str, Any], outputs: int, _: bool) -> HeadSettings:
    section = Section(options, "", "speech head")
    modes = ("lin_softmax", "average", "average_before")
    section.only("prediction_mode", *modes)
    section.only("eval_prediction_mode", None, "")
    section.only("conv_kernel", -1, 0, 1)
    _warn_unless_normalised(section)
    dropout, mode = float(section.get("final_dropout", 0.0)), section.get("prediction_mode", modes[0])
    section.close()
    return HeadSettings("votes" if mode == modes[0] else "pooled", outputs, task="multi-label", dropout=dropout)


def _warn_unless_normalised(section: Section) -> None:
    if section.get("normalize", True) is False:
        warnings.warn("normalize: expected True, got False: waveforms are normalised all the same", stacklevel=2)


def _read_image(options: Mapping[str, Any], outputs: int, normed: bool) -> HeadSettings:
    section = Section(options, "", "image head")
    section.only("remove_alibi", False)
    section.read |= {"norm_eps", "use_fc_norm"}
    mode = str(section.get("prediction_mode", "MEAN_POOLING")).rsplit(".", 1)[-1].strip("<>")
    if mode not in _POOLS:
        raise NotImplementedError(f"prediction_mode: expected one of {', '.join(_POOLS)}, got {mode!r}")
    section.close()
    return HeadSettings("pooled", outputs, pool=_POOLS[mode], norm_eps=1e-6 if normed else None)  # type: ignore[arg-type]


def _read_text(options: Mapping[str, Any], outputs: int, _: bool) -> HeadSettings:
    section = Section(options, "", "text head")
    section.only("pooler_activation_fn", "tanh")
    section.only("quant_noise_pq", 0)
    section.only("spectral_norm_classification_head", False)
    dropout = float(section.get("pooler_dropout", 0.0))
    if "pretrained_model_args" in options:  # in 1.0 the options of encoder and head are one section
        section.close()
    task: Any = "regression" if outputs == 1 else "classification"
    return HeadSettings("sentence", outputs, task=task, dropout=dropout)


_READERS: dict[str, Callable[[Mapping[str, Any], int, bool], HeadSettings]] = {
    "wav2vec_ctc": _read_ctc,
    "audio_classification": _read_audio,
    "mae_image_classification": _read_image,
    "data2vec_text": _read_text,
    "data2vec_text_classification": _read_text,
}


def forget_training(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The pre-training options of a fine-tuned file without those that fine-tuning has set and that change nothing but
    its own training: masks, noise, skipped layers. Values that are not built may stand there."""
    model = {k: v for k, v in config.items() if not _OF_TRAINING.fullmatch(k)}
    if family.startswith("d2v2"):
        model["post_mlp_drop"] = model.get("encoder_dropout", 0.1)
        modalities = {name: dict(value or {}) for name, value in (model.get("modalities") or {}).items()}
        for value in modalities.values():
            for key in [k for k in value if _OF_TRAINING.fullmatch(k)]:
                del value[key]
            value["decoder"] = value.get("decoder") or {}
        model["modalities"] = modalities
    return model


_OF_TRAINING = re.compile(
    r"(no_)?mask_(?!noise_std).*|require_same_masks|inverse_mask|encoder_zero_mask|add_masks|remove_masks"
    r"|keep_masked_pct|(prenet_)?layerdrop|encoder_layerdrop|(start|end)_drop_path_rate|post_mlp_drop|dropout_input"
    r"|mae_masking|drop_path_rate|block_dropout"
)


# ---- out --------------------------------------------------------------------------------------------------------


def layout_of(head: Head, family: str) -> Layout:
    """The layout in which a model of ours is written.

    Raises:
        NotImplementedError: the published code has no such model.
    """
    settings = head.settings
    fits = {
        "d2v1_audio": {"tokens": _CTC, "votes": _AUDIO, "pooled": _AUDIO}, "d2v2_audio": {"tokens": _CTC},
        "d2v1_vision": {"pooled": _IMAGE1 if settings.skip_tokens else _BEIT}, "d2v2_image": {"pooled": _IMAGE},
        "d2v1_text": {"sentence": _text_layout(family, "", f"classification_heads.{_SENTENCE}.")},
        "d2v2_text": {"sentence": _text_layout(family, "model.", f"classification_heads.{_SENTENCE}.")},
    }  # fmt: skip
    layout = fits[family].get(settings.kind)
    wanted = {"wav2vec_ctc": "ctc", "audio_classification": "multi-label"}
    task = wanted.get(layout.model, settings.task) if layout is not None else ""
    fc_norm = settings.kind != "pooled" or layout in (_AUDIO, _IMAGE) or settings.norm_eps is not None
    if (
        layout is None
        or settings.task != task
        or not fc_norm
        or settings.blank
        or (settings.kind == "pooled" and settings.hidden)
    ):
        raise NotImplementedError(
            f"format fairseq: expected a head that the published code has, got kind {settings.kind}, task "
            f"{settings.task}, hidden {settings.hidden}, blank {settings.blank} on {family}"
        )
    return layout


def describe_head(layout: Layout, settings: HeadSettings, inner: dict[str, Any]) -> dict[str, Any]:
    """Options of a fine-tuned file; `inner`: those of the pre-trained model."""
    outer: dict[str, Any] = {"_name": layout.model}
    if layout.model == "data2vec_text":
        return {**inner, "pooler_dropout": settings.dropout}
    if layout.model == "wav2vec_ctc":
        return {**outer, "final_dropout": settings.dropout, "normalize": True, "w2v_args": {"model": inner}}
    if layout.model == "audio_classification":
        outer["prediction_mode"] = "lin_softmax" if settings.kind == "votes" else "average"
        return {**outer, "final_dropout": settings.dropout, "normalize": True, "d2v_args": {"model": inner}}
    outer["pretrained_model_args"] = {"model": inner}
    if layout.model == "data2vec_text_classification":
        return {**outer, "pooler_dropout": settings.dropout, "pooler_activation_fn": "tanh"}
    outer["num_classes"] = settings.outputs
    if layout.model == "mae_image_classification":
        modes = {"mean": "MEAN_POOLING", "class": "CLS_TOKEN", "linear-softmax": "LIN_SOFTMAX"}
        outer |= {"prediction_mode": modes[settings.pool], "use_fc_norm": settings.norm_eps is not None}
    return outer
