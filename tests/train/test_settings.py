"""Settings from a file, from a function of the user, and from the command line: which counts, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from d2v import recipes
from d2v.cli import main
from d2v.config import Config
from d2v.config.fields import flat_fields
from d2v.settings import load_recipe, pretrain_defaults, value_of, write_toml

from .conftest import tiny_options
from .test_cli import refused

USER_FILE = """
from d2v import recipes
open({marker!r}, "a").write("run ")
def small_images():
    return recipes.vision_tiny().replace({{"optim.learning_rate": 0.5, "recipe": "mine"}})
def nothing():
    return "vision-tiny"
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    file = tmp_path / "settings.toml"
    file.write_text(
        'recipe = "vision-tiny"\n[optim]\nlearning_rate = 2e-3\nclip = "None"\nbetas = [0.8, 0.9]\n'
        '[data]\nglobal-batch = 8\n[run]\nseed = 3\n[stem]\ndropout = 0\n'
    )  # fmt: skip
    return file


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    """Writes a word to `ran` in its folder whenever it is run."""
    file = tmp_path / "mine.py"
    file.write_text(USER_FILE.format(marker=str(tmp_path / "ran")))
    return file


def read(*arguments: str) -> Config:
    first = "" if arguments[0].startswith("-") else arguments[0]
    return pretrain_defaults(first, arguments)[1]


def changed(file: Path, old: str, new: str) -> Path:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file


def test_a_file_replaces_settings_of_its_recipe(toml: Path) -> None:
    expected = recipes.vision_tiny().replace({
        "optim.learning_rate": 2e-3, "optim.clip": None, "optim.betas": (0.8, 0.9), "data.global_batch": 8,
        "run.seed": 3,
    })  # fmt: skip
    assert read("--config", str(toml)) == expected
    assert read("vision1-tiny", "--config", str(toml)).version == 1
    assert read("--recipe", "vision1-tiny", f"--config={toml}").recipe == "vision1-tiny"
    as_json = toml.with_suffix(".json")
    as_json.write_text(json.dumps({"recipe": "vision-tiny", "optim.learning-rate": 2e-3, "optim": {"clip": None}}))
    assert read("--config", str(as_json)) == recipes.vision_tiny().replace(
        {"optim.learning_rate": 2e-3, "optim.clip": None}
    )


