"""Shards at URLs, and reads that are begun ahead of their use."""

from __future__ import annotations

import http.server
import pickle
import re
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from support.images import encode, make_image, write_tar
from train.test_stranger import edit

from d2v.config import Config
from d2v.data import make_modality
from d2v.data.cache import IndexCache
from d2v.data.index import open_source
from d2v.data.loader import train_updates
from d2v.data.sources import ShardLost, Source, Wanted
from d2v.data.storage import remote
from d2v.data.storage.ahead import ReadAhead, with_following
from d2v.data.storage.remote import RemoteFile
from d2v.recipes import get
from d2v.train.run_dir import read_run


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT_SECONDS", 0.001)


def make_shards(folder: Path, count: int = 2) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [
        write_tar(folder / f"{s:02d}.tar", {f"{i}{end}": data for i in range(4 * s, 4 * s + 4) for end, data in
                  ((".png", encode(make_image(i))), (".cls", str(i % 2).encode()), (".txt", f"text {i}".encode()))})
        for s in range(count)
    ]  # fmt: skip


def content(source: Source) -> list[Any]:
    texts = [source.read_transcript(i) for i in range(len(source))]
    data = [source.read(i) for i in range(len(source))]
    assert source.labels is not None and source.shards is not None
    return [source.digest(), data, texts, source.labels.tolist(), source.shards.tolist(), source.rejected]


@pytest.fixture
def memory(tmp_path: Path) -> str:
    """URL of a folder of shards in memory, the same as in tmp_path / "shards"."""
    system, name = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for shard in make_shards(tmp_path / "shards"):
        system.pipe_file(f"{name}/{shard.name}", shard.read_bytes())
    return f"memory://{name}"


