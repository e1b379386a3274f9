"""Backend choice: forced means forced, reasons are told, info tells the truth."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from support.tensors import random_rows
from torch.library import opcheck

from d2v_kernels import _env, _native, _samples, average_layers, info, registry, use_backend


def test_native_is_built_where_a_compiler_is() -> None:
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    assert not _native.load_errors().get("libd2v_cpu"), _native.load_errors()


def test_forced_backend_that_cannot_run_says_why() -> None:
    layers = [random_rows((1, 4, 3), torch.float32, 0)]
    with use_backend("triton"), pytest.raises(NotImplementedError, match=r"average_layers: backend triton.*triton"):
        average_layers(layers)
    with use_backend("native"), pytest.raises(NotImplementedError, match="average_layers: backend native"):
        average_layers(layers, norm=("batch", "layer"))


def test_forcing_a_backend_leaves_operators_that_it_has_no_version_of() -> None:
    high = random_rows((5, 7), torch.bfloat16, 0)
    low, source = torch.zeros(5, 7, dtype=torch.int16), random_rows((5, 7), torch.float32, 1)
    triton = next(b for b in registry.backends() if b.name == "triton")
    assert "update_split_ema_" not in triton.implementations
    results = []
    for name in ("triton", "auto"):
        halves = high.clone(), low.clone()
        with use_backend(name):
            torch.ops.d2v.update_split_ema_([halves[0]], [halves[1]], [source], 0.25, None)
        results.append(halves)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], high)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"use_backend: expected one of auto.*got 'cuda'"):
        use_backend("cuda")  # at the call, before it is entered


def test_use_backend_nests_and_restores() -> None:
    assert registry.forced_backend() == "auto"
    with use_backend("reference"):
        with use_backend("native"):
            assert registry.forced_backend() == "native"
        assert registry.forced_backend() == "reference"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert registry.forced_backend() == "auto"


@pytest.mark.parametrize("op", registry.OPERATORS)
def test_no_silent_fallback(op, monkeypatch) -> None:
    """A native body that raises is not replaced by another backend."""
    native = next(b for b in registry.backends() if b.name == "native")
    if op not in native.implementations:
        pytest.skip(f"native has no {op}: {_native.load_errors()}")

    def broken(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setitem(native.implementations, op, broken)
    monkeypatch.setattr(registry, "_chosen", {})
    with pytest.raises(RuntimeError, match="planted"):
        _samples.run(op, "cpu", torch.float32)
    monkeypatch.undo()
    registry._chosen.clear()


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("op", registry.OPERATORS)
def test_opcheck_of_every_sample(op, backend) -> None:
    if backend == "native" and _native.load_errors().get("libd2v_cpu"):
        pytest.skip(_native.load_errors()["libd2v_cpu"])
    with use_backend(backend):
        opcheck(getattr(torch.ops.d2v, op).default, _samples.sample(op, "cpu", torch.float32))


def test_info_runs_every_usable_operator() -> None:
    report = info.collect(probe=True)
    assert {row["op"] for row in report["operators"]} == set(registry.OPERATORS)
    for row in report["operators"]:
        states = [row[b.name] for b in registry.backends()]
        assert sum(s.startswith("chosen") for s in states) == 1, row
        assert not any("failed" in s for s in states), row


def test_info_begins_with_what_runs(capsys, monkeypatch) -> None:
    info.main([])
    every = len(registry.OPERATORS)
    native = "0" if _native.load_errors().get("libd2v_cpu") else every
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"summary: native on cpu for {native} of {every} operators")
    with use_backend("reference"):
        assert f"native on cpu for 0 of {every} operators; reference on cpu for {every} of" in info.collect()["summary"]
    monkeypatch.setitem(_native._errors, "libd2v_cpu", "not built: no compiler")
    assert info.collect()["summary"].endswith("; missing: libd2v_cpu: not built: no compiler")


def test_info_command_prints_json() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "d2v_kernels.info", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout)["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["D2V_KERNELS_BACKEND", "D2V_KERNELS_ISA"])
def test_bad_environment_is_named(name, monkeypatch) -> None:
    _env.default_backend.cache_clear()
    monkeypatch.setenv(name, "fastest")
    with pytest.raises(ValueError, match=f"{name}: expected one of .*got 'fastest'"):
        info.collect()


def test_a_misspelt_instruction_level_is_refused_at_import() -> None:
    """The library would take it for its highest one."""
    code = "import d2v_kernels"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "D2V_KERNELS_ISA": "avx"}, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stderr.endswith("expected one of base, avx2, avx512, avx512bf16, amx, got 'avx'\n"), run.stderr
