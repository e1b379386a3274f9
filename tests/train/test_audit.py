"""What a run wrote about itself can be replayed, and a changed bit is found: which update, which tensor, whose rank."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from soak.jobs import find_port, rank_environment
from support.ranks import run_ranks

from d2v.cli import main
from d2v.config import Config
from d2v.train import trainer as trainer_module
from d2v.train.digests import Digests, digest
from d2v.train.distributed import Ranks
from d2v.train.pretraining import pretrain

from .conftest import tiny_options

RUN: dict[str, Any] = {"digest_every": 1, "keep_checkpoints": 9}


def audit(folder: Path, steps: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, sentence and record of the command."""
    capsys.readouterr()
    code = main(["audit", str(folder), "--steps", steps, *more])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    return (code, lines[0], json.loads(lines[-1])) if lines else (code, err, {})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- digests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
def test_every_changed_bit_and_every_exchange_changes_the_digest(dtype: torch.dtype) -> None:
    value = torch.randn(5, 7).mul(9).to(dtype)
    before = digest({"x": value})
    assert digest({"x": value.clone()}) == before
    bits = value.view(torch.uint8)
    for place in range(bits.numel()):
        for bit in range(8):
            changed = bits.clone().flatten()
            changed[place] ^= 1 << bit
            if dtype != torch.bool:
                assert digest({"x": changed.view(bits.shape).view(dtype)}) != before
    other = torch.arange(35.0).view(5, 7).to(torch.float32)
    assert digest({"x": other}) != digest({"x": other.flip(0)})


def test_pieces_add_up_to_the_whole_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    from d2v.train import digests

    value = torch.randn(11, 13)
    whole = digest({"x": value})["x"]
    monkeypatch.setattr(digests, "_CHUNK", 10)
    assert digest({"x": value})["x"] == whole
    sums = digests._Sums()
    sums.add("a", value[:4])
    sums.add("b", value[4:], first=4 * 13)
    assert sum(sums.finish().values()) % 2**64 == whole
    assert digest({"x": torch.empty(0)}) == {"x": 0} and digest({}) == {}


def test_the_odd_rank_is_named() -> None:
    class Three(Ranks):
        def gather(self, value: Any) -> list[Any]:
            own, none = value
            return [value, ({**own, "w": own["w"] + 1}, none), value][: self.size]

    model = torch.nn.ParameterDict({"v": torch.ones(2), "w": torch.ones(3)})
    run = Config().change(run={"digest_every": 1}).run
    ranks = Three(torch.device("cpu"), 0, 3)
    assert "rank 1: weights that differ from those of the other ranks, first w;" in str(
        Digests(model, ranks, run).collect(1, model)[1]
    )
    ranks = Three(torch.device("cpu"), 0, 2)
    assert "ranks 0, 1: weights that differ from those of each other" in str(
        Digests(model, ranks, run).collect(1, model)[1]
    )


# ---- replays ---------------------------------------------------------------------------------------------------


