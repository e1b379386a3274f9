"""`interop.fairseq.build` over the options of the published image model, against the step written out in torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from support import families
from support.parity import assert_near
from support.published import PublishedStep, grid_of, make_config, make_eat_config, make_teacher, make_tensors
from support.tensors import BACKENDS
from torch import Tensor

from d2v import Config
from d2v.config import Mask
from d2v.interop import fairseq
from d2v.model.masking import resolve_masks
from d2v_kernels import masks_from_bool, use_backend

SHARED = {"decoder_layers": 3, "decoder_dim": 24, "decoder_kernel": 5, "decoder_groups": 4, "decoder_residual": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "pre_norm": {"layer_norm_first": True, "prenet_depth": 2},
    "pre_norm_block_targets": {"layer_norm_first": True, "end_of_block_targets": True},
    "block_targets": {"end_of_block_targets": True},
    "one_of_four_layers": {"depth": 4, "average_top_k_layers": 1, "prenet_depth": 0},
    "three_of_four_layers": {"depth": 4, "average_top_k_layers": 3},
    "layer_then_instance": {
        "instance_norm_target_layer": False, "layer_norm_target_layer": True, "layer_norm_targets": False,
        "instance_norm_targets": True,
    },
    "batch": {"instance_norm_target_layer": False, "batch_norm_target_layer": True},
    "every_norm": {
        "batch_norm_target_layer": True, "layer_norm_target_layer": True, "instance_norm_targets": True,
    },
    "no_norm": {"instance_norm_target_layer": False, "layer_norm_targets": False},
    "positions_at_masked": {"add_positions_masked": True},
    "positions_at_all": {"add_positions_all": True, "add_positions_masked": True},
    "even_kernel": {"decoder_kernel": 4, "decoder_layers": 3},
    "kernel_2": {"decoder_kernel": 2},
    "wide_decoder": {"decoder_dim": 24, "decoder_kernel": 5, "decoder_layers": 3, "decoder_groups": 8},
    "narrow_decoder_without_residual": {"decoder_dim": 8, "decoder_residual": False, "decoder_groups": 1},
    "no_extra_token": {"num_extra_tokens": 0, "cls_loss": 0},
    "three_extra_tokens": {"num_extra_tokens": 3, "cls_loss": 0.5},
    "extra_token_without_loss": {"cls_loss": 0},
    "smooth_l1": {"loss_beta": 0.5, "loss_scale": 2.0, "d2v_loss": 0.5},
    "one_copy": {"clone_batch": 1},
    "three_copies": {"clone_batch": 3},
    "norm_without_affine": {"norm_affine": False, "norm_eps": 1e-3},
    "teacher_of_blocks": {"ema_encoder_only": True},
    "teacher_of_blocks_pre_norm": {"ema_encoder_only": True, "layer_norm_first": True},
    "teacher_without_stem": {"ema_local_encoder": False},
    "no_positions": {"fixed_positions": False},
    "widths": {"embed_dim": 24, "num_heads": 3, "mlp_ratio": 2.5, "decoder_groups": 2, "decoder_dim": 24},
    "one_head_odd_grid": {"num_heads": 1, "input_size": 20, "in_chans": 1},
    "alibi_on_the_grid": {"use_alibi_encoder": True},
    "alibi_euclidean_of_each_layer": {
        "use_alibi_encoder": True, "alibi_distance": "euclidean", "learned_alibi_scale_per_layer": True,
    },
    "alibi_of_the_sequence": {"use_alibi_encoder": True, "alibi_dims": 1, "num_extra_tokens": 0, "cls_loss": 0},
    "learned_alibi_table": {"use_alibi_encoder": True, "learned_alibi": True, "alibi_max_pos": 16},
    "learned_alibi_table_of_each_layer": {
        "use_alibi_encoder": True, "learned_alibi": True, "alibi_max_pos": 16, "learned_alibi_scale_per_layer": True,
    },
    "some_masked_visible": {"keep_masked_pct": 0.3},
    "some_masked_visible_with_positions": {"keep_masked_pct": 0.5, "add_positions_masked": True, "clone_batch": 3},
    "narrow_patches": {"local_dim": 12},
    "wide_patches_without_stem_average": {"local_dim": 24, "ema_local_encoder": False},
    "pixels": {"recon_loss": 0.5, "embed_dim": 48, "num_heads": 2, "decoder_dim": 16},
    "pixels_smooth_l1": {
        "recon_loss": 2.0, "embed_dim": 48, "loss_beta": 0.5, "loss_scale": 2.0, "d2v_loss": 0.5, "clone_batch": 3,
    },
    "transformer_decoder": {"transformer_decoder": True, "decoder_dim": 24},
    "transformer_decoder_pre_norm": {
        "transformer_decoder": True, "layer_norm_first": True, "add_positions_masked": True, "mlp_ratio": 2.5,
        "norm_affine": False,
    },
    "cross_decoder": {"transformer_decoder": True, "enc_dec_transformer": True, "decoder_dim": 24},
    "cross_decoder_with_positions": {
        "transformer_decoder": True, "enc_dec_transformer": True, "add_positions_all": True, "decoder_layers": 1,
        "mlp_ratio": 2,
    },
    "shared_decoder": {"shared_decoder": SHARED, "d2v_loss": 0.5},
    "shared_decoder_and_pixels": {
        "shared_decoder": {**SHARED, "decoder_layers": 1}, "embed_dim": 48, "recon_loss": 0.25,
        "transformer_decoder": True, "decoder_dim": 16, "keep_masked_pct": 0.3,
    },
    "constant_decay": {"ema_decay": 0.95, "ema_end_decay": 0.95},
}  # fmt: skip


def make_inputs(config: dict[str, Any], samples: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Images, masks with equal counts, noise; float64."""
    image = config["modalities"]["image"]
    grid, patch = grid_of(image), image["patch_size"]
    tokens = math.prod(grid)
    rows, masked = samples * config["clone_batch"], int(tokens * image["mask_prob"])
    hidden = masked - round(masked * image["keep_masked_pct"])
    generator = torch.Generator().manual_seed(7)
    shape = samples, image["in_chans"], grid[0] * patch, grid[1] * patch
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, tokens, generator=generator).argsort(dim=1) < masked
    noise = torch.randn(rows, hidden, config["embed_dim"], generator=generator, dtype=torch.float64)
    return images, mask, 0.01 * noise


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*OPTIONS, "eat"])
def test_step(name: str, backend: str) -> None:
    config = make_eat_config() if name == "eat" else make_config(**OPTIONS[name])
    student = make_tensors(config, seed=1)
    teacher = make_teacher(config, student, seed=2)
    images, mask, noise = make_inputs(config)
    model = fairseq.build(config, student, teacher, family="d2v2_image")
    leaves = {n: t.clone().requires_grad_("positions" not in n) for n, t in student.items()}
    expected = PublishedStep(config, leaves, teacher).run(images, mask, noise)
    expected["loss"].backward()
    # Several norms in a row exist on the reference backend only; "auto" picks it for that one operator.
    several = "," in model.config.target.norm + model.config.target.out_norm
    with use_backend("auto" if several and backend == "native" else backend):
        out = model(images.float(), masks=mask, noise=noise.float())
        out.loss.backward()
        for key in ("prediction", "target", "targets", "class_prediction", "class_target"):
            if key in expected:
                # An instance-normed target has mean 0: its class target is rounding noise.
                assert_near(getattr(out, key), expected[key], 5e-5, key, floor=0.02)
        assert out.losses.keys() == expected.keys() & {"regression", "cls", "shared", "reconstruction"}
        for key in out.losses:
            assert_near(out.losses[key], expected[key], 1e-5, key)
        assert_near(out.loss, expected["loss"], 1e-5, "loss")
        gradients = fairseq.gradients(model)
        assert gradients.keys() == {n for n, t in leaves.items() if t.grad is not None}
        largest = max(float(g.abs().max()) for g in gradients.values())
        for key, gradient in gradients.items():
            # A gradient that is mathematically zero is rounding noise of the largest one.
            assert_near(gradient, leaves[key].grad, 1e-4, key, floor=0.01 * largest)
        model.teacher.update(decay := model.config.ema.decay(1, 1000))
    own = {f"blocks.{n}" if config["ema_encoder_only"] else n: n for n in teacher}
    averaged = fairseq.teacher_parameters(model)
    assert averaged.keys() == teacher.keys()
    for ours, theirs in own.items():
        assert_near(averaged[theirs], decay * teacher[theirs] + (1 - decay) * student[ours], 1e-6, theirs)


