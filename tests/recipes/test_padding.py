"""Padding is invisible: a sample has the same features, targets and predictions alone and in a padded batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.families import make_batch, make_config, make_model
from torch import Tensor

from d2v import Config, Data2Vec
from d2v.model.masking import make_mask_sampler

LENGTHS = {"speech": (2_000, 1_500, 700), "text": (31, 20, 9), "signals": (2_000, 1_500, 700)}
# Recipe, fields of the encoder, and of the stem.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "speech": ("speech-base", {}, {}),
    "speech_prenet_and_extra_tokens": ("speech-base", {"prenet_depth": 1, "extra_tokens": 2}, {}),
    "speech_alibi_of_each_layer": ("speech-base", {"alibi_per_layer": True, "alibi_heads": 3}, {}),
    "speech_alibi_table": ("speech-base", {"alibi_table": 20, "extra_tokens": 1}, {}),
    "speech_position_norm": ("speech-base", {}, {"position_norm": True, "position_width": 12}),
    "speech_transformer_decoder": ("speech-base", {}, {}),
    "speech_norm_over_time": ("speech-base", {}, {"convolution_norm": "group", "convolution_bias": True}),
    "speech1_norm_over_time": ("speech1-base", {}, {"convolution_norm": "group"}),
    "speech_pre_norm": ("speech-base", {"norm_order": "pre"}, {}),
    "log_mel": ("speech-base", {"alibi": "none"}, {"kind": "log-mel", "positions": "sincos"}),
    "text": ("text-base", {}, {}),
    "text_alibi": ("text-base", {"alibi": "fixed"}, {"learned_positions": False}),
    "text_narrow_with_table": ("text-base", {"alibi": "learned", "alibi_table": 31}, {"width": 12}),
    "text1_narrow": ("text1-base", {}, {"width": 12}),
    "text_large": ("text-large", {}, {}),
    "speech1": ("speech1-base", {}, {}),
    "speech1_pre_norm": ("speech1-base", {"norm_order": "pre"}, {}),
    "text1": ("text1-base", {}, {}),
    "signals": ("signals-tiny", {}, {"channels": 3}),
    "signals_norm_over_time": ("signals-tiny", {}, {"channels": 3, "convolution_norm": "group"}),
    "signals_conv": ("signals-tiny", {}, {"channels": 3, "positions": "conv"}),
}
DECODERS = {"speech_transformer_decoder": {"kind": "transformer", "heads": 4}}


def make(name: str) -> Config:
    recipe, encoder, stem = CASES[name]
    config = make_config(recipe, **encoder)
    return config.change(stem=stem, decoder=DECODERS.get(name, {}))


def lengths_of(config: Config) -> tuple[int, ...]:
    long = config.stem.kind == "log-mel"
    return tuple(n * (4 if long else 1) for n in LENGTHS[config.stem.modality])


def assert_same(alone: Tensor, padded: Tensor, name: str) -> None:
    error = float((alone - padded).detach().abs().max() / alone.detach().abs().max())
    assert error <= 1e-5, f"{name}: expected at most 1e-5 of the maximum, got {error:.2g}"


@pytest.mark.parametrize("name", CASES)
def test_encode(name: str) -> None:
    config = make(name)
    model = make_model(config)
    inputs, lengths = make_batch(config, lengths_of(config))
    for encode in (model.encode, model.teacher.encode):
        batch = encode(inputs, lengths)
        assert batch.valid.shape == batch.features.shape[:2]
        for row, length in enumerate(lengths.tolist()):
            alone = encode(inputs[row : row + 1, :length])
            tokens = alone.features.shape[1]
            assert int(batch.valid[row].sum()) == tokens
            assert bool(batch.valid[row, :tokens].all())
            assert bool(alone.valid.all())
            assert_same(alone.features[0], batch.features[row, :tokens], f"row {row}")
            if alone.class_token is not None and batch.class_token is not None:
                assert_same(alone.class_token[0], batch.class_token[row], f"class token of row {row}")


def draw(model: Data2Vec, lengths: Tensor | None, tokens: int) -> Any:
    sampler = make_mask_sampler(model.config, tokens=tokens)
    count = 3 if lengths is None else len(lengths)
    return sampler.draw(range(count), 0, copies=model.config.mask.copies, lengths=lengths)


@pytest.mark.parametrize("name", CASES)
def test_training(name: str) -> None:
    """Targets and predictions of each sample, with the masks that the batch drew."""
    config = make(name)
    model = make_model(config)
    inputs, lengths = make_batch(config, lengths_of(config))
    tokens, valid = model.stem.measure(inputs, lengths)
    masks = draw(model, valid, tokens)
    copies, width = config.mask.copies, config.encoder.width
    generator = torch.Generator().manual_seed(5)
    rows = len(lengths) * copies
    noise = None
    if config.version == 2:
        noise = 0.01 * torch.randn(rows, int(masks.mask[0].sum()), width, generator=generator)
    out = model(inputs, lengths, masks=masks, noise=noise)
    assert out.sample_size == int(masks.mask.sum()) > 0
    start = 0
    for row, length in enumerate(lengths.tolist()):
        part = slice(row * copies, (row + 1) * copies)
        mask = masks.mask[part, : int(valid[row])]
        one = model(
            inputs[row : row + 1, :length], masks=mask.contiguous(), noise=None if noise is None else noise[part]
        )
        assert_same(one.targets[0], out.targets[row, : int(valid[row])], f"targets of row {row}")
        assert not out.targets[row, int(valid[row]) :].any()
        assert_same(one.prediction, out.prediction[start : start + one.sample_size], f"predictions of row {row}")
        start += one.sample_size
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_text_counts_its_padding() -> None:
    """Without lengths, padding ids are padding."""
    config = make("text")
    model = make_model(config)
    inputs, lengths = make_batch(config, LENGTHS["text"])
    assert torch.equal(model.encode(inputs).features, model.encode(inputs, lengths).features)


def test_given_masks_at_padding_leave_the_loss() -> None:
    """By default; the published code keeps them."""
    config = make("text")
    inputs, lengths = make_batch(config, LENGTHS["text"])
    mask = torch.zeros(6, inputs.shape[1], dtype=torch.bool)
    mask[:, [2, 4, 15, 30]] = True
    inside = (mask.view(3, 2, -1) & (torch.arange(mask.shape[1]) < lengths[:, None])[:, None]).sum()
    assert make_model(config)(inputs, lengths, masks=mask).sample_size == int(inside) < int(mask.sum())
    published = dataclasses.replace(config, published=frozenset({"loss-on-padding"}))
    assert make_model(published)(inputs, lengths, masks=mask).sample_size == int(mask.sum())


@pytest.mark.parametrize("name", ["speech", "text", "speech1", "text1"])
def test_drawn_masks_avoid_padding(name: str) -> None:
    config = make(name)
    inputs, lengths = make_batch(config, lengths_of(config))
    model = make_model(config)
    tokens, valid = model.stem.measure(inputs, lengths)
    masks = draw(model, valid, tokens)
    hidden = torch.arange(tokens) >= valid.repeat_interleave(config.mask.copies)[:, None]
    assert not (masks.mask & hidden).any()
    assert masks.mask.any(dim=1).all()
    if config.version == 2:
        assert len(set(masks.mask.sum(dim=1).tolist())) == 1
    assert torch.isfinite(model(inputs, lengths).loss)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("speech", "positions-see-padding"),
        ("speech", "statistics-over-padding"),
        ("speech1", "positions-see-padding"),
        ("speech1", "statistics-over-padding"),
        ("text1", "masked-tokens-only-teacher"),
    ],
)
def test_published_behaviours_change_something(name: str, published: str) -> None:
    config = make(name)
    inputs, lengths = make_batch(config, lengths_of(config))
    model, other = make_model(config), make_model(dataclasses.replace(config, published=frozenset({published})))
    tokens, valid = model.stem.measure(inputs, lengths)
    masks = draw(model, valid, tokens)
    targets = [m(inputs, lengths, masks=masks).targets for m in (model, other)]
    assert not torch.equal(*targets)


def test_teacher_of_masked_tokens_is_a_teacher_of_the_masked_text() -> None:
    """As published: position ids and keys of the masked tokens alone, wherever they stood."""
    config = dataclasses.replace(make("text1"), published=frozenset({"masked-tokens-only-teacher"}))
    model = make_model(config)
    inputs, lengths = make_batch(config, LENGTHS["text"])
    masks = draw(model, lengths, inputs.shape[1])
    out = model(inputs, lengths, masks=masks)
    for row in range(len(lengths)):
        alone = inputs[row : row + 1, masks.mask[row]]
        features = model.stem(alone, None)
        layers = model.teacher.collect(alone, features, None, config.target.top_k, config.target.source)
        expected = torch.stack([torch.nn.functional.layer_norm(t, t.shape[-1:]) for t in layers]).mean(dim=0)
        assert_same(expected[0], out.targets[row, masks.mask[row]], f"row {row}")


@pytest.mark.parametrize("name", ["speech-base", "vision-base"])
def test_a_table_starts_as_the_bias_that_it_replaces(name: str) -> None:
    """Also where it is shorter than the sequence: later positions take the last ones' bias."""
    alibi: dict[str, Any] = {"alibi": "fixed", "alibi_heads": 3, "extra_tokens": 1, "alibi_scale": 0.7}
    image = name == "vision-base"
    if image:
        alibi["alibi_distance"] = "euclidean"
    config = make_config(name, **alibi)
    inputs, lengths = (torch.randn(2, 3, 32, 32), None) if image else make_batch(config, (700, 400))
    plain, table = (Data2Vec(make_config(name, **alibi, alibi_table=n)) for n in (None, 16 if image else 40))
    table.load_state_dict(plain.state_dict(), strict=False)
    assert_same(plain.encode(inputs, lengths).features, table.encode(inputs, lengths).features, "features")
    if not image:
        short = Data2Vec(make_config(name, **alibi, alibi_table=8))
        short.load_state_dict(plain.state_dict(), strict=False)
        with torch.no_grad():
            bias = short.positions.alibi.attention_bias(None, torch.arange(12)[None]).matrix_of(0)
        assert bias is not None and torch.equal(bias[0, :, 7, :8], bias[0, :, 11, :8])
        assert (
            float(bias[0, 0, 11, 7]) == 0.0 and float(bias[0, 0, 0, 7]) < 0.0 and float(bias[0, 3].abs().max()) == 0.0
        )