def test_a_stretch_has_the_same_bits_and_nothing_is_written(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pretrain(make_config(run=RUN))
    before = files_of(folder)
    assert len(json.loads((folder / "digests.jsonl").read_text().splitlines()[0])["weights"]) > 10
    for steps, lines, digests in (("3:6", 2, 3), ("0:2", 1, 2), ("4:6", 1, 2)):
        code, text, record = audit(folder, steps, capsys)
        assert (code, record["lines"], record["digests"], record["same_bits"]) == (0, lines, digests, True), text
    assert files_of(folder) == before


def test_digests_leave_the_run_as_it_is_and_are_cut_on_resume(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    plain = pretrain(make_config(run={"dir": str(tmp_path / "plain")}))
    assert not (plain / "digests.jsonl").exists()
    folder = pretrain(make_config(run=RUN))
    for name in ("loss", "grad_norm"):
        one, two = ([json.loads(x)[name] for x in (f / "metrics.jsonl").open()] for f in (plain, folder))
        assert one == two
    whole = (folder / "digests.jsonl").read_text()
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    pretrain(make_config(run=RUN))
    assert (folder / "digests.jsonl").read_text() == whole


def test_what_differs_first_is_named_and_a_large_difference_fails(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pretrain(make_config(run=RUN))
    lines = [json.loads(line) for line in (folder / "digests.jsonl").open()]
    lines[4]["weights"]["stem.proj.weight"] = "0" * 16
    (folder / "digests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, text, record = audit(folder, "3:6", capsys)
    assert code == 0 and "first digests after update 5: stem.proj.weight" in text and not record["same_bits"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    metrics[-1]["loss"] *= 1.001
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    code, text, record = audit(folder, "3:6", capsys)
    assert code == 1 and "DIFFERENT" in text and record["largest_difference"] == pytest.approx(1e-3, rel=0.01)
    assert audit(folder, "3:6", capsys, "--limit", "0.01")[0] == 0


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("6:3", "steps: expected FIRST:LAST, two numbers of updates, the first below the last; got '6:3'"),
        ("three", "steps: expected FIRST:LAST"),
        ("6:9", "expected updates of which"),
    ],
)
def test_bad_stretches_are_refused(
    steps: str, message: str, make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = audit(pretrain(make_config(run=RUN)), steps, capsys)
    assert code == 2 and message in text


# ---- flipped bits -----------------------------------------------------------------------------------------------


def flip(value: torch.Tensor) -> None:
    value.view(-1).view(torch.int32)[0] ^= 1 << 20


def run_rank(rank: int, ranks: int, port: int, options: list[str], plant: str, log: str) -> None:
    """`d2v` on one of several ranks; rank 1 flips a bit at update 3, before or after gradients meet."""
    os.environ |= rank_environment(rank, ranks, port)
    if rank == 1 and plant == "after":
        clip = trainer_module.clip_gradients
        calls = iter(range(1, 99))

        def broken(parameters: Any, limit: Any) -> Any:
            if next(calls) == 3:
                flip(parameters[0].grad)
            return clip(parameters, limit)

        trainer_module.clip_gradients = broken
    if rank == 1 and plant == "before":
        run_update = trainer_module.Trainer.run_update

        def tapped(self: Any, batches: Any) -> Any:
            def corrupt(gradient: torch.Tensor) -> torch.Tensor:
                changed = gradient.clone()
                flip(changed)
                return changed

            hook = self.parameters[-1].register_hook(corrupt) if self.update == 2 else None
            step = run_update(self, batches)
            if hook is not None:
                hook.remove()
            return step

        trainer_module.Trainer.run_update = tapped  # type: ignore[method-assign]
    with (
        Path(log).with_suffix(f".{rank}").open("w", encoding="utf-8") as file,
        redirect_stderr(file),
        redirect_stdout(file),
    ):
        code = main(options)
    Path(log).with_suffix(f".code{rank}").write_text(str(code))


def launch(ranks: int, options: list[str], plant: str, log: Path) -> list[str]:
    """Exit codes and what each rank said."""
    run_ranks(run_rank, ranks, ranks, find_port(), options, plant, str(log))
    return [log.with_suffix(f".code{r}").read_text() + " " + log.with_suffix(f".{r}").read_text() for r in range(ranks)]


def options_of(folder: Path, images: Path) -> list[str]:
    return [
        "pretrain", "vision-tiny", *tiny_options(), "--data.path", str(images), "--run.dir", str(folder),
        "--run.digest-every", "1", "--run.keep-checkpoints", "9", "--run.checkpoint-every", "2",
    ]  # fmt: skip


def test_a_bit_flipped_after_the_reduction_stops_the_run_and_names_the_rank(images: Path, tmp_path: Path) -> None:
    options = [*options_of(tmp_path / "run", images), "--data.global-batch", "3"]
    said = launch(3, options, "after", tmp_path / "log")
    assert (
        said[0].startswith("1 ") and "training stopped at update 3: rank 1: weights that differ from those" in said[0]
    )
    assert "step-00000002" in said[0]  # the last good checkpoint


def test_a_bit_flipped_before_the_reduction_is_found_by_a_replay(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert [text[0] for text in launch(2, options_of(folder, images), "before", tmp_path / "log")] == ["0", "0"]
    stored = json.loads((folder / "digests.jsonl").read_text().splitlines()[2])
    assert stored["step"] == 3 and len(stored["gradients"]) == 2
    said = launch(2, ["audit", str(folder), "--steps", "2:4"], "", tmp_path / "replay")
    record = json.loads(said[0].splitlines()[-1])
    assert not record["same_bits"] and record["conditions"] == []
    assert record["differing"][0].startswith("digests after update 3: ")
    assert record["differing"][0].endswith("; own gradients of rank 1")
