"""The index of many files: it is kept, counts while nothing has changed, and is small."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.images import encode, make_image
from train.test_collectives import on_two_ranks

from d2v.config import Config
from d2v.data import index, shards
from d2v.data.cache import IndexCache, NameTable, pack_arrays, unpack_arrays
from d2v.data.index import IMAGES, Source, open_source
from d2v.data.sources import Kind, Wanted
from d2v.data.storage import folders, lists
from d2v.recipes import get
from d2v.train.distributed import open_ranks
from d2v.train.pretraining import open_data

LIST = Kind("files", frozenset({".jpg"}), "a list", lists=True)
LONG_AGO = 1_600_000_000


def make_tree(root: Path, count: int = 12) -> Path:
    """Images of three classes, a file of another kind and a table, all old."""
    for number in range(count):
        file = root / f"class{number % 3}" / "deep" / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(make_image(number)))
    (root / "notes.doc").write_text("")
    (root / "my-metadata.csv").write_text("")
    (root / "metadata.csv").write_text("file_name,label\nclass0/deep/00.png,zero\n")
    settle(root)
    return root


def settle(root: Path) -> None:
    for path in [root, *root.rglob("*")]:
        os.utime(path, (LONG_AGO, LONG_AGO))


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were walked; those of ten files and more are kept."""
    done, original = [], folders.walk_files

    def walk(root: Path, *more: Any) -> Any:
        done.append(root)
        return original(root, *more)

    monkeypatch.setattr(folders, "walk_files", walk)
    monkeypatch.setattr(folders, "KEPT_FROM", 10)
    return done


def describe(source: Source) -> list[Any]:
    tables = getattr(source, "tables", None)
    return [
        source.digest(),
        source.stamps.tolist(),
        source.left_out,
        tables,
        [source.read(i) for i in range(len(source))],
    ]


def test_a_large_folder_is_walked_once(tmp_path: Path, walks: list[Path]) -> None:
    root, cache = make_tree(tmp_path / "data"), IndexCache(tmp_path / "cache", shared=True)
    plain = describe(open_source(str(root)))
    assert plain[2] == {"files that end in .csv": 1, "files that end in .doc": 1}
    walks.clear()
    for expected in ([root], [], []):
        assert describe(open_source(str(root), cache=cache)) == plain
        assert walks == expected
        walks.clear()
    labelled = open_source(str(root), cache=cache, labelled=True)
    assert labelled.classes == ["zero"] and walks == []
    kept = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert len(kept) == 1 and kept[0].startswith("folder-")
    assert not list(root.rglob("*.bin")), "nothing is written beside the data"


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "rewritten", "folder"])
def test_a_folder_that_has_changed_is_walked_again(tmp_path: Path, walks: list[Path], change: str) -> None:
    root, cache = make_tree(tmp_path / "data"), IndexCache(tmp_path / "cache", shared=True)
    before = open_source(str(root), cache=cache).digest()
    some = root / "class1" / "deep" / "04.png"
    if change == "added":
        (some.parent / "99.png").write_bytes(some.read_bytes())
    elif change == "removed":
        some.unlink()
    elif change == "renamed":
        some.rename(some.with_name("98.png"))
    elif change == "rewritten":
        for number, file in enumerate(some.parent.iterdir()):  # some of them are among those that are looked at
            with file.open("r+b") as opened:
                opened.write(encode(make_image(77 + number)))
                opened.truncate()
    else:
        (root / "class1").rename(tmp_path / "gone")
        (tmp_path / "gone").rename(root / "class9")
    walks.clear()
    now = open_source(str(root), cache=cache)
    assert describe(now) == describe(open_source(str(root)))
    assert walks[:1] == [root]
    assert (now.digest() == before) == (change == "rewritten")


@pytest.mark.parametrize("name", ["../secret.png", "class0/../../secret.png", "{}/secret.png"])
def test_kept_names_do_not_lead_out_of_the_folder(tmp_path: Path, walks: list[Path], name: str) -> None:
    """The cache of a run folder may be somebody else's."""
    root, cache = make_tree(tmp_path / "data"), IndexCache(tmp_path / "cache", shared=True)
    plain = describe(open_source(str(root), cache=cache))
    (file,) = (tmp_path / "cache").iterdir()
    arrays = dict(cache.read(file.name))
    (tmp_path / "secret.png").write_bytes(encode(make_image(5)))
    status = (tmp_path / "secret.png").stat()
    names = [*NameTable.taken(arrays, "names")][:-1] + [name.format(tmp_path)]
    stamps = np.concatenate([arrays["stamps"][:-1], [[status.st_size, status.st_mtime_ns]]])
    cache.keep(file.name, arrays | NameTable(names).arrays("names") | {"stamps": stamps})
    walks.clear()
    assert describe(open_source(str(root), cache=IndexCache(tmp_path / "cache", shared=True))) == plain
    assert walks == [root]


