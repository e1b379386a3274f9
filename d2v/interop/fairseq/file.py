"""Published checkpoint files, in and out (their structure: fairseq's `torch.save` of one dict)."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v.config import Config
from d2v.config.finetune import HeadSettings
from d2v.data.sources import read_text_file
from d2v.folder import describe_mismatch
from d2v.interop.fairseq.config import describe, translate
from d2v.interop.fairseq.heads import (
    INNER,
    PREFIXES,
    Layout,
    allow_no_decoder,
    describe_head,
    find_layout,
    forget_training,
    layout_of,
    read_settings,
)
from d2v.interop.fairseq.model import assemble, parameters, teacher_parameters
from d2v.interop.fairseq.names import BEIT, family_of
from d2v.interop.fairseq.options import PUBLISHED
from d2v.interop.renaming import rename, reverse
from d2v.interop.torch_file import check_weights, read_torch_file, strip_wrappers, to_plain
from d2v.model.data2vec import Data2Vec, strip_pretraining
from d2v.model.finetuned import FineTuned
from d2v.model.saving import Origin
from d2v.model.task_heads import Head, make_head

_MARKS = {
    "d2v2_audio": "modality_encoders.AUDIO.",
    "d2v2_image": "modality_encoders.IMAGE.",
    "d2v2_text": "modality_encoders.TEXT.",
    "d2v1_text": "encoder.sentence_encoder.",
    "d2v1_audio": "feature_extractor.conv_layers.",
    "d2v1_vision": "patch_embed.conv.",
}
"""What the names of a family begin with, after the prefix of a fine-tuned model."""
_BEIT = "patch_embed.proj.weight"
_OLD_NAMES = (
    (r"^decoder\.", "encoder."),
    (r"\.emb_layer_norm\.", ".layernorm_embedding."),
    (r"^encoder\.lm_head\.", "encoder.regression_head."),
)
"""Of 1.0 text."""
_NOT_READ = re.compile(r".*(encoder_mask|target_proj\..*|num_updates)$")
"""Left over from training code, without effect on what a model computes."""
_PRE_TRAINING = re.compile(
    r"(modality_encoders\.\w+\.decoder|shared_decoder|recon_proj|encoder\.regression_head|final_proj|mask_emb)\b"
)
"""What only pre-training uses: a fine-tuned file may lack it."""
_DECODER = re.compile(r"(modality_encoders\.\w+\.decoder|encoder\.regression_head|final_proj)\.")
NORMALISED = {"esc50_eval": (-6.627, 5.359), "spcv2_eval": (-6.846, 5.565)}
"""Mean and deviation of the spectrograms that EAT was fine-tuned on, by the option that names the data."""


def load(path: str | Path) -> Data2Vec | FineTuned:
    """A model from a published checkpoint file, 1.0 or 2.0, or from the separate 1.0 vision repository.

    Nothing in the file is executed. Padding is treated as in the published code where positions are convolutions
    ("positions-see-padding"); all other behaviours are the default ones. A fine-tuned file gives a `FineTuned`, its
    labels from the file or from a `dict.ltr.txt` beside it, else numbers; heads that are not known are left out with a
    warning that names them. A file without the decoder (2.0) or regression head (1.0) of the pre-training gives a model
    without it, with a warning; so does one whose class loss is not that of data2vec 2.0 (emotion2vec). Names may begin
    with `module.` or `_orig_mod.`.

    Raises:
        ValueError: not such a file; tensors missing, unexpected, misshapen or not finite. NotImplementedError: an
            option that is not built, by name.
    """
    state = read_torch_file(path)
    key = "model" if isinstance(state, Mapping) and "model" in state else "module"
    if not isinstance(state, Mapping) or not isinstance(state.get(key), Mapping):
        raise ValueError(f"checkpoint {str(path)!r}: expected a dict with the tensors under 'model', got none")
    found = _sort_tensors(strip_wrappers(state[key]), str(path))
    layout = find_layout(found.heads, found.family, found.prefix, found.beit)
    known = set() if layout is None else {n for n in found.heads if any(n.startswith(p) for _, p in layout.names)}
    if left := [name for name in found.heads if name not in known]:
        warnings.warn(f"checkpoint {str(path)!r}: left out the heads {', '.join(left[:8])}", stacklevel=2)
    outer = {} if found.beit else _find_options(state, str(path))
    inner = _describe_beit(found.tensors) if found.beit else _find_config(outer, str(path))
    loss = inner.get("cls_type", "single")
    if loss != "single":
        found.tensors = {n: t for n, t in found.tensors.items() if not _DECODER.match(n)}
    config = _translate(inner, found, fine_tuned=bool(found.heads) or loss != "single")
    for option, (mean, deviation) in NORMALISED.items():
        if outer.get(option) and config.stem.modality == "spectrograms":
            config = config.change(stem={"frame_mean": mean, "frame_deviation": deviation})
    dtypes = {n: t.dtype for n, t in (found.tensors if layout is None else {**found.named, **found.heads}).items()}
    origin = Origin(inner if layout is None else outer, dtypes, tuple(found.heads), key)
    if layout is None:
        model = _assemble_pretrained(config, found, str(path), loss)
        model.origin = origin
        return model
    settings = read_settings(layout, outer, found.heads)
    options = outer.get("norm_eps") if layout.model == "mae_image_classification" else None
    if options is not None:
        config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, norm_eps=float(options)))
    model = _assemble_encoder(config, found)
    fine_tuned = FineTuned(model, make_head(settings, config.encoder.width), _find_labels(state, path, settings))
    _fill_head(fine_tuned.head, {n: found.heads[n] for n in known}, layout)
    fine_tuned.origin = origin
    return fine_tuned


def _translate(inner: dict[str, Any], found: Found, fine_tuned: bool) -> Config:
    family = found.family
    mask_token = _vocabulary(found.tensors) - 1 if family == "d2v1_text" else None
    shapes = {name: tuple(t.shape) for name, t in found.tensors.items()}
    given = forget_training(inner, family) if fine_tuned and not found.beit else inner
    if family.startswith("d2v2") and not found.has_decoder:
        given = allow_no_decoder(given)
    translated = translate(given, family, shapes, mask_token)
    if translated.shared_decoder.layers == 0:  # left over from training code
        for tensors in (found.tensors, found.named):
            for name in [n for n in tensors if n.startswith("shared_decoder")]:
                del tensors[name]
    return dataclasses.replace(
        translated, published=PUBLISHED[family] & {"positions-see-padding"},
        encoder=dataclasses.replace(translated.encoder, norm_eps=1e-6) if found.beit else translated.encoder,
    )  # fmt: skip


def _assemble_pretrained(config: Config, found: Found, where: str, loss: str) -> Data2Vec:
    """A pre-trained model; without decoder or head, like the file, where that has none. loss: of its class token."""
    whole = found.has_decoder
    if not whole:
        part = "decoder" if config.version == 2 else "regression head"
        lack = f"has no {part} of the pre-training" if loss == "single" else f"the loss cls_type {loss!r} is not built"
        warnings.warn(
            f"checkpoint {where!r}: {lack}: the model gives features and can be fine-tuned, "
            "but pre-training cannot go on from it",
            stacklevel=3,
        )
    optional = _PRE_TRAINING if found.heads or found.beit or not whole else None
    prepare = functools.partial(strip_pretraining, decoder=not whole, teacher=False)
    return assemble(config, found.tensors, found.teacher, optional, prepare)


def _assemble_encoder(config: Config, found: Found) -> Data2Vec:
    """The encoder of a fine-tuned file: what the file lacks of the pre-training is left out."""

    def prepare(model: Data2Vec) -> None:
        strip_pretraining(model, decoder=not found.has_decoder, teacher=found.teacher is None)
        if "mask_emb" not in found.tensors:
            model.mask_token = None
        if found.family == "d2v1_vision" and "encoder.norm.weight" not in found.tensors:
            model.blocks.norm = None  # the head has it, behind its pool

    return assemble(config, found.tensors, found.teacher, prepare=prepare)


@torch.no_grad()
def _fill_head(head: Head, given: Mapping[str, Tensor], layout: Layout) -> None:
    own = {layout.published(name): tensor for name, tensor in head.state_dict().items()}
    if problem := describe_mismatch(own, given):
        raise ValueError(f"head: {problem}")
    for name, tensor in own.items():
        check_weights(given[name], f"head: {name}")
        tensor.copy_(given[name])


def _find_labels(state: Mapping[str, Any], path: str | Path, settings: HeadSettings) -> list[str]:
    """Names of the outputs: the dictionary in the file, `dict.ltr.txt` beside it, or numbers."""
    extra = state.get("extra_state")
    task = to_plain(state.get("task_state"))
    found = [extra.get("labels") if isinstance(extra, Mapping) else None]
    if isinstance(task, dict) and isinstance(task.get("target_dictionary"), dict):
        found.append(task["target_dictionary"].get("symbols"))
    beside = Path(path).with_name("dict.ltr.txt")
    if settings.task == "ctc" and beside.is_file():
        lines = read_text_file(beside).splitlines()
        found.append(["<s>", "<pad>", "</s>", "<unk>", *(line.rsplit(" ", 1)[0] for line in lines)])
    for labels in found:
        if isinstance(labels, list) and len(labels) == settings.outputs and all(isinstance(x, str) for x in labels):
            return labels
    return [str(i) for i in range(settings.outputs)]


def save(model: Data2Vec | FineTuned, path: str | Path) -> Path:
    """Writes a checkpoint that the published code and `load` read; returns the path. Appears whole or not at all.

    A model that came from such a file keeps its options and dtypes. A 1.0 image classifier is written with the names of
    the separate vision repository, unless it leaves out the first patch as the published fairseq classifier does.

    Raises:
        NotImplementedError: something that the published code does not have.
    """
    path = Path(path)
    encoder = model.encoder if isinstance(model, FineTuned) else model
    family, origin = family_of(encoder), model.origin if isinstance(model.origin, Origin) else None
    dtypes = origin.dtypes if origin is not None else {}
    layout = layout_of(model.head, family) if isinstance(model, FineTuned) else None
    prefix = "" if layout is None else layout.prefix
    named = {prefix + name: t for name, t in parameters(encoder).items()}
    if isinstance(model, FineTuned) and layout is not None:
        if layout.model == "beit":
            named = {rename(name, reverse(BEIT)): t for name, t in named.items()}
        named |= {layout.published(name): t for name, t in model.head.state_dict().items()}
    tensors: dict[str, Any] = {
        name: t.detach().cpu().to(dtypes.get(name, t.dtype)).contiguous().clone() for name, t in named.items()
    }
    if layout is None or encoder.teacher.owned:
        teacher = {n: t.detach().cpu().contiguous().clone() for n, t in teacher_parameters(encoder).items()}
        tensors["encoder._ema" if family == "d2v1_text" else "_ema"] = teacher
    config = origin.config if origin is not None else _describe(model, family, layout)
    state: dict[str, Any] = {
        "args": None, "cfg": {"model": config}, "model": tensors, "criterion": None, "optimizer_history": [],
        "task_state": {}, "extra_state": {}, "last_optimizer_state": None,
    }  # fmt: skip
    if isinstance(model, FineTuned):
        state["extra_state"] = {"labels": list(model.labels)}
    if origin is not None and origin.key != "model":
        state[origin.key] = state.pop("model")
    _write(state, path)
    return path


def _describe(model: Data2Vec | FineTuned, family: str, layout: Layout | None) -> dict[str, Any]:
    inner = describe(model.config, family)
    if not isinstance(model, FineTuned) or layout is None:
        return inner
    return describe_head(layout, model.head.settings, inner)


def _write(state: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{path.name}")
    try:
        torch.save(state, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Found:
    """Tensors of a file, sorted."""

    tensors: dict[str, Tensor]
    """Of the model, by published names without prefix."""
    named: dict[str, Tensor]
    """The same by their names in the file."""
    heads: dict[str, Tensor]
    """All others, by their names in the file."""
    teacher: dict[str, Tensor] | None
    family: str
    prefix: str
    beit: bool
    """The names are those of the separate vision repository."""

    @property
    def has_decoder(self) -> bool:
        """There is the decoder or the regression head of the pre-training."""
        return any(_DECODER.match(name) for name in self.tensors)


def _sort_tensors(state: Mapping[str, Any], where: str) -> Found:
    given = dict(state)
    entries = [given.pop(key) for key in ("_ema", "encoder._ema") if key in given]
    teacher = dict(entries[0]) if entries else None
    beit = _BEIT in given
    original = {name: name for name in given}
    if beit:
        original = {rename(name, BEIT): name for name in given}
    elif any(name.startswith(("encoder.sentence_encoder", "decoder.sentence_encoder")) for name in given):
        original = {_rename_old(name): name for name in given}
    found = [(f, p) for p in PREFIXES for f, mark in _MARKS.items() if any(n.startswith(p + mark) for n in original)]
    if not found:
        raise ValueError(f"checkpoint {where!r}: expected names of a data2vec model, got {sorted(given)[:4]}")
    family, prefix = found[0]
    result = Found({}, {}, {}, teacher, family, prefix, beit)
    for name, old in original.items():
        value = given[old]
        inner = name.removeprefix(prefix).replace("positional_encoder.pos_embed", "positional_encoder.positions")
        if not isinstance(value, Tensor) or _NOT_READ.fullmatch(inner):
            continue
        if not name.startswith(prefix) or _is_head(inner):
            result.heads[name] = value
        else:
            result.tensors[inner] = value
            result.named[old if beit else name] = value
    return result


def _is_head(name: str) -> bool:
    return name.startswith(("head.", "fc_norm.", "classification_heads.", "encoder.classification_heads.", "proj."))


def _rename_old(name: str) -> str:
    for pattern, replacement in _OLD_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _find_options(state: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of the file's model."""
    config = to_plain(state.get("cfg") or state.get("args"))
    if isinstance(config, dict) and isinstance(config.get("model"), dict):
        config = config["model"]
    if not isinstance(config, dict) or not config:
        raise ValueError(f"checkpoint {where!r}: expected the model's options under 'cfg' or 'args', got none")
    return config


