"""Fixtures of the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.images import write_class_folders


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return write_class_folders(tmp_path / "images")
