"""The command line: one sentence and exit code 2 for whatever cannot be used."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from d2v import cli, recipes
from d2v.cli import main
from d2v.config import Config
from d2v.config.finetune import TASKS
from d2v.options import list_options, option_names

from .conftest import tiny_options

ROOT = Path(cli.__file__).parents[1]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Sentence of a refused command line."""
    capsys.readouterr()
    assert main(arguments) == 2, arguments
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("d2v: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err


def test_misspelt_names_are_answered_with_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cases = {
        ("pretrian",): "did you mean 'pretrain'?",
        ("evaluate", "prob"): "did you mean 'probe'?",
        ("evaluate",): "did you mean 'probe'?",
        ("data", "texture"): "did you mean 'textures'?",
        ("data", "tokeniser"): "did you mean 'tokenizer'?",
        ("pretrain", "vision-tyny"): "did you mean 'vision-tiny'?",
        ("pretrain", "vision_base2"): "did you mean 'vision-base'?",
        ("pretrain", "vision-tiny", "--run.stepps", "3"): "did you mean '--run.steps'?",
        ("pretrain", "vision-tiny", "--optim.learning_rat=3"): "did you mean '--optim.learning-rate'?",
        ("pretrain", "vision-tiny", "--dryrun"): "did you mean '--dry-run'?",
        ("evaluate", "probe", "--chekpoint", "x"): "did you mean '--checkpoint'?",
        ("info", "--jsn"): "did you mean '--json'?",
        ("plot", "x", "--cont", "3"): "did you mean '--count'?",
    }
    for arguments, text in cases.items():
        assert text in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_values_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ("pretrain", "vision-tiny")
    cases = {
        (): "expected one of pretrain",
        ("pretrain",): "recipe: expected one of",
        (*tiny, "--run.steps", "abc"): "--run.steps",
        (*tiny, "--run.steps"): "Missing value for argument '--run.steps'",
        (*tiny, "--run.precision", "fp8"): "invalid choice 'fp8' for argument '--run.precision'",
        (*tiny, "--published", "nonsense"): "invalid choice 'nonsense'",
        (*tiny, "extra"): "extra",
        (*tiny, "--encoder.heads", "7"): "encoder.width: expected a multiple of encoder.heads",
        (*tiny, "--run.steps", "-1"): "run.steps: expected 0 or more, got -1",
        ("recipes", "--all"): "did you mean '--show'?",
        ("plot",): "Run folder",
    }
    for arguments, text in cases.items():
        assert text in refused(capsys, *arguments), arguments


def test_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path, images: Path) -> None:
    (tmp_path / "empty").mkdir()
    run, missing = str(tmp_path / "run"), str(tmp_path / "missing")
    tiny = ("pretrain", "vision-tiny")
    cases = {
        (*tiny, "--data.path", str(images)): "run.dir: expected a folder for the run, got nothing",
        (*tiny, "--run.dir", run): "data.path: expected a folder of images or .tar shards, got nothing",
        (*tiny, "--run.dir", run, "--data.path", missing): "found nothing at",
        (*tiny, "--run.dir", run, "--data.path", str(tmp_path / "empty")): "found none in 0 files",
        (*tiny, "--run.dir", run, "--data.path", str(images), "--model.init", missing): "model.init: expected",
        (*tiny, "--dry-run", "--data.path", missing): "found nothing at",
        (
            "evaluate",
            "probe",
            "--checkpoint",
            missing,
            "--train",
            str(images),
            "--test",
            str(images),
        ): "checkpoint: exp",
        ("evaluate", "probe", "--checkpoint", missing, "--train", missing, "--test", missing): "checkpoint: exp",
        ("plot", missing): "dir: expected a run folder",
        ("data", "textures", "--output", str(images)): "output: expected an absent or empty folder",
    }
    for arguments, text in cases.items():
        assert text in refused(capsys, *arguments), arguments
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "images"]


