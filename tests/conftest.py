"""Settings of all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: one thread in each worker and what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run: a failure is a change of the code, never of the dice.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folders of the longest tests come first: one that a worker begins last would keep the others waiting."""
    items.sort(key=lambda item: item.path.parent.name not in ("triton_kernels", "native"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of single tests."""
    parser.addoption(
        "--other-python", action="append", default=[], metavar="PYTHON",
        help="an interpreter with torch 2.10 or newer under which the portable wheel is tried; may be repeated",
    )  # fmt: skip
    parser.addoption(
        "--data", default=None, metavar="DIR",
        help="a folder of recorded speech for the acceptance of the speech recipes; unset: generated sounds",
    )  # fmt: skip


@pytest.fixture(scope="session")
def shared_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of pytest, the same for all of its workers; see `support.workers`."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if hasattr(request.config, "workerinput") else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder
