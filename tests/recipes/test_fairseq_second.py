"""`interop.fairseq.build` over the options of published 2.0 speech and text, against the step written out in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.parity import assert_near
from support.published_second import PublishedStep, make_config, make_shapes, make_tensors, teacher_names
from support.tensors import BACKENDS

from d2v.interop import fairseq
from d2v_kernels import use_backend

AUDIO: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one_scale_for_all_heads": {"learned_alibi_scale_per_head": False},
    "scale_of_each_layer": {"learned_alibi_scale_per_layer": True},
    "one_scale_of_each_layer": {"learned_alibi_scale_per_layer": True, "learned_alibi_scale_per_head": False},
    "fixed_scale": {"learned_alibi_scale": False},
    "no_alibi": {"use_alibi_encoder": False},
    "alibi_on_three_heads": {"num_alibi_heads": 3},
    "table": {"learned_alibi": True, "alibi_max_pos": 30, "num_extra_tokens": 1},
    "table_on_three_heads_of_each_layer": {
        "learned_alibi": True, "alibi_max_pos": 25, "num_alibi_heads": 3, "learned_alibi_scale_per_layer": True,
    },
    "some_masked_visible": {"keep_masked_pct": 0.4},
    "six_heads": {"embed_dim": 24, "num_heads": 6, "num_alibi_heads": 6},
    "extra_tokens": {"num_extra_tokens": 2, "cls_loss": 0.1, "learned_alibi_scale_per_layer": True},
    "pre_norm": {"layer_norm_first": True},
    "pre_norm_block_targets": {"layer_norm_first": True, "end_of_block_targets": True, "prenet_depth": 2},
    "block_targets": {"end_of_block_targets": True, "average_top_k_layers": 1},
    "norms": {"instance_norm_target_layer": False, "layer_norm_target_layer": True, "instance_norm_targets": True},
    "batch_and_layer": {
        "instance_norm_target_layer": False, "batch_norm_target_layer": True, "layer_norm_targets": True,
    },
    "norm_over_time": {"extractor_mode": "default"},
    "norm_over_time_averaged": {"extractor_mode": "default", "ema_local_encoder": True},
    "positions_with_norm": {"conv_pos_pre_ln": True},
    "even_kernels": {"conv_pos_width": 12, "decoder_kernel": 4},
    "one_convolution": {"conv_pos_depth": 1, "conv_pos_width": 9, "conv_pos_groups": 8},
    "teacher_of_everything": {"ema_local_encoder": True},
    "teacher_of_blocks": {"ema_encoder_only": True, "prenet_depth": 2},
    "no_prenet_one_copy": {"prenet_depth": 0, "clone_batch": 1},
    "half_gradient": {"local_grad_mult": 0.5},
    "frozen_extractor": {"local_grad_mult": 0.0},
    "projection": {"projection_layers": 3, "projection_ratio": 1.5, "decoder_dim": 8, "decoder_residual": False},
    "smooth_l1": {"loss_beta": 0.5, "loss_scale": 2.0, "d2v_loss": 0.5},
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "defaults": {"ema_encoder_only": True},
    "prenet": {"prenet_depth": 1, "ema_encoder_only": True},
    "prenet_averaged": {"prenet_depth": 2},
    "everything_averaged": {"ema_local_encoder": True},
    "pre_norm": {"layer_norm_first": True, "ema_encoder_only": True},
    "bare_embeddings": {"layernorm_embedding": False, "no_token_positional_embeddings": True},
    "scaled_embeddings": {"no_scale_embedding": False},
    "alibi": {"use_alibi_encoder": True},
    "table": {"use_alibi_encoder": True, "learned_alibi": True, "alibi_max_pos": 40},
    "random_masks_stay_hidden": {"keep_masked_pct": 0.4},
    "dense_decoder": {"decoder_groups": 1, "projection_layers": 2, "decoder_residual": False, "decoder_kernel": 9},
    "extra_token": {"num_extra_tokens": 1, "cls_loss": 0.5, "prenet_depth": 1},
    "layer_then_instance": {
        "instance_norm_target_layer": False, "layer_norm_target_layer": True, "instance_norm_targets": True,
    },
}  # fmt: skip
CASES = [("audio", n) for n in AUDIO] + [("text", n) for n in TEXT]


def make_inputs(name: str, padded: bool) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, int]:
    """Inputs of two samples, lengths, padding (B,T), tokens T."""
    generator = torch.Generator().manual_seed(7)
    if name == "text":
        tokens = torch.randint(4, 30, (2, 21), generator=generator)
        if padded:
            tokens[1, 15:] = 1
        return tokens, (tokens != 1).sum(dim=1) if padded else None, tokens == 1 if padded else None, 21
    waves = torch.randn(2, 533, generator=generator, dtype=torch.float64)
    if padded:
        waves[1, 400:] = 0.0
    frames = 25
    padding = torch.arange(frames) >= torch.tensor([25, 19])[:, None]
    return waves, torch.tensor([533, 400]) if padded else None, padding if padded else None, frames


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("name", "option"), CASES)
def test_step(name: str, option: str, padded: bool) -> None:
    options = (AUDIO if name == "audio" else TEXT)[option]
    config = make_config(name, **options)
    shapes = make_shapes(config, name)
    student, other = make_tensors(shapes, seed=1), make_tensors(shapes, seed=2)
    names = teacher_names(config, name, shapes)
    teacher = {n: 0.9 * student[n] + 0.1 * other[n] for n in names}
    if not config["modalities"][name]["learned_alibi_scale"]:  # not trained: copied
        teacher |= {n: student[n] for n in names if "alibi_scale" in n}
    model = fairseq.build(config, student, {names[n]: t for n, t in teacher.items()}, family=f"d2v2_{name}")
    inputs, lengths, padding, tokens = make_inputs(name, padded)
    rows, masked = 2 * config["clone_batch"], tokens // 2
    generator = torch.Generator().manual_seed(8)
    last = 13 if name == "text" else 17  # the masks of the published speech sampler avoid padding, those of text do not
    mask = torch.rand(rows, tokens, generator=generator)
    mask[:, last:] = 2.0 if padded and name == "audio" else mask[:, last:]
    mask = mask.argsort(dim=1).argsort(dim=1) < masked
    hidden = masked - (round(masked * config["modalities"][name]["keep_masked_pct"]) if name == "audio" else 0)
    noise = 0.01 * torch.randn(rows, hidden, config["embed_dim"], generator=generator, dtype=torch.float64)
    learned = config["modalities"][name]["learned_alibi_scale"]
    leaves = {n: t.clone().requires_grad_(learned or "alibi_scale" not in n) for n, t in student.items()}
    expected = PublishedStep(config, name, leaves, teacher).run(inputs, padding, mask, noise)
    expected["loss"].backward()
    with use_backend("auto"):
        out = model(inputs.float() if name == "audio" else inputs, lengths, masks=mask, noise=noise.float())
        out.loss.backward()
    for key in ("prediction", "target", "targets", "class_prediction", "class_target"):
        if key in expected:
            assert_near(getattr(out, key), expected[key], 5e-5, key, floor=0.02)
    for key in out.losses:
        assert_near(out.losses[key], expected[key], 1e-5, key)
    assert_near(out.loss, expected["loss"], 1e-5, "loss")
    gradients = fairseq.gradients(model)
    factor = config["modalities"][name].get("local_grad_mult", 1.0)
    local = [n for n in shapes if "conv_layers" in n]
    wanted = {n for n, t in leaves.items() if t.grad is not None} - (set(local) if factor == 0.0 else set())
    assert gradients.keys() == wanted
    largest = max(float(g.abs().max()) for g in gradients.values())
    for key, gradient in gradients.items():
        grad = leaves[key].grad
        assert grad is not None
        assert_near(gradient, grad * (factor if key in local else 1.0), 1e-4, key, floor=0.01 * largest)
    model.teacher.update(0.75)
    averaged = fairseq.teacher_parameters(model)
    assert averaged.keys() == set(names.values())
    for ours, theirs in names.items():
        assert_near(averaged[theirs], 0.75 * teacher[ours] + 0.25 * student[ours], 1e-6, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree(backend: str) -> None:
    """One case on each backend; the golden cases run there too."""
    config = make_config("audio")
    shapes = make_shapes(config, "audio")
    student = make_tensors(shapes, seed=1)
    model = fairseq.build(config, student, None, family="d2v2_audio")
    inputs, _, _, tokens = make_inputs("audio", False)
    mask = (torch.arange(tokens) % 2 == 0).expand(4, -1)
    noise = torch.zeros(4, int(mask[0].sum()), 16)
    expected = PublishedStep(config, "audio", student, {}).run(inputs, None, mask, noise.double())
    with use_backend(backend):
        out = model(inputs.float(), masks=mask, noise=noise)
    assert_near(out.prediction, expected["prediction"], 5e-5, "prediction")
