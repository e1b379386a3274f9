"""The published training step of every family, reproduced on every backend: golden cases d2v1_* and d2v2_*."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from support.golden import load_case
from support.tensors import BACKENDS
from torch import Tensor

from d2v import Data2Vec, Output
from d2v.interop import fairseq
from d2v_kernels import use_backend

CASES = (
    "d2v2_image", "d2v2_audio", "d2v2_audio_pad", "d2v2_text", "d2v2_text_pad", "d2v1_audio", "d2v1_audio_pad",
    "d2v1_text", "d2v1_text_pad", "d2v1_vision",
)  # fmt: skip


class Case:
    """A golden case and the model built from it."""

    def __init__(self, name: str) -> None:
        self.tensors, self.record = load_case(name)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below a prefix."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def build(self) -> Data2Vec:
        """The model before the step."""
        token = self.tensors.get("mask_token_id")
        return fairseq.build(
            self.record["config"], self.part("student/"), self.part("teacher/"), family=self.record["family"],
            mask_token=None if token is None else int(token),
        )  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """What the published step took: inputs, lengths, masks, noise."""
        t = self.tensors
        mask = t["mask"].bool().flatten(1)
        names = ("input/source", "input/img", "input/target_tokens")
        padding, noise = t.get("input/padding_mask"), t.get("mask_noise")
        if noise is not None:
            # The case stores noise in the order of ids_restore; the model takes it by ascending position.
            masked = mask.nonzero()[:, 1].view(mask.shape[0], -1)
            rows = t["ids_restore"].gather(1, masked) - t["ids_keep"].shape[1]
            noise = noise.gather(1, rows[..., None].expand(-1, -1, noise.shape[2]))
        return {
            "inputs": next(t[name] for name in names if name in t),
            "lengths": None if padding is None else (~padding).sum(dim=1),
            "masks": mask,
            "noise": noise,
        }

    def step(self, model: Data2Vec) -> Output:
        """One forward."""
        result: Output = model(**self.arguments())
        return result

    def descend(self, model: Data2Vec) -> None:
        """Plain gradient descent through the live views."""
        parameters = fairseq.parameters(model)
        for name, gradient in fairseq.gradients(model).items():
            parameters[name] -= self.record["sgd_lr"] * gradient
        model.zero_grad()


@functools.lru_cache(maxsize=2)
def load(name: str) -> Case:
    return Case(name)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str = "", scale: float = 0.0) -> None:
    assert actual.shape == expected.shape, name
    actual, expected = actual.detach().double(), expected.double()
    error = float((actual - expected).abs().max()) / (scale or max(float(expected.abs().max()), 1e-30))
    assert error <= tolerance, f"{name}: expected at most {tolerance} of the maximum, got {error:.3g}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_step(name: str, backend: str) -> None:
    """Targets, predictions, loss parts, gradients, and the teacher after one update."""
    case = load(name)
    model, t = case.build(), case.tensors
    with use_backend(backend):
        out = case.step(model)
        out.loss.backward()
    loss = next(n.removeprefix("pred/") for n in t if n.startswith("pred/") and n != "pred/cls")
    pairs = {f"pred/{loss}": out.prediction, f"target/{loss}": out.target, "targets_full": out.targets}
    pairs |= {"pred/cls": out.class_prediction, "target/cls": out.class_target}
    for key, actual in pairs.items():
        assert (actual is None) == (key not in t) or key == "targets_full"
        if actual is not None and key in t:
            assert_near(actual, t[key], 5e-5, key)
    values = {f"loss/{loss}": out.losses["regression"], "loss/normalized": out.loss, "loss/cls": out.losses.get("cls")}
    for key, value in (values | {"pred_var": out.prediction_std, "target_var": out.target_std}).items():
        if value is not None:
            assert_near(value, t[key], 1e-5, key)
    assert out.sample_size == case.record["scalars"]["sample_size"]
    assert_gradients(case, fairseq.gradients(model))
    with use_backend(backend):
        case.descend(model)
        model.teacher.update(model.config.ema.decay(1, model.config.run.steps))
    averaged, expected = fairseq.teacher_parameters(model), case.part("teacher_after/")
    assert averaged.keys() == expected.keys()
    for key, tensor in averaged.items():
        assert_near(tensor, expected[key], 1e-6, key)


def assert_gradients(case: Case, gradients: dict[str, Tensor]) -> None:
    expected, zero = case.part("grad/"), set(case.record["mathematically_zero_gradients"])
    assert gradients.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in gradients.items():
        if name in zero:
            assert_near(gradient, expected[name], 1e-6, name, scale=largest)
        else:
            assert_near(gradient, expected[name], 1e-4, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_five_steps(name: str, backend: str) -> None:
    case = load(name)
    model, trace = case.build(), case.part("trace/")
    with use_backend(backend):
        for i in range(5):
            out = case.step(model)
            for value, key in ((out.loss, "loss"), (out.target_std, "target_var"), (out.prediction_std, "pred_var")):
                assert float(value.detach()) == pytest.approx(float(trace[key][i]), rel=1e-5), f"{key} at step {i}"
            out.loss.backward()
            case.descend(model)
            decay = model.config.ema.decay(i + 1, model.config.run.steps)
            assert decay == pytest.approx(float(trace["decay"][i]), abs=1e-12)
            model.teacher.update(decay)
    for kind, tensors in (("student", fairseq.parameters(model)), ("teacher", fairseq.teacher_parameters(model))):
        for key, expected in case.part(f"trace/final_{kind}/").items():
            assert_near(tensors[key], expected, 1e-5, key)


@pytest.mark.parametrize("name", CASES)
def test_intermediates(name: str) -> None:
    """The teacher's tensors of every block that counts, and the student's encoder output of 1.0."""
    case = load(name)
    model, t = case.build(), case.tensors
    arguments = case.arguments()
    tokens, lengths = model.stem.measure(arguments["inputs"], arguments["lengths"])
    features = model.stem(arguments["inputs"], lengths)
    target = model.config.target
    layers = model.teacher.collect(arguments["inputs"], features, lengths, target.top_k, target.source)
    stored = [t[f"teacher_layer/{i}"] for i in range(sum(n.startswith("teacher_layer/") for n in t))]
    for layer, expected in zip(layers, stored[-len(layers) :], strict=True):
        assert layer.shape[1] == tokens
        assert_near(layer, expected, 5e-5)


@pytest.mark.parametrize("name", CASES)
def test_no_teacher_copies_the_student(name: str) -> None:
    case = load(name)
    token = case.tensors.get("mask_token_id")
    model = fairseq.build(
        case.record["config"], case.part("student/"), None, family=case.record["family"],
        mask_token=None if token is None else int(token),
    )  # fmt: skip
    student = dict(model.named_parameters())
    for ours, average in model.teacher.named_parameters():
        assert torch.equal(average, student[ours]), ours


@pytest.mark.parametrize("name", CASES)
def test_every_option_is_known(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(name).build()


@pytest.mark.parametrize("name", ["d2v1_audio", "d2v2_text"])
def test_parameters_are_live_views(name: str) -> None:
    """Also of a fused projection: a change of one third reaches the model."""
    case = load(name)
    model = case.build()
    student, teacher = (
        ("encoder.layers.0.self_attn.v_proj.weight", "layers.3.fc2.weight")
        if name == "d2v1_audio"
        else ("blocks.0.attn.qkv.weight", "3.mlp.fc2.weight")
    )
    before = float(case.step(model).loss.detach())
    fairseq.parameters(model)[student] += 0.1
    after_student = float(case.step(model).loss.detach())
    fairseq.teacher_parameters(model)[teacher] *= -1.0
    after_teacher = float(case.step(model).loss.detach())
    assert len({before, after_student, after_teacher}) == 3
