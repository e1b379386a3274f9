"""Heads of published fine-tuned files: which head a file has, its options and tensors, and back.

Known are the models `wav2vec_ctc` (speech), `audio_classification` (1.0), `mae_image_classification` (2.0),
`data2vec_image_classification` (1.0), `data2vec_text_classification` (2.0), the classification heads of `data2vec_text`
(1.0), and the classifier of the separate 1.0 vision repository, whose names are BEiT's.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from d2v.config.finetune import HeadSettings
from d2v.interop.fairseq.options import Section
from d2v.interop.options import Option, as_float, read_options, write_options
from d2v.model.task_heads import Head

_SENTENCE = "sentence_classification_head"
_SENTENCE_NAME = re.compile(r"((?:encoder\.|model\.)?classification_heads\.(\w+)\.)(?:dense|out_proj)\.(?:weight|bias)")
PREFIXES = ("", "w2v_encoder.w2v_model.", "d2v_model.", "model.")
"""What fine-tuned models put before the encoder's names."""
INNER = ("w2v_args", "d2v_args", "pretrained_model_args")
"""Options of a fine-tuned model that hold those of the pre-trained one."""
_POOLS = {"MEAN_POOLING": "mean", "1": "mean", "CLS_TOKEN": "class", "2": "class"}
_POOLS |= {"LIN_SOFTMAX": "linear-softmax", "3": "linear-softmax"}


def _read_pool(value: Any, _: Any) -> str:
    mode = str(value).rsplit(".", 1)[-1].strip("<>")
    if mode not in _POOLS:
        raise NotImplementedError(f"prediction_mode: expected one of {', '.join(_POOLS)}, got {mode!r}")
    return _POOLS[mode]


