"""The published 2.0 image training step on the GPU: golden case d2v2_image, on every backend."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors", reason="safetensors is not installed: the golden case cannot be read")

from support.golden import load_case

from d2v.interop import fairseq
from d2v.model import layers
from d2v_kernels import use_backend

TENSORS, RECORD = load_case("d2v2_image")


def part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in TENSORS.items() if name.startswith(prefix)}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert actual.shape == expected.shape, name
    actual, expected = actual.detach().cpu().double(), expected.detach().double()
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"{name}: expected at most {tolerance} of the maximum, got {error:.3g}"


@pytest.mark.parametrize("backend_name", ["auto", "triton"])
def test_golden_step(place, backend_name) -> None:
    """Losses, every gradient, and the teacher after its update, in float32 without tensor floats."""
    if place.emulated and backend_name == "triton":
        pytest.skip("thousands of programs for an interpreter")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = fairseq.build(RECORD["config"], part("student/"), part("teacher/"), family="d2v2_image").to(place.device)
    mask = TENSORS["mask"].bool()
    masked = mask.nonzero()[:, 1].view(mask.shape[0], -1)
    rows = TENSORS["ids_restore"].gather(1, masked) - TENSORS["ids_keep"].shape[1]
    noise = TENSORS["mask_noise"].gather(1, rows[..., None].expand(-1, -1, TENSORS["mask_noise"].shape[2]))
    with use_backend(backend_name):
        out = model(TENSORS["input/source"].to(place.device), masks=mask, noise=noise.to(place.device))
        out.loss.backward()
        for value, name in (
            (out.losses["regression"], "loss/IMAGE_regression"),
            (out.losses["cls"], "loss/cls"),
            (out.prediction, "pred/IMAGE_regression"),
            (out.target, "target/IMAGE_regression"),
        ):
            assert_near(value, TENSORS[name], 1e-4, name)
        for name, gradient in fairseq.gradients(model).items():
            assert_near(gradient, TENSORS[f"grad/{name}"], 5e-4, name)
        parameters = fairseq.parameters(model)
        with torch.no_grad():
            for name, gradient in fairseq.gradients(model).items():
                parameters[name] -= RECORD["sgd_lr"] * gradient
        model.teacher.update(model.config.ema.decay(1, model.config.run.steps))
    for name, tensor in fairseq.teacher_parameters(model).items():
        assert_near(tensor, TENSORS[f"teacher_after/{name}"], 1e-5, name)


def test_teacher_as_a_graph(place) -> None:
    """Recorded targets equal those of plain calls while the weights move."""
    if place.emulated:
        pytest.skip("CUDA graphs need a GPU")
    models = []
    for _ in range(2):
        models.append(
            fairseq.build(RECORD["config"], part("student/"), part("teacher/"), family="d2v2_image").to(place.device)
        )
    models[1].graph_teacher()
    images = TENSORS["input/source"].to(place.device)
    for step in range(3):
        targets = []
        for model in models:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(1.0 + 0.01 * step)
            model.teacher.update(0.5)
            targets.append(model(images, masks=TENSORS["mask"].bool()).targets)
        assert torch.equal(*targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convolutions_over_time_keep_channels_last(monkeypatch: pytest.MonkeyPatch, place, dtype: torch.dtype) -> None:
    """A layer of the front end and one of the positions: right, and as dense as their inputs, gradients too."""
    if place.emulated:
        monkeypatch.setattr(layers, "_suits_products", lambda *_: False)
        monkeypatch.setattr(layers, "_keeps_layout", lambda _: True)
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    for conv in (nn.Conv1d(64, 32, 3, 2), nn.Conv1d(64, 64, 19, padding=9, groups=4)):
        x, found, grad = torch.randn(2, 65, 64).to(dtype), [], torch.empty(0)
        for device, kind in ((torch.device("cpu"), torch.float64), (place.device, dtype)):
            own, given = copy.deepcopy(conv).to(dtype).to(device, kind), x.to(device, kind).requires_grad_()
            y = layers.convolve_grid(own, given)
            grad = grad if grad.numel() else torch.randn(y.shape).to(dtype)
            found.append((y, *torch.autograd.grad(y, [given, *own.parameters()], grad.to(device, kind))))
        truth, got = found
        assert got[0].is_contiguous() and got[1].is_contiguous()
        for mine, true in zip(got, truth, strict=True):
            assert_near(mine, true, 1e-2 if dtype == torch.bfloat16 else 1e-4, str(tuple(mine.shape)))