def test_the_command_line_replaces_the_file(capsys: pytest.CaptureFixture[str], toml: Path, images: Path) -> None:
    changed(toml, "global-batch", f'path = "{images}"\nimage-range = [0, 4000.5]\nglobal-batch')
    options = ["--optim.learning-rate", "3e-3", "--data.no-flip", "--data.rotate", "--run.threads=1"]
    assert main(["pretrain", "--config", str(toml), *options, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip().removeprefix("settings     ") for line in lines[1:11]] == [
        "optim.learning-rate 0.003: command line (recipe: 0.004)",
        f"optim.betas (0.8, 0.9): {toml} (recipe: (0.9, 0.98))",
        f"optim.clip None: {toml} (recipe: 3.0)",
        f"data.path {images}: {toml} (recipe: nothing)",
        f"data.global-batch 8: {toml} (recipe: 16)",
        "data.flip False: command line (recipe: True)",
        f"data.image-range ('0', '4000.5'): {toml} (recipe: ('auto',))",
        f"run.seed 3: {toml} (recipe: 0)",
        "run.threads 1: command line (recipe: None)",
        "all others: recipe",
    ]
    assert "(8, 3, 32, 32) per micro-batch" in lines[12]


def test_a_whole_run_from_a_file_and_its_config_again(
    capsys: pytest.CaptureFixture[str], toml: Path, images: Path, tmp_path: Path
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    options = [*tiny_options(), "--data.path", str(images), "--run.dir", str(run)]
    assert main(["pretrain", "--config", str(toml), *options]) == 0
    stored = Config.from_json((run / "config.json").read_text())
    assert (stored.optim.learning_rate, stored.data.global_batch, stored.run.seed) == (2e-3, 4, 3)
    capsys.readouterr()
    # Its own folder is no setting: a new run has a place of its own.
    command = ["pretrain", "--config", str(run / "config.json"), "--run.steps", "2"]
    assert "run.dir: expected a folder for the run, got nothing" in capsys_lines(capsys, command)[-1]
    assert main([*command, "--run.dir", str(again)]) == 0
    assert f"note: {run}/config.json: these count on the command line only: run.dir" in capsys.readouterr().err
    expected = stored.replace({"run.dir": str(again), "run.steps": 2})
    assert Config.from_json((again / "config.json").read_text()) == expected
    # What the run did not know yet has its default, and its recipe need not be one of ours.
    values = json.loads((run / "config.json").read_text())
    del values["mask"]["span"]
    for name in ("vision-tiny", "of-another-version"):
        (run / "config.json").write_text(json.dumps({**values, "recipe": name}))
        config = read("--config", str(run / "config.json"))
        assert (config.recipe, config.mask.span) == (name, Config().mask.span)
    assert Config().mask.span != stored.mask.span
    (run / "config.json").write_text(json.dumps({**values, "recipe": ["a"]}))
    with pytest.raises(ValueError, match=r"recipe: expected str, got \['a'\]"):
        read("--config", str(run / "config.json"))


def test_the_architecture_of_a_checkpoint_comes_between_recipe_and_file(
    toml: Path, make_config: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from d2v.train.pretraining import pretrain

    folder = pretrain(make_config(run={"steps": 1, "dir": str(tmp_path / "first")}, stem={"dropout": 0.5}))
    changed(toml, "[stem]\n", "[decoder]\nkernel = 3\n[stem]\nchannels = 3\n")
    options = ["--data.path", str(images), "--model.init", str(folder), "--stem.position-scale", "0.25"]
    assert main(["pretrain", "--config", str(toml), *options, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "encoder.width 16: --model.init (recipe: 64)" in out
    assert "stem.position-scale 0.25: command line (recipe: 0.1)" in out
    # What a checkpoint has and the file says otherwise does not fit.
    changed(toml, "[decoder]\nkernel = 3", "[decoder]\nkernel = 5")
    assert "decoder.kernel 3, got 5" in refused(capsys, "pretrain", "--config", str(toml), *options, "--dry-run")


def capsys_lines(capsys: pytest.CaptureFixture[str], command: list[str]) -> list[str]:
    assert main(command) == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("g_rate", "g_rat", "expected a setting, got 'optim.learning_rat'; did you mean 'optim.learning-rate'?"),
        ("learning_rate", "lr", "expected a setting, got 'optim.lr'; did you mean 'optim.learning-rate'?"),
        ("[optim]", "[optimizer]", "got 'optimizer.learning_rate'; did you mean 'optim.learning-rate'?"),
        ("2e-3", '"fast"', "optim.learning_rate: expected float, got fast"),
        ("clip", "learning-rate = 1\nclip", "expected optim.learning-rate once, got it with a dash and with an"),
        ("seed = 3", "seed = 3.5", "run.seed: expected int, got 3.5"),
        ("seed = 3", "seed = true", "run.seed: expected int, got True"),
        ("seed = 3", "seed = 2020-01-01", "run.seed: expected int, got 2020-01-01"),
        ("seed = 3", "seed = {a = 1}", "run.seed: expected int, got {'a': 1}"),
        ("[0.8, 0.9]", "[0.8]", "optim.betas: expected tuple[float, float], got [0.8]"),
        ("2e-3", "-1.0", "optim.learning_rate: expected 0 or more, got -1.0"),
        ("[stem]", "[encoder]\nheads = 7\n[stem]", "encoder.width: expected a multiple of encoder.heads, got 64"),
        ('"vision-tiny"', '"vision-tyny"', "recipe: expected one of"),
        ('recipe = "vision-tiny"', "", "recipe: expected the name of a recipe here or on the command"),
        ('"vision-tiny"', "3", "recipe: expected the name of a recipe here or on the command line, got 3"),
        ("[stem]", "[stem", "expected TOML, got what cannot be read: "),
        ("[0.8, 0.9]", "[" * 100_000, "expected TOML, got what cannot be read: "),
        ("[stem]", "[finetune]", "expected settings of pre-training, got those of a fine-tuned model"),
        ("[stem]", "[checkpoint]", "expected a setting, got 'checkpoint.dropout'"),
        ('recipe =', 'dry-run = true\nrecipe =', "expected a setting, got 'dry-run'"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_say(
    capsys: pytest.CaptureFixture[str], toml: Path, old: str, new: str, expected: str
) -> None:
    text = refused(capsys, "pretrain", "--config", str(changed(toml, old, new)), "--dry-run")
    assert text.startswith(f"d2v: {toml}: ") and expected in text


def test_files_that_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert refused(capsys, "pretrain", "--config", str(missing)) == f"d2v: {missing}: No such file or directory\n"
    assert "Is a directory" in refused(capsys, "pretrain", "--config", str(tmp_path))
    (tmp_path / "a.json").write_text('{"run": ')
    assert "expected JSON, got what cannot be read" in refused(capsys, "pretrain", "--config", str(tmp_path / "a.json"))
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    assert "expected TOML, got what cannot be read" in refused(capsys, "pretrain", "--config", str(tmp_path / "a.toml"))
    os.mkfifo(tmp_path / "pipe.toml")
    for endless in (str(tmp_path / "pipe.toml"), "/dev/zero"):  # would be waited for, or fill the memory
        assert "got what cannot be read: not a regular file" in refused(capsys, "pretrain", "--config", endless)
    assert "Missing value for argument '--config'" in refused(capsys, "pretrain", "vision-tiny", "--config")


def test_no_file_chooses_where_to_write_or_runs_something(
    capsys: pytest.CaptureFixture[str], toml: Path, tmp_path: Path
) -> None:
    places = f'path = "pipe:touch {tmp_path}/x"\nallow-commands = true\ncache = "{tmp_path}/cache"\n'
    changed(toml, "[data]\n", f"[data]\n{places}")
    changed(toml, "[run]\n", f'[run]\ndir = "{tmp_path}/run"\n')
    toml.write_text(f'{toml.read_text()}\n[target]\ncache = "{tmp_path}/targets"\n')
    config = read("--config", str(toml))
    assert (config.run.dir, config.data.cache, config.data.allow_commands) == ("", None, False)
    assert config.target.cache is None
    note = (
        f"note: {toml}: these count on the command line only: data.allow-commands, data.cache, run.dir, target.cache\n"
    )
    assert capsys.readouterr().err == note
    assert main(["pretrain", "--config", str(toml), "--dry-run"]) == 2
    assert "allow" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["settings.toml"]


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_are_shown_as_files(name: str, tmp_path: Path) -> None:
    file = tmp_path / "shown.toml"
    file.write_text(write_toml(recipes.get(name)))
    assert read("--config", str(file)) == recipes.get(name)
    text = file.read_text()
    for field, f in flat_fields(Config).items():
        assert (f"\n{field.rpartition('.')[2]} = " in f"\n{text}") or f.metadata["outside"], field


def test_show_prints_what_a_file_may_hold(capsys: pytest.CaptureFixture[str], user_file: Path, tmp_path: Path) -> None:
    assert main(["recipes", "--show", "text-base"]) == 0
    (tmp_path / "a.toml").write_text(capsys.readouterr().out)
    assert read("--config", str(tmp_path / "a.toml")) == recipes.text_base()
    assert main(["recipes", "--show", f"{user_file}:small_images"]) == 0
    (tmp_path / "b.toml").write_text(capsys.readouterr().out)
    assert read("--config", str(tmp_path / "b.toml")) == load_recipe(f"{user_file}:small_images")
    assert "did you mean 'text-base'?" in refused(capsys, "recipes", "--show", "text-bas")
    odd = Config(recipe='a "b"\\\u00e9\n', published=frozenset({"loss-on-padding"}))
    (tmp_path / "c.toml").write_text(write_toml(odd.replace("optim.clip", float("inf"))), encoding="utf-8")
    assert read("--config", str(tmp_path / "c.toml")) == odd.replace("optim.clip", float("inf"))


def test_a_function_of_the_user(
    capsys: pytest.CaptureFixture[str], user_file: Path, images: Path, tmp_path: Path
) -> None:
    run, ran = tmp_path / "run", tmp_path / "ran"
    place = ["--run.dir", str(run)]
    options = [*tiny_options(), "--data.path", str(images), *place]
    assert main(["pretrain", "--recipe", f"{user_file}:small_images", *options, "--run.steps", "3"]) == 0
    assert ran.read_text() == "run "
    stored = Config.from_json((run / "config.json").read_text())
    assert (stored.recipe, stored.optim.learning_rate, stored.encoder.width) == ("mine", 0.5, 16)
    # From here on, the run is in its folder: the file may be gone.
    assert main(["pretrain", *place, "--run.log-every", "1"]) == 0
    assert main(["pretrain", "--config", str(run / "config.json"), "--run.dir", str(tmp_path / "other")]) == 0
    assert ran.read_text() == "run "
    assert main(["pretrain", f"{user_file}:small_images", *options, "--run.steps", "3"]) == 0  # the first argument, too
    assert ran.read_text() == "run run "
    cases = {
        ("--recipe", f"{user_file}:smal_images"): "did you mean 'small_images'?",
        ("--recipe", f"{user_file}:nothing"): "nothing, got str",
        ("--recipe", str(user_file)): "recipe: expected one of",
        ("--recipe", f"{tmp_path}/no.py:f"): "no.py: No such file or directory",
        ("vision-tiny", "--recipe", "vision-base"): "recipe: expected one, got 'vision-tiny' and 'vision-base'",
        ("--recipe", "vision-tyny"): "did you mean 'vision-tiny'?",
    }
    for arguments, text in cases.items():
        assert text in refused(capsys, "pretrain", *arguments, "--dry-run"), arguments


@pytest.mark.parametrize("whole", [False, True])
def test_no_file_of_settings_and_no_run_names_code(
    whole: bool, capsys: pytest.CaptureFixture[str], user_file: Path, tmp_path: Path
) -> None:
    name, file = f"{user_file}:small_images", tmp_path / "config.json"
    values: dict[str, Any] = json.loads(recipes.vision_tiny().to_json()) if whole else {}
    file.write_text(json.dumps({**values, "recipe": name}))
    text = refused(capsys, "pretrain", "--config", str(file), "--dry-run")
    assert text == (
        f"d2v: {file}: recipe: expected a name, got {name!r}: a file with code counts on the command line only\n"
    )
    run = tmp_path / "run"
    run.mkdir()
    file.rename(run / "config.json")
    if whole:  # a stranger's run
        main(["pretrain", "--run.dir", str(run)])
    assert not (tmp_path / "ran").exists()


def test_fine_tuning_takes_a_file(
    capsys: pytest.CaptureFixture[str], make_config: Any, images: Path, tmp_path: Path
) -> None:
    from d2v.train.pretraining import pretrain

    folder = pretrain(make_config(run={"steps": 1, "dir": str(tmp_path / "pre")}))
    file, first, second = tmp_path / "a.toml", tmp_path / "first", tmp_path / "second"
    text = "[task]\nepochs = 2\nmixup = 0\nvalid_share = 0.3\n[optim]\nlearning-rate = 0.5\n[data]\nglobal_batch = 4\n"
    file.write_text(text)
    command = ["finetune", "vision-classify", "--checkpoint", str(folder), "--train", str(images)]
    assert main([*command, "--config", str(file), "--optim.learning-rate", "0.25", "--run.dir", str(first)]) == 0
    stored = json.loads((first / "config.json").read_text())
    options = stored["finetune"]["options"]
    assert (options["epochs"], options["mixup"], options["valid_share"]) == (2, 0, 0.3)
    assert (stored["optim"]["learning_rate"], stored["data"]["global_batch"]) == (0.25, 4)
    capsys.readouterr()
    assert main([*command, "--config", str(first / "config.json"), "--run.dir", str(second)]) == 0
    assert "these count on the command line only: data.path, run.dir" in capsys.readouterr().err
    again = json.loads((second / "config.json").read_text())
    assert again == {**stored, "run": {**stored["run"], "dir": str(second)}}
    for text, expected in (
        ("[task]\nepoch = 3", "got 'task.epoch'; did you mean 'task.epochs'?"),
        ('[task]\nepochs = "x"', "task.epochs: expected float, got x"),
        ("[task]\nmixup = -1", "task.mixup: expected 0 or more, got -1"),
        ("checkpoint = 'x'", "expected a setting, got 'checkpoint'"),
        ("[encoder]\ndepth = 3", "expected a setting, got 'encoder.depth'"),
    ):
        file.write_text(text)
        text = refused(capsys, *command, "--config", str(file), "--run.dir", str(tmp_path / "third"))
        assert text.startswith(f"d2v: {file}: ") and expected in text


def test_the_last_value_of_an_option_counts() -> None:
    assert value_of("--run.dir", ["--run.dir", "a/x=1", "--run.dir=b/y=2"]) == "b/y=2"
    assert value_of("--run.dir", ["--run.dir", "a/x=1,y=2"]) == "a/x=1,y=2"
    assert value_of("--run.dir", ["--run.dir"]) is None
    assert value_of("--run.dir", []) is None
