"""`d2v compare`: which settings differ, means over seeds, tests against scipy and by hand, curves of all runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2v import recipes
from d2v.cli import main
from d2v.tools.compare import compare, compare_pairs, find_differences, make_groups, read_run

from .test_cli import refused

LOSSES = {1e-3: [1.0, 1.1, 1.3], 3e-3: [2.0, 2.1, 2.4]}


def write_run(folder: Path, losses: list[Any], changes: dict[str, Any], **evaluations: Any) -> Path:
    """A run folder with these losses, one every 10 updates."""
    folder.mkdir(parents=True)
    config = recipes.vision_tiny().replace({**changes, "run.dir": str(folder)})
    (folder / "config.json").write_text(config.to_json())
    lines = [{"step": 10 * (i + 1), "loss": loss, "grad_norm": 2.0} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in evaluations.items():
        file = folder / {"probe": "probe.json", "test": "test/result.json"}[name]
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(value))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for rate, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            changes = {"optim.learning_rate": rate, "run.seed": seed}
            write_run(tmp_path / "sweep" / f"{rate}-{seed}", [5.0, loss], changes)
    return tmp_path / "sweep"


def test_means_and_tests_over_seeds(sweep: Path) -> None:
    stats = pytest.importorskip("scipy.stats", reason="p-values need scipy")
    result = json.loads(compare([sweep], as_json=True))
    assert [row["loss"] for row in result["runs"]] == LOSSES[1e-3] + LOSSES[3e-3]
    assert set(result["runs"][0]) == {"run", "step", "loss", "optim.learning_rate", "run.seed"}
    first, _ = result["groups"]
    assert (first["group"], first["runs"], first["seeds"]) == ("learning_rate=0.001", 3, 3)
    a, b = LOSSES.values()
    assert first["loss"] == pytest.approx({"mean": np.mean(a), "deviation": np.std(a, ddof=1)})
    (test,) = result["tests"]
    assert test["difference"] == pytest.approx(np.mean(b) - np.mean(a))
    # Welch's statistic and degrees of freedom by hand.
    va, vb = np.var(a, ddof=1) / 3, np.var(b, ddof=1) / 3
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 2)
    expected = 2 * stats.t.sf(abs(np.mean(b) - np.mean(a)) / math.sqrt(va + vb), freedom)
    assert test["p"] == pytest.approx(expected) == test["p by Holm"]
    text = compare([sweep])
    assert "Welch's t-test over seeds (3, 3 in the groups)" in text
    assert any(line.split() == ["learning_rate=0.001", "3", "3", "1.133", "±", "0.15"] for line in text.splitlines())
    assert "note:" not in text
    # A run counts once, however often it is given.
    assert json.loads(compare([sweep, sweep / "0.001-0", sweep / ".." / "sweep"], as_json=True)) == result


def test_holm_over_three_groups(sweep: Path) -> None:
    pytest.importorskip("scipy", reason="p-values need scipy")
    for seed, loss in enumerate([1.2, 1.4, 1.5]):
        write_run(sweep / f"x-{seed}", [loss], {"optim.learning_rate": 0.5, "run.seed": seed})
    runs = [read_run(path) for path in sorted(sweep.iterdir())]
    tests = compare_pairs(make_groups(runs, find_differences(runs)), "loss")
    ps = sorted(test["p"] for test in tests)
    steps = [min(1.0, 3 * ps[0]), min(1.0, 2 * ps[1]), ps[2]]
    assert sorted(t["p by Holm"] for t in tests) == pytest.approx([max(steps[: i + 1]) for i in range(3)])
    assert "note: the runs stand at different updates, 10 to 20" in compare([sweep])


def test_too_few_seeds_and_no_scipy(sweep: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    single = [sweep / "0.001-0", sweep / "0.003-0"]
    text = compare(single)
    assert "Welch" not in text and "deviation" not in text and "optim.learning_rate" in text
    (test,) = json.loads(compare([*single, sweep / "0.003-1"], as_json=True))["tests"]
    assert test["p"] is None and test["difference"] == pytest.approx(1.05)
    # One seed twice is one seed.
    again = write_run(tmp_path / "again", [1.0], {"optim.learning_rate": 1e-3})
    result = json.loads(compare([single[0], again, sweep / "0.003-0", sweep / "0.003-1"], as_json=True))
    assert [(g["runs"], g["seeds"]) for g in result["groups"]] == [(2, 1), (2, 2)]
    assert result["tests"][0]["p"] is None
    result = json.loads(compare([sweep, again], as_json=True))
    assert [(g["runs"], g["seeds"]) for g in result["groups"]] == [(4, 3), (3, 3)]
    assert result["tests"][0]["p"] is None, "seeds 0, 0, 1, 2 are no four independent runs"
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert json.loads(compare([sweep], as_json=True))["tests"][0]["p"] is None


def test_evaluations_and_what_was_not_finite(tmp_path: Path) -> None:
    probe = {"linear_probe": {"pretrained": 0.8, "random_init": 0.1}, "knn": {"pretrained": 0.7}, "classes": 8}
    scores = {"task": "classification", "samples": 9, "accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 1.0}
    one = write_run(tmp_path / "one", [3.0, None], {}, probe=probe)
    two = write_run(tmp_path / "two", [3.0, 2.0], {"data.flip": False}, probe=probe, test=scores)
    first, second = json.loads(compare([one, two], as_json=True))["runs"]
    assert first | {"run": "", "data.flip": ""} == {
        "run": "", "step": 20, "loss": None, "linear_probe": 0.8, "knn": 0.7, "test.accuracy": None, "data.flip": "",
    }  # fmt: skip
    assert (second["loss"], second["test.accuracy"], second["data.flip"]) == (2.0, 0.9, False)
    lines = compare([one, two]).splitlines()
    assert lines[0].split() == ["run", "step", "loss", "linear_probe", "knn", "test.accuracy", "data.flip"]
    assert lines[1].split()[1:] == ["20", "nan", "0.8", "0.7", "-", "True"]
    assert compare([one, two], metrics=["grad_norm"]).splitlines()[1].split()[1:] == ["20", "2", "True"]


def test_settings_that_older_runs_did_not_know(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, [1.0], {}) for name in ("one", "two"))
    values = json.loads((one / "config.json").read_text())
    del values["run"]["products"]
    (one / "config.json").write_text(json.dumps(values))
    runs = [read_run(one), read_run(two)]
    assert find_differences(runs) == []
    assert list(make_groups(runs, [])) == ["all"]


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(c) for c, n in zip(found.tolist(), counts, strict=True) if n > 50 and max(c) - min(c) > 60}


def test_the_picture_has_a_colour_for_each_group(sweep: Path, tmp_path: Path) -> None:
    blue, orange = (31, 119, 180), (255, 127, 14)
    compare([sweep / "0.001-0", sweep / "0.001-1"], output=tmp_path / "one.png")
    compare([sweep], output=tmp_path / "two.png")
    assert colours(tmp_path / "one.png") & {blue, orange} == {blue}
    assert colours(tmp_path / "two.png") & {blue, orange} == {blue, orange}


def test_the_command(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(sweep), "--output", str(tmp_path / "c.png"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 6
    assert (tmp_path / "c.png").is_file()
    assert main(["compare", *map(str, sorted(sweep.iterdir())), "--metrics", "grad_norm"]) == 0
    assert "grad_norm" in capsys.readouterr().out.splitlines()[0]
    assert "metrics: expected some of loss, grad_norm, got 'los'" in refused(
        capsys, "compare", str(sweep), "--metrics", "los"
    )
    assert "found none at" in refused(capsys, "compare", str(tmp_path / "nowhere"))
    assert "got nothing" in refused(capsys, "compare")
    (sweep / "0.001-0" / "config.json").write_text("{")
    assert "config.json" in refused(capsys, "compare", str(sweep))
