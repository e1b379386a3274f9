"""`d2v plan`: its arithmetic against real models, real collectives, checkpoints and figures worked out by hand; and the
command."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from d2v import recipes
from d2v.cli import main
from d2v.config import Config
from d2v.folder import PLAN
from d2v.model.data2vec import Data2Vec
from d2v.model.transformer import Block
from d2v.settings import read_file
from d2v.tools.cluster import (
    MACHINES,
    Cluster,
    all_reduce_bytes,
    all_reduce_seconds,
    calibrate,
    efficiency,
    estimate,
    find_machine,
    gather_bytes,
    gather_seconds,
    largest_micro,
    volumes,
)
from d2v.tools.paper import count_bytes, count_sizes, draw_masks, keeping, kept_bytes, make_longest
from d2v.tools.plan import limits, scale
from d2v.train.distributed import Ranks, accumulating, parallelise
from d2v.train.logging import compare_plan, read_metrics
from d2v.train.pretraining import pretrain
from d2v_kernels import Masks

ROOT = Path(__file__).resolve().parents[2]
RANKS = 8
PLAIN = Cluster(bandwidth=1.0, overlap=0.0, near=0.0, far=0.0)


def draw(recipe: str, parallel: Any = "ddp") -> tuple[Config, Tensor, Masks]:
    """Two samples, without chance but for masks."""
    config = recipes.get(recipe).change(encoder={"layer_drop": 0.0}, run={"precision": "fp32", "parallel": parallel})
    inputs = make_longest(config, 2)
    return config, inputs, draw_masks(config, inputs)[0]


def test_volumes_by_hand() -> None:
    assert all_reduce_bytes(100.0, 4) == 150.0
    assert gather_bytes(100.0, 4) == 75.0
    assert all_reduce_bytes(100.0, 1) == gather_bytes(100.0, 1) == 0.0
    # 2 * 7/8 of 900 GB at 450 GB/s a GPU; 2 * 63/64 of them where the node's 400 GB/s count.
    assert all_reduce_seconds(900e9, 8, PLAIN) == pytest.approx(3.5)
    assert all_reduce_seconds(900e9, 64, PLAIN) == pytest.approx(2 * 63 / 64 * 900 / 400)
    assert gather_seconds(900e9, 8, 5, PLAIN) == pytest.approx(1.75)
    slow = dataclasses.replace(PLAIN, network=400.0)
    assert all_reduce_seconds(900e9, 64, slow) == pytest.approx(2 * 63 / 64 * 900 / 50)
    assert all_reduce_seconds(900e9, 8, slow) == all_reduce_seconds(900e9, 8, PLAIN)


def test_parameters_are_those_of_the_model() -> None:
    sizes, model = count_sizes(recipes.get("vision-tiny")), Data2Vec(recipes.vision_tiny())
    assert sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.averaged == sum(p.numel() for p in model.teacher.parameters())
    assert sizes.averaged_blocks == sum(p.numel() for b in blocks_of(model.teacher) for p in b.parameters())
    assert 0 < sizes.trained_blocks < sizes.trained


@pytest.mark.parametrize("recipe", ["vision-tiny", "text-tiny"])
def test_activations_are_those_of_a_real_forward(recipe: str) -> None:
    """The forward without memory keeps as many bytes as one that computes."""
    config, inputs, masks = draw(recipe)
    model = Data2Vec(config).train()
    with torch.autocast("cpu", torch.bfloat16), keeping() as kept:
        out = model(inputs, masks=masks)
    real = count_bytes(kept, without=(*model.parameters(), *model.buffers()))
    del out
    # Scalars may share a piece of memory in one and not in the other.
    assert kept_bytes(config, inputs)[0] == pytest.approx(real, rel=0.01)


def test_work_is_that_of_a_step() -> None:
    sizes = count_sizes(recipes.get("vision-base"))
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
    config, inputs, masks = draw("vision-tiny", parallel)
    model = Data2Vec(config)
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
    sizes = count_sizes(recipes.get("vision-tiny"))
    assert count_sent(ranks, "ddp", forwards) == {"gradients": 4 * sizes.trained}
    expected = volumes(sizes, "ddp", RANKS, forwards, Cluster())
    assert expected == {"all-reduce": 2 * 7 / 8 * 4 * sizes.trained}


@pytest.mark.parametrize("forwards", [1, 2])
def test_fsdp_gathers_student_twice_and_teacher_once(ranks: Ranks, forwards: int) -> None:
    sizes, sent = count_sizes(recipes.get("vision-tiny")), count_sent(ranks, "fsdp", forwards)
    expected = volumes(sizes, "fsdp", RANKS, forwards, Cluster())
    share = (RANKS - 1) / RANKS
    gathered = expected["all-gather, student"] + expected["all-gather, teacher"]
    # Rows of small tensors are filled up to a multiple of the ranks.
    assert sent["c10d::_allgather_base_"] * share == pytest.approx(gathered, rel=0.02)
    assert sent["c10d::_reduce_scatter_base_"] * share == pytest.approx(expected["reduce-scatter"], rel=0.02)
    assert set(sent) == {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_"}


def test_casts_of_weights_stay_whole_with_sharding(ranks: Ranks) -> None:
    """What a sharded model's forward keeps under autocast has all of its weights in bfloat16."""
    config, inputs, masks = draw("vision-tiny", "fsdp")
    model = Data2Vec(config)
    network = parallelise(model, blocks_of(model), config.run, ranks)
    with torch.autocast("cpu", torch.bfloat16), keeping() as kept:
        out = network(inputs, masks=masks)
    # Gathered weights are freed after the forward: their pieces of memory have no bytes here.
    assert count_bytes(kept) == pytest.approx(kept_bytes(config, inputs)[0], rel=0.01)
    del out


