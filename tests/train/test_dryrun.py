"""Sizes that `--dry-run` prints: weights and activations counted, shares of ranks as the loader makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v.config import Config
from d2v.data.loader import train_updates
from d2v.tools.dry_run import MIB, count_static, dry_run
from d2v.tools.paper import count_bytes
from d2v.train.distributed import Ranks
from d2v.train.pretraining import Pretraining, open_data
from d2v.train.trainer import Trainer

CPU = torch.device("cpu")
Make = Callable[..., Config]


def test_bytes_are_counted_once() -> None:
    block = torch.zeros(100, dtype=torch.float64)
    other = torch.zeros(10, dtype=torch.bfloat16)
    assert count_bytes([block, block[10:], block.view(10, 10), other]) == 820
    assert count_bytes([block, other], without=[block[:1]]) == 20


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_stays_in_memory(make_config: Make, precision: str) -> None:
    config = make_config(run={"precision": precision})
    objective = Pretraining(config, open_data(config)[0], None, CPU)
    model = objective.model
    static = count_static(Trainer(objective, Ranks(CPU)), objective)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (static["weights"], static["gradients"], static["Adam moments"]) == (trained, trained, 2 * trained)
    averaged = sum(p.numel() for p in model.teacher.parameters())
    assert static["teacher"] == 4 * averaged
    # Weights of products in two bytes, norms in four; fp32 needs no copies.
    copies = static["its working copies"]
    assert copies == 0 if precision == "fp32" else 2 * averaged < copies < 2.2 * averaged


def numbers(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line.split()


def table(text: str) -> dict[int, list[str]]:
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("ranks"))
    return {int(line.split()[0]): line.split()[1:] for line in lines[first + 1 :]}


def test_activations_are_measured(make_config: Make) -> None:
    measured = []
    for batch in (4, 8):
        text = dry_run(make_config(data={"global_batch": batch}))
        measured.append(float(text.split("measured: ")[1].split(";")[0]) * MIB)
    # Twice the samples keep twice as much; no less than the outputs of the student's blocks for 2 masks of 4 tokens.
    assert measured[1] == pytest.approx(2 * measured[0], rel=0.15)
    assert measured[0] > 2 * 4 * 2 * 4 * 16 * 4


@pytest.mark.parametrize(("parallel", "shards"), [("ddp", None), ("fsdp", None), ("fsdp", 2)])
def test_shares_of_ranks(make_config: Make, parallel: str, shards: Any) -> None:
    config = make_config(data={"global_batch": 12, "micro_batch": 2}, run={"parallel": parallel, "shard_ranks": shards})
    found = table(dry_run(config))
    assert set(found) == {1, 2, 4, 8}
    source, _ = open_data(config)
    for ranks, (samples, micro, largest, _) in found.items():
        batches = next(train_updates(config, source, 0, CPU, 0, ranks))
        assert int(samples) == sum(len(b) for b in batches)
        assert (int(micro), int(largest)) == (len(batches), max(len(b) for b in batches))
    memory = {ranks: float(row[-1]) for ranks, row in found.items()}
    # Two samples at a time on 1 to 4 ranks: only sharding makes a difference.
    split = {"ddp": 1, "fsdp": 4}[parallel] if shards is None else shards
    objective = Pretraining(config, source, None, CPU)
    static = sum(count_static(Trainer(objective, Ranks(CPU)), objective).values()) / MIB
    assert memory[1] - memory[4] == pytest.approx(static * (1 - 1 / split), abs=0.11)


def test_the_length_of_the_run(make_config: Make, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    text = dry_run(make_config(run={"steps": 30}))
    assert "30 updates of 4 samples: 10.0 epochs; warm-up 2 updates" in text  # of 12 images
    assert float(numbers(text, "work")[1]) > 1e6
    assert sorted(tmp_path.rglob("*")) == before
