"""Settings of all tests."""

import pytest
from hypothesis import settings

# The same examples on every run: a failure is a change of the code, never of the dice.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


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
