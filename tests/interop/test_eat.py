"""EAT's published files, and those of emotion2vec: imported, and their features against the formulas in float64."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from support.published import PublishedStep, make_config, make_eat_config, make_teacher, make_tensors
from support.published_second import PublishedStep as SecondStep
from support.published_second import make_config as make_second_config
from support.published_second import make_shapes
from support.published_second import make_tensors as make_second_tensors
from support.sounds import make_sound
from torch import Tensor

import d2v
from d2v.cli import main
from d2v.interop import fairseq
from d2v.interop.torch_file import read_torch_file
from d2v.model.stems.positions import sincos_positions
from d2v.recipes import eat_base, eat_large, vision_base

POSITIONS = "modality_encoders.IMAGE.fixed_positional_encoder.positions"


def kaldi_frames(waveform: np.ndarray) -> np.ndarray:
    """(F,128) float64: Kaldi's log-mel filterbank, one frame and one band after the other."""
    bins = np.arange(257) * 16_000 / 512
    mels = 1127 * np.log(1 + np.array([20.0, 8_000.0]) / 700)
    edges = np.linspace(*mels, 130)
    rows = []
    for start in range(0, len(waveform) - 399, 160):
        frame = waveform[start : start + 400].astype(np.float64)
        frame -= frame.mean()
        frame = np.concatenate([[0.03 * frame[0]], frame[1:] - 0.97 * frame[:-1]])
        frame *= 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
        power = np.abs(np.fft.rfft(frame, 512)) ** 2
        place, row = 1127 * np.log(1 + bins / 700), []
        for left, middle, right in zip(edges, edges[1:], edges[2:], strict=False):
            triangle = np.minimum((place - left) / (middle - left), (right - place) / (right - middle)).clip(0)
            row.append(np.log(max(float(triangle @ power), 2.0**-23)))
        rows.append(row)
    return np.array(rows)


def published_input(waveform: np.ndarray, frames: int, mean: float = -4.268, deviation: float = 4.569) -> Tensor:
    bands = kaldi_frames(waveform - waveform.mean())[:frames]
    bands = np.pad(bands, ((0, frames - len(bands)), (0, 0)))
    return torch.from_numpy((bands - mean) / (2 * deviation))[None, None]


def make_state(config: dict[str, Any], student: dict[str, Tensor], teacher: dict[str, Tensor] | None) -> dict[str, Any]:
    model: dict[str, Any] = {n: t.float() for n, t in student.items()}
    if teacher is not None:
        model["_ema"] = {n: t.float() for n, t in teacher.items()}
    return {"args": None, "cfg": {"model": config}, "model": model, "last_optimizer_state": None}


def make_eat() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Configuration, student and teacher, in float32's numbers."""
    config = make_eat_config()
    student = {n: t.float().double() for n, t in make_tensors(config, seed=1).items()}
    student[POSITIONS] = sincos_positions(16, (8, 8))[None].float().double()
    return config, student, {n: t.float().double() for n, t in make_teacher(config, student, seed=2).items()}


def write_sounds(folder: Path) -> list[np.ndarray]:
    """Shorter than 128 frames, longer, and of two channels at another rate."""
    folder.mkdir()
    sounds = [make_sound(1, 0.9) + 0.1, make_sound(2, 1.6)]
    for i, values in enumerate(sounds):
        soundfile.write(folder / f"{i}.wav", values, 16_000, subtype="FLOAT")
    soundfile.write(folder / "2.flac", make_sound(3, 1.0, 44_100, channels=2), 44_100)
    soundfile.write(folder / "3.wav", np.zeros(80), 16_000)
    return sounds


