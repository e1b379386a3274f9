"""`Data2Vec.from_checkpoint` and `Data2Vec.features`: which folders are read, and what comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.families import make_batch, make_config, make_model
from support.images import write_class_folders

from d2v import Data2Vec, FineTuned
from d2v.cli import main
from d2v.config.finetune import HeadSettings
from d2v.model.data2vec import strip_pretraining
from d2v.model.saving import write_folder
from d2v.model.task_heads import make_head
from d2v.saved import load_model


def assert_same_weights(a: Data2Vec, b: Data2Vec) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["vision-base", "speech1-base", "text-base"])
def test_exported_folder(name: str, tmp_path: Path) -> None:
    model = make_model(make_config(name))
    write_folder(model, tmp_path / "model")
    state = torch.get_rng_state()
    again = Data2Vec.from_checkpoint(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state), "loading draws nothing from torch's generator"
    assert not any(module.training for module in again.modules())
    assert_same_weights(model, again)


def test_run_folder_and_its_checkpoint(tmp_path: Path) -> None:
    images = write_class_folders(tmp_path / "images")
    sizes = ["--stem.image-size", "16", "--encoder.depth", "2", "--target.top-k", "2", "--data.global-batch", "4"]
    run = ["--run.dir", str(tmp_path / "run"), "--run.steps", "2", "--run.checkpoint-every", "1", "--data.workers", "0"]
    assert main(["pretrain", "vision-tiny", "--data.path", str(images), *sizes, *run, "--run.device", "cpu"]) == 0
    newest, _, _ = load_model(str(tmp_path / "run"), "cpu")
    assert_same_weights(Data2Vec.from_checkpoint(str(tmp_path / "run")), newest)
    (first,) = (tmp_path / "run" / "checkpoints").glob("step-*1")
    older, _, _ = load_model(str(first), "cpu")
    assert_same_weights(Data2Vec.from_checkpoint(first), older)
    assert not torch.equal(newest.stem.proj.weight, older.stem.proj.weight)


@pytest.mark.parametrize("name", ["vision-base", "speech1-tiny", "text1-tiny"])
def test_a_model_without_parts_says_so(name: str) -> None:
    model = make_model(make_config(name))
    inputs = torch.randn(2, 3, 32, 32)
    if model.config.stem.modality != "vision":
        inputs, _ = make_batch(model.config, (38, 38) if "text" in name else (2_000, 2_000))
    assert torch.isfinite(model(inputs).loss)
    for decoder, teacher, what in ((False, True, "the teacher's averages"), (True, False, "decoder or head")):
        bare = strip_pretraining(make_model(make_config(name)), decoder=decoder, teacher=teacher)
        refused = rf"^forward: expected a model that can be pre-trained, got one without {what} .*encode\(\)"
        with pytest.raises(ValueError, match=refused):
            bare(inputs)
        assert torch.isfinite(bare.encode(inputs).features).all()


@pytest.mark.parametrize("stripped", [True, False])
def test_encoder_of_a_fine_tuned_model(stripped: bool, tmp_path: Path) -> None:
    """The head of a pre-norm encoder took its final norm over; parts of the pre-training may be left out."""
    encoder = make_model(make_config("vision-base", norm_order="pre"))
    if stripped:
        strip_pretraining(encoder)
    head = make_head(HeadSettings("pooled", 2, norm_eps=1e-6), 32)
    tuned = FineTuned(encoder, head, ("a", "b")).eval()
    write_folder(tuned, tmp_path / "tuned")
    again = Data2Vec.from_checkpoint(tmp_path / "tuned")
    assert_same_weights(tuned.encoder, again)
    assert again.blocks.norm is None and (again.decoder is None) == stripped
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.features(images), encoder.features(images))


def test_features_are_those_of_encode() -> None:
    model = make_model(make_config("speech-base", dropout=0.5)).train()
    model.blocks.eval()
    inputs, lengths = make_batch(model.config, (2_000, 1_500))
    features = model.features(inputs, lengths)
    assert features.shape == (2, model.stem.count_tokens(2_000), 32) and not features.requires_grad
    assert torch.equal(features, model.encode(inputs, lengths).features)
    assert model.training and model.stem.training and not model.blocks.training, "flags stay as they were"
    torch.testing.assert_close(model.features(inputs[1:, :1_500]), features[1:, : model.stem.count_tokens(1_500)])


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint: expected a run folder, a checkpoint or an exported folder"):
        Data2Vec.from_checkpoint(tmp_path / "absent")
    write_folder(make_model(make_config("vision-base")), tmp_path / "model")
    wrong = make_config("vision-base", depth=2)
    (tmp_path / "model" / "config.json").write_text(wrong.to_json())
    with pytest.raises(ValueError, match=r"unexpected tensor '(teacher\.)?blocks\.blocks\.2"):
        Data2Vec.from_checkpoint(tmp_path / "model")
