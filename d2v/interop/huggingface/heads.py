"""Heads of transformers' Data2Vec task models, in and out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v.config import Config
from d2v.config.finetune import HeadSettings
from d2v.model.task_heads import Head

_CLASSIFIER = (("out.", "classifier."),)
_LM = (("dense.", "lm_head.dense."), ("norm.", "lm_head.layer_norm."), ("out.", "lm_head.decoder."))


@dataclass(frozen=True)
class TaskModel:
    """A class of transformers with a head."""

    names: tuple[tuple[str, str], ...]
    """(beginning of our name in the head, beginning of theirs)."""
    read: Callable[[Mapping[str, Any], int], HeadSettings]
    """Head from `config.json` and the number of outputs."""


def _dropout(given: Mapping[str, Any]) -> float:
    value = given.get("classifier_dropout")
    return float(given.get("hidden_dropout_prob", 0.1) if value is None else value)


def _task(given: Mapping[str, Any], outputs: int) -> Any:
    kinds = {"regression": "regression", "multi_label_classification": "multi-label"}
    return kinds.get(str(given.get("problem_type")), "regression" if outputs == 1 else "classification")


def _read_ctc(given: Mapping[str, Any], outputs: int) -> HeadSettings:
    dropout = float(given.get("final_dropout", 0.1))
    return HeadSettings("tokens", outputs, task="ctc", dropout=dropout, blank=int(given.get("pad_token_id") or 0))


def _read_utterance(given: Mapping[str, Any], outputs: int) -> HeadSettings:
    _refuse_layer_sum(given)
    hidden = int(given.get("classifier_proj_size", 256))
    return HeadSettings("pooled", outputs, task=_task(given, outputs), hidden=hidden)


def _read_frames(given: Mapping[str, Any], outputs: int) -> HeadSettings:
    _refuse_layer_sum(given)
    return HeadSettings("tokens", outputs, task="tokens")


def _refuse_layer_sum(given: Mapping[str, Any]) -> None:
    if given.get("use_weighted_layer_sum"):
        raise NotImplementedError("config.json: use_weighted_layer_sum: expected False, got True")


def _read_sentence(given: Mapping[str, Any], outputs: int) -> HeadSettings:
    return HeadSettings("sentence", outputs, task=_task(given, outputs), dropout=_dropout(given))


def _read_image(given: Mapping[str, Any], outputs: int) -> HeadSettings:
    task = _task(given, outputs)
    if not given.get("use_mean_pooling", True):
        return HeadSettings("pooled", outputs, task=task, pool="class")
    return HeadSettings("pooled", outputs, task=task, norm_eps=float(given["layer_norm_eps"]))


MODELS = {
    "Data2VecAudioForCTC": TaskModel((("out.", "lm_head."),), _read_ctc),
    "Data2VecAudioForSequenceClassification": TaskModel((("dense.", "projector."), *_CLASSIFIER), _read_utterance),
    "Data2VecAudioForAudioFrameClassification": TaskModel(_CLASSIFIER, _read_frames),
    "Data2VecTextForSequenceClassification": TaskModel(
        (("dense.", "classifier.dense."), ("out.", "classifier.out_proj.")), _read_sentence
    ),
    "Data2VecTextForMultipleChoice": TaskModel((("dense.", "pooler.dense."), *_CLASSIFIER), _read_sentence),
    "Data2VecTextForTokenClassification": TaskModel(
        _CLASSIFIER, lambda given, n: HeadSettings("tokens", n, task="tokens", dropout=_dropout(given))
    ),
    "Data2VecTextForQuestionAnswering": TaskModel(
        (("out.", "qa_outputs."),), lambda _, n: HeadSettings("tokens", n, task="tokens")
    ),
    "Data2VecTextForMaskedLM": TaskModel(
        _LM, lambda given, n: HeadSettings("vocabulary", n, task="tokens", norm_eps=float(given["layer_norm_eps"]))
    ),
    "Data2VecVisionForImageClassification": TaskModel((("norm.", "pooler.layernorm."), *_CLASSIFIER), _read_image),
}
"""Task models that are built; a score of multiple choice is one output for each choice."""
_QUESTION = ("start", "end")


def find_model(given: Mapping[str, Any]) -> TaskModel | None:
    """The task model of a `config.json`, or None: an encoder.

    Raises:
        NotImplementedError: a task model that is not built, by name.
    """
    name = str((given.get("architectures") or [""])[0])
    if name in MODELS:
        return MODELS[name]
    if "For" in name:
        raise NotImplementedError(f"config.json: architectures: expected one of {', '.join(MODELS)}, got {name}")
    return None


def read_head(model: TaskModel, given: Mapping[str, Any], tensors: dict[str, Tensor]) -> tuple[HeadSettings, Any]:
    """Settings of a head and its tensors by our names, which are taken out of `tensors`."""
    own: dict[str, Tensor] = {}
    if model.names is _LM:  # its last layer is the embedding, and its bias is kept under another name as well
        if (embeddings := tensors.get("embeddings.word_embeddings.weight")) is not None:
            tensors.setdefault("lm_head.decoder.weight", embeddings)
        bias = tensors.pop("lm_head.bias", None)
        if bias is not None:
            tensors.setdefault("lm_head.decoder.bias", bias)
    for ours, theirs in model.names:
        for end in ("weight", "bias"):
            if theirs + end in tensors:
                own[ours + end] = tensors.pop(theirs + end)
    if "out.weight" not in own:
        raise ValueError(f"checkpoint: expected a tensor {dict(model.names)['out.']}weight, found none")
    return model.read(given, int(own["out.weight"].shape[0])), own


def read_labels(folder: Path, given: Mapping[str, Any], settings: HeadSettings) -> list[str]:
    """Names of the outputs: `vocab.json` of a CTC folder, else `id2label`, else numbers."""
    names: dict[int, str] = {}
    if settings.task == "ctc":
        file = folder / "vocab.json"
        if file.is_file():
            value = json.loads(file.read_text(encoding="utf-8"))
            names = {int(i): str(label) for label, i in value.items()} if isinstance(value, dict) else {}
    elif (given.get("architectures") or [""])[0] == "Data2VecTextForQuestionAnswering":
        names = dict(enumerate(_QUESTION))
    elif settings.kind != "vocabulary":
        names = {int(i): str(label) for i, label in (given.get("id2label") or {}).items()}
    return [names.get(i, str(i)) for i in range(settings.outputs)]


# ---- out --------------------------------------------------------------------------------------------------------


def choose_model(head: Head, config: Config, labels: Sequence[str]) -> str:
    """Name of the transformers class for a head of ours.

    Raises:
        NotImplementedError: transformers has no such class.
    """
    s, modality = head.settings, config.stem.modality
    if modality == "speech":
        if s.kind == "tokens":
            return "Data2VecAudioForCTC" if s.task == "ctc" else "Data2VecAudioForAudioFrameClassification"
        if s.kind == "pooled" and s.pool == "mean" and s.norm_eps is None and not s.skip_tokens:
            return "Data2VecAudioForSequenceClassification"
    whole = s.kind == "pooled" and not s.hidden and not s.skip_tokens
    if modality == "vision" and whole and (s.pool, s.norm_eps) in (("mean", config.encoder.norm_eps), ("class", None)):
        return "Data2VecVisionForImageClassification"
    if modality == "text" and s.kind == "sentence" and s.hidden in (0, config.encoder.width):
        return "Data2VecTextForSequenceClassification"
    if modality == "text" and s.kind == "tokens" and s.task == "tokens":
        is_question = tuple(labels) == _QUESTION
        return f"Data2VecTextFor{'QuestionAnswering' if is_question else 'TokenClassification'}"
    if modality == "text" and s.kind == "vocabulary":
        return "Data2VecTextForMaskedLM"
    raise NotImplementedError(
        f"format huggingface: expected a head that transformers has for {modality}, got {dataclasses.asdict(s)}"
    )


def describe_head(name: str, settings: HeadSettings, labels: Sequence[str], width: int) -> dict[str, Any]:
    """Entries of `config.json` for a head."""
    entry: dict[str, Any] = {"architectures": [name]}
    if name == "Data2VecAudioForCTC":
        return {**entry, "vocab_size": settings.outputs, "pad_token_id": settings.blank,
                "final_dropout": settings.dropout, "ctc_zero_infinity": True}  # fmt: skip
    if settings.kind != "vocabulary":
        entry["id2label"] = {str(i): label for i, label in enumerate(labels)}
        entry["label2id"] = {label: i for i, label in enumerate(labels)}
        kinds = {"regression": "regression", "multi-label": "multi_label_classification"}
        entry["problem_type"] = kinds.get(settings.task, "single_label_classification")
    if name.startswith("Data2VecText"):
        entry["classifier_dropout"] = settings.dropout
    if name == "Data2VecAudioForSequenceClassification":
        entry["classifier_proj_size"] = settings.hidden or width
    if name == "Data2VecVisionForImageClassification":
        entry["use_mean_pooling"] = settings.pool == "mean"
    return entry


def name_tensors(name: str, head: Head, embeddings: Tensor | None, width: int) -> dict[str, Tensor]:
    """Tensors of a head by transformers' names, as copies; the last layer of a token prediction where it is not equal
    to `embeddings`."""
    own = {n: t.detach().cpu().contiguous().clone() for n, t in head.state_dict().items()}
    names = dict(MODELS[name].names)
    if name == "Data2VecTextForMaskedLM":
        own |= {"bias": own["out.bias"].clone()}
        if embeddings is not None and torch.equal(own["out.weight"], embeddings.cpu()):
            del own["out.weight"], own["out.bias"]
        return {f"lm_head.{n}" if n == "bias" else _rename(n, names): t for n, t in own.items()}
    if "dense." in names and "dense.weight" not in own:  # transformers always has this layer
        own |= {"dense.weight": torch.eye(width), "dense.bias": torch.zeros(width)}
    return {_rename(n, names): t for n, t in own.items()}


def _rename(name: str, names: Mapping[str, str]) -> str:
    part, end = name.rsplit(".", 1)
    return names[f"{part}."] + end
