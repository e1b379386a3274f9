"""What `interop.fairseq.build` refuses, by name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.golden import load_case
from torch import Tensor

from d2v import Data2Vec
from d2v.config import SPEECH_CONVOLUTIONS
from d2v.interop import fairseq
from d2v.interop.fairseq.config import parse_convolutions

TENSORS, RECORD = load_case("d2v2_image")


def part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in TENSORS.items() if name.startswith(prefix)}


def build(**options: Any) -> Data2Vec:
    config = {**RECORD["config"], **options}
    return fairseq.build(config, part("student/"), part("teacher/"), family="d2v2_image")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mae_init": True}, "mae_init"),
        ({"shared_decoder": {"decoder_layers": 0}}, "shared_decoder"),
        ({"dropout_input": 0.1}, "dropout_input"),
        ({"post_mlp_drop": 0.1}, "post_mlp_drop"),
        ({"d2v_loss": 0}, "d2v_loss"),
    ],
)
def test_unsupported_option_is_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(NotImplementedError, match=word):
        build(**options)


def test_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match="d2v3_smell"):
        fairseq.build(RECORD["config"], {}, None, family="d2v3_smell")
    with pytest.raises(ValueError, match="mask_token: expected None for d2v2_image, got 3"):
        fairseq.build(RECORD["config"], {}, None, family="d2v2_image", mask_token=3)
    with pytest.raises(ValueError, match="mask_token: expected the id of the mask token for d2v1_text, got None"):
        fairseq.build({}, {}, None, family="d2v1_text")


def test_tensors_that_do_not_fit_are_named() -> None:
    student = part("student/")
    student["blocks.0.extra"] = student.pop("blocks.0.norm1.bias")
    with pytest.raises(ValueError, match=r"missing \['blocks.0.norm1.bias'\], unexpected \['blocks.0.extra'\]"):
        fairseq.build(RECORD["config"], student, None, family="d2v2_image")
    student = part("student/")
    student["blocks.0.norm1.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"blocks.0.norm1.bias: expected shape \(32,\), got \(3,\)"):
        fairseq.build(RECORD["config"], student, None, family="d2v2_image")


REFUSED = [
    ("d2v2_audio", {"extractor_mode": "other"}, "modalities.audio.extractor_mode"),
    ("d2v2_audio", {"transformer_decoder": True}, "modalities.audio.transformer_decoder"),
    ("d2v2_audio", {"mask_channel_prob": 0.1}, "modalities.audio.mask_channel_prob"),
    ("d2v2_audio", {"encoder_zero_mask": False}, "modalities.audio.encoder_zero_mask"),
    ("d2v2_text", {"local_grad_mult": 0.5}, "modalities.text.local_grad_mult"),
    ("d2v2_text", {"learned_pos": False}, "modalities.text.learned_pos"),
    ("d2v1_audio", {"activation_fn": "relu"}, "activation_fn"),
    ("d2v1_audio", {"layer_type": "conformer"}, "layer_type"),
    ("d2v1_audio", {"pos_conv_depth": 1}, "pos_conv_depth: expected at least 2, got 1"),
    ("d2v1_vision", {"shared_rel_pos_bias": False}, "shared_rel_pos_bias"),
    ("d2v1_text", {"transformer": {"activation_fn": "gelu_accurate"}}, "transformer.activation_fn"),
    ("d2v1_text", {"transformer": {"encoder": {"learned_pos": False}}}, "transformer.encoder.learned_pos"),
]


def configuration(family: str, options: dict[str, Any]) -> dict[str, Any]:
    version, name = family.split("_")
    if version == "d2v1":
        return options
    return {"modalities": {name: {"decoder": {}, **options}}, "encoder_dropout": 0.1}


@pytest.mark.parametrize(("family", "options", "text"), REFUSED)
def test_options_that_are_not_built_are_refused(family: str, options: dict[str, Any], text: str) -> None:
    token = 3 if family == "d2v1_text" else None
    with pytest.raises(NotImplementedError, match=text):
        fairseq.build(configuration(family, options), {}, None, family=family, mask_token=token)


def test_unknown_option_warns_once() -> None:
    config = {**RECORD["config"], "colour_of_the_sky": "blue"}
    with pytest.warns(UserWarning, match="colour_of_the_sky: unknown option, ignored"):
        fairseq.build(config, part("student/"), None, family="d2v2_image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fairseq.build(config, part("student/"), None, family="d2v2_image")


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]", SPEECH_CONVOLUTIONS),
        ("[(8, 4, 2), (6, 3, 1)]", ((8, 4, 2), (6, 3, 1))),
        (" [(8, 4, 2)] * 2", ((8, 4, 2), (8, 4, 2))),
    ],
)
def test_convolutions_are_read(text: str, layers: Any) -> None:
    assert parse_convolutions(text) == layers


@pytest.mark.parametrize("text", ["__import__('os').getcwd()", "[(1, 2)]", "[(1,2,3)] * 1000000", "[(1,2,3)", "7"])
def test_convolutions_are_never_executed(text: str) -> None:
    with pytest.raises(ValueError, match="conv_feature_layers: expected a list of"):
        parse_convolutions(text)


def test_alibi_scale_of_the_first_files() -> None:
    """Four dimensions instead of five."""
    tensors, record = load_case("d2v2_audio")
    student = {n.removeprefix("student/"): t for n, t in tensors.items() if n.startswith("student/")}
    name = "modality_encoders.AUDIO.alibi_scale"
    old = {**student, name: student[name][0]}
    model = fairseq.build(record["config"], old, None, family="d2v2_audio")
    assert torch.equal(fairseq.parameters(model)[name], student[name])
