"""The network as one compiled graph: the results of the eager one, few graphs for many sizes, refusals.

Mostly without code generation, whose minutes would not tell more about this library than one small case does.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from support.graphs import count_graphs, fresh_compiler  # noqa: F401
from torch import Tensor

from d2v import recipes
from d2v.config import Config
from d2v.config.finetune import FineTuneConfig
from d2v.folder import list_checkpoints
from d2v.model.data2vec import Data2Vec, Output
from d2v.train.distributed import Ranks, parallelise
from d2v.train.pretraining import pretrain

from .test_train import assert_same_run

Make = Callable[..., Config]
NETWORK: dict[str, Any] = {"compile": True, "compile_scope": "network"}


def shrink(recipe: str, dropout: float = 0.0, **run: Any) -> Config:
    """One block of 16 channels; nothing drawn but masks and noise unless there is dropout."""
    base = recipes.get(recipe)
    encoder = dataclasses.replace(
        base.encoder, width=16, heads=2, depth=1, prenet_depth=0, layer_drop=0.0, dropout=dropout,
        attention_dropout=0.0, activation_dropout=0.0, prenet_dropout=0.0, drop_path=0.0,
    )  # fmt: skip
    return dataclasses.replace(
        base,
        stem=dataclasses.replace(base.stem, dropout=0.0, position_layers=1),
        encoder=encoder,
        decoder=dataclasses.replace(base.decoder, layers=1, width=16, groups=2, input_dropout=0.0),
        mask=dataclasses.replace(base.mask, copies=2),
        target=dataclasses.replace(base.target, top_k=1),
        run=dataclasses.replace(base.run, **run),
    )


def make_inputs(config: Config, samples: int, size: int, lengths: Tensor | None = None) -> Tensor:
    """Random images, token ids (samples, size) or that many tenths of a second; padding where lengths say so."""
    generator = torch.Generator().manual_seed(size)
    stem = config.stem
    if stem.modality == "vision":
        return torch.randn(samples, stem.channels, stem.image_size, stem.image_size, generator=generator)
    if stem.modality == "speech":
        return torch.randn(samples, 1_600 * size, generator=generator)
    tokens = torch.randint(5, stem.vocabulary - 1, (samples, size), generator=generator)
    for row, length in enumerate([] if lengths is None else lengths.tolist()):
        tokens[row, length:] = 1
    return tokens


def run_step(model: Data2Vec, inputs: Tensor, seed: int, lengths: Tensor | None = None) -> tuple[Output, list[Tensor]]:
    """A forward and backward pass: its result, and the gradients that are there."""
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=model.config.run.precision == "bf16"):
        out = model(inputs, lengths=lengths)
    out.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return out, gradients


def assert_equal_steps(eager: Data2Vec, inputs: Tensor, backend: str, lengths: Tensor | None = None) -> None:
    """The compiled model has the loss, targets and gradients of its original, before and after an average."""
    compiled = copy.deepcopy(eager)
    compiled.compile(backend=backend)
    # Rounding, whose error in a gradient is one of the largest summands: eight bits of them under autocast.
    limit = 2e-2 if eager.config.run.precision == "bf16" else 2e-5
    for seed in range(2):
        (one, of_one), (two, of_two) = (run_step(m, inputs, seed, lengths) for m in (eager, compiled))
        assert one.sample_size == two.sample_size > 0
        for a, b in ((one.loss, two.loss), (one.targets, two.targets), (one.target_std, two.target_std)):
            torch.testing.assert_close(b, a, rtol=limit, atol=limit)
        assert len(of_one) == len(of_two) > 10
        for a, b in zip(of_one, of_two, strict=True):
            torch.testing.assert_close(b, a, rtol=limit, atol=limit * float(max(a.abs().max(), 1e-3)))
        for model in (eager, compiled):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01)
            model.teacher.update(0.5)
    assert count_graphs() == 1


@pytest.mark.long
def test_generated_code_has_the_results_of_the_eager_network() -> None:
    config = shrink("vision-tiny")
    torch.manual_seed(0)
    assert_equal_steps(Data2Vec(config).train(), make_inputs(config, 2, 1), "inductor")


@pytest.mark.parametrize(
    ("recipe", "run"),
    [
        ("vision1-tiny", {}),
        ("speech-tiny", {}),
        ("text1-tiny", {}),
        ("vision-tiny", {"precision": "bf16"}),
        ("vision-tiny", {"activation_checkpointing": True}),
    ],
    ids=str,
)
def test_the_graph_has_the_results_of_the_eager_network(recipe: str, run: dict[str, Any]) -> None:
    config = shrink(recipe, **run)
    torch.manual_seed(0)
    model = Data2Vec(config).train()
    model.context.recompute = model.blocks.recompute = config.run.activation_checkpointing
    lengths = torch.tensor([20, 13]) if config.stem.modality == "text" else None
    assert_equal_steps(model, make_inputs(config, 2, 20, lengths), "aot_eager", lengths)


def test_sizes_that_change_do_not_compile_for_ever() -> None:
    config = shrink("text-tiny")
    torch.manual_seed(0)
    model = Data2Vec(config).train()
    model.compile(backend="eager")
    counts = []
    for size in (20, 24, 17, 33, 20):
        run_step(model, make_inputs(config, 3, size), size)
        counts.append(count_graphs())
    # The first size, then one graph for any.
    assert counts == [1, 2, 2, 2, 2]
    for size in (20, 24, 31, 17):
        lengths = torch.tensor([size - 5, size, size - 2])
        run_step(model, make_inputs(config, 3, size, lengths), size, lengths)
        run_step(model, make_inputs(config, 3, size + 1), size)
    assert count_graphs() == 3  # and one with padding


def test_numbers_of_masked_positions_are_a_size_from_the_first_batch_on() -> None:
    config = shrink("vision1-tiny")
    torch.manual_seed(0)
    model = Data2Vec(config).train()
    model.compile(backend="eager")
    sizes = {run_step(model, make_inputs(config, 3, 1), seed)[0].sample_size for seed in range(5)}
    assert len(sizes) > 1
    assert count_graphs() == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_runs_repeat_and_are_taken_up_exactly_with_dropout(
    backend: str, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Data2Vec, "compile", functools.partialmethod(Data2Vec.compile, backend=backend))
    one_block: dict[str, dict[str, Any]] = {"encoder": {"depth": 1, "dropout": 0.1}, "target": {"top_k": 1}}
    for name in ("whole", "parts"):
        run = {**NETWORK, "dir": str(tmp_path / name), "steps": 4, "log_every": 1, "checkpoint_every": 2}
        config = make_config(run=run, **one_block)
        pretrain(config)
    (newest,) = list_checkpoints(tmp_path / "parts" / "checkpoints")[1:]
    shutil.rmtree(newest)
    torch._dynamo.reset()
    made = count_graphs()
    pretrain(config)
    assert count_graphs() == made + 1
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_copy_is_not_compiled() -> None:
    model = Data2Vec(shrink("vision-tiny"))
    model.compile(backend="eager")
    assert model.compiled is not None
    assert copy.deepcopy(model).compiled is None


def test_the_scope_decides_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(Data2Vec, "compile", lambda self: compiled.append(self))
    model = Data2Vec(shrink("vision-tiny"))
    blocks = list(model.blocks.blocks)
    for run, expected in (({}, []), ({"compile": True}, blocks), (NETWORK, [model])):
        compiled.clear()
        assert parallelise(model, blocks, shrink("vision-tiny", **run).run, Ranks(torch.device("cpu"))) is model
        assert compiled == expected


def test_refusals(make_config: Make) -> None:
    wrong: list[tuple[dict[str, dict[str, Any]], str]] = [
        ({"run": {"compile_scope": "network"}}, "blocks without run.compile"),
        ({"run": {**NETWORK, "parallel": "fsdp"}}, "blocks with fsdp"),
        ({"run": NETWORK, "encoder": {"layer_drop": 0.1}}, "blocks with encoder.layer_drop"),
    ]
    for sections, expected in wrong:
        with pytest.raises(ValueError, match=f"run.compile_scope: expected {expected}, got network"):
            make_config(**sections)
    text = dataclasses.replace(shrink("text1-tiny"), published=frozenset({"masked-tokens-only-teacher"}))
    with pytest.raises(ValueError, match=r"run\.compile_scope: expected blocks with masked-tokens-only-teacher"):
        dataclasses.replace(text, run=dataclasses.replace(text.run, **NETWORK))
    drop = make_config(encoder={"layer_drop": 0.1})
    with pytest.raises(ValueError, match=r"run.compile_scope: expected blocks with encoder.layer_drop, got network"):
        FineTuneConfig.of(drop, run=dataclasses.replace(drop.run, **NETWORK))


def test_configurations_of_before_can_be_read(make_config: Make) -> None:
    config = make_config(run={"compile": True})
    stored = json.loads(config.to_json())
    del stored["run"]["compile_scope"]
    assert Config.from_json(json.dumps(stored)) == config
