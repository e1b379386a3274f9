"""Task models of transformers in and out: equal logits, labels, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2v.config.finetune import HeadSettings
from d2v.interop import huggingface
from d2v.model.data2vec import strip_pretraining
from d2v.model.finetuned import FineTuned
from d2v.model.task_heads import make_head

from .test_huggingface import close, inputs_of, tiny_model

# Of an export of speech, which test_huggingface_guesses.py is about.
pytestmark = pytest.mark.filterwarnings("ignore:format huggingface")
COMMON = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
AUDIO = {
    **COMMON, "conv_dim": [24, 24, 24], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2],
    "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5,
    "num_feat_extract_layers": 3, "vocab_size": 12, "classifier_proj_size": 20, "num_labels": 4, "pad_token_id": 0,
}  # fmt: skip
TEXT = {**COMMON, "vocab_size": 90, "max_position_embeddings": 42, "type_vocab_size": 1, "num_labels": 3}
VISION = {
    **COMMON, "image_size": 24, "patch_size": 4, "num_labels": 5, "use_shared_relative_position_bias": True,
    "use_mean_pooling": True, "layer_scale_init_value": 0.1,
}  # fmt: skip
CASES = {
    "AudioForCTC": AUDIO,
    "AudioForSequenceClassification": AUDIO,
    "AudioForAudioFrameClassification": AUDIO,
    "TextForSequenceClassification": TEXT,
    "TextForTokenClassification": TEXT,
    "TextForQuestionAnswering": {**TEXT, "num_labels": 2},
    "TextForMaskedLM": TEXT,
    "VisionForImageClassification": VISION,
    "VisionForImageClassification, class token": {**VISION, "use_mean_pooling": False},
    "VisionForImageClassification, no positions": {**VISION, "use_shared_relative_position_bias": False},
    "TextForSequenceClassification, two types": {**TEXT, "type_vocab_size": 2, "intermediate_size": 37},
    "VisionForImageClassification, mask token": {**VISION, "use_mask_token": True},
}


def theirs(name: str, options: dict[str, Any]) -> Any:
    """A task model of transformers with random weights, no value at its start."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(5)
    kind = name.split("For")[0]
    config = getattr(transformers, f"Data2Vec{kind}Config")(**options)
    model = getattr(transformers, "Data2Vec" + name.split(",")[0])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def logits_of(model: Any, inputs: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        out = model(inputs, **more)
    return torch.stack([out.start_logits, out.end_logits], dim=-1) if "start_logits" in out else out.logits


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    model = theirs(name, CASES[name])
    model.save_pretrained(tmp_path / "m")
    ours = huggingface.load(tmp_path / "m")
    assert isinstance(ours, FineTuned)
    inputs = inputs_of({"A": "hf_audio", "T": "hf_text", "V": "hf_vision"}[name[0]])
    expected = logits_of(model, inputs)
    close(ours.eval()(inputs).detach(), expected, 2e-5)
    assert len(ours.labels) == expected.shape[-1]
    again = huggingface.load(huggingface.save(ours, tmp_path / "n"))
    assert isinstance(again, FineTuned) and again.labels == ours.labels
    assert again.head.settings == ours.head.settings
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    back = type(model).from_pretrained(tmp_path / "n").eval()
    close(logits_of(back, inputs), expected, 1e-6)


@pytest.mark.parametrize("name", ["AudioForCTC", "AudioForSequenceClassification", "TextForSequenceClassification"])
def test_logits_of_padded_batches(tmp_path: Path, name: str) -> None:
    model = theirs(name, CASES[name])
    model.save_pretrained(tmp_path / "m")
    ours = huggingface.load(tmp_path / "m").eval()
    inputs = inputs_of("hf_audio" if name[0] == "A" else "hf_text")
    lengths = torch.tensor([inputs.shape[1], inputs.shape[1] * 3 // 5])
    valid = torch.arange(inputs.shape[1]) < lengths[:, None]
    inputs = torch.where(valid, inputs, torch.tensor(0.0 if inputs.is_floating_point() else 1).to(inputs.dtype))
    expected, actual = logits_of(model, inputs, attention_mask=valid.long()), ours(inputs, lengths)
    if expected.dim() == 3:
        kept = torch.arange(expected.shape[1]) < ours.count_tokens(inputs, lengths)[:, None]
        expected, actual = expected[kept], actual[kept]
    close(actual, expected, 2e-5)


def test_labels(tmp_path: Path) -> None:
    model = theirs("TextForSequenceClassification", {**TEXT, "id2label": {0: "bad", 1: "fair", 2: "good"}})
    model.save_pretrained(tmp_path / "m")
    assert huggingface.load(tmp_path / "m").labels == ("bad", "fair", "good")
    model = theirs("AudioForCTC", AUDIO)
    model.save_pretrained(tmp_path / "n")
    assert huggingface.load(tmp_path / "n").labels[:2] == ("0", "1")
    (tmp_path / "n" / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, "E": 2}))
    assert huggingface.load(tmp_path / "n").labels[:4] == ("<pad>", "|", "E", "3")


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("AudioForXVector", AUDIO, "Data2VecAudioForXVector"),
        ("AudioForSequenceClassification", {**AUDIO, "use_weighted_layer_sum": True}, "use_weighted_layer_sum"),
        (
            "VisionForSemanticSegmentation",
            {**VISION, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
            "Data2VecVisionForSemanticSegmentation",
        ),
        ("TextForCausalLM", {**TEXT, "is_decoder": True}, "is_decoder"),
    ],
)
def test_refused_by_name(tmp_path: Path, name: str, options: dict[str, Any], text: str) -> None:
    theirs(name, options).save_pretrained(tmp_path / "m")
    with pytest.raises(NotImplementedError, match=text):
        huggingface.load(tmp_path / "m")


