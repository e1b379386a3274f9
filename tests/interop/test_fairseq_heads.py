"""Fine-tuned files of the published code: heads, labels, options of fine-tuning, the same file again."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v.config.finetune import HeadSettings
from d2v.interop import fairseq
from d2v.interop.convert import export_checkpoint, import_checkpoint
from d2v.interop.torch_file import read_torch_file
from d2v.model.data2vec import Data2Vec, strip_pretraining
from d2v.model.finetuned import FineTuned
from d2v.model.task_heads import make_head
from d2v.saved import load_any

from .test_fairseq_file import published_state

DROPPED = ("_ema", "decoder", "regression_head", "final_proj", "encoder._ema")
CASES = ("ctc1", "ctc2", "audio", "image2", "image2_class", "image1", "text1", "text2")


class PredictionMode(enum.Enum):
    """Stands for the published enum, which a file refers to by its name."""

    MEAN_POOLING = 1
    CLS_TOKEN = 2


def encoder_of(case: str) -> str:
    return {
        "ctc1": "d2v1_audio", "ctc2": "d2v2_audio", "audio": "d2v1_audio", "image2": "d2v2_image", "text1": "d2v1_text",
        "image2_class": "d2v2_image", "image1": "d2v1_vision", "text2": "d2v2_text",
    }[case]  # fmt: skip


def fine_tuned_state(case: str, half: bool = False) -> dict[str, Any]:
    """A file as the published fine-tuning code writes it, from the student of a golden case."""
    state = published_state(encoder_of(case), half)
    inner = {**state["cfg"]["model"]}
    tensors = {n: t for n, t in state["model"].items() if not any(part in n for part in DROPPED)}
    torch.manual_seed(2)
    dtype, width = torch.float16 if half else torch.float32, width_of(inner)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    if case in ("ctc1", "ctc2"):
        inner |= {"mask_channel_prob": 0.5, "mask_prob": 0.0, "layerdrop": 0.1}
        if case == "ctc2":
            audio = {**inner["modalities"]["audio"], "mask_channel_prob": 0.5, "inverse_mask": False}
            inner["modalities"] = {"audio": {**audio, "prenet_layerdrop": 0.1, "encoder_zero_mask": False}}
        prefix, heads = "w2v_encoder.w2v_model.", {"w2v_encoder.proj.weight": draw(7, width)}
        heads["w2v_encoder.proj.bias"] = draw(7)
        cfg = {"_name": "wav2vec_ctc", "final_dropout": 0.1, "w2v_args": {"model": inner, "task": {"normalize": True}}}
        cfg |= {"mask_channel_prob": 0.5, "normalize": True, "freeze_finetune_updates": 100}
    elif case == "audio":
        prefix, heads = "d2v_model.", {"proj.weight": draw(5, width) / 4, "proj.bias": draw(5)}
        cfg = {"_name": "audio_classification", "d2v_args": {"model": inner}, "prediction_mode": "lin_softmax"}
    elif case.startswith("image"):
        prefix = "model."
        heads = {"fc_norm.weight": draw(width), "fc_norm.bias": draw(width)}
        heads |= {"head.weight": draw(6, width), "head.bias": draw(6)}
        name = "mae_image_classification" if case != "image1" else "data2vec_image_classification"
        cfg = {"_name": name, "num_classes": 6, "mixup": 0.7, "pretrained_model_args": {"model": inner}}
        if case != "image1":
            inner |= {"start_drop_path_rate": 0.02, "end_drop_path_rate": 0.2}
            image = {**inner["modalities"]["image"], "start_drop_path_rate": 0.0, "end_drop_path_rate": 0.02}
            inner["modalities"] = {"image": image}
            mode = PredictionMode.CLS_TOKEN if case == "image2_class" else PredictionMode.MEAN_POOLING
            cfg |= {"prediction_mode": mode, "use_fc_norm": True, "layer_decay": 0.65}
        else:  # its encoder has neither mask token nor final norm any more
            tensors = {n: t for n, t in tensors.items() if n != "mask_emb" and not n.startswith("encoder.norm.")}
    else:
        prefix = "" if case == "text1" else "model."
        head = "classification_heads.sentence_classification_head."
        heads = {f"{head}dense.weight": draw(width, width), f"{head}dense.bias": draw(width)}
        heads |= {f"{head}out_proj.weight": draw(3, width), f"{head}out_proj.bias": draw(3)}
        cfg = inner if case == "text1" else {"_name": "data2vec_text_classification"}
        cfg |= {} if case == "text1" else {"pooler_dropout": 0.0, "pretrained_model_args": {"model": inner}}
    named = {prefix + n: t for n, t in tensors.items()} | heads
    return {"args": None, "cfg": {"model": cfg}, "model": named, "last_optimizer_state": None}


def width_of(inner: dict[str, Any]) -> int:
    if "transformer" in inner:
        return int(inner["transformer"]["encoder"]["embed_dim"])
    return int(inner.get("embed_dim") or inner["encoder_embed_dim"])


def write(state: dict[str, Any], path: Path) -> Path:
    torch.save(state, path)
    return path


def inputs_for(model: Data2Vec) -> tuple[Tensor, Tensor | None]:
    stem = model.config.stem
    torch.manual_seed(7)
    if stem.modality == "speech":
        return torch.randn(2, 2600), torch.tensor([2600, 1900])
    if stem.modality == "text":
        inputs = torch.randint(4, stem.vocabulary - 1, (2, 12))
        inputs[1, 8:] = 1
        return inputs, torch.tensor([12, 8])
    return torch.randn(2, stem.channels, stem.image_size, stem.image_size), None


def expected_logits(case: str, state: dict[str, Any], model: FineTuned) -> Tensor:
    """The published heads written out in plain torch, on features of the encoder."""
    heads = {n: t.float() for n, t in state["model"].items()}
    inputs, lengths = inputs_for(model.encoder)
    encoded = model.encoder.encode(inputs, lengths)
    x, valid = encoded.features, encoded.valid
    if case in ("ctc1", "ctc2"):
        return F.linear(x, heads["w2v_encoder.proj.weight"], heads["w2v_encoder.proj.bias"])
    if case == "audio":
        p = F.linear(x, heads["proj.weight"], heads["proj.bias"]).double().sigmoid() * valid[..., None]
        return torch.logit(p.square().sum(1) / p.sum(1)).float()
    if case.startswith("text"):
        name = "classification_heads.sentence_classification_head."
        x = torch.tanh(F.linear(x[:, 0], heads[f"{name}dense.weight"], heads[f"{name}dense.bias"]))
        return F.linear(x, heads[f"{name}out_proj.weight"], heads[f"{name}out_proj.bias"])
    pooled = x[:, 1:].mean(1) if case == "image1" else x.mean(1)  # the published 1.0 code loses patch 0
    if case == "image2_class":
        assert encoded.class_token is not None
        pooled = encoded.class_token
    eps = 1e-5 if case == "image1" else 1e-6
    pooled = F.layer_norm(pooled, pooled.shape[-1:], heads["fc_norm.weight"], heads["fc_norm.bias"], eps)
    return F.linear(pooled, heads["head.weight"], heads["head.bias"])


@pytest.mark.parametrize("case", CASES)
def test_heads_are_read(tmp_path: Path, case: str) -> None:
    state = fine_tuned_state(case)
    model = fairseq.load(write(state, tmp_path / "a.pt"))
    assert isinstance(model, FineTuned)
    model.eval()
    logits, expected = model(*inputs_for(model.encoder)), expected_logits(case, state, model)
    torch.testing.assert_close(logits.detach(), expected, rtol=2e-5, atol=2e-5)
    assert model.labels == tuple(str(i) for i in range(expected.shape[-1]))
    assert model.encoder.decoder is None and model.encoder.head is None and not model.encoder.teacher.owned
    assert sum(p.numel() for p in model.parameters()) == sum(
        t.numel()
        for n, t in state["model"].items()
        if t.is_floating_point() and not n.endswith(("version", "positions"))
    )


def same_file(path: Path, state: dict[str, Any]) -> None:
    again = read_torch_file(path)
    for name, tensor in again["model"].items():
        assert name in state["model"] or name.endswith("positions"), name
        if name in state["model"]:
            assert tensor.dtype == state["model"][name].dtype and torch.equal(tensor, state["model"][name]), name
    missing = {n for n, t in state["model"].items() if n not in again["model"] and t.is_floating_point()}
    assert not {n for n in missing if not n.endswith("version")}, missing


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal(tmp_path: Path, case: str, half: bool) -> None:
    state = fine_tuned_state(case, half)
    first = fairseq.load(write(state, tmp_path / "a.pt"))
    fairseq.save(first, tmp_path / "b.pt")
    same_file(tmp_path / "b.pt", state)
    second = fairseq.load(tmp_path / "b.pt")
    assert isinstance(first, FineTuned) and isinstance(second, FineTuned)
    assert second.head.settings == first.head.settings and second.config == first.config
    options = dict(read_torch_file(tmp_path / "b.pt")["cfg"]["model"])
    given = dict(state["cfg"]["model"])
    if "prediction_mode" in given and case != "audio":
        assert options.pop("prediction_mode") == given.pop("prediction_mode").value
    assert options == given


@pytest.mark.parametrize("case", ["ctc2", "image2", "text1"])
def test_import_and_export(tmp_path: Path, case: str) -> None:
    state = fine_tuned_state(case, half=True)
    said = import_checkpoint(str(write(state, tmp_path / "a.pt")), str(tmp_path / "ours"))
    assert "fine-tuned" in said
    export_checkpoint(str(tmp_path / "ours"), "fairseq", str(tmp_path / "b.pt"))
    same_file(tmp_path / "b.pt", state)
    first = fairseq.load(tmp_path / "a.pt")
    second, _, _ = load_any(str(tmp_path / "ours"), "cpu", takes_data=False)
    assert isinstance(first, FineTuned) and isinstance(second, FineTuned) and first.labels == second.labels
    inputs = inputs_for(first.encoder)
    first.encoder.drop_training_settings()  # as `load_any` does: padding is invisible
    assert torch.equal(first.eval()(*inputs), second(*inputs))


OWN: dict[str, tuple[str, HeadSettings]] = {
    "d2v1_audio": ("ctc1", HeadSettings("tokens", 4, task="ctc")),
    "d2v2_audio": ("ctc2", HeadSettings("tokens", 4, task="ctc", dropout=0.1)),
    "d2v1_text": ("text1", HeadSettings("sentence", 4)),
    "d2v2_text": ("text2", HeadSettings("sentence", 4)),
    "d2v2_image": ("image2", HeadSettings("pooled", 4, pool="class", norm_eps=1e-6)),
    "d2v1_vision": ("image1", HeadSettings("pooled", 4, norm_eps=1e-6)),
}


@pytest.mark.parametrize("family", OWN)
def test_own_models_are_written(tmp_path: Path, family: str) -> None:
    """Also 1.0 images, with the names of the separate vision repository."""
    torch.save(published_state(family), tmp_path / "a.pt")
    encoder = fairseq.load(tmp_path / "a.pt")
    assert isinstance(encoder, Data2Vec)
    encoder.origin, settings = None, OWN[family][1]
    strip_pretraining(encoder)
    if family == "d2v1_vision":
        encoder.mask_token = None
        encoder.config = type(encoder.config)(**{**vars(encoder.config)})
    model = FineTuned(encoder, make_head(settings, encoder.config.encoder.width), ("ant", "bee", "cat", "dog")).eval()
    fairseq.save(model, tmp_path / "b.pt")
    again = fairseq.load(tmp_path / "b.pt")
    assert isinstance(again, FineTuned) and again.labels == model.labels and again.head.settings == settings
    inputs = inputs_for(encoder)
    tolerance = 1e-4 if family == "d2v1_vision" else 1e-5  # its names carry no epsilon: 1e-6 is taken
    torch.testing.assert_close(again.eval()(*inputs), model(*inputs), rtol=tolerance, atol=tolerance)


def test_files_of_another_trainer_keep_their_key(tmp_path: Path) -> None:
    """Fine-tuned files of the separate vision repository hold the tensors under "module" and no options."""
    state = fine_tuned_state("image1")
    state["model"].pop("cfg", None)
    (tmp_path / "a").mkdir()
    model = fairseq.load(write(state, tmp_path / "a" / "first.pt"))
    assert isinstance(model, FineTuned)
    model.head.settings = HeadSettings("pooled", 6, norm_eps=1e-6)
    model.origin = None
    fairseq.save(model, tmp_path / "beit.pt")
    tensors = dict(read_torch_file(tmp_path / "beit.pt")["model"])
    assert "blocks.0.mlp.fc1.weight" in tensors and "patch_embed.proj.weight" in tensors
    half = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    again = fairseq.load(write({"module": half}, tmp_path / "module.pt"))
    fairseq.save(again, tmp_path / "back.pt")
    back = read_torch_file(tmp_path / "back.pt")
    assert "model" not in back and back["module"].keys() == half.keys()
    assert all(torch.equal(t, back["module"][n]) and t.dtype == back["module"][n].dtype for n, t in half.items())


def test_labels_of_the_dictionary_beside(tmp_path: Path) -> None:
    path = write(fine_tuned_state("ctc1"), tmp_path / "a.pt")
    (tmp_path / "dict.ltr.txt").write_text("| 94802\nE 51860\nT 38431\n")
    assert fairseq.load(path).labels == ("<s>", "<pad>", "</s>", "<unk>", "|", "E", "T")  # type: ignore[union-attr]


class Dictionary:
    """Stands for the published dictionary that the task's state may hold."""

    def __init__(self) -> None:
        self.symbols = ["<s>", "<pad>", "</s>", "<unk>", "|", "E", "T"]
        self.indices = {symbol: i for i, symbol in enumerate(self.symbols)}


