"""The table of `benchmarks.scaling`, and that docs/scaling.md has its figures."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.harness.report import markdown
from benchmarks.scaling.__main__ import main
from d2v import recipes
from d2v.tools.cluster import Cluster, estimate
from d2v.tools.plan import assumptions, cells

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_says_that_it_estimates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "scaling.png"
    main(["--gpus", "8", "512", "--recipe", "speech-base", "--plot", str(plot)])
    text = capsys.readouterr().out
    assert text.startswith("Estimates, not measurements")
    assert [line.split("|")[3].strip() for line in text.splitlines() if line.startswith("| `")] == ["8", "512"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    for wrong in (["--gpus", "0"], ["--network", "0"]):
        with pytest.raises(SystemExit, match=f"{wrong[0]}: expected"):
            main(wrong)


def test_the_guide_has_the_figures_of_the_program() -> None:
    """docs/scaling.md is what the program prints with its defaults."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    cluster = Cluster()
    for recipe in ("vision-base", "speech-base", "text-large"):
        for gpus in (8, 64):
            row = cells(estimate(recipes.get(recipe), gpus, "ddp", cluster), cluster)
            assert markdown(row, []).splitlines()[0] in text
    assert assumptions(cluster).split(":")[0] in text
    assert (ROOT / "docs" / "scaling.png").stat().st_size < 100_000
    assert math.isclose(Cluster().peak, 989e12)
