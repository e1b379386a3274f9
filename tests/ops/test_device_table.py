"""A plan's table on a device: which stream waits for what. Streams are played; the real ones are in tests/gpu."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from d2v_kernels import _device_table
from d2v_kernels._device_table import DeviceTable, upload


class Played:
    """`torch.cuda` and the device tensor, as far as a table asks them; `calls` in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.capturing = False
        self.stream = self.make_stream("a")
        self.rows = mock.Mock(record_stream=lambda stream: self.calls.append(f"record {stream.label}"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(_device_table, "upload", lambda op, host, device: self.rows)

    def make_stream(self, label: str) -> mock.Mock:
        stream = mock.Mock(label=label)
        stream.record_event = lambda: f"event of {label}"
        stream.wait_event = lambda event: self.calls.append(f"{label} waits for {event}")
        return stream


def test_stream_of_the_upload_waits_for_nothing(monkeypatch) -> None:
    played = Played(monkeypatch)
    table = DeviceTable("op", torch.zeros(2), torch.device("cuda", 0))
    assert table.on_current_stream() is played.rows
    assert played.calls == []


def test_another_stream_waits_and_keeps_the_memory(monkeypatch) -> None:
    played = Played(monkeypatch)
    table = DeviceTable("op", torch.zeros(2), torch.device("cuda", 0))
    played.stream = played.make_stream("b")
    assert table.on_current_stream() is played.rows
    assert played.calls == ["record b", "b waits for event of a"]


def test_a_capture_keeps_the_memory_and_waits_for_nothing(monkeypatch) -> None:
    played = Played(monkeypatch)
    table = DeviceTable("op", torch.zeros(2), torch.device("cuda", 0))
    played.stream, played.capturing = played.make_stream("b"), True
    table.on_current_stream()
    assert played.calls == ["record b"]


def test_nothing_is_uploaded_during_a_capture(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="op: expected nothing to upload during a graph capture"):
        upload("op", torch.zeros(2), torch.device("cuda", 0))


def test_on_a_cpu_it_is_the_host_tensor() -> None:
    host = torch.arange(3)
    assert DeviceTable("op", host, torch.device("cpu")).on_current_stream() is host
