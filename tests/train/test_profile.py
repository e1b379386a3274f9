"""What a step costs the host: traces with named ranges, no waiting for the device, no growing memory."""

from __future__ import annotations

import dataclasses
import gzip
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import d2v
import d2v_kernels
from d2v import recipes, runtime
from d2v.config import Config
from d2v.data.dataset import Batch
from d2v.data.sources import Source
from d2v.model.masking import make_mask_sampler
from d2v.model.stems import make_stem
from d2v.runtime import RANGES, WARM_UP, Profiler, memory_bytes, resident_bytes, span
from d2v.train.distributed import Ranks
from d2v.train.logging import read_metrics
from d2v.train.pretraining import Pretraining, pretrain
from d2v.train.trainer import Trainer
from d2v_kernels import Masks

from .conftest import tiny_options
from .test_flops import change, make_batch, small

CPU = torch.device("cpu")
PACKAGES = tuple(f"{Path(str(package.__file__)).parent}/" for package in (d2v, d2v_kernels))
"""Where the code lies that these tests watch, whatever its checkout is called."""
Make = Callable[..., Config]


# ---- traces ---------------------------------------------------------------------------------------------------------


def names_in(trace: Path) -> list[str]:
    with gzip.open(trace, "rt") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def test_a_run_leaves_a_trace_of_its_updates(make_config: Make) -> None:
    folder = pretrain(make_config(), profile=3)
    assert {p.name for p in (folder / "profile").iterdir()} == {"trace.json.gz", "table.txt"}
    names = names_in(folder / "profile" / "trace.json.gz")
    for name in RANGES:
        assert names.count(f"d2v/{name}") == 3, name
    assert "d2v::average_layers" in names  # operators under their own names
    table = (folder / "profile" / "table.txt").read_text()
    assert "d2v/teacher" in table
    assert len(read_metrics(folder / "metrics.jsonl")) == 3  # the run went on to its end
    assert span("teacher") is span("ema")  # off again: one object that does nothing


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path: Path) -> None:
    def break_off() -> None:
        with Profiler(tmp_path / "some", 5) as profiler:
            for update in range(10):
                with span("teacher"):
                    torch.ones(10).sum()
                if update == WARM_UP + 2:
                    raise RuntimeError("broken")
                profiler.step()

    with pytest.raises(RuntimeError, match="broken"):
        break_off()
    assert names_in(tmp_path / "some" / "trace.json.gz").count("d2v/teacher") == 3
    with Profiler(tmp_path / "none", 5) as profiler:
        profiler.step()
    assert not (tmp_path / "none").exists()
    assert runtime._open_profilers == 0


def test_nothing_without_a_profiler(tmp_path: Path) -> None:
    with Profiler(tmp_path / "profile", 0) as profiler:
        assert span("teacher") is span("student")
        profiler.step()
    assert not (tmp_path / "profile").exists()
    with pytest.raises(ValueError, match="profile: expected 0 updates or more, got -1"):
        Profiler(tmp_path, -1)


def test_ranges_do_not_break_a_compiled_graph() -> None:
    def double(x: Tensor) -> Tensor:
        with span("teacher"):
            return 2 * x

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


# ---- reads on the host ----------------------------------------------------------------------------------------------

READS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select", "_unique",
    "_unique2", "unique_consecutive", "unique_dim", "allclose", "argwhere", "bincount", "repeat_interleave",
}  # fmt: skip
"""Operators whose result, or its shape, the host must wait for."""
ON_HOST = {("text.py", "_check_ids"), ("speech.py", "measure"), ("_native.py", "step")}
"""Functions that look into tensors only where these lie on the host: ids of tokens and samples that are not finite
(`test_checks_of_inputs_read_nothing_on_a_device`), and the weight of the moving average after an fp16 update."""


