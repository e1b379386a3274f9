"""Every kernel in Triton's interpreter, in a child process: the variable must be set before kernels are imported.

The operators' own tests run with the backend forced (few examples each), then those of `interpreted`, which make
the forms that only large shapes reach small enough. Numbers that the interpreter would get wrong are errors there
(`support.interpreter`).

What no interpreter shows: programs run one after the other and whole blocks at once, so races, missing barriers and the
order of lanes in a sum stay hidden; a multiply and an add round twice; exp, log, erf and tensor-float products are
NumPy's; addresses, widths and pipelined loads are not the GPU's. PTX and machine code are read for casts, maxima and
accesses (test_machine_code.py, test_products_code.py); accuracy on a GPU is for tests/gpu.
"""

from __future__ import annotations

import pytest
from triton_kernels.conftest import run_child

from d2v_kernels import _env

FAMILIES = ("layers", "ema", "tokens", "loss", "gelu", "gelu_linear", "norm", "norm_mixed", "convolution", "attention")
OPERATORS = [f"tests/ops/test_{family}.py" for family in FAMILIES]
# Too many programs for an interpreter, or float64; `interpreted` has small tests of the same properties.
LEFT_OUT = ["published", "gradcheck", "thread_count", "is_normal", "monitors_see"]

pytestmark = pytest.mark.skipif(_env.triton_interpreter(), reason="this is the child process")


def run_tests(*arguments: str) -> str:
    """The child's closing line."""
    done = run_child(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "support.interpreter", *arguments,
        TRITON_INTERPRET="1", D2V_KERNELS_BACKEND="auto",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_operators(needs_triton) -> None:
    selection = " and ".join(["triton", *(f"not {word}" for word in LEFT_OUT)])
    closing = run_tests(*OPERATORS, "-k", selection)
    assert int(closing.split()[0]) >= 60, closing


def test_forms(needs_triton) -> None:
    closing = run_tests("tests/triton_kernels/interpreted")
    assert int(closing.split()[0]) >= 100, closing