@dataclass(frozen=True)
class Layout:
    """A kind of fine-tuned file: its tensors and its options."""

    model: str
    """`_name` in its options; "beit" for the separate vision repository."""
    prefix: str
    """Before the encoder's names."""
    names: tuple[tuple[str, str], ...]
    """(beginning of our name in the head, beginning of the published one)."""
    inner: str = "pretrained_model_args"
    """Option that holds those of the pre-trained model; empty: they are one section."""
    kind: str = ""
    """Key of its options in `NO_EFFECT`; empty: none of them matters."""
    options: tuple[Option, ...] = ()
    """Options beside fields of `HeadSettings`."""
    built: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Options with the only values that are built."""
    written: dict[str, Any] = field(default_factory=dict)
    """What is written beside `options`."""
    head: dict[str, Any] = field(default_factory=dict)
    """Settings that no option changes."""

    def published(self, name: str) -> str:
        """Published name of a tensor of our head."""
        own, theirs = next(pair for pair in self.names if name.startswith(pair[0]))
        return theirs + name.removeprefix(own)


_OUT = (("out.", "proj."),)
_NORMED = (("norm.", "fc_norm."), ("out.", "head."))
_DROPOUT = Option("final_dropout", "dropout", 0.0, as_float)
_CTC = Layout(
    "wav2vec_ctc", "w2v_encoder.w2v_model.", (("out.", "w2v_encoder.proj."),), "w2v_args", "speech head", (_DROPOUT,),
    {"blank_weight": (0,), "autoregressive": (False,)}, {"normalize": True}, {"kind": "tokens", "task": "ctc"},
)  # fmt: skip
_MODES = ("lin_softmax", "average", "average_before")
_AUDIO = Layout(
    "audio_classification", "d2v_model.", _OUT, "d2v_args", "speech head",
    (
        _DROPOUT,
        Option("prediction_mode", "kind", _MODES[0], lambda v, _: "votes" if v == _MODES[0] else "pooled",
               lambda v, _: _MODES[0] if v == "votes" else _MODES[1]),
    ),
    {"prediction_mode": _MODES, "eval_prediction_mode": (None, ""), "conv_kernel": (-1, 0, 1)}, {"normalize": True},
    {"task": "multi-label"},
)  # fmt: skip
_IMAGE = Layout(
    "mae_image_classification", "model.", _NORMED, kind="image head", built={"remove_alibi": (False,)},
    options=(
        Option("prediction_mode", "pool", "MEAN_POOLING", _read_pool,
               lambda v, _: next(mode for mode, pool in _POOLS.items() if pool == v)),
    ),
)  # fmt: skip
# Its code takes the first patch for the class token, which the encoder has already cut off.
_IMAGE1 = Layout("data2vec_image_classification", "model.", _NORMED, head={"norm_eps": 1e-5, "skip_tokens": 1})
_BEIT = Layout("beit", "", _NORMED)


def _text_layout(family: str, prefix: str, head: str) -> Layout:
    first = family == "d2v1_text"  # its options of encoder and head are one section
    return Layout(
        "data2vec_text" if first else "data2vec_text_classification", prefix,
        (("dense.", f"{head}dense."), ("out.", f"{head}out_proj.")), "" if first else "pretrained_model_args",
        "text head", (Option("pooler_dropout", "dropout", 0.0, as_float),),
        {"pooler_activation_fn": ("tanh",), "quant_noise_pq": (0,), "spectral_norm_classification_head": (False,)},
        {} if first else {"pooler_activation_fn": "tanh"}, {"kind": "sentence"},
    )  # fmt: skip


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
    own: dict[str, Any] = {"outputs": int(tensors[name].shape[0]), **layout.head}
    if layout.names is _NORMED and "norm_eps" not in own:
        normed = layout.published("norm.weight") in tensors
        own["norm_eps"] = 1e-6 if normed else None
        own["pool"] = "mean" if normed else "class"
    if layout.kind:
        section = Section(options, "", layout.kind)
        for option, values in layout.built.items():
            section.only(option, *values)
        if layout.kind == "speech head" and section.get("normalize", True) is False:
            warnings.warn("normalize: expected True, got False: waveforms are normalised all the same", stacklevel=2)
        read_options(layout.options, section.get, own)
        section.read |= {"norm_eps", "use_fc_norm"} if layout is _IMAGE else set()
        if layout.kind != "text head":
            section.close()
        else:
            own["task"] = "regression" if own["outputs"] == 1 else "classification"
            if "pretrained_model_args" in options:  # in 1.0 the options of encoder and head are one section
                section.close()
    return HeadSettings(**own)


def forget_training(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The pre-training options of a fine-tuned file without those that fine-tuning has set and that change nothing but
    its own training: masks, noise, skipped layers. Values that are not built may stand there."""
    model = {k: v for k, v in config.items() if not _OF_TRAINING.fullmatch(k)}
    if family.startswith("d2v2"):
        model["post_mlp_drop"] = model.get("encoder_dropout", 0.1)
        modalities = (model.get("modalities") or {}).items()
        model["modalities"] = {
            name: {k: v for k, v in (value or {}).items() if not _OF_TRAINING.fullmatch(k)}
            for name, value in modalities
        }
    return model


def allow_no_decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a 2.0 model with the published defaults where a file without decoder has none for it."""
    modalities = (config.get("modalities") or {}).items()
    filled = {name: {**(value or {}), "decoder": (value or {}).get("decoder") or {}} for name, value in modalities}
    return {**config, "modalities": filled}


_OF_TRAINING = re.compile(
    r"(no_)?mask_(?!noise_std).*|require_same_masks|inverse_mask|encoder_zero_mask|add_masks|remove_masks"
    r"|keep_masked_pct|(prenet_)?layerdrop|encoder_layerdrop|(start|end)_drop_path_rate|post_mlp_drop|dropout_input"
    r"|mae_masking|drop_path_rate|block_dropout|recon_loss|cls_type|adversarial_training"
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
    own = {**layout.written, **write_options(layout.options, settings)}
    if not layout.inner:
        return {**inner, **own}
    if layout.names is _NORMED:
        own["num_classes"] = settings.outputs
    if layout is _IMAGE:
        own["use_fc_norm"] = settings.norm_eps is not None
    return {"_name": layout.model, **own, layout.inner: {"model": inner}}
