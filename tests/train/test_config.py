"""Settings: single changes, ranges, and which of them a resumed run may change."""

from __future__ import annotations

from typing import Any

import pytest

from d2v import Config, recipes
from d2v.config.finetune import FineTuneConfig
from d2v.train.run_dir import FREE_FIELDS


def test_replace_changes_one_setting() -> None:
    config = recipes.vision_tiny()
    other = config.replace("optim.learning_rate", 0.5)
    assert other.optim.learning_rate == 0.5
    assert config.optim.learning_rate == 4e-3
    assert other.replace("optim.learning_rate", 4e-3) == config
    assert config.replace("version", 1).version == 1
    assert config.replace("published", frozenset({"loss-on-padding"})).published == {"loss-on-padding"}
    tuned = FineTuneConfig.of(config).replace("finetune.options.mixup", 0.25)
    assert isinstance(tuned, FineTuneConfig)
    assert tuned.finetune.options.mixup == 0.25


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("optim.learnin_rate", "optim.learning_rate"),
        ("run.step", "run.steps"),
        ("optim", "optim.*"),
        ("", ".*"),
        ("finetune.options.mixup", ".*"),
    ],
)
def test_replace_names_the_nearest_setting(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"config: expected a setting, got '{name}'; did you mean '{nearest}'"):
        recipes.vision_tiny().replace(name, 1)


def test_replace_takes_settings_that_belong_together() -> None:
    config = recipes.vision_tiny()
    with pytest.raises(ValueError, match=r"a multiple of encoder\.heads"):
        config.replace("encoder.heads", 5)
    other = config.replace({"encoder.heads": 5, "encoder.width": 80, "data.crop_scale": [0.5, 1]})
    assert (other.encoder.heads, other.encoder.width, other.data.crop_scale) == (5, 80, (0.5, 1))
    assert other.encoder.depth == config.encoder.depth
    assert config.replace({}) == config


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("optim.learning_rate", "1e-3", "expected float, got 1e-3"),
        ("run.steps", 10.0, "expected int, got 10.0"),
        ("run.steps", True, "expected int, got True"),
        ("data.flip", 1, "expected bool, got 1"),
        ("run.precision", "fp8", "expected one of fp32, bf16, fp16, got fp8"),
        ("optim.clip", "off", "expected float, got off"),
        ("optim.betas", (0.9,), r"expected tuple\[float, float\], got \(0.9,\)"),
        ("optim.betas", (0.9, float("nan")), r"expected a number, got \(0.9, nan\)"),
    ],
)
def test_replace_refuses_other_types(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {expected}"):
        recipes.vision_tiny().replace(name, value)


def test_change_replaces_fields_of_sections() -> None:
    base = recipes.vision_tiny()
    config = base.change(recipe="mine", data=dict(workers=7, flip=False), head=base.head)
    assert (config.recipe, config.data.workers, config.data.flip) == ("mine", 7, False)
    assert config.change(recipe=base.recipe, data=base.data) == base
    with pytest.raises(TypeError, match="wokers"):
        base.change(data=dict(wokers=7))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("mask.ratio", 1.0, "above 0, below 1"),
        ("mask.ratio", float("nan"), "above 0, below 1"),
        ("mask.copies", 0, "1 or more"),
        ("encoder.heads", 0, "1 or more"),
        ("ema.start", 1.5, "0 to 1"),
        ("data.micro_batch", 0, "1 or more"),
        ("data.bad_fraction", -0.1, "0 to 1"),
        ("data.speed", 0.5, "0 unless speech"),
        ("run.timeout", 1.0, "5 or more"),
        ("run.shard_ranks", 2, "nothing without fsdp"),
        ("target.top_k", 4, "1 to encoder.depth"),
        ("optim.schedule", "tri-stage", "above 0 for tri-stage"),
        ("stem.kind", "log-mel", "stock unless speech"),
        ("mask.kind", "rectangles", "block, random or span for version 2"),
    ],
)
def test_ranges_and_what_belongs_together(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"[a-z_.]+: expected {expected}, got "):
        recipes.vision_tiny().replace(name, value)


def test_the_mask_token_is_in_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"stem\.mask_token: expected 0 to below 2048, got 2048"):
        recipes.text1_tiny().replace("stem.mask_token", 2048)
    with pytest.raises(ValueError, match=r"stem\.mask_token: expected 0 to below 2048, got None"):
        recipes.text1_tiny().replace("stem.mask_token", None)


def test_what_a_resumed_run_may_change() -> None:
    of_data = "allow_commands bad_fraction cache micro_batch path readers tokenizer valid workers"
    of_run = """activation_checkpointing async_checkpoint best checkpoint_every collapse_after collapse_content_spread
        collapse_prediction_std compile compile_cache compile_scope convolution device digest_every dir keep_best
        keep_checkpoints keep_every keep_pages local_checkpoint local_every log_every
        packed parallel products shard_ranks teacher_graph threads
        timeout track"""
    of_target = {"target.cache"}
    of_probe = {f"probe.{n}" for n in ("train", "test", "every", "pool", "samples")}
    assert (
        of_target | of_probe | {f"data.{n}" for n in of_data.split()} | {f"run.{n}" for n in of_run.split()}
        == FREE_FIELDS
    )


def test_unknown_fields_of_a_file_are_named() -> None:
    with pytest.raises(ValueError, match=r"config\.run: unknown fields \['stepz'\]"):
        Config.from_json('{"run": {"stepz": 1}}')
