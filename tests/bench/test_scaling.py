"""The arithmetic of benchmarks.scaling against real models, real collectives and figures worked out by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.report import markdown
from benchmarks.scaling import estimate as scaling
from benchmarks.scaling import report as scaling_report
from benchmarks.scaling.__main__ import main
from benchmarks.scaling.estimate import Cluster
from benchmarks.training.cases import StepCase, make_batch, make_config
from d2v import recipes
from d2v.model.data2vec import Data2Vec
from d2v.model.transformer import Block
from d2v.tools.dry_run import count_bytes
from d2v.train.distributed import Ranks, accumulating, parallelise

ROOT = Path(__file__).resolve().parents[2]
RANKS = 8
TINY = StepCase("vision-tiny", 2)
PLAIN = Cluster(bandwidth=1.0, overlap=0.0, near=0.0, far=0.0)


def test_volumes_by_hand() -> None:
    assert scaling.all_reduce_bytes(100.0, 4) == 150.0
    assert scaling.gather_bytes(100.0, 4) == 75.0
    assert scaling.all_reduce_bytes(100.0, 1) == scaling.gather_bytes(100.0, 1) == 0.0
    # 2 * 7/8 of 900 GB at 450 GB/s a GPU; 2 * 63/64 of them where the node's 400 GB/s count.
    assert scaling.all_reduce_seconds(900e9, 8, PLAIN) == pytest.approx(3.5)
    assert scaling.all_reduce_seconds(900e9, 64, PLAIN) == pytest.approx(2 * 63 / 64 * 900 / 400)
    assert scaling.gather_seconds(900e9, 8, 5, PLAIN) == pytest.approx(1.75)
    slow = dataclasses.replace(PLAIN, network=400.0)
    assert scaling.all_reduce_seconds(900e9, 64, slow) == pytest.approx(2 * 63 / 64 * 900 / 50)
    assert scaling.all_reduce_seconds(900e9, 8, slow) == scaling.all_reduce_seconds(900e9, 8, PLAIN)


def test_parameters_are_those_of_the_model() -> None:
    sizes, model = scaling.count_sizes("vision-tiny"), Data2Vec(recipes.vision_tiny())
    assert sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.averaged == sum(p.numel() for p in model.teacher.parameters())
    assert sizes.averaged_blocks == sum(p.numel() for b in blocks_of(model.teacher) for p in b.parameters())
    assert 0 < sizes.trained_blocks < sizes.trained


@pytest.mark.parametrize(("recipe", "length"), [("vision-tiny", 0.0), ("text-tiny", 64.0)])
def test_activations_are_those_of_a_real_forward(recipe: str, length: float) -> None:
    """The forward without memory keeps as many bytes as one that computes."""
    case = StepCase(recipe, 2, length)
    config = make_config(case, "fp32")
    model = Data2Vec(config).train()
    inputs, masks = make_batch(case, config, model, 0)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        out = model(inputs, masks=masks)
    real = count_bytes(kept, without=(*model.parameters(), *model.buffers()))
    del out
    # Scalars may share a piece of memory in one and not in the other.
    assert scaling._kept_bytes(case, 2)[0] == pytest.approx(real, rel=0.01)


def test_work_is_that_of_a_step() -> None:
    sizes = scaling.count_sizes("vision-base")
    # docs of the published step: 6610 GFLOP for 16 images of 16 masks.
    assert 16 * (sizes.forward + sizes.backward) == pytest.approx(6.61e12, rel=0.03)
    assert 0.3 < sizes.backward / (sizes.forward + sizes.backward) < 2 / 3


# ---- what the trainer really sends


class Sent(TorchDispatchMode):
    """Bytes of the whole tensors of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        whole = {"c10d::_allgather_base_": 0, "c10d::_reduce_scatter_base_": 1}
        if name in whole:
            self._add(name, args[whole[name]])
        return func(*args, **(kwargs or {}))

    def take_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Stands for the sum of a bucket of DistributedDataParallel."""
        self._add("gradients", bucket.buffer())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def _add(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() > 1:
            self.bytes[name] = self.bytes.get(name, 0) + tensor.numel() * tensor.element_size()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """Eight ranks of which seven are imaginary."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    try:
        yield Ranks(torch.device("cpu"), 0, RANKS, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def blocks_of(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, Block)]


def count_sent(ranks: Ranks, parallel: Any, forwards: int) -> dict[str, int]:
    config = make_config(TINY, "fp32")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, parallel=parallel))
    model = Data2Vec(config)
    inputs, masks = make_batch(TINY, config, model, 0)
    network = parallelise(model, blocks_of(model), config.run, ranks)
    sent = Sent()
    if isinstance(network, DistributedDataParallel):
        network.register_comm_hook(None, lambda _, bucket: sent.take_bucket(bucket))
    with sent if parallel == "fsdp" else contextlib.nullcontext():
        for number in range(forwards):
            with accumulating(network, number == forwards - 1):
                network(inputs, masks=masks).loss.backward()
        model.teacher.update(0.99)
    return sent.bytes


@pytest.mark.parametrize("forwards", [1, 2])
def test_ddp_sends_every_gradient_once(ranks: Ranks, forwards: int) -> None:
    sizes = scaling.count_sizes("vision-tiny")
    assert count_sent(ranks, "ddp", forwards) == {"gradients": 4 * sizes.trained}
    expected = scaling.volumes(sizes, "ddp", RANKS, forwards, Cluster())
    assert expected == {"all-reduce": 2 * 7 / 8 * 4 * sizes.trained}


