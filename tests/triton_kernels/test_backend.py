"""The backend where it cannot run: lazy, silent at start-up, and with reasons."""

from __future__ import annotations

import pytest
import torch
from triton_kernels.conftest import run_child

from d2v_kernels import _env, average_layers, prefers_dropout_add_layer_norm, registry, use_backend

pytestmark = pytest.mark.skipif(_env.triton_interpreter(), reason="of a process without the interpreter")
BACKEND = next(b for b in registry.backends() if b.name == "triton")
BLOCKED = "import sys; sys.modules['triton'] = None\n"  # as if it were not installed


def test_import_leaves_triton_alone() -> None:
    code = "import sys, d2v_kernels; print('triton' in sys.modules); d2v_kernels.registry.backends()"
    assert run_child("-c", code).stdout.split() == ["False"]


def test_a_cpu_tensor_is_refused_without_importing_triton() -> None:
    code = (
        "import sys, torch, d2v_kernels\n"
        "with d2v_kernels.use_backend('triton'):\n"
        "    try: d2v_kernels.average_layers([torch.ones(1, 2, 3)])\n"
        "    except NotImplementedError as error: print(error)\n"
        "print('triton' in sys.modules)"
    )
    words, loaded = run_child("-c", code).stdout.splitlines()
    assert words.startswith("average_layers: backend triton cannot run (cpu; float32, float32): ")
    assert "TRITON_INTERPRET=1" in words
    assert loaded == "False"


def test_without_triton_everything_else_works() -> None:
    code = BLOCKED + (
        "import torch, d2v_kernels\n"
        "from d2v_kernels import registry\n"
        "print(d2v_kernels.layer_norm_gelu(torch.ones(2, 3)).shape)\n"
        "case = registry.Case('gather_tokens', 'cuda', (torch.float32,))\n"
        "print(registry.choose(case).name)\n"
        "triton = next(b for b in registry.backends() if b.name == 'triton')\n"
        "print(triton.why_not(case))"
    )
    done = run_child("-c", code)
    shape, chosen, reasons = done.stdout.splitlines()
    assert shape == "torch.Size([2, 3])", done.stderr
    assert chosen in ("reference", "native")
    assert "triton cannot be imported (" in reasons


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (registry.Case("gather_tokens", "cuda", (torch.float64,)), "triton has no float64 kernels"),
        (registry.Case("average_layers", "cuda", (torch.float32,) * 2, ("group", "none")), "not by group"),
        (registry.Case("dropout_add_layer_norm", "cuda", (torch.float32,), ("4097",)), "rows of up to 4096 channels"),
        (registry.Case("gather_tokens", "mps", (torch.float32,)), "not on mps"),
        (registry.Case("conv", "cuda", (torch.float32,)), "triton has no conv"),
    ],
)
def test_reasons(case, words) -> None:
    assert words in "; ".join(BACKEND.why_not(case))


def test_every_operator_has_a_kernel() -> None:
    """But averages in two halves, an option of the native backend."""
    assert set(BACKEND.implementations) == set(registry.OPERATORS) - {"update_split_ema_"}


@pytest.mark.parametrize(
    ("device", "branch", "dropout", "channels", "expected"),
    [
        ("cuda", torch.bfloat16, 0.0, 768, True),  # what blocks have under autocast
        ("cuda", torch.float32, 0.1, 768, True),
        ("cuda", torch.float32, 0.0, 768, False),
        ("cuda", torch.bfloat16, 0.1, 4097, False),
        ("cuda", torch.float64, 0.1, 768, False),
        ("cpu", torch.bfloat16, 0.0, 4097, True),
        ("mps", torch.bfloat16, 0.1, 768, False),
    ],
)
def test_blocks_on_gpus_take_the_norm_in_one_pass(
    needs_triton, monkeypatch, device, branch, dropout, channels, expected
) -> None:
    monkeypatch.setattr(registry, "_warned", {"cuda"})
    residual = torch.float64 if branch == torch.float64 else torch.float32
    assert prefers_dropout_add_layer_norm(device, branch, residual, channels, dropout) is expected
    with use_backend("reference"):
        forced = prefers_dropout_add_layer_norm(device, branch, residual, channels, dropout)
    assert forced is (expected and device == "cpu")


def test_order_of_preference() -> None:
    assert [b.name for b in registry.preferred("update_ema_", "cuda")] == ["native", "triton", "reference"]
    assert [b.name for b in registry.preferred("update_ema_", "cpu")] == ["native", "reference", "triton"]
    assert {b.name for b in registry.preferred("update_ema_", "mps")} == {"native", "triton", "reference"}


def test_an_exception_to_the_preference(monkeypatch) -> None:
    monkeypatch.setitem(registry.EXCEPTIONS, ("cpu", "gather_tokens"), ("reference", "native"))
    case = registry.Case("gather_tokens", "cpu", (torch.float32,))
    assert registry.choose(case).name == "reference"


def test_triton_is_never_the_silent_choice_on_a_cpu() -> None:
    for op in registry.OPERATORS:
        assert registry.choose(registry.Case(op, "cpu", (torch.float32,))).name != "triton"
    with use_backend("triton"), pytest.raises(NotImplementedError):
        average_layers([torch.ones(1, 2, 3)])
