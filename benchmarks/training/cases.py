"""Which training steps are measured: recipes at the batch that one device sees, and other shapes of the same range."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from d2v import recipes
from d2v.config import Config
from d2v.model.data2vec import Data2Vec
from d2v.model.masking import make_mask_sampler
from d2v_kernels import Masks
from d2v_kernels.bench import recipe

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class StepCase:
    """One step: a recipe, and the size of a micro-batch."""

    recipe: str
    samples: int
    """B."""
    length: float = 0.0
    """Speech: seconds; text: tokens; images: nothing."""
    tuned_for: bool = True
    """False: a second shape of the same range, to show that nothing is tuned to the first."""
    settings: tuple[tuple[str, int], ...] = ()
    """Settings that differ from the recipe's, by their dotted names."""
    precision: Precision | None = None
    """None: float32 on a CPU, bfloat16 on a GPU."""

    @property
    def modality(self) -> str:
        """What the recipe learns from."""
        return recipes.get(self.recipe).stem.modality

    @property
    def name(self) -> str:
        """Recipe and batch."""
        size = {"speech": f" x {self.length:g} s", "text": f" x {self.length:g} tokens", "vision": ""}[self.modality]
        changes = "".join(f", {name} {value}" for name, value in self.settings)
        return f"{self.recipe} B={self.samples}{size}{changes}{f', {self.precision}' if self.precision else ''}"


CPU = [
    StepCase("vision-tiny", 16),
    StepCase("speech-tiny", 32, 0.6),
    StepCase("text-tiny", 16, 64),
    StepCase("vision1-tiny", 16),
    StepCase("speech1-tiny", 32, 0.6),
    StepCase("text1-tiny", 16, 64),
    StepCase("vision-small", 8),
    StepCase("speech-small", 2, 5.0),
    StepCase("text-small", 4, 256),
    StepCase("vision-tiny", 11, tuned_for=False),
    StepCase("speech-small", 1, 7.3, tuned_for=False),
]
CPU += [dataclasses.replace(case, precision="bf16") for case in CPU if case.tuned_for]
GPU = [
    StepCase("vision-base", 16),
    StepCase("speech-base", 3, 20.0),
    StepCase("text-base", 4, 512),
    StepCase("speech1-base", 11, 20.0),
    StepCase("vision1-base", 128),
    StepCase("text1-base", 16, 512),
    StepCase("vision-large", 8),
    StepCase("speech-large", 1, 20.0),
    StepCase("vision-base", 24, tuned_for=False),
    StepCase("speech-base", 4, 13.7, tuned_for=False),
]
DRY = [StepCase("vision-tiny", 2), StepCase("speech-tiny", 2, 0.4)]
"""For a run that only shows that everything works."""


def change(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with other values: section -> field -> value."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


def without_dropout(config: Config) -> Config:
    """Nothing random but masks and noise, in float32: for comparing results."""
    dropouts = ("dropout", "attention_dropout", "activation_dropout", "prenet_dropout", "layer_drop", "drop_path")
    return change(config, encoder=dict.fromkeys(dropouts, 0.0), decoder={"input_dropout": 0.0},
                  stem={"dropout": 0.0}, run={"precision": "fp32"})  # fmt: skip


def make_config(case: StepCase, precision: Precision) -> Config:
    """The recipe's configuration; dropout as it has it, layer drop off, so that every step does the same work."""
    config = recipes.get(case.recipe)
    for name, value in case.settings:
        section, field = name.split(".")
        config = change(config, **{section: {field: value}})
    return change(config, encoder={"layer_drop": 0.0}, run={"precision": precision})


def make_inputs(case: StepCase, config: Config, seed: int) -> Tensor:
    """Random samples of a batch, on the host."""
    return recipe.make_inputs(config, case.samples, case.length, seed)


def make_batch(case: StepCase, config: Config, model: Data2Vec, seed: int) -> tuple[Tensor, Masks]:
    """Inputs and the masks that a loader's worker draws for them, on the host."""
    inputs = make_inputs(case, config, seed)
    stem: torch.nn.Module = model.stem
    tokens, _ = stem.measure(inputs, None)  # type: ignore[operator]
    sampler = make_mask_sampler(config, tokens=None if config.stem.modality == "vision" else tokens)
    ids = list(range(seed * case.samples, (seed + 1) * case.samples))
    return inputs, sampler.draw(ids, 0, copies=config.mask.copies)
