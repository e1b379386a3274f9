"""The quick start: short, and nothing but `d2v` commands. `make quickstart` runs it in full."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "quickstart.py"


def test_it_only_calls_commands_and_is_short() -> None:
    text = SCRIPT.read_text()
    assert text.count("\n") < 150
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert imported - sys.stdlib_module_names == {"d2v.cli"}


@pytest.mark.long
def test_a_short_trial_writes_what_the_contract_says(tmp_path: Path) -> None:
    output = tmp_path / "quickstart"
    command = [sys.executable, str(SCRIPT), "--output", str(output), "--steps", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # the package need not be installed
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((output / "result.json").read_text())
    for probe in ("linear_probe", "knn", "few_label"):
        assert set(result[probe]) >= {"pretrained", "random_init", "pixels", "power_spectrum"}
        assert all(0.0 <= value <= 1.0 for value in result[probe].values())
    assert result["seconds"] > 0
    assert result["samples_per_second"] > 0
    assert (output / "report.png").stat().st_size > 10_000
    assert "not a published data2vec recipe" in done.stdout
    (output / "notes.txt").write_text("mine")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1
    assert "expected an absent folder or an earlier quick start" in done.stderr
    assert (output / "notes.txt").exists()