def test_unequal_counts_follow_row_0() -> None:
    """Rows that mask fewer lose visible tokens; rows that mask more keep masked ones visible."""
    config = make_config(clone_batch=1)
    student = make_tensors(config, seed=1)
    images, mask, noise = make_inputs(config, samples=3)
    mask[1] = mask[0]
    mask[1, mask[1].nonzero()[0]] = False
    mask[2] = mask[0]
    mask[2, (~mask[2]).nonzero()[0]] = True
    model = fairseq.build(config, student, None, family="d2v2_image")
    expected = PublishedStep(config, student, make_teacher(config, student, 0) | student).run(images, mask, noise)
    out = model(images.float(), masks=mask, noise=noise.float())
    assert_near(out.prediction, expected["prediction"], 5e-5, "prediction")


def test_cross_decoders_need_equal_counts() -> None:
    config = make_config(transformer_decoder=True, enc_dec_transformer=True, clone_batch=1)
    model = fairseq.build(config, make_tensors(config, seed=1), None, family="d2v2_image")
    images, mask, _ = make_inputs(config)
    mask[1] = mask[0]
    mask[1, (~mask[1]).nonzero()[0]] = True
    with pytest.raises(ValueError, match=r"same number of masked positions in every row.*in rows \[1\]"):
        model(images.float(), masks=mask)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mask_dropout", 0.1),
        ("prenet_layerdrop", 0.1),
        ("local_grad_mult", 0.5),
        ("mask_prob_min", 0.2),
    ],
)
def test_unsupported_modality_option_is_named(option: str, value: Any) -> None:
    config = make_config()
    config["modalities"]["image"][option] = value
    with pytest.raises(NotImplementedError, match=f"modalities.image.{option}"):
        fairseq.build(config, {}, None, family="d2v2_image")


