"""Foreign torch files are read without running what is in them."""

from __future__ import annotations

import argparse
import collections
import contextlib
import enum
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v.interop.torch_file import Record, read_torch_file, to_plain


class Bomb:
    """Calls something when unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.parts = (call, arguments)

    def __reduce__(self) -> Any:
        return self.parts


@pytest.fixture
def omegaconf(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stand-in classes under the names that published files use."""

    def define(module: str, name: str, bases: tuple[type, ...] = (), **entries: Any) -> Any:
        made = type(name, bases, {"__module__": module, "__qualname__": name, **entries})
        for i, _ in enumerate(module.split(".")):
            parent = ".".join(module.split(".")[: i + 1])
            if parent not in sys.modules or parent == module:
                monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, types.ModuleType(parent)))
        monkeypatch.setattr(sys.modules[module], name, made, raising=False)
        return made

    dictionary = define("omegaconf.dictconfig", "DictConfig")
    node = define("omegaconf.nodes", "AnyNode")
    modality = enum.Enum("Modality", {"AUDIO": 1, "IMAGE": 2}, module="examples.data2vec.data.modality")
    define("examples.data2vec.data.modality", "Unused")
    monkeypatch.setattr(sys.modules["examples.data2vec.data.modality"], "Modality", modality, raising=False)

    def wrap(value: Any) -> Any:
        made = (dictionary if isinstance(value, dict) else node)()
        key = "_content" if isinstance(value, dict) else "_val"
        made.__dict__.update({"_metadata": None, key: value})
        return made

    return types.SimpleNamespace(wrap=wrap, modality=modality)


def test_published_structure(tmp_path: Path, omegaconf: types.SimpleNamespace, monkeypatch: Any) -> None:
    weights = {"a": torch.arange(4.0).half(), "_ema": {"b": torch.ones(2)}}
    history: Any = collections.defaultdict(list)
    history["x"].append(1)
    wrap = omegaconf.wrap
    torch.save(
        {
            "args": argparse.Namespace(arch="wav2vec", layers=[1, 2]),
            "cfg": wrap({"model": wrap({"depth": wrap(12), "kind": omegaconf.modality.AUDIO, "name": "x"})}),
            "model": weights, "optimizer_history": [history],
        },
        tmp_path / "m.pt",
    )  # fmt: skip
    for name in [n for n in sys.modules if n.startswith(("omegaconf", "examples.data2vec"))]:
        monkeypatch.delitem(sys.modules, name)
    state = read_torch_file(tmp_path / "m.pt")
    assert isinstance(state["cfg"], Record) and "omegaconf" not in sys.modules
    assert to_plain(state["cfg"])["model"]["depth"] == 12 and to_plain(state["cfg"])["model"]["name"] == "x"
    assert to_plain(state["cfg"])["model"]["kind"] in (1, "AUDIO")
    assert to_plain(state["args"]) == {"arch": "wav2vec", "layers": [1, 2]}
    assert to_plain(state["optimizer_history"]) == [{"x": [1]}]
    assert torch.equal(state["model"]["a"], weights["a"]) and torch.equal(state["model"]["_ema"]["b"], torch.ones(2))


@pytest.mark.parametrize("call", ["os.system", "builtins.exec", "subprocess.call", "webbrowser.open"])
def test_calls_do_not_run(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = call.rsplit(".", 1)
    ran: list[Any] = []
    function = getattr(__import__(module), name)
    torch.save(
        {"model": {"w": torch.ones(1)}, "extra": Bomb(function, f"open({str(tmp_path / 'ran')!r}, 'w')")},
        tmp_path / "m",
    )
    monkeypatch.setattr(__import__(module), name, lambda *a: ran.append(a))
    state = None
    with contextlib.suppress(ValueError):  # names like os.system are refused, others become records
        state = read_torch_file(tmp_path / "m")
    assert state is None or isinstance(state["extra"], Record)
    assert not ran and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "absent"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "m.pt"
    torch.save({"model": torch.randn(1000)}, path)
    data = path.read_bytes()
    contents = {"cut": data[: len(data) // 2], "text": b"hello\n" * 50, "empty": b""}
    path.unlink() if damage == "absent" else path.write_bytes(contents[damage])
    with pytest.raises(ValueError, match="checkpoint: expected a file"):
        read_torch_file(path)


def test_unfolding_is_limited(tmp_path: Path) -> None:
    bomb: Any = ["x"]
    for _ in range(40):
        bomb = [bomb, bomb]
    torch.save({"cfg": bomb}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="at most"):
        to_plain(read_torch_file(tmp_path / "m.pt"))


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1 << 16)}}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in plain.namelist():
            packed.writestr(member, plain.read(member))
    assert read_torch_file(tmp_path / "plain.pt")["model"]["w"].shape == (1 << 16,)
    with pytest.raises(ValueError, match=r"does not compress, got .*packed\.pt': [\d,]+ bytes that unpack to 26\d,"):
        read_torch_file(tmp_path / "packed.pt")
