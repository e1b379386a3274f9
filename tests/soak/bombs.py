"""Every file of a run folder replaced by a pickle that would execute: nothing does."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from soak.cases import make_data, options
from soak.jobs import call

PLANTED = (".metadata", "__0_0.distcp", "checkpoint.pt", "optimizer.pt", "pytorch_model.bin", "trainer.pkl")
"""Names under which other tools leave pickles; put beside the real files of a checkpoint."""


class Bomb:
    """Unpickled, it makes the folder `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.marker, 0o777, True, True)


def make_bombs(folder: Path) -> tuple[list[bytes], Path]:
    """A bare pickle and one in torch.save's file, and the folder that either would make; shows that both would."""
    marker = folder / "exploded"
    zipped = io.BytesIO()
    torch.save({"weights": Bomb(marker)}, zipped)
    bombs = [pickle.dumps(Bomb(marker)), zipped.getvalue()]
    for bomb, load in zip(bombs, (pickle.loads, lambda b: torch.load(io.BytesIO(b), weights_only=False)), strict=True):
        load(bomb)
        assert marker.is_dir(), "expected the bomb to work where it is let"
        marker.rmdir()
    return bombs, marker


def plant_everywhere(folder: Path, modality: str = "vision", *, thorough: bool = True) -> dict[str, int]:
    """Replaces one file of a run folder after the other by a bomb, resumes the run and exports its weights.

    Each command must end well (the file is not needed) or with exit code 2 and one sentence, and nothing may have been
    executed. Returns how often each happened. Raises `AssertionError` with file, command and text otherwise.
    Not `thorough`: the two kinds of bombs take turns, and the run is only resumed.
    """
    data = make_data(modality, folder / "data")
    clean, run, export = folder / "clean", folder / "run", folder / "export"
    command = options(modality, data, run, 2, every=1, batch=4, small=True)
    code, text = call(["pretrain", *options(modality, data, clean, 2, every=1, batch=4, small=True)])
    assert code == 0, text
    last = "checkpoints/step-00000002"
    files = sorted(str(p.relative_to(clean)) for p in clean.rglob("*") if p.is_file())
    assert len([f for f in files if f.startswith(last)]) >= 4
    bombs, marker = make_bombs(folder)
    commands = [["pretrain", *command]]
    if thorough:
        commands += [
            ["export", "--checkpoint", str(run), "--format", "safetensors", "--output", str(export)],
            ["plot", str(run)],
        ]
    counts = {"refused": 0, "not needed": 0}
    for number, name in enumerate([*files, *(f"{last}/{n}" for n in PLANTED), *PLANTED]):
        for bomb in bombs if thorough else [bombs[number % 2]]:
            for arguments in commands:
                for old in (run, export):
                    shutil.rmtree(old, ignore_errors=True)
                shutil.copytree(clean, run)
                (run / name).write_bytes(bomb)
                code, text = call(arguments)
                what = f"a bomb in {name}, d2v {arguments[0]}"
                assert not marker.exists(), f"{what}: it was executed"
                assert code in (0, 2), f"{what}: expected exit code 0 or 2, got {code}: {text}"
                sentences = [line for line in text.splitlines() if line.startswith("d2v: ")]
                assert code == 0 or len(sentences) == 1, f"{what}: expected one sentence, got {text!r}"
                counts["refused" if code else "not needed"] += 1
    return counts