@pytest.mark.parametrize("published", [False, True])
def test_masked_tokens_that_stay_visible(published: bool) -> None:
    """Spread over the masked ones of a row, or the first ones, as the published sort gives them; all in the loss."""
    names = frozenset({"visible-count-of-row-0"}) if published else frozenset()
    config = dataclasses.replace(Config(), mask=Mask(keep_masked=0.25), published=names)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [0, 2, 3, 5, 7, 8, 11, 15]] = mask[1, 8:] = True
    given = masks_from_bool(mask)
    masks = resolve_masks(config, mask, batch=2, tokens=16, lengths=None, first_id=0).masks
    assert masks.keep is not None and masks.restore is not None and torch.equal(masks.rows, given.rows)
    for row, more in enumerate([[0, 2], [8, 9]] if published else [[3, 11], [10, 14]]):
        shown = sorted([*(~mask[row]).nonzero()[:, 0].tolist(), *more])
        assert masks.keep[row].tolist() == shown
        hidden = [t for t in range(16) if t not in shown]
        assert [masks.restore[row, t] for t in [*shown, *hidden]] == list(range(16))
    again = dataclasses.replace(config, mask=Mask(keep_masked=0.0))
    assert torch.equal(resolve_masks(again, mask, 2, 16, None, 0).masks.restore, given.restore)


def test_the_shared_decoder_has_noise_of_its_own() -> None:
    """With the weights of the other decoder it makes the same predictions from given noise, others from drawn noise."""
    config = families.make_config("speech-base").change(mask={"noise_std": 1.0})
    same = {n: getattr(config.decoder, n) for n in ("layers", "width", "kernel", "groups")}
    model = families.make_model(config.change(shared_decoder=same))
    assert model.shared_decoder is not None and model.decoder is not None
    model.shared_decoder.load_state_dict(model.decoder.state_dict())
    waves = torch.randn(2, 2_000)
    tokens, _ = model.stem.measure(waves)
    mask = (torch.arange(tokens) % 2 == 0).expand(4, -1)
    noise = torch.randn(4, int(mask[0].sum()), config.encoder.width)
    given = model(waves, masks=mask, noise=noise).losses
    assert torch.equal(given["shared"], given["regression"])
    drawn = model(waves, masks=mask, noise_keys=torch.arange(4)).losses
    assert not torch.isclose(drawn["shared"], drawn["regression"], rtol=1e-4)
