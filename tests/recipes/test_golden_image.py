"""The published 2.0 image training step, reproduced on every backend: golden case d2v2_image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.golden import load_case
from support.tensors import BACKENDS
from torch import Tensor

from d2v import Data2Vec, Output
from d2v.interop import fairseq
from d2v_kernels import use_backend

TENSORS, RECORD = load_case("d2v2_image")


def part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in TENSORS.items() if name.startswith(prefix)}


def build(**options: Any) -> Data2Vec:
    config = {**RECORD["config"], **options}
    return fairseq.build(config, part("student/"), part("teacher/"), family="d2v2_image")


def step(model: Data2Vec) -> Output:
    mask = TENSORS["mask"].bool()
    masked = mask.nonzero()[:, 1].view(mask.shape[0], -1)
    # The case stores noise in the order of ids_restore; the model takes it in ascending order of the positions.
    rows = TENSORS["ids_restore"].gather(1, masked) - TENSORS["ids_keep"].shape[1]
    noise = TENSORS["mask_noise"].gather(1, rows[..., None].expand(-1, -1, TENSORS["mask_noise"].shape[2]))
    result: Output = model(TENSORS["input/source"], masks=mask, noise=noise)
    return result


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert actual.shape == expected.shape, name
    actual, expected = actual.detach().double(), expected.double()
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"{name}: expected at most {tolerance} of the maximum, got {error:.3g}"


def descend(model: Data2Vec) -> None:
    parameters, gradients = fairseq.parameters(model), fairseq.gradients(model)
    for name, gradient in gradients.items():
        parameters[name] -= RECORD["sgd_lr"] * gradient
    model.zero_grad()


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend: str) -> None:
    with use_backend(backend):
        out = step(build())
    assert out.class_prediction is not None
    assert out.class_target is not None
    for actual, name in (
        (out.prediction, "pred/IMAGE_regression"),
        (out.target, "target/IMAGE_regression"),
        (out.targets, "targets_full"),
        (out.class_prediction, "pred/cls"),
        (out.class_target, "target/cls"),
    ):
        assert_near(actual, TENSORS[name], 5e-5, name)
    for value, name in (
        (out.losses["regression"], "loss/IMAGE_regression"),
        (out.losses["cls"], "loss/cls"),
        (out.loss, "loss/normalized"),
        (out.prediction_std, "pred_var"),
        (out.target_std, "target_var"),
    ):
        assert_near(value, TENSORS[name], 1e-5, name)
    assert out.sample_size == RECORD["scalars"]["sample_size"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str) -> None:
    model = build()
    with use_backend(backend):
        step(model).loss.backward()
    gradients, expected = fairseq.gradients(model), part("grad/")
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_near(gradient, expected[name], 1e-4, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_after_one_update(backend: str) -> None:
    model = build()
    with use_backend(backend):
        step(model).loss.backward()
        descend(model)
        model.teacher.update(model.config.ema.decay(1, model.config.run.steps))
    actual, expected = fairseq.teacher_parameters(model), part("teacher_after/")
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert_near(tensor, expected[name], 1e-6, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_five_steps(backend: str) -> None:
    model = build()
    trace = part("trace/")
    with use_backend(backend):
        for i in range(5):
            out = step(model)
            for value, name in ((out.loss, "loss"), (out.target_std, "target_var"), (out.prediction_std, "pred_var")):
                assert float(value.detach()) == pytest.approx(float(trace[name][i]), rel=1e-5), f"{name} at step {i}"
            out.loss.backward()
            descend(model)
            decay = model.config.ema.decay(i + 1, model.config.run.steps)
            assert decay == pytest.approx(float(trace["decay"][i]), abs=1e-12)
            model.teacher.update(decay)
    for kind, tensors in (("student", fairseq.parameters(model)), ("teacher", fairseq.teacher_parameters(model))):
        for name, expected in part(f"trace/final_{kind}/").items():
            assert_near(tensors[name], expected, 1e-5, name)


def test_intermediates() -> None:
    model = build()
    features, _ = model.stem(TENSORS["input/source"])
    assert_near(features, TENSORS["inter/local_encoder"], 5e-5)
    x = model.teacher.context(model.positions(model.teacher.stem(TENSORS["input/source"])[0]))
    assert_near(x, TENSORS["inter/teacher_blocks_in"], 5e-5)
    layers = model.teacher.collect(TENSORS["input/source"], features, None, 3, "ffn")
    for i, layer in enumerate(layers):
        assert_near(layer, TENSORS[f"teacher_layer/{i}"], 5e-5)


def test_no_teacher_copies_the_student() -> None:
    model = fairseq.build(RECORD["config"], part("student/"), None, family="d2v2_image")
    student = fairseq.parameters(model)
    for name, tensor in fairseq.teacher_parameters(model).items():
        assert torch.equal(tensor, student[name]), name


def test_parameters_are_live_views() -> None:
    model = build()
    before = float(step(model).loss.detach())
    fairseq.parameters(model)["blocks.0.attn.qkv.weight"] += 0.1
    after_student = float(step(model).loss.detach())
    fairseq.teacher_parameters(model)["blocks.2.mlp.fc2.weight"] *= -1.0
    after_teacher = float(step(model).loss.detach())
    assert len({before, after_student, after_teacher}) == 3


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"recon_loss": 1.0}, "recon_loss"),
        ({"mae_init": True}, "mae_init"),
        ({"shared_decoder": {}}, "shared_decoder"),
        ({"dropout_input": 0.1}, "dropout_input"),
        ({"post_mlp_drop": 0.1}, "post_mlp_drop"),
        ({"d2v_loss": 0}, "d2v_loss"),
    ],
)
def test_unsupported_option_is_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(NotImplementedError, match=word):
        build(**options)


def test_unsupported_family_is_named() -> None:
    with pytest.raises(NotImplementedError, match="d2v2_audio"):
        fairseq.build(RECORD["config"], {}, None, family="d2v2_audio")
    with pytest.raises(ValueError, match="d2v3_smell"):
        fairseq.build(RECORD["config"], {}, None, family="d2v3_smell")
    with pytest.raises(ValueError, match="mask_token: expected None for d2v2_image, got 3"):
        fairseq.build(RECORD["config"], {}, None, family="d2v2_image", mask_token=3)


def test_tensors_that_do_not_fit_are_named() -> None:
    student = part("student/")
    student["blocks.0.extra"] = student.pop("blocks.0.norm1.bias")
    with pytest.raises(ValueError, match=r"missing \['blocks.0.norm1.bias'\], unexpected \['blocks.0.extra'\]"):
        fairseq.build(RECORD["config"], student, None, family="d2v2_image")
    student = part("student/")
    student["blocks.0.norm1.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"blocks.0.norm1.bias: expected shape \(32,\), got \(3,\)"):
        fairseq.build(RECORD["config"], student, None, family="d2v2_image")
