"""The folder of a stranger: nothing of it runs, chooses a place or takes memory; what it says is checked first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2v.cli import main
from d2v.config import Config
from d2v.config.fields import flat_fields, forget_places
from d2v.config.finetune import FineTuneConfig, read_config
from d2v.model.data2vec import build_model
from d2v.model.saving import write_folder
from d2v.train import run_dir

PLACES = {
    "data.path", "data.valid", "data.tokenizer", "data.cache", "data.allow_commands", "run.dir",
    "target.cache", "run.compile_cache", "run.local_checkpoint",
    "finetune.options.bpe", "probe.train", "probe.test",
}  # fmt: skip
NO_PLACES = {"stem.modality", "recipe", "target.norm", "target.out_norm", "run.keep_best", "finetune.task"}
"""Texts that name no file."""


@pytest.fixture
def export(make_config: Callable[..., Config], tmp_path: Path) -> Path:
    """An exported folder."""
    write_folder(build_model(make_config()), tmp_path / "export")
    return tmp_path / "export"


def edit(folder: Path, name: str, value: Any) -> None:
    """Changes a setting of a folder's configuration."""
    config = json.loads((folder / "config.json").read_text())
    section, _, field = name.rpartition(".")
    (config[section] if section else config)[field] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_every_place_is_marked() -> None:
    fields = flat_fields(FineTuneConfig)
    assert {n for n, f in fields.items() if f.metadata.get("outside")} == PLACES
    texts = {n for n, f in fields.items() if f.type in ("str", "str | None")}
    assert texts - PLACES == NO_PLACES, "a new text: does it name a file? then setting(outside=True)"


@pytest.mark.parametrize("name", sorted(PLACES))
def test_no_place_is_taken_from_a_folder(name: str, tmp_path: Path) -> None:
    config = FineTuneConfig().replace({"ema.freeze_after": 0, "run.compile": True})  # some need it
    value = True if name == "data.allow_commands" else str(tmp_path / "elsewhere")
    together = ("probe.train", "probe.test") if name.startswith("probe.") else (name,)
    changed = config.replace(dict.fromkeys(together, value))
    (tmp_path / "config.json").write_text(changed.to_json())
    assert changed != config and read_config(tmp_path / "config.json") == config == forget_places(changed)


@pytest.mark.parametrize("command", ["plot", "features", "probe"])
def test_nothing_of_a_folder_runs_or_is_written_elsewhere(
    command: str, make_config: Callable[..., Config], images: Path, tmp_path: Path
) -> None:
    run, marker, cache = tmp_path / "run", tmp_path / "ran", tmp_path / "cache"
    tiny = make_config(run={"steps": 1})
    from d2v.train.pretraining import pretrain

    pretrain(tiny)
    for folder in (run, *(run / "checkpoints").iterdir()):
        for name, value in (("path", f"pipe:touch {marker}"), ("allow_commands", True), ("cache", str(cache))):
            edit(folder, f"data.{name}", value)
    piped, output = f"pipe:touch {marker}", str(tmp_path / "out.npy")
    given = {
        "plot": [["plot", str(run)], ["plot", str(run), "--images", piped]],
        "features": [
            ["features", "--checkpoint", str(run), "--input", i, "--output", output] for i in (piped, str(images))
        ],
        "probe": [["evaluate", "probe", "--checkpoint", str(run), "--train", piped, "--test", piped]],
    }
    for arguments in given[command]:
        assert main(arguments) in (0, 2)
    assert not marker.exists() and not cache.exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("encoder.depth", 10**9, "layers for"),
        ("encoder.depth", "2", "expected int"),
        ("encoder.width", 2_000_000, "expected shape"),
        ("encoder.width", 2 * 10**12, "no model"),
        ("encoder.width", 10**400, "expected int"),
        ("encoder.width", 17, "multiple of"),
        ("encoder.heads", 0, "1 or more"),
        ("encoder.mlp_ratio", 1e308, "model"),
        ("encoder.mlp_ratio", float("nan"), "expected"),
        ("encoder.mlp_ratio", None, "expected float"),
        ("decoder.layers", 10**7, "layers for"),
        ("decoder.kernel", -1, "1 or more"),
        ("decoder.groups", 0, "1 or more"),
        ("stem.image_size", 10**9, "patches"),
        ("stem.image_size", True, "expected int"),
        ("stem.patch_size", 0, "1 or more"),
        ("stem.channels", 4, "expected shape"),
        ("stem.convolutions", [[512, 10]], "expected"),
        ("stem.convolutions", [[0, 0, 0]], "1 or more"),
        ("target.norm", 3, "expected str"),
        ("version", 3, "expected one of 1, 2"),
        ("version", True, "expected one of 1, 2"),
        ("published", [3], "expected str"),
        ("data", [], "expected an object"),
        ("data.workers", 10**9, "0 to 4096"),
        ("data.crop_scale", [0.1], "expected"),
        ("run.steps", 10**15, "2^40"),
    ],
)
def test_numbers_of_a_configuration_are_checked_first(
    export: Path, name: str, value: Any, words: str, capsys: pytest.CaptureFixture[str], images: Path, tmp_path: Path
) -> None:
    edit(export, name, value)
    command = ["features", "--checkpoint", str(export), "--input", str(images), "--output", str(tmp_path / "f.npy")]
    assert main(command) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("d2v: checkpoint") and words in sentence and len(sentence) < 500, sentence


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"data": ' + "[" * 900 + "]" * 900 + "}",
        "\x00",
        '{"run": {"steps": 1e999}}',
        '{"encoder": ' + "9" * 5000 + "}",
    ],
)
def test_no_configuration_ends_in_a_traceback(export: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (export / "config.json").write_text(text)
    assert main(["export", "--checkpoint", str(export), "--format", "safetensors", "--output", str(export / "x")]) == 2
    assert capsys.readouterr().err.startswith("d2v: checkpoint: cannot read")


def test_a_run_that_goes_on_takes_no_cache_from_its_folder(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config().change(data={"cache": str(tmp_path / "cache")}, run={"dir": str(tmp_path / "run")})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config.to_json())
    assert run_dir.read_run(str(tmp_path / "run")) == config.change(data={"cache": None})
    note = f"note: data.cache counts on the command line only; it was {str(tmp_path / 'cache')!r}"
    assert note in capsys.readouterr().err
