"""Compiled blocks and one compiled graph on two ranks: the losses of one eager rank, with few graphs.

Without code generation but for one endurance test.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
from soak.cases import NO_DROPOUT
from soak.jobs import find_port, largest_difference, losses, rank_environment
from support.ranks import run_ranks

from d2v.cli import main
from d2v.model.data2vec import Data2Vec
from d2v.train.distributed import keep_compiled

from .conftest import tiny_options

COMPILED = ["--run.compile", "--run.threads", "1"]
NETWORK = [*COMPILED, "--run.compile-scope", "network"]


def run_rank(rank: int, ranks: int, port: int, options: list[str], log: str, backend: str = "aot_eager") -> None:
    """`d2v` on one rank, by default compiled as far as the graphs of forward and backward."""
    if ranks > 1:
        os.environ |= rank_environment(rank, ranks, port)
    for owner in (Data2Vec, torch.nn.Module):
        owner.compile = functools.partialmethod(owner.compile, backend=backend)  # type: ignore[method-assign, assignment]
    assert main(options) == 0
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    Path(f"{log}.{rank}").write_text(str(graphs), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "form", "most"),
    [
        ("network", NETWORK, 1),
        ("blocks", COMPILED, 4),
        ("sharded", [*COMPILED, "--run.parallel", "fsdp"], 4),
        ("dropped", [*COMPILED, "--encoder.layer-drop", "0.3", "--encoder.drop-path", "0.2"], 4),
    ],
)
def test_two_ranks_compiled_have_the_losses_of_one(
    name: str, form: list[str], most: int, images: Path, tmp_path: Path
) -> None:
    base = ["pretrain", "vision-tiny", *tiny_options(), *NO_DROPOUT, "--data.path", str(images), "--run.log-every", "1"]
    base += ["--data.micro-batch", "2", "--run.steps", "6"]
    more = form[form.index("--encoder.layer-drop") :] if name == "dropped" else []
    eager, run = tmp_path / "eager", tmp_path / "run"
    assert main([*base, *more, "--run.dir", str(eager)]) == 0
    if name == "dropped":  # on one rank, whose random numbers are those of the eager run
        run_rank(0, 1, 0, [*base, *form, "--run.dir", str(run)], str(tmp_path / "graphs"))
    else:
        options = [*base, *form, "--run.dir", str(run)]
        run_ranks(run_rank, 2, 2, find_port(), options, str(tmp_path / "graphs"))
    assert largest_difference(losses(run), losses(eager)) < 1e-6
    assert 1 <= int((tmp_path / "graphs.0").read_text()) <= most


@pytest.mark.soak
@pytest.mark.parametrize("form", [NETWORK, [*COMPILED, "--run.parallel", "fsdp"]], ids=["network", "sharded"])
def test_four_ranks_of_generated_code_have_the_losses_of_one(form: list[str], images: Path, tmp_path: Path) -> None:
    base = ["pretrain", "vision-tiny", *tiny_options(), *NO_DROPOUT, "--data.path", str(images), "--run.log-every", "1"]
    base += ["--data.micro-batch", "1", "--run.steps", "30", "--encoder.depth", "1", "--target.top-k", "1"]
    eager, run, log = tmp_path / "eager", tmp_path / "run", str(tmp_path / "graphs")
    assert main([*base, "--run.dir", str(eager)]) == 0
    run_ranks(run_rank, 4, 4, find_port(), [*base, *form, "--run.dir", str(run)], log, "inductor")
    difference = largest_difference(losses(run), losses(eager))
    print(f"largest relative difference of a loss: {difference:.2g}")
    assert difference < 1e-6


def start_once(number: int, options: list[str], log: str) -> None:
    """`d2v`, compiled to machine code; keeps how many graphs' code was there and how many was not."""
    assert main(options) == 0
    counters = torch._dynamo.utils.counters["inductor"]
    Path(log).write_text(f"{counters['fxgraph_cache_hit']} {counters['fxgraph_cache_miss']}", encoding="utf-8")


@pytest.mark.long
def test_a_later_start_takes_compiled_code_from_the_folder(images: Path, tmp_path: Path) -> None:
    counts = []
    for number in range(2):
        base = ["pretrain", "vision-tiny", *tiny_options(), "--data.path", str(images), "--run.steps", "1", *NETWORK]
        options = [*base, "--run.dir", str(tmp_path / f"run-{number}"), "--run.compile-cache", str(tmp_path / "code")]
        run_ranks(start_once, 1, options, str(tmp_path / "counts"))
        counts.append([int(word) for word in (tmp_path / "counts").read_text().split()])
    assert (tmp_path / "code").stat().st_mode & 0o077 == 0
    (_, made), (found, missing) = counts
    assert made > 0 and found >= made and missing == 0


def test_a_folder_for_code_that_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    with pytest.raises(ValueError, match=r"run\.compile_cache: expected a folder of your own .* with mode 770"):
        keep_compiled(tmp_path)
