"""Recipes: sizes and values of the published configurations, names, round trips."""

from __future__ import annotations

import pytest
import torch

from d2v import Config, Data2Vec, recipes
from d2v.interop import fairseq


def count(config: Config) -> tuple[int, int]:
    """Elements of encoder (fixed positions included, as the published totals count) and decoder."""
    with torch.device("meta"):
        tensors = fairseq.parameters(Data2Vec(config))
    sizes = {n: t.numel() for n, t in tensors.items()}
    decoder = sum(s for n, s in sizes.items() if ".decoder." in n)
    return sum(sizes.values()) - decoder, decoder


def test_base_has_the_published_size() -> None:
    assert count(recipes.vision_base()) == (85_797_888, 2_585_856)


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
    from d2v.data2vec import make_mask_sampler

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


def test_tiny_and_small_run_a_step() -> None:
    for config in (recipes.vision_tiny(), recipes.vision_small()):
        model = Data2Vec(config)
        out = model(torch.randn(1, 3, 32, 32))
        out.loss.backward()
        model.teacher.update(config.ema.decay(1, config.run.steps))
        assert torch.isfinite(out.loss)


@pytest.mark.parametrize(
    ("name", "nearest"), [("vision-tny", "vision-tiny"), ("vision_base", "vision-base"), ("huge", "vision-huge14")]
)
def test_unknown_recipe_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        recipes.get(name)