def test_a_folder_that_is_being_filled_is_not_kept(tmp_path: Path, walks: list[Path]) -> None:
    root, cache = make_tree(tmp_path / "data"), IndexCache(tmp_path / "cache", shared=True)
    (root / "class0" / "deep" / "50.png").write_bytes(encode(make_image(1)))
    for _ in range(2):
        open_source(str(root), cache=cache)
    assert walks == [root, root]
    assert not (tmp_path / "cache").exists()


def open_beside(rank: int, data: str, run: str) -> dict[str, Any]:
    """What a rank finds, and how often it walks."""
    walked, original = [], folders.walk_files
    folders.walk_files = lambda *given: walked.append(1) or original(*given)  # type: ignore[func-returns-value]
    folders.KEPT_FROM = 10
    base = get("vision-tiny")
    config: Config = base.change(data=dict(path=data), run=dict(dir=run, timeout=60.0))
    with open_ranks(config.run) as ranks:
        source, _ = open_data(config, ranks)
    return {"digest": source.digest(), "walks": len(walked), "stamps": source.stamps.tolist()}


def test_one_rank_walks_for_all(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "data")
    first, second = on_two_ranks(open_beside, tmp_path, str(root), str(tmp_path / "run"))
    assert (first["walks"], second["walks"]) == (1, 0)
    assert first["digest"] == second["digest"] and first["stamps"] == second["stamps"]
    assert not (tmp_path / "run").exists(), "opening reads only"


# ---- lists


def read_both(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, list[Any], list[Any]]:
    """Whether a list is plain; what is found in it as it is, and line by line."""

    def found() -> list[Any]:
        try:
            source = open_source(str(file), LIST)
        except ValueError as error:
            return [str(error)]
        counts = getattr(source, "counts", None)
        lines = source.lines.tolist()  # type: ignore[attr-defined]
        return [
            list(source.names),
            None if counts is None else counts.tolist(),
            lines,
            source.rejected,
            source.describe(0),
        ]

    plain, as_is = lists.read_plain(file) is not None, found()
    with monkeypatch.context() as patch:
        patch.setattr(index, "read_plain", lambda _: None)
        return plain, as_is, found()


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("/data\na.jpg\t1\nb/c d.jpg\t22\n", True),
        ("/data\na.jpg\t1\nü.jpg\t000000000000000022", True),
        ("\ufeff/data\na.jpg\t1\n\n\n", True),
        ("\na.jpg\t1\n", True),
        ("/data\na.wav:0:5\t1\n/abs.jpg\t2\n", True),
        ("a.jpg\t1\nb.jpg\t2\n", False),
        ("/data\n../a.jpg\t1\nb.jpg\t2\n", False),
        ("/data\na/../../a.jpg\t1\nb.jpg\t2\n", False),
        ("/data\n..\t1\nb.jpg\t2\n", False),
        ("/data\n\t1\nb.jpg\t2\n", False),
        ("/data\na.jpg\t1\n\t1\n", False),
        ("/data\n \t1\nb.jpg\t2\n", False),
        ("/data\na.jpg\t1\n \n", False),
        ("/data\na.jpg\t1\n\nb.jpg\t2\n", False),
        ("/data\na.jpg\t1\r\nb.jpg\t2\r\n", False),
        ("/data\na.jpg\t1\nb.jpg\n", False),
        ("/data\na.jpg\t1\tx\nb.jpg\t2\n", False),
        ("/data\na.jpg\t1\nb.jpg\t-2\n", False),
        ("/data\na.jpg\t1\nb.jpg\t\n", False),
        ("/data\na.jpg\t1\nb.jpg\t1234567890123456789\n", False),
        ("/data\na.jpg\t1\ncat b |\t2\n", False),
        ("/data\n", False),
        ("\n\n", False),
    ],
)
@pytest.mark.parametrize("piece", [1, 8, 1 << 20])
def test_lists_in_arrays_are_those_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, plain: bool, piece: int
) -> None:
    (tmp_path / "list.tsv").write_text(text, encoding="utf-8")
    monkeypatch.setattr(lists, "PIECE", piece)
    was_plain, as_is, by_line = read_both(tmp_path / "list.tsv", monkeypatch)
    assert as_is == by_line
    assert was_plain == plain or (piece < 1 << 20 and "\n\n" in text), "a blank line may be a piece"