# ---- estimates


def test_an_estimate_by_hand() -> None:
    """One GPU: no communication; work over the assumed rate, bytes over the assumed rate."""
    cluster = Cluster(launch=0.0)
    config = recipes.vision_base()
    sizes, found = count_sizes(config), estimate(config, 1, "ddp", cluster)
    work = 256 * (sizes.forward + sizes.backward) / (cluster.peak * 0.4)
    moved = (40 * sizes.trained + 14 * sizes.averaged) / cluster.memory_rate
    assert (found.forwards, found.micro, found.exposed, found.kappa) == (16, 16, 0.0, 1.0)
    assert found.seconds == pytest.approx(work + moved)
    assert found.hours == pytest.approx(375_300 * (work + moved) / 3600)
    assert efficiency(found, cluster) == pytest.approx(1.0)


def test_more_gpus_than_samples_need_a_larger_batch() -> None:
    cluster = Cluster()
    published = estimate(recipes.get("speech-base"), 24, "ddp", cluster)
    larger = estimate(recipes.get("speech-base"), 192, "ddp", cluster)
    assert (published.kappa, published.batch) == (1.0, 24)
    assert (larger.kappa, larger.batch) == (8.0, 192)
    assert any("beyond the rules" in what for what in limits(larger, cluster))
    uneven = estimate(recipes.get("speech-base"), 16, "ddp", cluster)
    assert "uneven shares" in limits(uneven, cluster)


def test_sharding_saves_memory_and_a_slow_network_costs_time() -> None:
    cluster, slow = Cluster(), Cluster(network=100.0)
    of = {p: estimate(recipes.get("vision-large"), 16, p, cluster) for p in ("ddp", "fsdp", "hybrid")}  # type: ignore[arg-type]
    assert of["fsdp"].memory < of["hybrid"].memory < of["ddp"].memory
    assert estimate(recipes.get("vision-large"), 16, "ddp", slow).exposed > of["ddp"].exposed
    found = estimate(recipes.get("vision-large"), 16, "ddp", slow)
    assert "network" in limits(found, slow)
    small = dataclasses.replace(cluster, memory=8e9)
    assert "memory" in limits(of["ddp"], small)
    config, less = recipes.vision_large(), dataclasses.replace(cluster, memory=40e9)
    assert largest_micro(config, "ddp", 16, cluster) > largest_micro(config, "ddp", 16, less)
    sizes = count_sizes(config)
    between = volumes(sizes, "hybrid", 16, 1, cluster)["all-reduce between nodes"]
    assert between == pytest.approx(4 * sizes.trained / 8)  # 2 * 1/2 of a shard