class Parts(http.server.SimpleHTTPRequestHandler):
    """Sends parts of files, which the class above does not; of the first `failing` requests none."""

    failing, whole = 0, False

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if type(self).failing > 0:
            type(self).failing -= 1
            self.send_error(503)
        elif wanted is None or self.whole:
            super().do_GET()
        else:
            data = Path(self.translate_path(self.path)).read_bytes()
            start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            self.wfile.write(data[start:stop])

    def do_HEAD(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.exists():
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """URL of tmp_path."""
    pytest.importorskip("aiohttp")
    handler = type("Handler", (Parts,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(tmp_path))) as running:
        running.handler = handler  # type: ignore[attr-defined]
        threading.Thread(target=running.serve_forever, daemon=True).start()
        Parts.failing, Parts.whole = 0, False
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("ask", ["{00..01}.tar", "*.tar", "0?.tar"])
def test_shards_in_memory_are_those_on_the_disk(memory: str, tmp_path: Path, ask: str) -> None:
    plain = content(open_source(str(tmp_path / "shards" / "*.tar"), labelled=True))
    source = open_source(f"{memory}/{ask}", labelled=True)
    assert content(source) == plain
    assert source.describe(5) == f"{memory}/01.tar:5.png"
    again = pickle.loads(pickle.dumps(source))
    assert content(again) == plain, "as a loader worker gets it"


def test_shards_by_file_and_by_http(tmp_path: Path, server: str) -> None:
    plain = (
        content(open_source(str(tmp_path / "shards" / "*.tar"), labelled=True))
        if make_shards(tmp_path / "shards")
        else []
    )
    assert content(open_source(f"file://{tmp_path}/shards/*.tar", labelled=True)) == plain
    assert content(open_source(f"{server}/shards/{{00..01}}.tar", labelled=True)) == plain
    with pytest.raises(ValueError, match=r"data.path: expected no \* at http"):
        open_source(f"{server}/shards/*.tar")
    with pytest.raises(ValueError, match=r"data.path: http.*/02.tar cannot be read \(1 try\)"):
        open_source(f"{server}/shards/02.tar")


def test_parquet_at_a_url(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": encode(make_image(i)), "path": f"{i}.png"}, "label": i % 2} for i in range(6)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    url = f"memory://{uuid.uuid4().hex}/a.parquet"
    fsspec.filesystem("memory").pipe_file(url, (tmp_path / "a.parquet").read_bytes())
    plain, found = (open_source(path, labelled=True) for path in (str(tmp_path / "a.parquet"), url))
    assert found.digest() == plain.digest()
    assert (
        [found.read(i) for i in range(6)]
        == [plain.read(i) for i in range(6)]
        == [row["image"]["bytes"] for row in rows]
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("simplecache::memory://x/a.tar", "expected the URL of files themselves, got one that wraps another"),
        ("memory://x/a.tar::file:///etc", "wraps another"),
        ("reference://x/a.tar", "wraps another"),
        ("zip://a.tar::memory://x.zip", "wraps another"),
        ("nothing://x/a.tar", "Protocol not known: nothing"),
        ("memory://nowhere/a.tar", r"cannot be read \(1 try\)"),
        ("memory://nowhere/*.tar", "got nothing"),
        ("memory://nowhere/a.tar.gz", r"expected .tar shards or .parquet files at .* got 'memory://nowhere/a.tar.gz'"),
        ("memory://nowhere/folder", "expected .tar shards or .parquet files"),
        ("memory://nowhere/a.{tar,parquet}", "got both"),
    ],
)
def test_what_is_no_shard_at_a_url_is_one_sentence(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_source(path)
    assert str(error.value).startswith("data.path: ") and "\n" not in str(error.value)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    with monkeypatch.context() as patch:
        patch.setattr(fsspec.core, "url_to_fs", missing)
        with pytest.raises(ValueError, match=r"^data.path: 's3://bucket/a.tar': Install s3fs to access S3$"):
            open_source("s3://bucket/a.tar")
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"needs fsspec: pip install 'd2v\[remote\]'"):
        open_source("s3://bucket/a.tar")


def test_errors_of_the_network_are_tried_again_and_named(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(f"{memory}/*.tar")
    kind, calls = type(fsspec.filesystem("memory")), list[str]()
    original, data = kind.cat_file, source.read(0)

    def fail(times: int) -> None:
        def read(self: Any, path: str, **more: Any) -> bytes:
            calls.append(path)
            if len(calls) <= times:
                raise TimeoutError("no answer")
            return bytes(original(self, path, **more))

        calls.clear()
        monkeypatch.setattr(kind, "cat_file", read)

    fail(remote.TRIES - 1)
    assert source.read(0) == data and len(calls) == remote.TRIES
    fail(remote.TRIES)
    with pytest.raises(ShardLost, match=rf"^{memory}/00.tar cannot be read \(4 tries\): .*no answer"):
        source.read(0)
    fsspec.filesystem("memory").pipe_file(f"{memory}/00.tar", b"short")
    fail(0)
    with pytest.raises(ShardLost, match="is cut off"):
        source.read(3)


def test_errors_while_a_shard_is_scanned_are_no_damage(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Any, *_: Any) -> bytes:
        raise ConnectionError("gone")

    monkeypatch.setattr(remote._Steady, "readinto", lambda self, _: self._remote.attempt(lambda: read(self)))
    with pytest.raises(OSError, match=r"00.tar cannot be read \(4 tries\): .*gone"):
        open_source(f"{memory}/00.tar")


def test_the_index_of_remote_shards_is_kept(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, opened, original = IndexCache(tmp_path / "cache", shared=True), list[str](), RemoteFile.open
    monkeypatch.setattr(RemoteFile, "open", lambda self: opened.append(self.name) or original(self))
    for expected in (["00.tar", "01.tar"], []):
        open_source(f"{memory}/*.tar", cache=cache)
        assert sorted(opened) == expected
        opened.clear()


def test_urls_inside_of_files_are_not_opened(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "find_system", lambda url: pytest.fail(f"asked for {url}"))
    (tmp_path / "list.tsv").write_text(f"{tmp_path}\n{memory}/00.tar\t1\n")
    kind = Wanted(open_source.__defaults__[0]._replace(lists=True)).kind  # type: ignore[index]
    source = open_source(str(tmp_path / "list.tsv"), kind)
    with pytest.raises(OSError, match="No such file"):
        source.read(0)
    with pytest.raises(OSError, match="No such file"):
        open_source([f"{memory}/00.tar"]).read(0)


def test_a_url_in_the_folder_of_a_stranger_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = get("vision-tiny").change(data=dict(path="memory://x/a.tar", valid="kept"))
    (tmp_path / "config.json").write_text(config.to_json())
    found = read_run(str(tmp_path))
    assert (found.data.path, found.data.valid) == ("", "kept")
    assert (
        "note: data.path counts on the command line only where it is a URL; it was 'memory://x/a.tar'"
        in capsys.readouterr().err
    )
    edit(tmp_path, "data.path", str(tmp_path))
    assert read_run(str(tmp_path)).data.path == str(tmp_path)


# ---- reads ahead


class Slow(Source):
    """Reads that return only once as many as are wanted are in flight."""

    threads_may_read = True

    def __init__(self, wanted: int) -> None:
        self.wanted, self.now, self.most, self.reads = wanted, 0, 0, list[int]()
        self.changed = threading.Condition()

    def read(self, index: int) -> bytes:
        with self.changed:
            self.now += 1
            self.most = max(self.most, self.now)
            self.reads.append(index)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most >= self.wanted, 10)
            self.now -= 1
        if index == 3:
            raise OSError("lost")
        return bytes([index])


@pytest.mark.parametrize(("threads", "wanted"), [(8, 8), (4, 4), (1, 1)])
def test_reads_in_flight(threads: int, wanted: int) -> None:
    source = Slow(wanted)
    ahead = ReadAhead(source, threads)
    source.read = ahead.read  # type: ignore[method-assign]
    ahead.ask(range(8))
    assert [source.read(i) for i in (0, 1, 2, 4, 5, 6, 7)] == [bytes([i]) for i in (0, 1, 2, 4, 5, 6, 7)]
    with pytest.raises(OSError, match="lost"):
        source.read(3)
    assert source.most == wanted and sorted(source.reads) == list(range(8)), "each once"
    assert source.read(9) == bytes([9]), "what was not asked for"


@pytest.mark.parametrize(("workers", "count"), [(0, 5), (1, 5), (2, 5), (3, 2), (2, 0)])
def test_batches_know_what_the_same_worker_makes_next(workers: int, count: int) -> None:
    batches = [[(10 * number, 0)] for number in range(count)]
    found = list(with_following(iter(batches), workers))
    assert [list(batch) for batch in found] == batches
    step = max(workers, 1)
    assert [list(batch.following) for batch in found] == [  # type: ignore[attr-defined]
        [10 * (n + step)] if n + step < count else [] for n in range(count)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_from_urls_sees_the_samples_of_one_from_files(memory: str, tmp_path: Path, workers: int) -> None:
    def batches(path: str, **data: Any) -> list[torch.Tensor]:
        more = dict(path=path, workers=workers, global_batch=4, micro_batch=2, **data)
        config: Config = get("vision-tiny").change(data=more, run=dict(steps=5))
        source = make_modality(config).open(path)
        found = [b.inputs for update in train_updates(config, source, 0, torch.device("cpu")) for b in update]
        assert ("read" in vars(source)) == (config.data.readers != 0 and "://" in path)
        return found

    plain = batches(str(tmp_path / "shards" / "*.tar"))
    for data in (dict(), dict(readers=0), dict(readers=3)):
        assert all(map(torch.equal, batches(f"{memory}/*.tar", **data), plain))
