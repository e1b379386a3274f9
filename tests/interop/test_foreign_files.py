"""Files that others bring: wrapped names, missing parts, damaged files, other containers, weights that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import d2v
from d2v.interop import fairseq, huggingface
from d2v.interop.convert import import_checkpoint
from d2v.saved import load_any
from d2v.train.pretraining import load_weights

from .test_fairseq_file import FAMILIES, published_state
from .test_huggingface import tiny_model

DECODERS = ("final_proj", "encoder.regression_head", "modality_encoders.")


def write(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_models(tmp_path: Path, prefix: str) -> None:
    state = published_state("d2v1_audio")
    expected = fairseq.parameters(fairseq.load(write(state, tmp_path / "a.pt")))  # type: ignore[arg-type]
    state["model"] = {prefix + name: tensor for name, tensor in state["model"].items()}
    model = fairseq.load(write(state, tmp_path / "b.pt"))
    assert isinstance(model, d2v.Data2Vec)
    found = fairseq.parameters(model)
    assert found.keys() == expected.keys() and all(torch.equal(t, found[n]) for n, t in expected.items())


def test_wrapped_transformers_names(tmp_path: Path) -> None:
    folder = huggingface.save(tiny_model("hf_text"), tmp_path / "m")
    tensors = {f"module.data2vec_text.{n}": t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    assert isinstance(huggingface.load(folder), d2v.Data2Vec)


def without_decoder(family: str) -> dict[str, Any]:
    state = published_state(family)
    state["model"] = {
        n: t
        for n, t in state["model"].items()
        if not n.startswith(DECODERS[:2]) and not (n.startswith(DECODERS[2]) and ".decoder." in n)
    }
    if family.startswith("d2v2"):
        state["cfg"]["model"]["modalities"][family.removeprefix("d2v2_")]["decoder"] = None
    return state


@pytest.mark.parametrize("family", FAMILIES)
def test_files_without_decoder(tmp_path: Path, family: str) -> None:
    path = write(without_decoder(family), tmp_path / "a.pt")
    whole = fairseq.load(write(published_state(family), tmp_path / "b.pt"))
    part = "decoder" if family.startswith("d2v2") else "regression head"
    with pytest.warns(UserWarning, match=f"has no {part} of the pre-training: the model gives features"):
        model = fairseq.load(path)
    assert isinstance(model, d2v.Data2Vec) and model.decoder is None and model.head is None
    assert isinstance(whole, d2v.Data2Vec)
    own, expected = fairseq.parameters(model), fairseq.parameters(whole)
    assert own and all(torch.equal(tensor, expected[name]) for name, tensor in own.items())
    with pytest.warns(UserWarning, match="has no"):
        import_checkpoint(str(path), str(tmp_path / "ours"))
    again = load_any(str(tmp_path / "ours"), "cpu", takes_data=False)[0]
    assert isinstance(again, d2v.Data2Vec) and again.decoder is None and again.head is None
    with pytest.raises(ValueError, match=r"model\.init .*expected a model with what predicts in pre-training"):
        load_weights(whole, str(tmp_path / "ours"), "model.init")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n"


def test_cut_files_and_pointers(tmp_path: Path) -> None:
    path = write(published_state("d2v1_text"), tmp_path / "a.pt")
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:2000])
    (tmp_path / "pointer.pt").write_bytes(POINTER)
    with pytest.raises(ValueError, match="cut off after 2,000 bytes: download or copy it again"):
        fairseq.load(tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="a Git LFS pointer that only names it: run `git lfs pull`"):
        fairseq.load(tmp_path / "pointer.pt")
    weights = huggingface.save(tiny_model("hf_text"), tmp_path / "m") / "model.safetensors"
    whole = weights.read_bytes()
    for size in (len(whole) - 5, 300):
        weights.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"model.safetensors', which is cut off after {size:,} bytes"):
            huggingface.load(tmp_path / "m")
    weights.write_bytes(POINTER)
    with pytest.raises(ValueError, match="a Git LFS pointer"):
        huggingface.load(tmp_path / "m")


def in_shards(folder: Path, tensors: dict[str, torch.Tensor], name: str) -> None:
    stem, suffix = name.split(".")
    names = list(tensors)
    parts = {f"{stem}-00001-of-00002.{suffix}": names[::2], f"{stem}-00002-of-00002.{suffix}": names[1::2]}
    for file, inside in parts.items():
        store: Callable[..., None] = save_file if suffix == "safetensors" else torch.save
        store({n: tensors[n] for n in inside}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, inside in parts.items() for n in inside}}
    (folder / f"{name}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("container", ["shards", "pickle", "pickled shards"])
def test_other_containers(tmp_path: Path, container: str) -> None:
    folder = huggingface.save(tiny_model("hf_audio"), tmp_path / "m")
    first = huggingface.load(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if container == "pickle":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        in_shards(folder, tensors, "model.safetensors" if container == "shards" else "pytorch_model.bin")
    again = huggingface.load(folder)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in first.state_dict().items() if "head" not in n)
    if container != "pickle":
        next(folder.glob("*-00002-of-*")).unlink()
        with pytest.raises(ValueError, match="00002-of-00002"):
            huggingface.load(folder)


def test_folders_without_weights(tmp_path: Path) -> None:
    folder = huggingface.save(tiny_model("hf_text"), tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    with pytest.raises(
        ValueError, match=r"expected model.safetensors or pytorch_model.bin, .* found config.json, tf_mo"
    ):
        huggingface.load(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(ValueError, match="expected a weight_map of names of files"):
        huggingface.load(folder)


class Call:
    """Would call a function when it is unpickled."""

    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_pickled_weights_run_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = huggingface.save(tiny_model("hf_text"), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1), "b": Call()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="checkpoint: expected"):
        huggingface.load(folder)
    assert "executed" not in capsys.readouterr().out


def spoil(tensor: torch.Tensor, how: str) -> torch.Tensor:
    if how in ("nan", "inf"):
        tensor = tensor.clone()
        tensor.view(-1)[0] = float(how)
        return tensor
    return tensor.to({"complex": torch.complex64, "bool": torch.bool, "integer": torch.int32}[how])


@pytest.mark.parametrize("how", ["nan", "inf", "complex", "bool", "integer"])
def test_weights_that_are_none(tmp_path: Path, how: str) -> None:
    text = (
        "expected finite weights, got 1 of" if how in ("nan", "inf") else "expected floating-point weights, got torch"
    )
    state = published_state("d2v2_text")
    state["model"]["blocks.0.mlp.fc1.weight"] = spoil(state["model"]["blocks.0.mlp.fc1.weight"], how)
    with pytest.raises(ValueError, match=rf"student: blocks\.0\.mlp\.fc1\.weight: {text}"):
        fairseq.load(write(state, tmp_path / "a.pt"))
    folder = huggingface.save(tiny_model("hf_vision"), tmp_path / "m")
    tensors, name = load_file(folder / "model.safetensors"), "encoder.layer.0.output.dense.bias"
    save_file({**tensors, name: spoil(tensors[name], how)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"encoder\.layer\.0\.output\.dense\.bias: {text}"):
        huggingface.load(folder)