def test_features_of_a_published_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, student, teacher = make_eat()
    torch.save(make_state(config, student, teacher), tmp_path / "eat.pt")
    sounds = write_sounds(tmp_path / "sounds")
    assert main(["import", "--from", str(tmp_path / "eat.pt"), "--output", str(tmp_path / "eat")]) == 0
    assert "spectrograms" in capsys.readouterr().out
    step = PublishedStep(config, student, teacher)
    model = d2v.Data2Vec.from_checkpoint(tmp_path / "eat")
    for weights, tensors in (("teacher", teacher), ("student", student)):
        output = tmp_path / f"{weights}.npy"
        options = ["--checkpoint", str(tmp_path / "eat"), "--input", str(tmp_path / "sounds"), "--weights", weights]
        assert main(["features", *options, "--output", str(output), "--device", "cpu"]) == 0
        text = capsys.readouterr().out
        assert re.search(r"left out 1: \S*/3.wav: 80 samples at 16 kHz, expected at least 400", text)
        assert re.search(r"cut 1: \S*/1.wav: cut to 1.295 of 1.6 s \(stem.frames\)", text)
        assert main(["features", *options, "--output", str(tmp_path / "class.npy"), "--pool", "class"]) == 0
        classes = torch.from_numpy(np.load(tmp_path / "class.npy")).double()
        rows = torch.from_numpy(np.load(output)).double()
        assert rows.shape == (3 * 64, 16) and classes.shape == (3, 16)
        encoder = model.teacher if weights == "teacher" else model
        for i, values in enumerate(sounds):
            inputs = published_input(values, 128)
            expected = step.encode(tensors, inputs)[0]
            scale = float(expected.abs().max())
            # The filterbank is computed in float32, in which quiet bands have an error of 1e-4.
            torch.testing.assert_close(rows[64 * i : 64 * (i + 1)], expected[1:], rtol=0, atol=1e-4 * scale)
            torch.testing.assert_close(classes[i], expected[0], rtol=0, atol=1e-4 * scale)
            found = encoder.encode(inputs.float())
            torch.testing.assert_close(found.features[0].double(), expected[1:], rtol=0, atol=1e-5 * scale)
            assert found.class_token is not None
            torch.testing.assert_close(found.class_token[0].double(), expected[0], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("frames", [128, 64])
def test_pre_training_goes_on(frames: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From an imported file, at its own length and at another one, for which the positions are computed."""
    config, student, teacher = make_eat()
    torch.save(make_state(config, student, teacher), tmp_path / "eat.pt")
    write_sounds(tmp_path / "sounds")
    assert main(["import", "--from", str(tmp_path / "eat.pt"), "--output", str(tmp_path / "eat")]) == 0
    sizes = ["--data.global-batch", "2", "--data.micro-batch", "2", "--data.workers", "0", "--data.bad-fraction", "0.5"]
    run = ["--run.dir", str(tmp_path / "run"), "--run.steps", "2", "--run.device", "cpu", "--stem.frames", str(frames)]
    options = ["--model.init", str(tmp_path / "eat"), "--data.path", str(tmp_path / "sounds"), *sizes, *run]
    assert main(["pretrain", "eat-base", *options]) == 0
    err = capsys.readouterr().err
    assert ("stem.frames 128 to 64: positions computed, 8 x 8 to 4 x 8" in err) == (frames == 64)
    model = d2v.Data2Vec.from_checkpoint(tmp_path / "run")
    assert model.grid == (frames // 16, 8) and model.config.mask.copies == 16
    assert torch.equal(model.positions.table, sincos_positions(16, model.grid)[None].float())
    moved = fairseq.parameters(model)["blocks.0.attn.proj.weight"] - student["blocks.0.attn.proj.weight"]
    assert 0.0 < float(moved.abs().max()) < 1e-3


def test_features_of_another_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, student, teacher = make_eat()
    torch.save(make_state(config, student, teacher), tmp_path / "eat.pt")
    sounds = write_sounds(tmp_path / "sounds")
    assert main(["import", "--from", str(tmp_path / "eat.pt"), "--output", str(tmp_path / "eat")]) == 0
    options = ["--checkpoint", str(tmp_path / "eat"), "--input", str(tmp_path / "sounds"), "--device", "cpu"]
    assert main(["features", *options, "--output", str(tmp_path / "a.npy"), "--stem.frames", "160"]) == 0
    read = capsys.readouterr()
    assert "cut" not in read.out and "stem.frames 128 to 160: positions computed, 8 x 8 to 10 x 8" in read.err
    teacher[POSITIONS] = sincos_positions(16, (10, 8))[None].float().double()
    expected = PublishedStep(config, student, teacher).encode(teacher, published_input(sounds[1], 160))[0, 1:]
    rows = torch.from_numpy(np.load(tmp_path / "a.npy")).double()[80:160]
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert main(["features", *options, "--output", str(tmp_path / "b.npy"), "--stem.image-size", "160"]) == 2
    assert "stem.modality: expected vision with stem.image_size, got spectrograms" in capsys.readouterr().err
    assert main(["features", *options, "--output", str(tmp_path / "b.npy"), "--stem.frames", "100"]) == 2
    assert "stem.frames: expected a multiple of stem.patch_size 16, got 100" in capsys.readouterr().err


def test_round_trip(tmp_path: Path) -> None:
    state = make_state(*make_eat())
    torch.save(state, tmp_path / "a.pt")
    with warnings.catch_warnings():  # every option of a published file is known
        warnings.simplefilter("error")
        model = fairseq.load(tmp_path / "a.pt")
    fairseq.save(model, tmp_path / "b.pt")
    again = read_torch_file(tmp_path / "b.pt")
    assert again["cfg"]["model"] == state["cfg"]["model"]
    for ours, theirs in ((again["model"], state["model"]), (again["model"]["_ema"], state["model"]["_ema"])):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs if n != "_ema")
    model.origin = None  # as if it had been trained here: options are written from the settings
    fairseq.save(model, tmp_path / "c.pt")
    described = fairseq.load(tmp_path / "c.pt").config
    assert (described.stem, described.encoder) == (model.config.stem, model.config.encoder)


def test_published_sizes() -> None:
    """512 tokens of which 102 are visible, and the positions of the first grid are the beginning of a longer one's."""
    config = eat_base()
    assert config.grid == (64, 8) and eat_large().encoder.depth == eat_large().target.top_k == 24
    masks = d2v.model.masking.make_mask_sampler(config).draw([0, 1], 0, copies=16)
    assert masks.keep is not None and masks.keep.shape == (32, 102)
    assert torch.equal(sincos_positions(16, (96, 8))[:512], sincos_positions(16, (64, 8)))


def test_one_channel_without_a_length_is_an_image(tmp_path: Path) -> None:
    config = make_config(in_chans=1)
    student = make_tensors(config, seed=1)
    model = fairseq.build(config, student, None, family="d2v2_image")
    assert model.config.stem.modality == "vision"
    with pytest.raises(NotImplementedError, match="utterance_level: expected False, got True"):
        fairseq.build({**make_eat_config(), "utterance_level": True}, student, None, family="d2v2_image")
    config = eat_base().change(version=1, stem={"frames": 32}, encoder={"depth": 1}, target={"top_k": 1})
    with pytest.raises(ValueError, match=r"in 1\.0, got spectrograms"):
        fairseq.save(d2v.Data2Vec(config), tmp_path / "a.pt")
    assert vision_base().grid == (14, 14)


@pytest.mark.parametrize(("option", "mean"), [("audio_mae", -4.268), ("esc50_eval", -6.627), ("spcv2_eval", -6.846)])
def test_fine_tuned_files_keep_their_normalisation(option: str, mean: float, tmp_path: Path) -> None:
    config, student, _ = make_eat()
    tensors = {f"model.{n}": t.float() for n, t in student.items() if "decoder" not in n}
    tensors |= {"fc_norm.weight": torch.ones(16), "fc_norm.bias": torch.zeros(16)}
    tensors |= {"head.weight": torch.randn(5, 16), "head.bias": torch.zeros(5)}
    outer = {
        "_name": "mae_image_classification", "pretrained_model_args": {"model": config}, option: True,
        "prediction_mode": "PredictionMode.CLS_TOKEN", "target_length": 128, "specaug": True, "mask_ratio": 0.2,
    }  # fmt: skip
    torch.save({"cfg": {"model": outer}, "model": tensors}, tmp_path / "a.pt")
    model = fairseq.load(tmp_path / "a.pt")
    assert isinstance(model, d2v.FineTuned) and model.head.settings.pool == "class"
    assert model.config.stem.frame_mean == mean and model.config.stem.frames == 128
    inputs = published_input(make_sound(1, 1.0), 128)
    expected = PublishedStep(config, student, student).encode(student, inputs)[:, 0]
    expected = torch.nn.functional.layer_norm(expected, (16,), eps=1e-6) @ tensors["head.weight"].double().T
    torch.testing.assert_close(model(inputs.float()).detach().double(), expected, rtol=1e-4, atol=1e-4)


def test_emotion2vec_gives_features(tmp_path: Path) -> None:
    """data2vec 2.0 of speech with ten tokens of the utterance, and a loss of theirs that is not published."""
    config = make_second_config(
        "audio", num_extra_tokens=10, layerdrop=0.05, learned_alibi_scale_per_layer=False, norm_eps=1e-5
    )
    config["modalities"]["audio"] |= {"prenet_layerdrop": 0.05, "init_extra_token_zero": True}
    config |= {
        "cls_loss": 1.0, "cls_type": "chunk", "adversarial_training": True, "adversarial_hidden_dim": 128,
        "adversarial_weight": 0.1, "_name": "data2vec_multi", "supported_modality": "AUDIO",
    }  # fmt: skip
    student = make_second_tensors(make_shapes(config, "audio"), seed=1)
    torch.save(make_state(config, student, None), tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="the loss cls_type 'chunk' is not built: the model gives features"):
        model = fairseq.load(tmp_path / "a.pt")
    assert isinstance(model, d2v.Data2Vec) and model.decoder is None
    inputs = torch.randn(2, 2_000, dtype=torch.float64)
    step = SecondStep(config, "audio", student, {})
    expected, _ = step.encode(student, step.local(student, inputs), None, None, student)
    found = model.encode(inputs.float())
    assert model.context.extra_tokens is not None and model.context.extra_tokens.shape[1] == 10
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.features.double(), expected[:, 10:], rtol=0, atol=1e-5 * scale)
