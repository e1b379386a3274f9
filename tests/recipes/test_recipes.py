"""Recipes: sizes and values of the published configurations, names, round trips."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.families import make_config, make_model

from d2v import Config, Data2Vec, recipes
from d2v.interop import fairseq


def count(config: Config) -> tuple[int, int]:
    """Elements of encoder (fixed positions included, as the published totals count) and decoder."""
    with torch.device("meta"):
        tensors = fairseq.parameters(Data2Vec(config))
    sizes = {n: t.numel() for n, t in tensors.items()}
    decoder = sum(s for n, s in sizes.items() if ".decoder." in n)
    return sum(sizes.values()) - decoder, decoder


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("vision-base", 85_797_888, 2_585_856),
        ("speech-base", 93_163_532, 619_776),
        ("speech-large", 313_275_408, 1_908_736),
        ("text-base", 124_054_272, 28_907_520),
    ],
)
def test_second_version_has_the_published_size(name: str, encoder: int, decoder: int) -> None:
    assert count(recipes.get(name)) == (encoder, decoder)


def test_first_version_has_the_published_size() -> None:
    """Without the head: 93 164 288 for speech. Text and images from the shapes of their tensors."""
    width, hidden = 768, 3072
    block = 4 * (width * width + width) + 2 * width * hidden + hidden + width + 4 * width
    head = width * width + width
    assert count(recipes.speech1_base())[0] - head == 93_164_288
    stem = width * (50_265 + 514 + 2)
    heads = 2 * width * width + 2 * width + 2 * width * width + width
    assert count(recipes.text1_base())[0] == 12 * block + stem + heads
    patches, tokens, table = width * (3 * 256 + 1), 2 * width, (27 * 27 + 3) * 12
    vision = 12 * (block - width + 2 * width)  # no key bias; two layer scales
    assert count(recipes.vision1_base())[0] == vision + patches + tokens + table + 2 * width + head


def test_large_sizes() -> None:
    text, vision = recipes.text_large(), recipes.vision1_large()
    embeddings = 1024 * (50_265 + 514 + 2)
    assert count(text)[0] == 24 * 12_596_224 + embeddings
    assert vision.encoder.depth == 24
    assert count(vision)[0] > 300_000_000


@pytest.mark.parametrize(
    ("config", "block", "blocks"),
    [(recipes.vision_large(), 12_596_224, 24), (recipes.vision_huge14(), 19_677_440, 32)],
)
def test_block_sizes(config: Config, block: int, blocks: int) -> None:
    width, patch = config.encoder.width, config.stem.patch_size
    tokens = config.stem.grid[0] ** 2
    stem = width * (3 * patch * patch + 1)
    assert count(config)[0] == blocks * block + stem + width * (1 + 2 + tokens)


def test_huge_decoder_changes_width() -> None:
    config = recipes.vision_huge14()
    first, other = 1024 * (1280 // 16 * 25 + 1), 1024 * (1024 // 16 * 25 + 1)
    assert count(config)[1] == first + 2 * other + 1280 * (1024 + 1)


@pytest.mark.parametrize(
    ("name", "visible"), [("vision-base", 39), ("vision-large", 49), ("vision-huge14", 64), ("vision-tiny", 16)]
)
def test_visible_tokens(name: str, visible: int) -> None:
    from d2v.model.masking import make_mask_sampler

    config = recipes.get(name)
    masks = make_mask_sampler(config).draw([3], 0, copies=2)
    assert masks.keep is not None
    assert masks.keep.shape == (2, visible)


@pytest.mark.parametrize(
    ("name", "rate", "ema", "steps", "top_k", "batch"),
    [
        ("vision-base", 1e-3, (0.9998, 0.99999, 100_000), 375_300, 10, 256),
        ("vision-large", 4e-4, (0.9998, 0.99999, 150_000), 375_300, 18, 128),
        ("vision-huge14", 4e-4, (0.9998, 1.0, 300_000), 500_000, 24, 256),
    ],
)
def test_published_values(
    name: str, rate: float, ema: tuple[float, float, int], steps: int, top_k: int, batch: int
) -> None:
    config = recipes.get(name)
    assert config.optim.learning_rate == rate
    assert (config.ema.start, config.ema.end, config.ema.anneal_steps) == ema
    assert config.run.steps == steps
    assert config.target.top_k == top_k
    assert config.data.global_batch == batch
    assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.95), 1e-8, 0.05)
    assert (config.optim.clip, config.optim.warmup_steps) == (4.0, 50_040)
    assert (config.target.norm, config.target.out_norm, config.target.source) == ("instance", "layer", "ffn")
    assert (config.loss.class_weight, config.mask.copies, config.encoder.norm_eps) == (0.01, 16, 1e-6)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe(name: str) -> None:
    config = recipes.get(name)
    assert config.recipe == name
    assert config.published == frozenset()
    assert Config.from_json(config.to_json()) == config
    assert recipes.RECIPES[name].__doc__
    with torch.device("meta"):
        Data2Vec(config)


def make_inputs(config: Config, samples: int) -> torch.Tensor:
    stem = config.stem
    torch.manual_seed(0)
    if stem.modality == "vision":
        return torch.randn(samples, stem.channels, stem.image_size, stem.image_size)
    if stem.modality == "text":
        tokens = torch.randint(4, stem.vocabulary, (samples, min(stem.max_tokens, 40)))
        if stem.mask_token is not None:
            tokens[tokens == stem.mask_token] = 4
        return tokens
    if stem.modality == "signals":
        return torch.randn(samples, 600, stem.channels)
    if stem.modality == "spectrograms":
        return torch.randn(samples, 1, stem.frames, 128)
    return torch.randn(samples, 9_600)


@pytest.mark.parametrize("name", [n for n in recipes.RECIPES if n.endswith(("tiny", "small"))])
def test_tiny_and_small_run_a_step(name: str) -> None:
    config = recipes.get(name)
    torch.manual_seed(0)
    model = Data2Vec(config)
    model.blocks.skipped = frozenset()
    samples = 1 if name.endswith("small") else 4
    out = model(make_inputs(config, samples))
    out.loss.backward()
    model.teacher.update(config.ema.decay(1, config.run.steps))
    assert torch.isfinite(out.loss)
    assert out.sample_size > 0
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking


@pytest.mark.parametrize(
    "name", ["speech-base", "text-base", "vision-base", "speech1-base", "text1-base", "vision1-base", "speech-tiny"]
)
def test_bfloat16_autocast(name: str) -> None:
    """Every family under autocast: near the result in float32, gradients everywhere, averages in float32."""
    config = make_config(name)
    losses = []
    for precision in ("fp32", "bf16"):
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, precision=precision))
        model = make_model(config)
        inputs = make_inputs(config, 2)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model(inputs)
        out.loss.backward()
        model.teacher.update(0.9)
        losses.append(float(out.loss.detach()))
        assert {p.dtype for p in model.teacher.parameters()} == {torch.float32}
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        encoded = model.teacher.encode(inputs)
        assert torch.isfinite(encoded.features).all()
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize(
    ("name", "nearest"), [("vision-tny", "vision-tiny"), ("vision_base", "vision-base"), ("huge", "vision-huge14")]
)
def test_unknown_recipe_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        recipes.get(name)
