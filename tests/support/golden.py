"""Golden cases: tensors of the published implementation. Some ship with the tests, others lie in a folder beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

_ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (_ROOT / "tests" / "golden", _ROOT / "shared" / "golden", _ROOT.parent / "shared" / "golden")


def load_case(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a case; the test that asks for one which is in no folder is skipped."""
    for folder in FOLDERS:
        path = folder / f"{name}.safetensors"
        if path.is_file():
            return load_file(path), json.loads((folder / f"{name}.json").read_text())
    pytest.skip(f"golden case {name}: expected in one of {', '.join(map(str, FOLDERS))}, found in none")
