"""Checkpoints on each node: a run goes on from the newest that all can read, with the same bits."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from soak.jobs import assert_same_weights, find_port, last_step, rank_environment
from support.ranks import run_ranks

from d2v.cli import main
from d2v.config import Config
from d2v.folder import list_checkpoints, step_of
from d2v.train.pretraining import pretrain
from d2v.train.trainer import Trainer

from .conftest import tiny_options

Make = Callable[..., Config]


class Planted(Exception):
    """The end of a run in its middle."""


def stop_before(update: int, leave: Callable[[], None]) -> None:
    """Has runs of this process end before an update, when what they saved is written."""
    original = Trainer.run_update

    @functools.wraps(original)
    def run_update(self: Trainer, batches: object) -> object:
        if self.update + 1 == update:
            self._finish_saving()
            leave()
        return original(self, batches)  # type: ignore[arg-type]

    Trainer.run_update = run_update  # type: ignore[method-assign, assignment]


def fail() -> None:
    raise Planted


def local_steps(place: Path) -> list[int]:
    """Updates of the local checkpoints under a folder."""
    return [step_of(c) for inner in (place.iterdir() if place.is_dir() else ()) for c in list_checkpoints(inner)]


def test_the_newest_readable_one_is_taken(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "memory"
    local = {"local_checkpoint": str(place), "local_every": 2, "checkpoint_every": 7, "steps": 12}
    pretrain(make_config(run={"dir": str(tmp_path / "whole"), "steps": 12, "checkpoint_every": 7}))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_update", Trainer.run_update)
        stop_before(6, fail)
        with pytest.raises(Planted):
            pretrain(make_config(run=local))
    assert local_steps(place) == [2, 4]
    (inner,) = place.iterdir()
    assert inner.stat().st_mode & 0o077 == 0
    # A changed byte in the middle of the newest: the one before it is taken.
    shard = inner / "step-00000004" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_update", Trainer.run_update)
        stop_before(12, fail)
        with pytest.raises(Planted):
            pretrain(make_config(run=local))
    text = capsys.readouterr().err
    assert "note: run.local_checkpoint: update 4 is not taken, rank 0 on " in text and "checksum differs" in text
    assert f"from {inner / 'step-00000002'} after update 2 of 12" in text
    # Newer than the run folder's, which has update 7.
    assert local_steps(place) == [8, 10]
    pretrain(make_config(run=local))
    assert "after update 10 of 12" in capsys.readouterr().err
    assert assert_same_weights(tmp_path / "run", tmp_path / "whole") > 10
    assert not inner.exists()


def test_a_run_takes_no_checkpoint_of_one_that_was_in_its_folder(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(run={"local_checkpoint": str(tmp_path / "memory"), "local_every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_update", Trainer.run_update)
        stop_before(3, fail)
        with pytest.raises(Planted):
            pretrain(config)
    shutil.rmtree(tmp_path / "run")
    pretrain(config)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3  # from the first update on
    (tmp_path / "run" / "run-id").write_text("../../elsewhere")
    with pytest.raises(ValueError, match=r"run\.dir: expected 32 hexadecimal digits"):
        pretrain(config)


def run_rank(rank: int, ranks: int, port: int, options: list[str], place: str, stop: bool) -> None:
    """`d2v` on a rank of the first or the second half of them, each half a node; all die before the fifth update."""
    node = 2 * rank // ranks
    os.environ |= {**rank_environment(rank, ranks, port), "GROUP_RANK": str(node)}
    if stop:
        stop_before(5, functools.partial(os._exit, 0))
    with Path(f"{place}.{rank}.log").open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
        assert main([*options, "--run.local-checkpoint", f"{place}-{node}"]) == 0


@pytest.mark.parametrize(
    ("ranks", "mode"), [(2, []), (4, ["--run.parallel", "fsdp", "--run.shard-ranks", "2"])], ids=["ddp", "hybrid"]
)
def test_a_lost_node_goes_back_to_the_run_folder(images: Path, tmp_path: Path, ranks: int, mode: list[str]) -> None:
    base = ["pretrain", "vision-tiny", *tiny_options(), "--data.path", str(images), "--run.checkpoint-every", "3"]
    base += ["--run.local-every", "2", "--data.micro-batch", "1", *mode]
    place = tmp_path / "memory"
    for name, lost in (("kept", False), ("lost", True)):
        options = [*base, "--run.dir", str(tmp_path / name)]
        run_ranks(run_rank, ranks, ranks, find_port(), options, str(place), True)
        assert local_steps(Path(f"{place}-0")) == local_steps(Path(f"{place}-1")) == [2, 4]
        assert last_step(tmp_path / name) == 3
        if lost:
            shutil.rmtree(f"{place}-1")
        run_ranks(run_rank, ranks, ranks, find_port(), options, str(place), False)
        said = Path(f"{place}.0.log").read_text()
        assert f"after update {3 if lost else 4} of 6" in said
        assert (f"update 4 is not taken, rank {ranks // 2} on " in said) == lost
        assert local_steps(Path(f"{place}-0")) == local_steps(Path(f"{place}-1")) == []
    assert_same_weights(tmp_path / "kept", tmp_path / "lost")


def test_a_model_split_over_nodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from d2v.config import Run
    from d2v.train import distributed

    ranks = distributed.Ranks(distributed.torch.device("cpu"), 0, 4)
    monkeypatch.setattr(distributed.Ranks, "gather", lambda *_: ["0", "0", "1", "1"])
    with pytest.raises(ValueError, match=r"run\.local_checkpoint: expected a whole model on every node"):
        distributed.make_node_group(Run(parallel="fsdp"), ranks)