def test_other_encodings_go_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in ("/data\na.jpg\t1\n".encode("utf-16"), b"/data\n\xe9.jpg\t1\n", b"/d\xe9\na.jpg\t1\n"):
        (tmp_path / "list.tsv").write_bytes(data)
        plain, as_is, by_line = read_both(tmp_path / "list.tsv", monkeypatch)
        assert not plain and as_is == by_line and "expected a list in UTF-8" in as_is[0]


def test_files_of_a_long_list_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.tsv").write_text(f"{tmp_path}\n" + "".join(f"{i}.jpg\t1\n" for i in range(12)))
    (tmp_path / "3.jpg").write_bytes(b"data")
    looked = len(open_source(str(tmp_path / "list.tsv"), LIST).stamps)
    monkeypatch.setattr(index, "KEPT_FROM", 10)
    source = open_source(str(tmp_path / "list.tsv"), LIST)
    assert (looked, len(source.stamps)) == (12, 0)
    assert source.read(3) == b"data"
    lengths = source.read_lengths(lambda file: len(file.read()), [3])  # type: ignore[attr-defined]
    assert lengths.tolist() == [4]
    record = source.record_files(tmp_path / "record")
    record.write()
    assert record.find_changed() == []


# ---- shards


def test_plain_headers_are_those_of_tarfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, members = Wanted(IMAGES), []
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=form) as archive:
            for i in range(40):
                member = tarfile.TarInfo(f"{'folder/' * (i % 30 // 2)}{'ü' * (i % 7)}{i}.jpg")
                member.size, member.mtime = i * 100, i / 2 if i % 5 == 0 else i
                archive.addfile(member, io.BytesIO(b"x" * member.size))
    for name in ("a.jpg", "b.jpg", "c.txt", "c.jpg"):
        (tmp_path / name).write_bytes(name.encode() * 200)
    subprocess.run(["tar", "cf", "3.tar", "a.jpg", "b.jpg", "c.txt", "c.jpg"], cwd=tmp_path, check=True)
    damaged = bytearray((tmp_path / "3.tar").read_bytes())
    damaged[1024 + 512 + 3] ^= 1  # in a name: the checksum tells
    (tmp_path / "4.tar").write_bytes(damaged)
    original = shards._next_plain

    def watch(*given: Any) -> Any:
        members.append(original(*given))
        return members[-1]

    for number in range(5):
        members.clear()
        monkeypatch.setattr(shards, "_next_plain", watch)
        quick = shards.scan_shard(tmp_path / f"{number}.tar", wanted)
        assert any(members) == (number < 4), f"plain headers in {number}"
        monkeypatch.setattr(shards, "_next_plain", lambda *_: None)
        assert shards.scan_shard(tmp_path / f"{number}.tar", wanted) == quick


# ---- files of the cache


def test_arrays_come_back_and_damage_is_an_error() -> None:
    arrays = {
        "a": np.arange(6).reshape(3, 2),
        "name": np.frombuffer(b"abc", np.uint8),
        "none": np.zeros((0, 4), np.int64),
    }
    data = b"x" * 64 + pack_arrays(arrays)
    found = unpack_arrays(data, 64)
    assert {n: (a.tolist(), a.shape) for n, a in found.items()} == {n: (a.tolist(), a.shape) for n, a in arrays.items()}
    for wrong in (b"", b"[]", b"[[1]]\n", b'[["a", "object", 1]]\n12345678', b'[["a", "int64", 99]]\n1'):
        with pytest.raises((ValueError, TypeError, KeyError)):
            unpack_arrays(wrong, 0)


def test_tables_of_names_are_compared_by_content() -> None:
    table = NameTable(["a", "bc"])
    assert table == NameTable(["a", "bc"]) and table != NameTable(["ab", "c"])
    assert NameTable.taken(table.arrays("x"), "x") == table
