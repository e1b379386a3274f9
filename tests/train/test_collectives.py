"""What gloo ranks exchange: dense tensors in float32 or wider; a NaN stops the run, and a rank that hangs is named."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from soak.jobs import find_port, rank_environment
from support.ranks import run_ranks, start_ranks

import d2v.train.trainer
from d2v.config import Config
from d2v.train.distributed import Ranks, StopFlag
from d2v.train.logging import MetricWindow
from d2v.train.monitors import find_failure
from d2v.train.optim import clip_gradients
from d2v.train.pretraining import Pretraining, pretrain
from d2v.train.ranks.heartbeat import EXIT_LOST, Heartbeat


def on_two_ranks(function: Callable[..., dict[str, Any]], folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    """What `function(rank, *arguments)` returns on each of two ranks."""
    run_ranks(_one_rank, 2, find_port(), function, str(folder), arguments)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _one_rank(rank: int, port: int, function: Callable[..., dict[str, Any]], folder: str, arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, 2, port)
    Path(folder, f"{rank}.json").write_text(json.dumps(function(rank, *arguments)))


def reduce_everything(rank: int, config: Config) -> dict[str, Any]:
    dist.init_process_group("gloo")
    ranks = Ranks(torch.device("cpu"), rank, 2, dist.group.WORLD)
    found: dict[str, Any] = {"refused": []}
    table = torch.arange(6.0).view(3, 2) + 10 * rank
    wrong = {
        "column": table[:, 1], "rows apart": table[::2], "one number often": torch.ones(1).expand(3),
        "bfloat16": torch.ones(3, dtype=torch.bfloat16), "float16": torch.ones(3, dtype=torch.float16),
    }  # fmt: skip
    for name, value in wrong.items():
        try:
            ranks.sum_(value)
        except ValueError as error:
            found["refused"].append(name)
            found["words"] = str(error)
    found["sum"] = ranks.sum_(table.clone()).tolist()

    flag = StopFlag(ranks)
    flag.exchange(5 if rank else 0)
    found["flag"] = flag.exchange(0)

    window = MetricWindow()
    nothing = math.nan if rank else 1.0
    window.add({"loss": torch.tensor(nothing), "prediction_std": torch.tensor(nothing)})
    means = window.means(ranks.sum_)
    found["failure"] = find_failure({"step": 1, **means}, config.run, 8)
    found["prediction_std"] = str(means["prediction_std"])
    dist.barrier()
    dist.destroy_process_group()
    return found


def test_reductions(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    for found in on_two_ranks(reduce_everything, tmp_path, make_config()):
        assert found["refused"] == ["column", "rows apart", "one number often", "bfloat16", "float16"]
        assert found["words"].startswith("reduction over ranks: expected a contiguous tensor of float32 or float64 or")
        assert found["sum"] == [[10.0, 12.0], [14.0, 16.0], [18.0, 20.0]]
        assert found["flag"] == 5
        assert "not finite: loss nan" in found["failure"]
        assert found["prediction_std"] == "nan"


def train_until_nan(rank: int, config: Config) -> dict[str, Any]:
    """A run whose loss is NaN on rank 1 alone, from the third update on; the types of the gradients it clips."""
    forward, types = Pretraining.forward, set()

    def planted(self: Pretraining, *arguments: Any) -> Any:
        step = forward(self, *arguments)
        if rank == 1 and self.updates_done >= 2:
            step.losses = {name: value * math.nan for name, value in step.losses.items()}
        return step

    def begin(self: Pretraining, update: int) -> None:
        self.updates_done = update - 1

    def clip(parameters: Any, limit: float | None) -> Any:
        types.update(str(p.grad.dtype) for p in parameters if p.grad is not None)
        return clip_gradients(parameters, limit)

    Pretraining.forward, Pretraining.begin_update, d2v.train.trainer.clip_gradients = planted, begin, clip
    try:
        pretrain(config)
    except d2v.train.trainer.RunStopped as error:
        return {"end": str(error), "types": sorted(types)}
    except SystemExit as leaving:
        return {"end": leaving.code, "types": sorted(types)}
    return {"end": "ran on", "types": sorted(types)}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_nan_of_the_second_rank_stops_both(tmp_path: Path, make_config: Callable[..., Config], parallel: str) -> None:
    """At the next line of metrics; gradients are float32 also under bfloat16 autocast."""
    config = make_config(run={"parallel": parallel, "precision": "bf16", "steps": 20})
    first, second = on_two_ranks(train_until_nan, tmp_path, config)
    # The checkpoint of the third update looks first, and is not written.
    assert first["end"].startswith("training stopped at update 3: not finite: loss nan")
    assert second["end"] == 1
    assert first["types"] == second["types"] == ["torch.float32"]
    assert not [*Path(config.run.dir, "checkpoints").glob("step-*")]


def hang(rank: int, port: int, config: Config, folder: str) -> None:
    """A run of three ranks whose rank 1 lives, but is busy with something else from the third update on."""
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, 3, port)
    begin = Pretraining.begin_update

    def stuck(self: Pretraining, update: int) -> None:
        if rank == 1 and update == 3:
            threading.Event().wait()
        begin(self, update)

    Pretraining.begin_update = stuck
    with Path(folder, f"{rank}.log").open("w", encoding="utf-8") as sys.stderr:
        pretrain(config)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_a_rank_that_hangs_is_named_by_the_others(
    tmp_path: Path, make_config: Callable[..., Config], parallel: str
) -> None:
    config = make_config(run={"parallel": parallel, "timeout": 20.0, "steps": 20})
    context = start_ranks(hang, 3, find_port(), config, str(tmp_path))
    for process in context.processes:
        process.join(200)
        process.kill()
    assert [process.exitcode for process in context.processes] == [EXIT_LOST] * 3
    said = [(tmp_path / f"{rank}.log").read_text().splitlines()[-1] for rank in range(3)]
    for rank in (0, 2):
        assert f"rank 1 on {socket.gethostname()} has not come" in said[rank], said
    assert "rank 1" in (tmp_path / "run" / "lost.txt").read_text()


class Gone:
    """A store whose host has left."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize("told", [True, False])
def test_a_rank_whose_store_is_gone_says_what_the_first_one_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], told: bool
) -> None:
    """And ends with its own error where none has left because of a lost rank."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    if told:
        (tmp_path / "lost.txt").write_text("rank 1 on b has not come")
    beat, thread = Heartbeat.__new__(Heartbeat), threading.Thread(target=int)
    thread.start()
    vars(beat).update(
        rank=2, timeout=1.0, folder=tmp_path, interval=0.01, names={0: "rank 0 on a", 1: "rank 1 on b"}, _store=Gone(),
        _store_seen=math.inf, _seen={}, _ended={}, _leaving=threading.Event(), _thread=thread,
    )  # fmt: skip
    error = RuntimeError("Connection closed by peer")
    if told:
        with pytest.raises(SystemExit, match=str(EXIT_LOST)):
            beat.__exit__(RuntimeError, error, None)
        assert "rank 1 on b has not come; this rank (2) stops at: Connection closed" in capsys.readouterr().err
    else:
        beat.__exit__(RuntimeError, error, None)
