"""Where a good guess about transformers is wrong: padded batches, and a head that loads without being loaded."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import d2v
from d2v.interop import huggingface

from .test_huggingface import close, inputs_of, tiny_model
from .test_huggingface_heads import TEXT, logits_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
FRAMES, PADDING = 1e-5, 1  # tolerance of features, padding token of text


def padded(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows of which the second is padded with what stands for nothing, lengths, and the second row alone."""
    inputs = inputs_of(case)
    lengths = torch.tensor([inputs.shape[1], inputs.shape[1] * 3 // 5])
    alone = inputs[1:, : lengths[1]].clone()
    inputs[1, lengths[1] :] = PADDING if case == "hf_text" else 0
    return inputs, lengths, alone


def theirs_of(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder).eval()


@torch.no_grad()
def in_transformers(model: Any, inputs: Tensor, lengths: Tensor) -> Tensor:
    """Features of the second row of a batch."""
    mask = torch.arange(inputs.shape[1]) < lengths[:, None]
    return model(inputs, attention_mask=mask.long()).last_hidden_state[-1]


@torch.no_grad()
def in_d2v(model: d2v.Data2Vec, inputs: Tensor, lengths: Tensor) -> Tensor:
    return model.encode(inputs, lengths).features[-1]


@pytest.mark.parametrize("case", ["hf_audio", "hf_text"])
def test_padded_rows(tmp_path: Path, case: str) -> None:
    """Imported models treat padding as transformers does; in use (`d2v features` and its like) it is invisible."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        huggingface.save(tiny_model(case), tmp_path / "m")
    theirs, ours = theirs_of(tmp_path / "m"), huggingface.load(tmp_path / "m").eval()
    assert isinstance(ours, d2v.Data2Vec)
    inputs, lengths, alone = padded(case)
    expected_alone = in_transformers(theirs, alone, lengths[1:])
    count = len(expected_alone)
    expected = in_transformers(theirs, inputs, lengths)[:count]
    close(in_d2v(ours, alone, lengths[1:])[:count], expected_alone, FRAMES)
    close(in_d2v(ours, inputs, lengths)[:count], expected, FRAMES)
    difference = float((expected - expected_alone).abs().max())
    if case == "hf_text":
        assert difference <= FRAMES * float(expected.abs().max())
    else:
        assert difference > 0.1  # the guess: a mask keeps padding out
    ours.drop_training_settings()
    close(in_d2v(ours, inputs, lengths)[:count], expected_alone, FRAMES)


def test_export_of_speech_says_that_padding_will_be_seen(tmp_path: Path) -> None:
    model = tiny_model("hf_audio")
    with pytest.warns(UserWarning, match="change with the padding of its batch"):
        huggingface.save(model, tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        huggingface.save(huggingface.load(tmp_path / "m"), tmp_path / "n")  # trained by a code that sees it
        huggingface.save(tiny_model("hf_text"), tmp_path / "t")
    published = dataclasses.replace(model.config, published=frozenset({"positions-see-padding"}))
    assert huggingface.load(tmp_path / "n").config.published == published.published


def roberta(folder: Path) -> Path:
    """A RoBERTa with its masked-language head: tensors with the shapes and nearly the names of Data2Vec-text's."""
    torch.manual_seed(1)
    transformers.RobertaForMaskedLM(transformers.RobertaConfig(**TEXT)).save_pretrained(folder)
    return folder


def change_config(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_transformers_loads_nothing_of_roberta_and_goes_on(tmp_path: Path) -> None:
    """The guess: what loads holds the file's weights. Only the head's names agree."""
    model, report = transformers.Data2VecTextForMaskedLM.from_pretrained(
        roberta(tmp_path / "m"), output_loading_info=True
    )
    loaded = {name for name, _ in model.named_parameters()} - set(report["missing_keys"])
    assert "lm_head.dense.weight" in loaded
    assert {name.split(".")[0] for name in loaded} == {"lm_head"}


@pytest.mark.parametrize(
    ("entries", "error", "words"),
    [
        ({}, ValueError, "expected a model_type of data2vec-audio, data2vec-text, data2vec-vision, got 'roberta'"),
        ({"model_type": "data2vec-text"}, NotImplementedError, "expected one of .*, got RobertaForMaskedLM"),
        (
            {"model_type": "data2vec-text", "architectures": ["Data2VecTextForMaskedLM"]},
            ValueError, r"expected a tensor lm_head\.decoder\.weight, found none",
        ),
        (
            {"model_type": "data2vec-text", "architectures": ["Data2VecTextModel"]},
            ValueError, r"encoder\.sentence_encoder\..* missing and \['roberta\.",
        ),
    ],
)  # fmt: skip
def test_roberta_is_refused(tmp_path: Path, entries: dict[str, Any], error: type[Exception], words: str) -> None:
    change_config(roberta(tmp_path / "m"), **entries)
    with pytest.raises(error, match=words):
        huggingface.load(tmp_path / "m")


@pytest.mark.parametrize("lost", ["lm_head.dense.weight", "lm_head.layer_norm.bias", "lm_head.bias"])
def test_a_head_that_is_not_whole_is_refused(tmp_path: Path, lost: str) -> None:
    """Nothing of a task model starts at random."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(1)
    config = transformers.Data2VecTextConfig(**TEXT)
    transformers.Data2VecTextForMaskedLM(config).save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert tensors.pop(lost, None) is not None
    tensors.pop("lm_head.decoder.bias", None)
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="head"):
        huggingface.load(tmp_path / "m")


@pytest.mark.parametrize("typed", [False, True])
def test_exported_heads_load_whole(tmp_path: Path, typed: bool) -> None:
    """Nothing newly initialised in transformers, nothing left over, the same logits; also with a token type that became
    part of our embeddings, to which the last layer is not equal then."""
    torch.manual_seed(1)
    model = transformers.Data2VecTextForMaskedLM(transformers.Data2VecTextConfig(**TEXT))
    with torch.no_grad():
        model.data2vec_text.embeddings.token_type_embeddings.weight.mul_(20.0 * typed)
        model.lm_head.bias.normal_()
    model.eval().save_pretrained(tmp_path / "m")
    ours = huggingface.load(tmp_path / "m").eval()
    huggingface.save(ours, tmp_path / "n")
    again, report = transformers.Data2VecTextForMaskedLM.from_pretrained(tmp_path / "n", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    inputs = inputs_of("hf_text")
    expected = logits_of(model, inputs)
    close(logits_of(again.eval(), inputs), expected, 2e-5)
    close(ours(inputs).detach(), expected, 2e-5)
    assert again.config.tie_word_embeddings is not typed


def test_a_last_layer_of_its_own(tmp_path: Path) -> None:
    """The guess: tied means equal. A file with another last layer keeps it, in transformers and here."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(1)
    transformers.Data2VecTextForMaskedLM(transformers.Data2VecTextConfig(**TEXT)).save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors") | {"lm_head.decoder.weight": torch.randn(90, 32)}
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.Data2VecTextForMaskedLM.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(theirs.lm_head.decoder.weight, tensors["lm_head.decoder.weight"])
    close(
        huggingface.load(tmp_path / "m").eval()(inputs_of("hf_text")).detach(),
        logits_of(theirs, inputs_of("hf_text")),
        2e-5,
    )
