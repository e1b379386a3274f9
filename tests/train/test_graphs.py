"""The teacher's pass: nothing is kept for autograd; through recordings right inputs in, present weights, results that
stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from d2v import recipes
from d2v.config import Config
from d2v.model.data2vec import Data2Vec
from d2v.model.teacher import SHAPES, GraphedTargets, Make
from d2v.model.transformer import Block
from d2v.train.pretraining import Pretraining, open_data


def record_calls(make: Make, inputs: torch.Tensor, features: torch.Tensor) -> tuple[Callable[[], None], torch.Tensor]:
    """What a CUDA graph does, on a CPU: the same call on the same places, its result where the first one was."""
    result = make(inputs, features)

    def replay() -> None:
        result.copy_(make(inputs, features))

    return replay, result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_those_without_recording(make_config: Callable[..., Config], precision: str) -> None:
    config = make_config(run={"precision": precision}, encoder={"dropout": 0.0})
    torch.manual_seed(0)
    plain = Data2Vec(config)
    graphed = Data2Vec(config)
    graphed.load_state_dict(plain.state_dict())
    graphed.graph_teacher(record_calls)
    for step in range(3):
        images = torch.randn(2 + step % 2, 3, 16, 16)
        outs = []
        for model in (plain, graphed):
            torch.manual_seed(step)
            outs.append(model(images))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.01)
            model.teacher.update(0.5)
        assert torch.equal(outs[0].targets, outs[1].targets)
        assert torch.equal(outs[0].loss, outs[1].loss)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["vision-tiny", "speech-tiny", "text1-tiny"])
def test_autograd_has_no_part_in_it(monkeypatch: pytest.MonkeyPatch, family: str, precision: str) -> None:
    """Layers without nodes and version counters, weights whose counters stand still; targets that may be saved."""
    model = Data2Vec(recipes.get(family).replace("run.precision", precision)).train()
    inputs = {
        "vision-tiny": torch.randn(2, 3, 32, 32),
        "speech-tiny": torch.randn(2, 3200),
        "text1-tiny": torch.randint(10, 90, (2, 16)),
    }[family]
    seen: list[torch.Tensor] = []
    saved: list[torch.Tensor] = []
    collect, teacher = model.teacher.collect, model.teacher
    parts = [teacher, *(teacher.working_parts().values() if teacher.working_dtype else ())]
    tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    before = [t._version for t in tensors]

    def watched(*arguments):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            seen.extend(collect(*arguments))
        return seen

    monkeypatch.setattr(teacher, "collect", watched)
    out = model(inputs)
    assert seen and not saved
    assert all(t.is_inference() and t.grad_fn is None and not t.requires_grad for t in seen)
    assert before == [t._version for t in tensors]
    assert not out.targets.is_inference()
    out.loss.backward()
    teacher.update(0.5)
    assert all(t.grad is None and not t.is_inference() for t in tensors)


def test_sharded_weights_keep_their_records(make_config: Callable[..., Config]) -> None:
    model = Data2Vec(make_config(run={"parallel": "fsdp"}))
    images = torch.randn(2, 3, 16, 16)
    layers = model.teacher.collect(images, model.stem(images, None), None, 2, "ffn")
    assert not any(t.is_inference() or t.requires_grad for t in layers)


def test_compiled_blocks_run_in_it(make_config: Callable[..., Config]) -> None:
    """Blocks of student and teacher, compiled one by one; what the teacher gives can be trained against."""
    config = make_config(run={"precision": "bf16"}, encoder={"dropout": 0.0})
    torch.manual_seed(0)
    plain, compiled = Data2Vec(config), Data2Vec(config)
    compiled.load_state_dict(plain.state_dict())
    for owner in (compiled, *compiled.teacher.working_parts().values()):
        for block in owner.modules():
            if isinstance(block, Block):
                block.compile(backend="aot_eager")
    images, targets = torch.randn(2, 3, 16, 16), []
    for step in range(2):
        for model in (plain, compiled):
            torch.manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16):
                out = model(images)
            out.loss.backward()
            model.teacher.update(0.5)
            targets.append(out.targets)
        torch.testing.assert_close(*targets[-2:], rtol=0.02, atol=0.02)


def test_a_checkpoint_reaches_the_working_copies(make_config: Callable[..., Config]) -> None:
    config = make_config(run={"precision": "bf16"}, encoder={"dropout": 0.0})
    torch.manual_seed(0)
    model, other = Data2Vec(config), Data2Vec(config)
    model.graph_teacher(record_calls)
    images = torch.randn(2, 3, 16, 16)
    model(images)
    model.load_state_dict(other.state_dict())
    torch.manual_seed(1)
    expected = other(images).targets
    torch.manual_seed(1)
    assert torch.equal(model(images).targets, expected)


def test_results_stay_and_shapes_are_limited() -> None:
    recorded: list[int] = []

    def record(make: Make, inputs: torch.Tensor, features: torch.Tensor) -> tuple[Callable[[], None], torch.Tensor]:
        recorded.append(len(inputs))
        return record_calls(make, inputs, features)

    targets = GraphedTargets(lambda x, y: x + y, record)
    first = targets(torch.ones(1), torch.ones(1))
    second = targets(torch.zeros(1), torch.ones(1))
    assert (first.item(), second.item()) == (2.0, 1.0)
    for n in range(2, SHAPES + 4):
        assert torch.equal(targets(torch.ones(n), torch.ones(n)), torch.full((n,), 2.0))
    assert recorded == list(range(1, SHAPES + 1))


def test_refusals(make_config: Callable[..., Config]) -> None:
    for run in ({"compile": True}, {"parallel": "fsdp"}):
        with pytest.raises(ValueError, match=r"run\.teacher_graph: expected False"):
            make_config(run={"teacher_graph": True, **run})
    config = make_config(run={"teacher_graph": True})
    with pytest.raises(ValueError, match=r"run\.teacher_graph: expected a GPU"):
        Pretraining(config, open_data(config)[0], None, torch.device("cpu"))
