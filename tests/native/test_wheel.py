"""The portable wheel holds no trace of the Python and torch it was built with: it runs under others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .test_install import ROOT, _copy_sources

USE = """
import json, sys, torch
import d2v_kernels as dk
from d2v_kernels import info

layers = [torch.randn(2, 70, 33, generator=torch.Generator().manual_seed(i)) for i in range(3)]
results = {}
for backend in ("native", "reference"):
    with dk.use_backend(backend):
        results[backend] = dk.average_layers(layers, norm="instance")
average, source = torch.zeros(100), torch.ones(100)
with dk.use_backend("native"):
    dk.update_ema_([average], [source], 0.75)
plan = dk.EmaPlan([average], [source])
plan.step(0.0)
masks = dk.MaskSampler("block", tokens=99, ratio=0.5, span=5).draw([3, 4], 0)
report = info.collect()
print(json.dumps({
    "where": dk.__file__,
    "torch": torch.__version__,
    "python": list(sys.version_info[:2]),
    "error": float((results["native"] - results["reference"]).abs().max()),
    "average": float(average.mean()),
    "masked": masks.mask.sum(1).tolist(),
    "chosen": {row["op"]: row["native"] for row in report["operators"] if row["device"] == "cpu"},
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portable wheel, CPU library only."""
    source = _copy_sources(tmp_path_factory.mktemp("wheel") / "source")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--python-tag", "py3"],
        cwd=source, env={**_environment(), "D2V_BUILD_CUDA": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (source / "dist").iterdir()
    return wheel


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def use_wheel(wheel: Path, python: str, site: Path) -> dict[str, object]:
    """Installs the wheel for an interpreter, outside its own packages, and uses it there."""
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    done = subprocess.run(install, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    environment = {**_environment(), "PYTHONPATH": str(site)}
    done = subprocess.run([python, "-c", USE], cwd=site, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert str(report["where"]).startswith(str(site))
    assert report["error"] < 1e-5 and report["average"] == 1.0 and report["masked"] == [49, 49]  # type: ignore[operator]
    return report


@pytest.mark.long
def test_wheel_has_no_python_tag(wheel: Path, tmp_path: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["py3", "none"], wheel.name
    use_wheel(wheel, sys.executable, tmp_path / "site")


@pytest.mark.long
def test_the_same_bits_twice(tmp_path: Path) -> None:
    """Compiled twice, in folders of different names, at different times."""
    digests = []
    for name in ("here", "a longer path"):
        source = _copy_sources(tmp_path / name)
        (source / "scripts").mkdir()
        shutil.copy2(ROOT / "scripts" / "build_wheel.sh", source / "scripts")
        environment = {**_environment(), "D2V_BUILD_CUDA": "0", "SOURCE_DATE_EPOCH": "1577836800"}
        environment |= {"PYTHON": sys.executable, "CCACHE_DISABLE": "1"}
        done = subprocess.run(["scripts/build_wheel.sh"], cwd=source, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        (wheel,) = (source / "dist").iterdir()
        digests.append(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert digests[0] == digests[1]


@pytest.mark.long
def test_wheel_under_other_pythons(wheel: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    pythons = pytestconfig.getoption("other_python")
    if not pythons:
        pytest.skip("no --other-python INTERPRETER (one with torch >= 2.10) was given")
    for number, python in enumerate(pythons):
        report = use_wheel(wheel, python, tmp_path / str(number))
        print(f"{wheel.name}: Python {report['python']}, torch {report['torch']}: native {report['chosen']}")
