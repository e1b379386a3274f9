"""`interop.fairseq.build` over the options of the published 1.0 models, against the step written out in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.parity import assert_near
from support.published_first import MASK, PublishedStep, make_config, make_shapes, teacher_names
from support.published_second import make_tensors
from torch import Tensor

from d2v.interop import fairseq

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "audio": {
        "defaults": {},
        "pre_norm": {"layer_norm_first": True},
        "positions_averaged": {"ema_layers_only": False},
        "layer_norm_then_instance": {
            "instance_norm_target_layer": False, "layer_norm_target_layer": True, "instance_norm_targets": True,
        },
        "group": {"instance_norm_target_layer": False, "group_norm_target_layer": True},
        "group_after_instance": {"group_norm_target_layer": True, "layer_norm_targets": True},
        "instance_twice": {"instance_norm_targets": True},
        "no_norm": {"instance_norm_target_layer": False},
        "every_norm": {
            "batch_norm_target_layer": True, "group_norm_target_layer": True, "layer_norm_target_layer": True,
            "layer_norm_targets": True, "instance_norm_targets": True,
        },
        "even_positions": {"conv_pos": 12, "pos_conv_depth": 2, "conv_pos_groups": 1},
        "bias": {"conv_bias": True},
        "norm_over_time": {"extractor_mode": "default", "conv_bias": True},
        "everything_averaged": {"ema_layers_only": False, "ema_transformer_only": False, "average_top_k_layers": 1},
        "norm_over_time_averaged": {
            "extractor_mode": "default", "ema_layers_only": False, "ema_transformer_only": False,
        },
        "gradient": {"feature_grad_mult": 0.25},
        "odd_widths": {"encoder_embed_dim": 24, "encoder_ffn_embed_dim": 37, "encoder_attention_heads": 3},
        "smooth_l1": {"loss_beta": 0.5, "loss_scale": 2.0, "average_top_k_layers": 1},
    },
    "text": {
        "defaults": {"instance_norm_target_layer": False, "layer_norm_target_layer": True},
        "one_head_layer": {"head_layers": 1},
        "three_head_layers": {"head_layers": 3},
        "pre_norm": {"normalize_before": True},
        "everything_averaged": {"ema_transformer_layers_only": False},
        "no_embedding_norm": {"layernorm_embedding": False},
        "scaled_embeddings": {"no_scale_embedding": False},
        "instance_of_layer": {
            "instance_norm_target_layer": False, "layer_norm_target_layer": True, "instance_norm_targets": True,
        },
        "batch": {"batch_norm_target_layer": True, "layer_norm_targets": True},
        "negative_scale": {"loss_scale": -1.0, "loss_beta": 4.0},
    },
    "vision": {
        "defaults": {},
        "mlp_outputs": {"end_of_block_targets": False},
        "everything_averaged": {"ema_transformer_only": False, "instance_norm_target_layer": True},
        "no_layer_scale": {"layer_scale_init_value": 0},
        "ignored_ratio": {"mlp_ratio": 2},
        "instance": {"instance_norm_target_layer": True, "average_top_k_layers": 3},
        "layer_then_instance": {"layer_norm_target_layer": True, "instance_norm_targets": True},
        "batch": {"batch_norm_target_layer": True, "layer_norm_targets": False},
        "one_channel": {"in_channels": 1, "image_size": 20, "num_heads": 2},
        "smooth_l1": {"loss_beta": 2.0, "loss_scale": 0.5, "average_top_k_layers": 8},
    },
}  # fmt: skip
CASES = [(name, option, False) for name in OPTIONS for option in OPTIONS[name]]
CASES += [(name, option, True) for name in ("audio", "text") for option in OPTIONS[name]]


def make_inputs(name: str, config: dict[str, Any], padded: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Inputs of two samples, lengths, padding (B,T) of speech, masks of different counts."""
    generator = torch.Generator().manual_seed(7)
    lengths = padding = None
    if name == "text":
        inputs, tokens, last = torch.randint(4, MASK, (2, 21), generator=generator), 21, 15
        if padded:
            inputs[1, last:], lengths = 1, torch.tensor([21, last])
    elif name == "audio":
        inputs, tokens, last = torch.randn(2, 533, generator=generator, dtype=torch.float64), 25, 19
        if padded:
            inputs[1, 400:], lengths = 0.0, torch.tensor([533, 400])
            padding = torch.arange(tokens) >= torch.tensor([tokens, last])[:, None]
    else:
        size = config["image_size"]
        inputs = torch.randn(2, config["in_channels"], size, size, generator=generator, dtype=torch.float64)
        tokens = last = (size // config["patch_size"]) ** 2
    mask = torch.rand(2, tokens, generator=generator) < 0.4
    mask[1, last:] = False
    return inputs, lengths, padding, mask


@pytest.mark.parametrize(("name", "option", "padded"), CASES)
def test_step(name: str, option: str, padded: bool) -> None:
    config = make_config(name, **OPTIONS[name][option])
    shapes = make_shapes(config, name)
    student, other = make_tensors(shapes, seed=1), make_tensors(shapes, seed=2)
    names, copied = teacher_names(config, name, shapes)
    teacher = {n: student[n] if n in copied else 0.9 * student[n] + 0.1 * other[n] for n in names}
    given = {names[n]: t for n, t in teacher.items()}
    token = MASK if name == "text" else None
    model = fairseq.build(config, student, given, family=f"d2v1_{name}", mask_token=token)
    inputs, lengths, padding, mask = make_inputs(name, config, padded)
    leaves = {n: t.clone().requires_grad_() for n, t in student.items()}
    expected = PublishedStep(config, name, leaves, teacher).run(inputs, padding, mask)
    expected["loss"].backward()
    out = model(inputs if name == "text" else inputs.float(), lengths, masks=mask)
    out.loss.backward()
    for key in ("prediction", "target", "targets", "regression", "loss"):
        actual = out.losses[key] if key == "regression" else getattr(out, key)
        # An instance norm over a batch of two divides by the difference of two nearly equal numbers.
        worse = 10.0 if option == "layer_norm_then_instance" else 1.0
        tolerance = worse * (1e-5 if key in ("regression", "loss") else 5e-5)
        assert_near(actual, expected[key], tolerance, key, floor=0.02)
    gradients = fairseq.gradients(model)
    assert gradients.keys() == {n for n, t in leaves.items() if t.grad is not None}
    largest = max(float(g.abs().max()) for g in gradients.values())
    for key, gradient in gradients.items():
        grad = leaves[key].grad
        assert grad is not None
        factor = config.get("feature_grad_mult", 1.0) if "feature_extractor" in key else 1.0
        assert_near(gradient, grad * factor, 1e-4, key, floor=0.01 * largest)
    model.teacher.update(0.75)
    averaged = fairseq.teacher_parameters(model)
    derived = {"version", *(n for n in averaged if n.endswith("rel_pos_bias.relative_position_index"))}
    assert averaged.keys() - derived == set(names.values())
    for ours, theirs in names.items():
        weight = 1.0 if ours in copied else 0.25
        assert_near(averaged[theirs], torch.lerp(teacher[ours], student[ours], weight), 1e-6, theirs)
