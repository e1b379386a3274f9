"""Golden cases that ship with the tests: tensors of the published implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1] / "golden"


def load_case(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a case."""
    return load_file(FOLDER / f"{name}.safetensors"), json.loads((FOLDER / f"{name}.json").read_text())