def _find_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The options of the model that was pre-trained: those of a fine-tuned file hold them one level deeper."""
    for key in INNER:
        inner = config.get(key)
        if isinstance(inner, dict):
            config = inner["model"] if isinstance(inner.get("model"), dict) else inner
    if not config:
        raise ValueError(f"checkpoint {where!r}: expected the model's options under 'cfg' or 'args', got none")
    return config


def _vocabulary(tensors: Mapping[str, Tensor]) -> int:
    name = "encoder.sentence_encoder.embed_tokens.weight"
    if name not in tensors:
        raise ValueError(f"checkpoint: expected a tensor {name}, found none")
    return int(tensors[name].shape[0])


def _describe_beit(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of a file of the separate vision repository, read off its shapes."""
    needed = ("patch_embed.conv.weight", "encoder.rel_pos_bias.relative_position_bias_table")
    if missing := [name for name in needed if name not in tensors]:
        raise NotImplementedError(f"checkpoint: expected a shared relative position bias, found no {missing[0]}")
    width, channels, patch, _ = tensors[needed[0]].shape
    distances, heads = tensors[needed[1]].shape
    side = (math.isqrt(distances - 3) + 1) // 2
    depth = 1 + max(int(m[1]) for n in tensors if (m := re.match(r"encoder\.blocks\.(\d+)\.", n)))
    scaled = "encoder.blocks.0.gamma_1" in tensors
    return {
        "_name": "data2vec_vision", "image_size": side * patch, "patch_size": patch, "in_channels": channels,
        "embed_dim": width, "num_heads": heads, "depth": depth, "layer_scale_init_value": 1e-4 if scaled else 0.0,
        "num_mask_patches": round(side * side * 120 / 196), "average_top_k_layers": max(1, depth // 2),
        "layer_norm_target_layer": True, "layer_norm_targets": True, "loss_beta": 2.0, "drop_path": 0.25,
        "attention_dropout": 0.05,
    }  # fmt: skip