def test_too_many_bad_images_end_with_a_summary(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, images: Path
) -> None:
    for file in list(images.rglob("*.png"))[:6]:
        file.write_bytes(b"broken")
    run = tmp_path / "run"
    arguments = ["pretrain", "vision-tiny", *tiny_options(), "--data.path", str(images), "--run.dir", str(run)]
    assert main(arguments) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("d2v: data.bad_fraction: expected at most 5.0%")
    assert "got 6 of 12" in text
    assert len((run / "bad_samples.jsonl").read_text().splitlines()) == 6


def test_pretrain_probe_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path, images: Path) -> None:
    run = tmp_path / "run"
    arguments = ["pretrain", "vision-tiny", *tiny_options(), "--data.path", str(images), "--run.dir", str(run)]
    assert main([*arguments, "--data.no-flip", "--published", "equal-mask-counts", "--ema.anneal-steps", "3"]) == 0
    config = Config.from_json((run / "config.json").read_text())
    assert config.recipe == "vision-tiny"
    assert config.encoder.width == 16
    assert not config.data.flip
    assert config.data.crop_scale == (0.4, 1.0)
    assert config.published == {"equal-mask-counts"}
    assert config.ema.anneal_steps == 3
    capsys.readouterr()
    probe = ["evaluate", "probe", "--checkpoint", str(run), "--train", str(images), "--test", str(images)]
    assert main([*probe, "--baselines", "random_init", "pixels", "--draws", "2", "--weights", "student"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["knn"]) == {"pretrained", "random_init", "pixels"}
    assert main(["plot", str(run)]) == 0
    assert (run / "report.png").is_file()
    capsys.readouterr()
    other = [*arguments, "--optim.weight-decay", "0.5"]
    text = refused(capsys, *other)
    assert "optim.weight_decay (stored 0.05, given 0.5)" in text


def test_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path, images: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["pretrain", "vision-tiny", *tiny_options(), "--data.path", str(images), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "(4, 3, 16, 16)" in out
    assert "8 rows of 16 tokens, 4 visible, 96 masked" in out
    assert "MiB" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in recipes.RECIPES)
    assert main(["--version"]) == 0
    assert main(["info", "--json"]) == 0
    assert "operators" in json.loads(capsys.readouterr().out.split("\n", 1)[1])


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        try:
            code = main([*name.split(), "--help"])
        except SystemExit as stop:
            code = int(stop.code or 0)
        assert code == 0, name
        assert "usage" in capsys.readouterr().out.lower()


DIFFERENT = list({recipes.get(name).traits: name for name in recipes.RECIPES}.values())
"""Recipes of which no two have the same options in their help."""


@functools.cache
def help_of(*command: str) -> str:
    text = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(text):
        main([*command, "--help"])
    return text.getvalue()


def names_in(text: str) -> list[str]:
    """Options of a help text, in its order."""
    return re.findall(r"^(?:│ |  )(--[a-z][\w.-]+)", text, re.MULTILINE)


def test_every_option_has_help() -> None:
    names = option_names(cli.COMMANDS["pretrain"].options)
    assert {"--run.steps", "--data.global-batch", "--data.no-flip", "--model.init", "--dry-run"} <= set(names)
    text = "".join(help_of("pretrain", recipe) for recipe in DIFFERENT)
    for name in names:
        assert name in text, name
    text = "".join(help_of("finetune", task) for task in TASKS)
    for name in option_names(cli.COMMANDS["finetune"].options):
        if name.startswith(("--task.", "--decode.", "--optim.", "--worst", "--valid")):
            assert name in text, name
    for name, command in cli.COMMANDS.items():
        for option in list_options(command.options):
            assert len(option.help) > 5, (name, option.name)


def test_help_begins_with_what_everybody_sets_and_leaves_out_what_has_no_effect() -> None:
    first = ["--data.path", "--run.dir", "--run.steps", "--data.global-batch", "--optim.learning-rate"]
    of_fields = {o.name: o for o in list_options(cli.COMMANDS["pretrain"].options)}
    for recipe in DIFFERENT:
        config, text = recipes.get(recipe), help_of("pretrain", recipe)
        names = names_in(text)
        assert names[:5] == first
        rare = [of_fields[name.removeprefix("--")].rare for name in names]
        assert 20 < sum(rare) == len(rare) - rare.index(True)  # the last ones
        sections = {name.removeprefix("--").split(".")[0] for name in names}
        assert ("head" in sections) == (config.version == 1)
        assert ("decoder" in sections) == (config.version == 2)
        for word, modality in (("Speech", "speech"), ("Log-mel", "speech"), ("Text", "text"), ("Image", "vision")):
            of_others = [
                n for n, o in of_fields.items() if o.help.startswith(word) and config.stem.modality != modality
            ]
            assert not set(names) & {f"--{name}" for name in of_others}
    assert len(names_in(help_of("pretrain", "vision-tiny"))) < len(of_fields) - 20
    names = names_in(help_of("finetune", "text-classify"))
    assert names[:5] == ["--checkpoint", "--train", "--valid", "--test", "--run.dir"]
    assert not {"--task.mixup", "--task.time-mask", "--decode.beam", "--data.path", "--data.flip"} & set(names)
    assert {"--task.time-mask", "--decode.beam"} < set(names_in(help_of("finetune", "speech-ctc")))


def test_options_that_the_help_leaves_out_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--stem.mel-bins", "30", "--head.layers", "2", "--data.tokenizer", "x", "--data.unequal", "pad"]
    assert not set(more) & set(names_in(help_of("pretrain", "vision-tiny")))
    assert "data.path: expected a folder" in refused(capsys, "pretrain", "vision-tiny", "--dry-run", *more)


def test_what_options_are_called_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    pretrain, probe = ("pretrain", "vision-tiny"), ("evaluate", "probe")
    cases = {
        (*pretrain, "--lr", "1"): "did you mean '--optim.learning-rate'?",
        (*pretrain, "--optim.lr=1"): "did you mean '--optim.learning-rate'?",
        (*pretrain, "--learning_rate=1"): "did you mean '--optim.learning-rate'?",
        (*pretrain, "--batch-size", "1"): "did you mean '--data.global-batch'?",
        (*pretrain, "--data.batch_size", "1"): "did you mean '--data.global-batch'?",
        (*pretrain, "--epochs", "1"): "did you mean '--run.steps'?",
        ("finetune", "text-classify", "--epochs", "1"): "did you mean '--task.epochs'?",
        (*pretrain, "--seed", "1"): "did you mean '--run.seed'?",
        (*pretrain, "--num_workers", "1"): "did you mean '--data.workers'?",
        (*pretrain, "--workers", "1"): "did you mean '--data.workers'?",
        (*pretrain, "--output", "x"): "did you mean '--run.dir'?",
        (*pretrain, "--data", "x"): "did you mean '--data.path'?",
        (*pretrain, "--dropout", "1"): "did you mean '--stem.dropout' or '--encoder.dropout'?",
        (
            "finetune",
            "text-classify",
            "--recipe",
            "x",
        ): "settings come from the first argument, RECIPE or TASK, and from",
        (*probe, "--batch-size", "1"): "did you mean '--batch'?",
        (*probe, "--ckpt", "x"): "did you mean '--checkpoint'?",
        ("probe", "--test", "x"): "did you mean 'evaluate probe'?",
    }
    for arguments, text in cases.items():
        assert text in refused(capsys, *arguments), arguments


def test_help_needs_neither_torch_nor_the_model() -> None:
    code = "import sys; from d2v.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_features_are_not_kept_waiting_for_what_trains() -> None:
    code = "import sys, d2v.evaluate.features; assert not {'torch.distributed.fsdp', 'sympy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "d2v", "pretrain", "nonsense"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["--help"], ["info", "--json"], ["recipes"]])
def test_commands_without_options_need_no_extra(command: list[str]) -> None:
    done = run_without_tyro(command)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_a_missing_extra_is_named() -> None:
    done = run_without_tyro(["features", "--help"])
    assert done.returncode == 2
    assert done.stderr == "d2v: this command needs tyro: pip install 'd2v[train]'\n"


def run_without_tyro(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A process in which tyro is not installed."""
    program = "import sys; sys.modules['tyro'] = None; from d2v.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("buffered", ["", "1"])
def test_output_that_nobody_reads_is_no_error(buffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "d2v", "recipes", "--show", "vision-tiny"]
    env = {**os.environ, "PYTHONUNBUFFERED": buffered}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, env=env)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
