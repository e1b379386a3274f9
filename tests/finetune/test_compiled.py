"""Fine-tuning as one compiled graph: the losses of the eager run, for fixed and changing sizes, with few graphs."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
from soak.jobs import find_port, largest_difference, losses, rank_environment
from support.graphs import count_graphs, fresh_compiler  # noqa: F401
from support.ranks import run_ranks

from d2v.cli import main
from d2v.model.finetuned import FineTuned

from .conftest import write_images, write_speech, write_table

NETWORK = ["--run.compile", "--run.compile-scope", "network"]
TASKS = {"images": "vision-classify", "transcripts": "speech-ctc", "texts": "text-classify"}
SILENT = ["dropout", "attention-dropout", "activation-dropout", "layer-drop", "drop-path", "head-dropout"]


def make_command(kind: str, model: Path, folder: Path) -> list[str]:
    """Thirty updates without dropout, the first two of the head alone; transcripts are masked."""
    train = folder / "train"
    if not train.exists():
        if kind == "images":
            write_images(train, 8, 0)
        elif kind == "transcripts":
            write_speech(train, 24, 0)
        else:
            train.mkdir()
            write_table(train / "table.tsv", 48, 0)
    path = train / "table.tsv" if kind == "texts" else train
    command = ["finetune", TASKS[kind], "--checkpoint", str(model), "--train", str(path), "--data.workers", "0"]
    command += ["--run.device", "cpu", "--run.threads", "1", "--run.log-every", "1", "--data.global-batch", "8"]
    command += ["--run.steps", "30", "--run.checkpoint-every", "30", "--task.freeze-encoder", "2"]
    command += [word for name in SILENT for word in (f"--task.{name}", "0")]
    return command + (["--task.time-mask", "0.2", "--task.time-span", "2"] if kind == "transcripts" else [])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", list(TASKS))
def test_losses_are_those_of_the_eager_run(
    kind: str, backend: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"images": "image_model", "transcripts": "speech_model", "texts": "text_model"}
    command = make_command(kind, request.getfixturevalue(names[kind]), tmp_path)
    monkeypatch.setattr(FineTuned, "compile", functools.partialmethod(FineTuned.compile, backend=backend))
    assert main([*command, "--run.dir", str(tmp_path / "eager")]) == 0
    assert count_graphs() == 0
    assert main([*command, *NETWORK, "--run.dir", str(tmp_path / "one")]) == 0
    difference, graphs = largest_difference(losses(tmp_path / "one"), losses(tmp_path / "eager")), count_graphs()
    assert difference < 1e-6
    # Of the frozen and of the whole model, each for the first size and, where sizes change, for any.
    assert 2 <= graphs <= 4


def run_rank(rank: int, port: int, command: list[str]) -> None:
    """`d2v` on one of two ranks, compiled as far as the graphs of forward and backward."""
    os.environ |= rank_environment(rank, 2, port)
    FineTuned.compile = functools.partialmethod(FineTuned.compile, backend="aot_eager")  # type: ignore[method-assign, assignment]
    assert main(command) == 0


def test_two_ranks_have_the_losses_of_one(image_model: Path, tmp_path: Path) -> None:
    command = [*make_command("images", image_model, tmp_path), "--run.steps", "6", "--data.micro-batch", "4"]
    assert main([*command, "--run.dir", str(tmp_path / "eager")]) == 0
    run_ranks(run_rank, 2, find_port(), [*command, *NETWORK, "--run.dir", str(tmp_path / "two")])
    assert largest_difference(losses(tmp_path / "two"), losses(tmp_path / "eager")) < 1e-6
