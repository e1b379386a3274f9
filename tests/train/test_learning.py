"""Every tiny recipe learns: 200 updates on data of its kind, judged by the monitors of the run.

Speech is generated unless pytest is given a folder of recordings (`--data DIR`); text is Python's own reference, the
topics of `help()`; images are crops of photographs from the scikit-image package; signals are those of
`examples/own_modality.py`.
"""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import pytest
from support.sounds import write_sounds

from d2v import recipes
from d2v.tools.textures import write_textures
from d2v.train.logging import read_metrics
from d2v.train.pretraining import pretrain

STEPS, WINDOW = 200, 20
NAMES = [
    name if name in ("text1-tiny", "vision1-tiny") else pytest.param(name, marks=pytest.mark.long)
    for name in recipes.RECIPES
    if name.endswith("-tiny")
]
"""Those that take more than about ten seconds are run with the long tests."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, str]:
    """Path of the data of each modality."""
    from pydoc_data.topics import topics

    root = tmp_path_factory.mktemp("data")
    (root / "topics.txt").write_text("\n\n".join(topics.values()), encoding="utf-8")
    write_textures(root / "textures", seed=0, size=32, counts={"pretrain": 100})
    given = request.config.getoption("--data")
    speech = given if given is not None else str(write_sounds(root / "sounds", count=96))
    sounds = {"speech": speech, "spectrograms": speech}
    example = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "own_modality.py"))
    signals = str(example["write_recordings"](root / "signals", 32, 0))
    pixels = str(root / "textures" / "pretrain")
    return {**sounds, "text": str(root / "topics.txt"), "vision": pixels, "signals": signals}


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_recipe_learns(name: str, folders: dict[str, str], tmp_path: Path) -> None:
    config = recipes.get(name)
    data = dataclasses.replace(config.data, path=folders[config.stem.modality], workers=0)
    run = dataclasses.replace(
        config.run, dir=str(tmp_path / "run"), steps=STEPS, log_every=1, checkpoint_every=STEPS, threads=1, device="cpu"
    )
    lines = read_metrics(pretrain(dataclasses.replace(config, data=data, run=run)) / "metrics.jsonl")
    assert len(lines) == STEPS

    def mean(key: str, first: int) -> float:
        return float(sum(line[key] for line in lines[first : first + WINDOW]) / WINDOW)

    assert mean("loss", STEPS - WINDOW) <= 0.9 * mean("loss", 0)
    assert mean("explained_variance", STEPS - WINDOW) >= 0.05
    assert mean("prediction_std", STEPS - WINDOW) >= 0.2 * mean("target_std", STEPS - WINDOW)
    assert mean("content_spread", STEPS - WINDOW) >= 0.5 * lines[0]["content_spread"]
