"""Attention: which engine runs a request, why another does not, and the messages of what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import d2v_kernels.ops.attention as engines
from d2v_kernels import Alibi, _native, attend, info, pack_lengths, registry, use_backend

needs_native = pytest.mark.skipif(not _native.is_loaded(_native.CPU_LIBRARY), reason="the CPU library is not built")
X = torch.ones(2, 5, 3, 4)
ALIBI = Alibi(torch.ones(3), torch.zeros(2, 5).int())


def request(**traits: Any) -> engines.Request:
    return engines.Request("cpu", torch.float32, 16, **traits)


@needs_native
def test_choice_on_a_cpu() -> None:
    for traits in ({"alibi": True}, {"dropout": True, "dropout_keys": True}, {"packed": True, "dropout": True}):
        assert engines.choose_engine(request(**traits)) == "native"
    assert engines.choose_engine(request()) == "sdpa"
    narrow = engines.Request("cpu", torch.bfloat16, 16)  # PyTorch's bfloat16 gradient is slow on CPUs
    assert engines.choose_engine(narrow) == "native"
    with use_backend("reference"):
        assert engines.choose_engine(request()) == "sdpa"
        assert engines.choose_engine(narrow) == "sdpa"
        assert engines.choose_engine(request(alibi=True)) == "reference"


def test_choice_without_native_code(monkeypatch) -> None:
    monkeypatch.setitem(registry._backends, "native", registry.Backend("native", {}, lambda case: []))
    for traits in ({}, {"packed": True, "dropout": True}):
        assert engines.choose_engine(request(**traits)) == "sdpa"
    for traits in ({"alibi": True}, {"dropout": True, "dropout_keys": True}):
        assert engines.choose_engine(request(**traits)) == "reference"


def test_engines_that_need_a_gpu() -> None:
    for name in ("xformers", "flex"):
        assert any("cuda, not on cpu" in reason for reason in engines.why_not_engine(name, request(packed=True)))


def test_forced_engine_fails_loudly() -> None:
    inputs, alibi = (X, X, X), ALIBI
    with pytest.raises(NotImplementedError, match=r"attend: no engine of sdpa .*: sdpa: would need the bias"):
        attend(*inputs, alibi=alibi, engine="sdpa")
    with pytest.raises(NotImplementedError, match="xformers: runs on cuda, not on cpu; xformers: has float16"):
        attend(*inputs, engine="xformers")
    with pytest.raises(ValueError, match=r"engine: expected auto or one of xformers, sdpa.*got 'flash'"):
        attend(*inputs, engine="flash")
    with use_backend("triton"), pytest.raises(NotImplementedError, match="reference: backend triton is forced"):
        attend(*inputs, alibi=alibi, engine="reference")


def test_a_probe_runs_and_compares(monkeypatch) -> None:
    """An engine whose tiny run is wrong, or raises, is not usable, and the reason says so."""
    cpu = torch.device("cpu")
    sdpa = engines.ENGINES["sdpa"]
    monkeypatch.setitem(engines.ENGINES, "xformers", sdpa)
    assert engines._probe("xformers", torch.float32, 16, cpu) == ""
    wrong = sdpa._replace(run=lambda q, k, v, o: sdpa.run(q, k, 1.5 * v, o))
    monkeypatch.setitem(engines.ENGINES, "xformers", wrong)
    assert "differs from PyTorch's" in engines._probe("xformers", torch.float32, 16, cpu)
    monkeypatch.undo()
    monkeypatch.setattr(engines, "_probed", {("xformers", torch.bfloat16, 64, 0): "OSError: libcudart.so.12"})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    on_cuda = engines.Request("cuda", torch.bfloat16, 64, packed=True)
    assert engines.why_not_engine("xformers", on_cuda) == ["a trial run failed (OSError: libcudart.so.12)"]


@needs_native
def test_info_names_the_engine_and_the_reasons(capsys) -> None:
    rows = info.attention_engines()
    row = next(r for r in rows if r["form"] == "ALiBi" and r["dtype"] == "float32" and r["device"] == "cpu")
    assert row["chosen"] == "native"
    assert "would need the bias" in row["why_not"]["sdpa"]
    row = next(r for r in rows if r["form"] == "plain" and r["dtype"] == "float32" and r["device"] == "cpu")
    assert row["chosen"] == "sdpa"
    assert row["why_not"]["native"] == "sdpa comes before it; not tried"
    info._print_attention(rows)
    printed = capsys.readouterr().out
    assert "chosen: sdpa" in printed
    assert "not xformers: runs on cuda, not on cpu" in printed


@needs_native
def test_info_times_the_engines(capsys) -> None:
    rows = info.attention_times()
    assert {(row["dtype"], row["chosen"]) for row in rows} == {("float32", "sdpa"), ("bfloat16", "native")}
    assert all(set(row["milliseconds"]) == {"native", "sdpa"} for row in rows)
    assert all(0.0 < ms < 60e3 for row in rows for ms in row["milliseconds"].values())
    rows[0]["milliseconds"] = {"native": 3.0, "sdpa": 2.0}
    info._print_times("attention", rows[:1])
    assert "native 3.00 ms (1.50 x), sdpa 2.00 ms (1.00 x)  chosen: sdpa" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": X[0]}, ValueError, r"query: expected 4 dimensions \(N, T, H, D\), got shape \(5, 3, 4\)"),
        ({"key": X[:, :4]}, ValueError, r"shape of key: expected \(2, 5, 3, 4\), got \(2, 4, 3, 4\)"),
        ({"value": X.half()}, TypeError, "dtype of value: expected float32, got float16"),
        ({"valid": torch.ones(3, dtype=torch.int64)}, ValueError, r"shape of lengths: expected \(2,\), got \(3,\)"),
        ({"valid": torch.ones(2, 5)}, TypeError, "dtype of valid: expected one of bool, got float32"),
        ({"packed": pack_lengths([10], "cpu")}, ValueError, r"query: expected 3 dimensions"),
        ({"dropout": 1.0}, ValueError, "dropout: expected 0 or more and less than 1, got 1.0"),
        ({"dropout_keys": torch.ones(3)}, ValueError, "shape of dropout keys"),
        ({"alibi": ALIBI._replace(slopes=torch.ones(2))}, ValueError, r"shape of slopes: expected \(3,\), got \(2,\)"),
        ({"alibi": ALIBI._replace(positions=torch.ones(2, 6).int())}, ValueError, r"positions: expected \(2, at most"),
        ({"alibi": ALIBI._replace(scale=torch.ones(2))}, ValueError, r"bias's scale: expected \(3,\) or \(1,\)"),
    ],
)  # fmt: skip
def test_messages(change, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        attend(**{"query": X, "key": X, "value": X, **change})
    assert str(caught.value).startswith("attend: ")


def test_double_backward_is_refused() -> None:
    q, k, v = (torch.randn(1, 3, 1, 4, requires_grad=True) for _ in range(3))
    with use_backend("reference"):
        out = attend(q, k, v, engine="reference")
    (g,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention: double backward"):
        g.sum().backward()


def test_dynamic_shapes_in_one_graph() -> None:
    compiled = torch.compile(lambda q: attend(q, q, q), dynamic=True, fullgraph=True, backend="aot_eager")
    for shape in ((2, 50, 4, 16), (3, 60, 4, 16)):
        q = torch.randn(shape)
        torch.testing.assert_close(compiled(q), attend(q, q, q))