def test_relative_positions_are_counted() -> None:
    """Their index is made of constants, which a copied mode of tensors without memory would free too often."""
    sizes = count_sizes(recipes.get("vision1-tiny"))
    config = recipes.get("vision1-tiny")
    least = config.encoder.depth * 65 * config.encoder.width * 2 * 8  # tokens and a class token, eight rows of 16 bits
    assert sizes.activations > least


# ---- the command


def run_plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["plan", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ESTIMATE  ") for line in lines)
    return [line.removeprefix("ESTIMATE  ") for line in lines]


def line_of(lines: list[str], word: str) -> str:
    (line,) = [line for line in lines if line.startswith(f"{word} ")]
    return line


def test_a_plan_by_hand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    options = ["--gpus", "8", "--machine", "h100", "--hours", "2", "--failures", "1e-3", "--output", str(output)]
    lines = run_plan(capsys, "vision-tiny", *options, "--run.keep-every", "2000", "--run.precision", "bf16")
    plan, config = json.loads(output.read_text()), recipes.vision_tiny()
    found, sizes = estimate(config, 8, "ddp", Cluster()), count_sizes(config)
    assert plan["estimate"] and (plan["machine"], plan["gpus"], plan["parallel"]) == ("h100", 8, "ddp")
    assert plan["step_seconds"] == pytest.approx(found.seconds) and plan["memory_bytes"] == found.memory
    assert plan["hours"] == pytest.approx(config.run.steps * found.seconds / 3600) == plan["gpu_hours"] / 8
    assert plan["sent_bytes"] == {"all-reduce": 2 * 7 / 8 * 4 * sizes.trained}
    # Every 2,000 of 6,000 updates: three, all kept.
    assert (plan["checkpoints_written"], plan["checkpoints_kept"]) == (3, 3)
    assert plan["disk_bytes"] == 3 * (12 * sizes.trained + 4 * sizes.averaged)
    assert plan["restarts"] == pytest.approx(1e-3 * plan["gpu_hours"])
    assert plan["lost_hours"] == pytest.approx(plan["restarts"] * 1_000 * found.seconds / 3600)
    assert f"budget     2 hours: {int(7200 / found.seconds):,} updates, 100% of them; all of them need 1 GPU" in (
        line_of(lines, "budget")
    )
    assert [line.split()[0] for line in lines[2:5]] == ["ddp", "fsdp", "memory"], "a node has no copies of a shard"
    assert not [line for line in lines if line.startswith(("batch", "options"))]


def test_the_least_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    config, cluster = recipes.vision_base(), MACHINES["h100"]
    hours = [estimate(config, n, "ddp", cluster).hours for n in (8, 16, 1024)]
    limit = str((hours[0] + hours[1]) / 2)
    lines = run_plan(capsys, "vision-base", "--gpus", "8", "--machine", "h100", "--hours", limit)
    assert f"all of them need 16 GPUs: {hours[1]:.1f} hours" in line_of(lines, "budget")
    lines = run_plan(capsys, "vision-base", "--gpus", "8", "--machine", "h100", "--hours", str(hours[2] / 2))
    assert f"no number of GPUs fits them all, 1024 take {hours[2]:.1f} hours" in line_of(lines, "budget")


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    machine = tmp_path / "small.toml"
    machine.write_text("memory = 6e9\nmfu = 0.2\n")
    lines = run_plan(capsys, "vision-base", "--gpus", "8", "--machine", str(machine))
    most = largest_micro(recipes.vision_base(), "ddp", 8, Cluster(memory=6e9))
    assert 0 < most < 16 and "does NOT fit" in line_of(lines, "memory") and "at 20%" in lines[0]
    assert line_of(lines, "memory").endswith(f"largest micro-batch that fits: {most}")
    fewer = run_plan(capsys, "vision-base", "--gpus", "8", "--machine", str(machine), "--data.micro-batch", str(most))
    assert ": fits, ddp" in line_of(fewer, "memory")
    several = ["--gpus", "1", "16", "--run.activation-checkpointing", "--data.valid", "here"]
    lines = run_plan(capsys, "vision-base", "--machine", "h100", *several)
    assert lines[1] == "assumed    without what these change: run.activation-checkpointing, data.valid"
    assert [line.split()[:2] for line in lines[3:]] == [["ddp", "1"], ["ddp", "16"], ["fsdp", "16"], ["hybrid", "16"]]


def test_measured_seconds_replace_the_assumed_share(capsys: pytest.CaptureFixture[str]) -> None:
    config, options = recipes.vision_base(), ["vision-base", "--machine", "h100", "--run.parallel", "fsdp"]
    for way in ("ddp", "fsdp"):
        cluster = calibrate(config, 4, way, 0.5, Cluster())  # type: ignore[arg-type]
        assert estimate(config, 4, way, cluster).seconds == pytest.approx(0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"measured: expected at least 0\.0\d+ s"):
        calibrate(config, 4, "ddp", 0.001, Cluster())
    one = run_plan(capsys, *options, "--gpus", "4", "--measured", "0.5")
    assert "time       0.5 s an update" in line_of(one, "time")
    other = run_plan(capsys, *options, "--gpus", "8", "--measured", "0.5", "--measured-gpus", "4")
    assert f"time       {estimate(config, 8, 'fsdp', cluster).seconds:.3g} s" in line_of(other, "time")


def test_the_guide_has_the_scaled_recipes() -> None:
    """The table of docs/distributed.md is what `scale` gives for four times the batch."""
    text = (ROOT / "docs" / "distributed.md").read_text()
    names = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `") and "→" in line]
    assert len(names) == 13
    for name in names:
        config = recipes.get(name)
        new, optim, batch, steps = scale(config, 4.0), config.optim, config.data.global_batch, config.run.steps
        anneal = new.get("ema.anneal_steps", new["run.steps"])
        assert (
            f"| `{name}` | {batch} → {new['data.global_batch']} | {steps:,} → {new['run.steps']:,} | "
            f"{optim.learning_rate:g} → {new['optim.learning_rate']:g} | "
            f"{', '.join(f'{beta:g}' for beta in new['optim.betas'])} | {new['optim.eps']:g} | "
            f"{new['optim.weight_decay']:g} | {optim.warmup_steps:,} → {new['optim.warmup_steps']:,} | "
            f"{new['ema.start']:g} → {new['ema.end']:g} in {anneal:,} |"
        ) in text


def test_options_of_a_larger_batch(capsys: pytest.CaptureFixture[str]) -> None:
    larger = ["vision-base", "--gpus", "64", "--machine", "h200", "--data.global-batch", "1024"]
    lines = run_plan(capsys, *larger)
    assert "93,825 updates of 1024" in line_of(lines, "time")
    assert line_of(lines, "options").split("    ")[1] == (
        "--data.global-batch 1024 --run.steps 93825 --optim.learning-rate 0.002 --optim.betas 0.6 0.8 "
        "--optim.eps 5e-09 --optim.weight-decay 0.1 --optim.warmup-steps 12510 --ema.start 0.99920024 "
        "--ema.end 0.99996 --ema.anneal-steps 25000"
    )
    for steps in (1_000, 375_300):  # the recipe's, too
        lines = run_plan(capsys, *larger, "--optim.learning-rate", "3e-3", "--run.steps", str(steps))
        assert f"{steps:,} updates of 1024" in line_of(lines, "time")
        assert f"--run.steps {steps} --optim.betas" in line_of(lines, "options"), "what was given stays"
    lines = run_plan(capsys, "speech-base", "--gpus", "512", "--machine", "h200")
    assert "beyond the rules" in line_of(lines, "batch")
    assert line_of(lines, "options") == "options    none: expected a batch of less than × 10, got × 21.3"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--gpus", "1", "--machine", "cpu"], "machine: expected one of h200, h100, a100, b200, mi300x (plans are for"),
     (["--gpus", "0", "--machine", "h100"], "gpus: expected numbers of 1 or more, got [0]"),
     (["--gpus", "1", "2", "--machine", "h100", "--hours", "1"], "gpus: expected one number with --output, --hours"),
     (["--gpus", "1", "--machine", "h100", "--mfu", "0.3", "--measured", "1"], "measured: expected one of --mfu"),
     (["--gpus", "1", "--machine", "h100", "--measured-gpus", "2"], "measured_gpus: expected --measured with it"),
     (["--gpus", "1", "--machine", "h100", "--dry-run"], "plan: expected no --dry-run, --profile or --run.plan"),
     (["--gpus", "8", "--machine", "h100", "--run.parallel", "fsdp", "--run.shard-ranks", "4"],
      "run.shard_ranks: expected the 8 GPUs of a node, got 4"),
     (["--gpus", "1", "--machine", "h100", "--run", "nowhere"], "run: expected a run with metrics and a checkpoint")],
)  # fmt: skip
def test_what_cannot_be_planned(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert main(["plan", "vision-tiny", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_machines_of_ones_own_are_checked(tmp_path: Path) -> None:
    for text, expected in (("peek = 1.0", r"unknown fields \['peek'\]"), ("memory = -1.0", "memory: expected above 0")):
        (tmp_path / "own.toml").write_text(text)
        with pytest.raises(ValueError, match=expected):
            find_machine(read_file(str(tmp_path / "own.toml")))


def test_a_run_says_what_became_of_its_plan(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Planned, run, compared, and planned again from what was measured; the checkpoint is as large as planned."""
    file, config = tmp_path / "plan.json", make_config(encoder={"width": 64})
    (tmp_path / "settings.json").write_text(config.to_json())
    planned = ["--config", str(tmp_path / "settings.json"), "--gpus", "1", "--machine", "h100"]
    lines = run_plan(capsys, *planned, "--output", str(file))
    assert "fp32" in lines[1]
    folder = pretrain(config, plan=str(file))
    plan, metrics = json.loads((folder / PLAN).read_text()), read_metrics(folder / "metrics.jsonl")
    assert plan == json.loads(file.read_text())
    seconds = statistics.median(line["step_seconds"] for line in metrics)
    expected = f"planned {plan['step_seconds']:.3g} s a step, {plan['memory_bytes'] / 1e9:.1f} GB a GPU (ESTIMATE for "
    text = capsys.readouterr().err
    assert f"{expected}1 x h100); measured {seconds:.3g} s, " in text
    checkpoint = sum(f.stat().st_size for f in (folder / "checkpoints" / "step-00000006").iterdir())
    assert 0.0 < checkpoint - plan["checkpoint_bytes"] < 100_000, "besides: generators, texts, headers"
    lines = run_plan(capsys, *planned, "--run", str(folder))
    assert f"time       {seconds:.3g} s an update, 6 updates" in line_of(lines, "time")
    (folder / PLAN).write_text("{}")
    assert compare_plan(folder) == (
        f"note: run.plan: expected a file of d2v plan --output, got {str(folder / PLAN)!r} without step_seconds"
    )
    for wrong in ("{}", "no JSON"):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"run\.plan: expected a file of d2v plan --output"):
            pretrain(make_config(run={"dir": str(tmp_path / "other")}), plan=str(file))
        assert not (tmp_path / "other").exists()
