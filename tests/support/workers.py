"""What pytest's workers share (`pytest -n 2`): things that take long to make, made once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def make_once(folder: Path, name: str, make: Callable[[], Path]) -> Path:
    """The file or folder that `make` returns, called in the first process that asks; the others wait for it.

    `folder` is the fixture `shared_folder` or a folder in it, `name` one file name. Where `make` fails, the next tries.
    """
    made = folder / f"{name}.made"
    with FileLock(folder / f"{name}.lock"):
        if not made.is_file():
            made.write_text(str(make()))
    return Path(made.read_text())