def test_labels_of_the_dictionary_inside(tmp_path: Path) -> None:
    state = {**fine_tuned_state("ctc2"), "task_state": {"target_dictionary": Dictionary()}}
    model = fairseq.load(write(state, tmp_path / "a.pt"))
    assert isinstance(model, FineTuned) and model.labels[4:] == ("|", "E", "T")
    fairseq.save(model, tmp_path / "b.pt")
    assert fairseq.load(tmp_path / "b.pt").labels == model.labels  # type: ignore[union-attr]


def add_blank_weight(state: dict[str, Any]) -> None:
    state["cfg"]["model"]["blank_weight"] = 2.0


def drop_bias(state: dict[str, Any]) -> None:
    del state["model"]["w2v_encoder.proj.bias"]


def add_convolution(state: dict[str, Any]) -> None:
    state["model"]["w2v_encoder.proj.weight"] = torch.ones(7, 3, 3)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (add_blank_weight, NotImplementedError, "blank_weight: expected 0, got 2.0"),
        (drop_bias, ValueError, r"head: expected a tensor 'w2v_encoder\.proj\.bias'"),
        (add_convolution, NotImplementedError, "expected a linear layer"),
    ],
)
def test_refused(tmp_path: Path, change: Callable[[Any], None], error: type[Exception], text: str) -> None:
    state = fine_tuned_state("ctc1")
    change(state)
    with pytest.raises(error, match=text):
        fairseq.load(write(state, tmp_path / "a.pt"))


def test_no_such_head_in_the_published_code(tmp_path: Path) -> None:
    model = fairseq.load(write(fine_tuned_state("text1"), tmp_path / "a.pt"))
    assert isinstance(model, FineTuned)
    odd = FineTuned(model.encoder, make_head(HeadSettings("votes", 3), 8), model.labels)
    with pytest.raises(NotImplementedError, match="format fairseq: expected a head that the published code has"):
        fairseq.save(odd, tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()
