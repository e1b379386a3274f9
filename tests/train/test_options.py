"""The options of every command are frozen: a new, renamed or lost one shows in `options.txt`.

`python tests/train/test_options.py` rewrites that file; what it changes is a change of the command line for users.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]  # also for the program below

from d2v import cli, options, recipes  # noqa: E402

FILE = Path(__file__).with_name("options.txt")


def list_options() -> Iterator[str]:
    """`command --option` for every option, in the order of the commands and of their help."""
    for command in sorted(cli.COMMANDS):
        yield from (f"{command} {name}" for name in options.option_names(cli.COMMANDS[command].options))


def test_options_are_frozen() -> None:
    frozen, found = FILE.read_text(encoding="utf-8").splitlines(), list(list_options())
    new, lost = sorted(set(found) - set(frozen)), sorted(set(frozen) - set(found))
    assert not new, f"new options: {new}; python tests/train/test_options.py lists them"
    assert not lost, f"options are gone: {lost}; users' commands break"
    assert found == frozen


def test_options_that_every_recipe_has() -> None:
    promised = [
        "run.steps", "run.seed", "run.log-every", "run.checkpoint-every", "run.precision", "run.dir",
        "data.global-batch", "data.workers", "data.path", "data.valid", "optim.learning-rate", "ema.start", "ema.end",
        "model.init", "dry-run",
    ]  # fmt: skip
    frozen = FILE.read_text(encoding="utf-8").splitlines()
    assert {f"pretrain --{name}" for name in promised} <= set(frozen)
    assert len(recipes.RECIPES) > 15  # whose options are the same: one class


def test_a_change_would_be_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "options.txt").write_text("".join(f"{line}\n" for line in list_options()), encoding="utf-8")
    monkeypatch.setitem(globals(), "FILE", tmp_path / "options.txt")
    test_options_are_frozen()
    original = options.option_names
    monkeypatch.setattr(options, "option_names", lambda kind: [*original(kind), "--surprise"])
    with pytest.raises(AssertionError, match=r"new options: \['audit .*--surprise"):
        test_options_are_frozen()
    monkeypatch.setattr(options, "option_names", lambda kind: original(kind)[1:])
    with pytest.raises(AssertionError, match="options are gone"):
        test_options_are_frozen()


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for line in list_options()), encoding="utf-8")
    print(f"{FILE}: {len(FILE.read_text(encoding='utf-8').splitlines())} options")