class DeviceReads(TorchDispatchMode):
    """Finds where the host reads what on a GPU would lie on the device.

    Marked are the tensors given to `mark` and everything computed from marked ones. What is on the host by contract -
    lengths, masks as they come from the loader's workers - is not marked and may be read.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0
        self._places: set[int] = set()
        self._held: list[Any] = []
        for name in ("tolist", "numpy", "cpu"):
            self._watch(monkeypatch, name)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        original = getattr(Tensor, name)

        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._record(name, [tensor])
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, method)

    def mark(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() and storage.data_ptr() not in self._places:
            self._places.add(storage.data_ptr())
            self._held.append(storage)  # so that its place is not given to another tensor
        return tensor

    def is_marked(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._places

    def _record(self, name: str, tensors: list[Tensor]) -> None:
        if any(self.is_marked(t) for t in tensors):
            frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGES)]
            if frames and (Path(frames[-1].filename).name, frames[-1].name) in ON_HOST:
                return
            where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "outside"
            self.found.append(f"{name} at {where}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]) if isinstance(t, Tensor)
        )
        self.seen += 1
        if name in READS or by_mask:
            self._record(name, given)
        result = func(*args, **(kwargs or {}))
        if any(self.is_marked(t) for t in given):
            for t in tree_leaves(result):
                if isinstance(t, Tensor):
                    self.mark(t)
        return result


class NoSource(Source):
    """An objective's samples, which these tests do not read."""

    def __init__(self) -> None:
        pass


def make_trainer(recipe: str, **sections: dict[str, Any]) -> tuple[Trainer, Batch]:
    config = change(small(recipe, {}), data={"global_batch": 2}, run={"steps": 1000})
    config = change(config, **sections)
    trainer = Trainer(Pretraining(config, NoSource(), None, CPU), Ranks(CPU))
    batch = make_batch(config, trainer.model)  # type: ignore[arg-type]
    keys = torch.arange(2 * config.mask.copies) if config.version == 2 else None
    # Batches of text always say how long their rows are.
    lengths = torch.tensor([40, 40]) if config.stem.modality == "text" else None
    return trainer, dataclasses.replace(batch, lengths=lengths, noise_keys=keys)


def find_reads(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, batches: list[Batch]) -> DeviceReads:
    """The reads of an update, after one that makes the optimiser's state."""
    trainer.run_update(batches)
    reads = DeviceReads(monkeypatch)
    with torch.no_grad():
        for tensor in [*trainer.model.state_dict().values(), *trainer.model.parameters()]:
            reads.mark(tensor)
    inputs_of, to = Pretraining.inputs_of, Masks.to
    monkeypatch.setattr(Pretraining, "inputs_of", lambda *a: reads.mark(inputs_of(*a).clone()))
    monkeypatch.setattr(Masks, "to", lambda m, *a, **k: to(m, *a, **k)._map(lambda t: reads.mark(t.clone())))
    with reads:
        trainer.run_update(batches)
    return reads


