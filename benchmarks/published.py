"""Whole steps beside the published code: `python -m benchmarks.published --fairseq FOLDER [--only NAME] [...]`.

FOLDER is a checkout of fairseq at commit 3d262bb2; none of it is part of this project. Both models get the same weights
and batches; their losses without dropout are compared first. Then steps take turns on one thread: forward, backward,
clipping, AdamW, moving average. The published step is that of its trainer without its bookkeeping, once with its own
Adam and once with PyTorch's fused one. What pre-training does not call and this machine lacks is replaced by empty
modules. Needed beside it: omegaconf 2.3, hydra-core 1.3, timm 1.0 and torchvision.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from d2v import Data2Vec
from d2v.config import Config
from d2v.interop import fairseq
from d2v.runtime import keep_freed_pages
from d2v_kernels import Masks
from d2v_kernels.bench.timer import summarise, take_turns

from .harness.record import parse
from .training.cases import CPU, StepCase, change, make_batch, make_config, without_dropout
from .training.forms import CLIP, Form, settings

RECIPES = ("vision-tiny", "vision-small", "speech-small")
"""Of 2.0, as far as the published code has their stems; its text models need its own dictionaries."""
ABSENT = ("bitarray", "hydra_plugins", "pandas", "regex", "sacrebleu", "scipy", "sklearn", "soundfile", "torchaudio")
COMPILED = ("fairseq.data.data_utils_fast", "fairseq.data.token_block_utils_fast", "fairseq.libbleu")
"""fairseq's own compiled modules, which only its data loaders use."""


# ---- the published code, imported on a Python that is newer than it


class _Empty(types.ModuleType):
    """A module in which every name is something that does nothing."""

    __path__: ClassVar[list[str]] = []
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


def import_published(folder: Path) -> None:
    """Makes `fairseq` and `examples.data2vec` importable.

    Dataclasses with mutable defaults, NumPy's old names and a torchvision operator are what newer versions refuse.
    """
    if not (folder / "examples" / "data2vec").is_dir():
        raise SystemExit(f"--fairseq: expected a checkout of fairseq with examples/data2vec, got {str(folder)!r}")
    for name in (*ABSENT, *COMPILED):
        if name in COMPILED or importlib.util.find_spec(name) is None:
            empty = _Empty(name)
            empty.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = empty
    for name in ("nms", "qnms"):  # torchvision declares their gradients where its compiled part does not fit torch
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in ("float", "int", "bool", "object"):
        if name not in vars(np):
            setattr(np, name, __builtins__[name] if isinstance(__builtins__, dict) else getattr(__builtins__, name))
    process = dataclasses._process_class  # type: ignore[attr-defined]

    def hashable(cls: type, init: bool, repr: bool, eq: bool, order: bool, unsafe_hash: bool, *rest: Any) -> type:
        return process(cls, init, repr, eq, order, unsafe_hash or "__hash__" not in vars(cls), *rest)  # type: ignore[no-any-return]

    dataclasses._process_class = hashable  # type: ignore[attr-defined]
    sys.path.insert(0, str(folder))


def fill(settings_of: Any, values: Mapping[str, Any]) -> Any:
    """A published configuration object with these values, section in section."""
    for name, value in values.items():
        own = getattr(settings_of, name, None)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(own):
            value = fill(copy.deepcopy(own), value)
        setattr(settings_of, name, type(own)[value] if isinstance(own, enum.Enum) and isinstance(value, str) else value)
    return settings_of


def build_published(saved: dict[str, Any], modality: str) -> nn.Module:
    """The published model of a checkpoint that this library wrote, with its weights."""
    options = dict(saved["cfg"]["model"])
    options.pop("_name", None)
    module = importlib.import_module("examples.data2vec.models.data2vec2")
    kinds = importlib.import_module("examples.data2vec.data.modality").Modality
    config = fill(module.Data2VecMultiConfig(), options)
    config.supported_modality = {"vision": kinds.IMAGE, "speech": kinds.AUDIO}[modality]
    model = module.Data2VecMultiModel.build_model(config)
    model.set_num_updates(0)
    missing, _ = model.load_state_dict(saved["model"], strict=False)
    own = {name for name, _ in model.named_parameters()}
    if lost := sorted(own & set(missing)):
        raise SystemExit(f"published model: expected all weights, {len(lost)} are missing: {lost[0]}")
    return model.train()  # type: ignore[no-any-return]


