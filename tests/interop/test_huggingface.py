"""Hugging Face folders in and out: equal hidden states with transformers, and with the golden models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import load_case
from torch import Tensor

import d2v
from d2v import recipes
from d2v.interop import fairseq, huggingface
from d2v.interop.huggingface.config import FAMILIES
from d2v.interop.huggingface.model import PREFIXES

# Of an export of speech, which test_huggingface_guesses.py is about.
pytestmark = pytest.mark.filterwarnings("ignore:format huggingface")
CASES = {
    "hf_audio": "input_values",
    "hf_audio_pad": "input_values",
    "hf_text": "input_ids",
    "hf_vision": "pixel_values",
}
TINY = {"hf_audio": "speech1_base", "hf_text": "text1_base", "hf_vision": "vision1_base"}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest magnitude."""
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], prefix: str = "") -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({prefix + n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


def tiny_model(case: str) -> d2v.Data2Vec:
    """A random model of a 1.0 family with every parameter away from its initial value."""
    torch.manual_seed(3)
    config = getattr(recipes, TINY[case])()
    stem = config.stem
    if case == "hf_audio":
        stem = dataclasses.replace(stem, convolutions=((24, 10, 5), (24, 3, 2), (24, 2, 2)), position_groups=4)
    elif case == "hf_text":
        stem = dataclasses.replace(stem, vocabulary=90, mask_token=89, max_tokens=40)
    else:
        stem = dataclasses.replace(stem, image_size=24, patch_size=4)
    encoder = dataclasses.replace(config.encoder, width=32, heads=4, depth=3)
    target = dataclasses.replace(config.target, top_k=2)
    model = d2v.Data2Vec(dataclasses.replace(config, stem=stem, encoder=encoder, target=target))
    with torch.no_grad():
        for name, tensor in fairseq.parameters(model).items():
            if tensor.is_floating_point() and not name.endswith("embed_tokens.weight"):
                tensor.add_(0.02 * torch.randn(tensor.shape))
    return model.eval()


def inputs_of(case: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if case == "hf_audio":
        return torch.randn(2, 1500, generator=generator)
    if case == "hf_text":
        return torch.randint(4, 89, (2, 20), generator=generator)
    return torch.randn(2, 3, 24, 24, generator=generator)


def hidden(model: d2v.Data2Vec, inputs: Tensor, layer: int | None = None) -> Tensor:
    """Features of all tokens, the class token first where there is one."""
    encoded = model.encode(inputs, layer=layer)
    token = [] if encoded.class_token is None else [encoded.class_token[:, None]]
    return torch.cat([*token, encoded.features], dim=1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prefix", ["", "task"])
def test_golden_hidden_states(tmp_path: Path, case: str, prefix: str) -> None:
    tensors, about = load_case(case)
    state = {n.removeprefix("state/"): t for n, t in tensors.items() if n.startswith("state/")}
    family = FAMILIES[about["config"]["model_type"]]
    folder = write_folder(tmp_path / "m", about["config"], state, PREFIXES[family] if prefix else "")
    model = huggingface.load(folder).eval()
    inputs = tensors["input/" + CASES[case]]
    lengths = tensors["input/attention_mask"].sum(1) if "input/attention_mask" in tensors else None
    depth = about["config"]["num_hidden_layers"]
    for layer in range(depth + 1):
        encoded = model.encode(inputs, lengths, layer=layer)
        features = encoded.features
        expected = tensors[f"output/hidden_states/{layer}"]
        if encoded.class_token is not None:
            features = torch.cat([encoded.class_token[:, None], features], dim=1)
            if "input/bool_masked_pos" in tensors:  # stored with mask tokens; the clean output is last
                if layer < depth:
                    continue
                expected = tensors["output/last_hidden_state_unmasked"]
            close(features, expected)
            continue
        close(features[encoded.valid], expected[encoded.valid])


@pytest.mark.parametrize("case", TINY)
def test_round_trip_is_bit_equal(tmp_path: Path, case: str) -> None:
    model = tiny_model(case)
    again = huggingface.load(huggingface.save(model, tmp_path / "m"))
    assert again.config.encoder == model.config.encoder
    first, second = fairseq.parameters(model), fairseq.parameters(again)
    for name, tensor in first.items():
        if not name.startswith(("final_proj", "encoder.regression_head")):
            assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("case", TINY)
def test_transformers_computes_the_same(tmp_path: Path, case: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, inputs = tiny_model(case), inputs_of(case)
    huggingface.save(model, tmp_path / "m")
    # Vision: without its pooling layer the class leaves the final norm out.
    options = {"add_pooling_layer": True} if case == "hf_vision" else {}
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path / "m", output_loading_info=True, **options)
    missing = [n for n in report["missing_keys"] if not n.startswith("pooler.dense")]
    assert not missing and not report["unexpected_keys"], report
    with torch.no_grad():
        states = theirs.eval()(inputs, output_hidden_states=True).hidden_states
    for layer in range(len(states)):
        close(hidden(model, inputs, layer), states[layer])


def test_task_heads_are_named(tmp_path: Path) -> None:
    model = tiny_model("hf_text")
    folder = huggingface.save(model, tmp_path / "m")
    from safetensors.torch import load_file

    tensors = {f"data2vec_text.{n}": t for n, t in load_file(folder / "model.safetensors").items()}
    tensors["classifier.dense.weight"] = torch.ones(2, 2)
    config = json.loads((folder / "config.json").read_text())
    with pytest.warns(UserWarning, match=r"left out the heads .'classifier'"):
        huggingface.load(write_folder(tmp_path / "task", config, tensors))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model_type": "bert"}, ValueError, "model_type of data2vec-audio"),
        ({"hidden_act": "relu"}, NotImplementedError, "hidden_act: expected gelu, got relu"),
        ({"num_hidden_layers": 4}, ValueError, "missing"),
        ({"num_hidden_layers": 2}, ValueError, "unknown"),
        ({"vocab_size": 91}, ValueError, "expected"),
    ],
)
def test_bad_folders(tmp_path: Path, change: dict[str, Any], error: type[Exception], text: str) -> None:
    folder = huggingface.save(tiny_model("hf_text"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(error, match=text):
        huggingface.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_and_damaged_files(tmp_path: Path, name: str) -> None:
    folder = huggingface.save(tiny_model("hf_text"), tmp_path / "m")
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(ValueError, match="checkpoint: expected"):
        huggingface.load(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"expected {name}"):
        huggingface.load(folder)


def test_second_version_has_no_format(tmp_path: Path) -> None:
    model = d2v.Data2Vec(recipes.vision_tiny())
    with pytest.raises(NotImplementedError, match=r"1\.0"):
        huggingface.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