@pytest.mark.parametrize(
    "recipe", ["vision-tiny", "vision1-tiny", "text-tiny", "text1-tiny", "speech-tiny", "speech1-tiny", "speech-base"]
)
def test_an_update_reads_nothing_from_the_device(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batch = make_trainer(recipe, encoder={"dropout": 0.1, "layer_drop": 0.2}, optim={"clip": 1.0})
    reads = find_reads(monkeypatch, trainer, [batch, batch])
    assert reads.seen > 300
    assert reads.found == []


@pytest.mark.parametrize("run", [{"precision": "bf16"}, {"precision": "fp16"}, {"activation_checkpointing": True}])
def test_nor_in_other_ways_of_training(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batch = make_trainer("vision-tiny", run=run)
    assert find_reads(monkeypatch, trainer, [batch, batch]).found == []


@pytest.mark.parametrize("recipe", ["text-tiny", "text1-tiny", "speech-tiny", "speech1-tiny"])
def test_nor_with_padding(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batch = make_trainer(recipe)
    shorter = batch.inputs.shape[1] * 3 // 4
    lengths = torch.tensor([batch.inputs.shape[1], shorter])
    inputs = batch.inputs.clone()
    if not inputs.is_floating_point():
        inputs[1, shorter:] = 1
    tokens, valid = trainer.model.stem.measure(inputs, lengths)  # type: ignore[operator, union-attr]
    config = trainer.config
    masks = make_mask_sampler(config, tokens=tokens).draw([0, 1], 0, copies=config.mask.copies, lengths=valid)
    padded = dataclasses.replace(batch, inputs=inputs, lengths=lengths, token_lengths=valid, masks=masks)
    assert find_reads(monkeypatch, trainer, [padded]).found == []


def test_a_read_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batch = make_trainer("vision-tiny")
    original = Trainer.run_update

    def with_reads(self: Trainer, batches: list[Batch]) -> Any:
        step = original(self, batches)
        loss = step.losses["regression"].detach()
        _ = float(loss), loss.tolist(), bool(loss > 0), loss[None].nonzero(), loss[None][loss[None] > 0]
        return step

    trainer.run_update([batch])
    monkeypatch.setattr(Trainer, "run_update", with_reads)
    found = [f.split()[0] for f in find_reads(monkeypatch, trainer, [batch]).found]
    assert found == ["_local_scalar_dense", "tolist", "_local_scalar_dense", "nonzero", "index"]


@pytest.mark.parametrize("recipe", ["vision-tiny", "text-tiny", "speech-tiny", "speech-base"])
def test_checks_of_inputs_read_nothing_on_a_device(recipe: str) -> None:
    """A meta tensor has no values: reading one raises."""
    config = recipes.get(recipe)
    stem = make_stem(config)
    shapes = {"vision": (2, 3, 32, 32), "text": (2, 40), "speech": (2, 9_000)}
    dtype = torch.int64 if config.stem.modality == "text" else torch.float32
    inputs = torch.empty(shapes[config.stem.modality], dtype=dtype, device="meta")
    lengths = None if config.stem.modality == "vision" else torch.tensor([inputs.shape[1], inputs.shape[1] // 2])
    tokens, _ = stem.measure(inputs, lengths)  # type: ignore[operator]
    assert tokens > 1


# ---- memory ---------------------------------------------------------------------------------------------------------


def growth(images: Path, folder: Path, steps: int) -> float:
    """MiB by which the memory of a process of its own grows over the second half of a run with six checkpoints."""
    options = {"run.steps": steps, "run.log-every": 10, "run.checkpoint-every": steps // 6, "data.micro-batch": 2}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    places = ["--data.path", str(images), "--run.dir", str(folder)]
    command = [sys.executable, "-m", "d2v", "pretrain", "vision-tiny", *tiny_options(), *words, *places]
    subprocess.run(command, cwd=Path(runtime.__file__).parents[1], check=True, capture_output=True)
    lines = read_metrics(folder / "metrics.jsonl")
    assert len(lines) == steps // 10
    assert all(line["memory_bytes"] > 1 << 20 for line in lines)
    half = [line["memory_bytes"] for line in lines[len(lines) // 2 :]]
    return float(max(half[-5:]) - max(half[:5])) / (1 << 20)


def test_memory_does_not_grow(images: Path, tmp_path: Path) -> None:
    assert growth(images, tmp_path / "run", 300) < 4.0


@pytest.mark.long
def test_memory_does_not_grow_over_thousands_of_updates(images: Path, tmp_path: Path) -> None:
    assert growth(images, tmp_path / "run", 2_000) < 4.0


def test_memory_of_the_process() -> None:
    before = resident_bytes()
    block = torch.ones(256 << 20, dtype=torch.uint8)
    # The kernel counts the pages that other threads touched with a delay, and may take some back meanwhile.
    assert resident_bytes() - before > 64 << 20
    assert memory_bytes(CPU) > 256 << 20
    del block


@pytest.fixture(autouse=True)
def _no_profiler_stays_open() -> Iterator[None]:
    yield
    assert runtime._open_profilers == 0
