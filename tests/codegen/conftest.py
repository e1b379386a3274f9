"""Fixtures: the CUDA toolkit of this machine, and what is built with it once for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from codegen.toolchain import Builds, Toolkit, find_toolkit, plan_builds


@pytest.fixture(scope="session")
def toolkit() -> Toolkit:
    found = find_toolkit()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def builds(toolkit: Toolkit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    all_builds = Builds(plan_builds(toolkit, tmp_path_factory.mktemp("codegen")))
    yield all_builds
    all_builds.close()