def test_multiple_choice_scores_each_choice(tmp_path: Path) -> None:
    model = theirs("TextForMultipleChoice", TEXT)
    model.save_pretrained(tmp_path / "m")
    ours = huggingface.load(tmp_path / "m").eval()
    inputs = inputs_of("hf_text")
    close(ours(inputs)[None, :, 0], logits_of(model, inputs[None]), 2e-5)


@pytest.mark.parametrize("case", ["hf_audio", "hf_text", "hf_vision"])
def test_own_heads_are_read_by_transformers(tmp_path: Path, case: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    settings = {
        "hf_audio": HeadSettings("pooled", 3), "hf_text": HeadSettings("sentence", 3),
        "hf_vision": HeadSettings("pooled", 3, norm_eps=1e-6),
    }[case]  # fmt: skip
    encoder = strip_pretraining(tiny_model(case))
    if case == "hf_vision":
        settings = HeadSettings("pooled", 3, norm_eps=encoder.config.encoder.norm_eps)
    head = make_head(settings, 32)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = FineTuned(encoder, head, ("ant", "bee", "cat")).eval()
    huggingface.save(model, tmp_path / "m")
    kind = {"hf_audio": "Audio", "hf_text": "Sequence", "hf_vision": "Image"}[case]
    task = "SequenceClassification" if kind == "Sequence" else f"{kind}Classification"
    other, report = getattr(transformers, f"AutoModelFor{task}").from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert other.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    close(logits_of(other.eval(), inputs_of(case)), model(inputs_of(case)), 2e-5)


def test_no_such_head_in_transformers(tmp_path: Path) -> None:
    encoder = strip_pretraining(tiny_model("hf_text"))
    model = FineTuned(encoder, make_head(HeadSettings("votes", 2), 32), ("a", "b"))
    with pytest.raises(NotImplementedError, match="format huggingface: expected a head that transformers has for text"):
        huggingface.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_wrong_head_shapes(tmp_path: Path) -> None:
    theirs("AudioForSequenceClassification", AUDIO).save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "classifier_proj_size": 21}))
    with pytest.raises(ValueError, match=r"head: dense\.weight: expected shape \(21, 32\)"):
        huggingface.load(tmp_path / "m")