class Published:
    """A step of the published trainer."""

    def __init__(self, model: nn.Module, config: Config, fused: bool) -> None:
        self.model, self.precision = model, config.run.precision
        criterion = importlib.import_module("fairseq.criterions.model_criterion").ModelCriterion
        self.criterion = criterion(None, {}, ["ema_decay", "target_var", "pred_var", "masked_pct"])
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW if fused else importlib.import_module("fairseq.optim.adam").Adam
        more = {"fused": True} if fused else {}
        self.optimiser = adam(self.parameters, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, **more)
        self.clip = importlib.import_module("fairseq.utils").clip_grad_norm_
        self.updates = 0

    def loss(self, inputs: Tensor, masks: Masks) -> tuple[Tensor, float]:
        """The sum over the batch, and what it is divided by."""
        sample = {"net_input": {"source": inputs, "precomputed_mask": masks.mask}, "id": torch.arange(len(inputs))}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            loss, size, _ = self.criterion(self.model, sample)
        return loss, float(size)

    def step(self, inputs: Tensor, masks: Masks) -> None:
        """One update."""
        loss, size = self.loss(inputs, masks)
        loss.backward()
        for p in self.parameters:
            if p.grad is not None:
                p.grad.mul_(1.0 / size)
        self.clip(self.parameters, CLIP)
        self.optimiser.step()
        for p in self.parameters:
            p.grad = None
        self.updates += 1
        self.model.set_num_updates(self.updates)  # type: ignore[operator]


# ---- both


def publish(config: Config) -> Config:
    """The recipe with what the published code computes otherwise, its faults too (docs/parity.md)."""
    faults = {"class-loss-per-micro-batch"} if config.loss.class_weight > 0.0 else set()
    if config.encoder.norm_order == "pre":
        faults.add("pre-norm-without-residual")
    return dataclasses.replace(change(config, stem={"position_scale": 1.0}), published=frozenset(faults))


def make_pair(case: StepCase, config: Config, fused: bool = False) -> tuple[Published, Form]:
    """The published step and ours with equal weights; `config` as the published format can say it."""
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        path = fairseq.save(Data2Vec(config), Path(folder) / "model.pt")
        saved = torch.load(path, weights_only=True)
        ours = fairseq.load(path)
    assert isinstance(ours, Data2Vec)
    read = change(ours.config, run={"precision": config.run.precision}, encoder={"layer_drop": 0.0})
    config = dataclasses.replace(read, published=config.published)
    published = Published(build_published(saved, case.modality), config, fused)
    return published, Form("d2v", config, ours.state_dict(), torch.device("cpu"))


def compare(case: StepCase, config: Config) -> float:
    """Relative difference of the losses where nothing is drawn, in float32."""
    published, ours = make_pair(case, change(without_dropout(config), mask={"noise_std": 0.0}))
    inputs, masks = make_batch(case, ours.config, ours.model, 0)
    loss, size = published.loss(inputs, masks)
    return abs(float(loss) / size / float(ours.forward(inputs, masks)) - 1.0)


def measure(case: StepCase, config: Config, rounds: int, budget: float) -> dict[str, dict[str, Any]]:
    """Processor seconds of a step of each form."""
    published, ours = make_pair(case, config)
    fused, _ = make_pair(case, config, fused=True)
    forms = {"published": published, "published, fused AdamW": fused, "d2v": ours}
    batches = [make_batch(case, ours.config, ours.model, seed) for seed in range(3)]
    counts = dict.fromkeys(forms, 0)

    def sample(name: str) -> float:
        batch = batches[counts[name] % len(batches)]
        counts[name] += 1
        before = time.process_time()
        forms[name].step(*batch)
        return time.process_time() - before

    samplers = {name: functools.partial(sample, name) for name in forms}
    for call in [*samplers.values()] * 2:
        call()
    samples = take_turns(samplers, rounds=rounds, least=4, budget_s=budget)
    return {name: summarise(seconds) for name, seconds in samples.items()}


def main(arguments: list[str] | None = None) -> None:
    """One line a case."""
    options = parse(
        "published", __doc__, arguments,
        fairseq=(Path(), "a checkout of fairseq, commit 3d262bb2"),
        only=("", f"measure the cases of {', '.join(RECIPES)} whose name contains this text"),
        precision=(("bf16", "fp32"), "of the steps"),
        rounds=(30, "most steps of each form; at least 4 are run"),
        budget=(40.0, "seconds of a case after which no round begins"),
    )  # fmt: skip
    keep_freed_pages()
    import_published(options.fairseq)
    cases = [c for c in CPU if c.recipe in RECIPES and c.tuned_for and c.precision is None and options.only in c.name]
    with settings(1):
        for case in cases:
            config = publish(make_config(case, options.precision))
            difference = compare(case, config)
            found = measure(case, config, options.rounds, options.budget)
            ours = found["d2v"]["minimum"]
            ratios = ", ".join(f"{name} / d2v {s['minimum'] / ours:.2f}" for name, s in found.items() if name != "d2v")
            print(f"{case.name}, {options.precision}: losses differ by {difference:.0e}; {ratios}", flush=True)


if __name__ == "__main__":
    main()