@pytest.mark.parametrize("forwards", [1, 2])
def test_fsdp_gathers_student_twice_and_teacher_once(ranks: Ranks, forwards: int) -> None:
    sizes, sent = scaling.count_sizes("vision-tiny"), count_sent(ranks, "fsdp", forwards)
    expected = scaling.volumes(sizes, "fsdp", RANKS, forwards, Cluster())
    share = (RANKS - 1) / RANKS
    gathered = expected["all-gather, student"] + expected["all-gather, teacher"]
    # Rows of small tensors are filled up to a multiple of the ranks.
    assert sent["c10d::_allgather_base_"] * share == pytest.approx(gathered, rel=0.02)
    assert sent["c10d::_reduce_scatter_base_"] * share == pytest.approx(expected["reduce-scatter"], rel=0.02)
    assert set(sent) == {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_"}


def test_casts_of_weights_stay_whole_with_sharding(ranks: Ranks) -> None:
    """What a sharded model's forward keeps under autocast has all of its weights in bfloat16."""
    config = make_config(TINY, "fp32")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, parallel="fsdp"))
    model = Data2Vec(config)
    inputs, masks = make_batch(TINY, config, model, 0)
    network = parallelise(model, blocks_of(model), config.run, ranks)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        out = network(inputs, masks=masks)
    # Gathered weights are freed after the forward: their pieces of memory have no bytes here.
    assert sum(scaling._pieces(kept).values()) == pytest.approx(scaling._kept_bytes(TINY, 2)[0], rel=0.01)
    del out


# ---- estimates


def test_an_estimate_by_hand() -> None:
    """One GPU: no communication; work over the assumed rate, bytes over the assumed rate."""
    cluster = Cluster(launch=0.0)
    sizes, found = scaling.count_sizes("vision-base"), scaling.estimate("vision-base", 1, "ddp", Cluster(launch=0.0))
    work = 256 * (sizes.forward + sizes.backward) / (cluster.peak * 0.4)
    moved = (40 * sizes.trained + 14 * sizes.averaged) / cluster.memory_rate
    assert (found.forwards, found.micro, found.exposed, found.kappa) == (16, 16, 0.0, 1.0)
    assert found.seconds == pytest.approx(work + moved)
    assert found.hours == pytest.approx(375_300 * (work + moved) / 3600)
    assert scaling.efficiency(found, cluster) == pytest.approx(1.0)


def test_more_gpus_than_samples_need_a_larger_batch() -> None:
    cluster = Cluster()
    published = scaling.estimate("speech-base", 24, "ddp", cluster)
    larger = scaling.estimate("speech-base", 192, "ddp", cluster)
    assert (published.kappa, published.batch) == (1.0, 24)
    assert (larger.kappa, larger.batch) == (8.0, 192)
    assert any("beyond the rules" in what for what in scaling_report.limits(larger, cluster))
    uneven = scaling.estimate("speech-base", 16, "ddp", cluster)
    assert "uneven shares" in scaling_report.limits(uneven, cluster)


def test_sharding_saves_memory_and_a_slow_network_costs_time() -> None:
    cluster, slow = Cluster(), Cluster(network=100.0)
    of = {p: scaling.estimate("vision-large", 16, p, cluster) for p in ("ddp", "fsdp", "hybrid")}  # type: ignore[arg-type]
    assert of["fsdp"].memory < of["hybrid"].memory < of["ddp"].memory
    assert scaling.estimate("vision-large", 16, "ddp", slow).exposed > of["ddp"].exposed
    found = scaling.estimate("vision-large", 16, "ddp", slow)
    assert "network" in scaling_report.limits(found, slow)
    small = dataclasses.replace(cluster, memory=8e9)
    assert "memory" in scaling_report.limits(of["ddp"], small)
    assert scaling.largest_micro("vision-large", "ddp", 16, cluster) > scaling.largest_micro(
        "vision-large", "ddp", 16, dataclasses.replace(cluster, memory=40e9)
    )
    sizes = scaling.count_sizes("vision-large")
    between = scaling.volumes(sizes, "hybrid", 16, 1, cluster)["all-reduce between nodes"]
    assert between == pytest.approx(4 * sizes.trained / 8)  # 2 * 1/2 of a shard


def test_the_table_says_that_it_estimates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "scaling.png"
    main(["--gpus", "8", "512", "--recipe", "speech-base", "--plot", str(plot)])
    text = capsys.readouterr().out
    assert text.startswith("Estimates, not measurements")
    assert [line.split("|")[3].strip() for line in text.splitlines() if line.startswith("| `")] == ["8", "512"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    for wrong in (["--gpus", "0"], ["--network", "0"]):
        with pytest.raises(SystemExit, match=f"{wrong[0]}: expected"):
            main(wrong)


def test_the_guide_has_the_figures_of_the_program() -> None:
    """docs/scaling.md is what the program prints with its defaults."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    cluster = Cluster()
    for recipe in ("vision-base", "speech-base"):
        for gpus in (8, 64):
            row = scaling_report.cells(scaling.estimate(recipe, gpus, "ddp", cluster), cluster)
            assert markdown(row, []).splitlines()[0] in text
    assert scaling_report.assumptions(cluster).split(":")[0] in text
    assert (ROOT / "docs" / "scaling.png").stat().st_size < 100_000
    assert math.isclose(Cluster().peak, 989e12)


def test_relative_positions_are_counted() -> None:
    """Their index is made of constants, which a copied mode of tensors without memory would free too often."""
    sizes = scaling.count_sizes("vision1-tiny")
    config = recipes.get("vision1-tiny")
    least = config.encoder.depth * 65 * config.encoder.width * 2 * 8  # tokens and a class token, eight rows of 16 bits
    assert sizes.activations > least
