"""Indexing and reading of folders and shards."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from support.images import encode, make_image, write_tar

from d2v.data import shards, sources
from d2v.data.cache import NameTable
from d2v.data.index import open_source
from d2v.data.sources import expand_braces


def test_folder_at_any_depth_in_a_fixed_order(image_folder: Path) -> None:
    (image_folder / "notes.txt").write_text("not an image by name")
    (image_folder / ".hidden.png").write_bytes(b"x")
    source = open_source(str(image_folder))
    names = [source.describe(i) for i in range(len(source))]
    assert len(names) == 12
    assert names == sorted(names)
    assert source.read(0) == Path(names[0]).read_bytes()


def test_class_folders_give_labels(image_folder: Path) -> None:
    source = open_source(str(image_folder), labelled=True)
    assert source.classes == ["ant", "bee", "cat"]
    assert source.labels is not None
    assert [source.classes[c] for c in source.labels] == [
        Path(source.describe(i)).relative_to(image_folder).parts[0] for i in range(len(source))
    ]
    make_image(0).save(image_folder / "loose.png")
    with pytest.raises(ValueError, match=r"train: expected class folders .* got 'loose.png'"):
        open_source(str(image_folder), labelled=True, option="train")


def test_links_are_followed_once_and_dangling_ones_reported(image_folder: Path) -> None:
    (image_folder / "ant" / "loop").symlink_to(image_folder)
    (image_folder / "gone.png").symlink_to(image_folder / "nowhere.png")
    os.mkfifo(image_folder / "pipe.png")
    source = open_source(str(image_folder))
    assert len(source) == 13
    index = next(i for i in range(13) if source.describe(i).endswith("gone.png"))
    with pytest.raises(OSError, match="No such file"):
        source.read(index)


def test_shards_are_read_in_place(tmp_path: Path) -> None:
    images = {f"{i:03d}": encode(make_image(i), "JPEG") for i in range(6)}
    for shard in range(2):
        keys = [k for i, k in enumerate(images) if i % 2 == shard]
        members = {f"{k}.jpg": images[k] for k in keys} | {f"{k}.cls": str(int(k) % 3 + 9).encode() for k in keys}
        write_tar(tmp_path / f"part-{shard:04d}.tar", members)
    before = sorted(p.name for p in tmp_path.iterdir())
    for pattern in ("part-*.tar", "part-{0000..0001}.tar", "part-{0000,0001}.tar"):
        source = open_source(str(tmp_path / pattern), labelled=True)
        found = {source.describe(i).rpartition(":")[2]: source.read(i) for i in range(6)}
        assert found == {f"{k}.jpg": v for k, v in images.items()}
        assert source.classes == ["9", "10", "11"]
    again = pickle.loads(pickle.dumps(source))
    assert again.read(3) == source.read(3)
    assert again.digest() == source.digest()
    assert before == sorted(p.name for p in tmp_path.iterdir())


def test_damaged_shards(tmp_path: Path) -> None:
    members = {f"{i}.png": encode(make_image(i)) for i in range(5)}
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        third = archive.getmembers()[2].offset
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: third + 600])
    source = open_source(str(cut))
    assert len(source) == 2
    assert "cut off" in source.rejected[0].reason
    garbage = tmp_path / "garbage.tar"
    garbage.write_bytes(whole[:third] + b"\x55" * 2048)
    source = open_source(str(garbage))
    assert len(source) == 2
    assert "damaged" in source.rejected[0].reason


def test_odd_members_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.png", "a.jpg"):  # two images of one key
            data = encode(make_image(0))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = open_source(str(path))
    assert len(source) == 1
    assert [r.reason for r in source.rejected] == ["second image of key 'a'", "not a regular file"]


def test_absurd_headers_are_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar"
    good = encode(make_image(0))
    first = tarfile.TarInfo("a.png")
    first.size = len(good)
    huge = tarfile.TarInfo("long")
    huge.type, huge.size = tarfile.XHDTYPE, 1 << 40
    padding = b"\0" * (-len(good) % 512)
    path.write_bytes(first.tobuf() + good + padding + huge.tobuf() + b"\0" * 512)
    source = open_source(str(path))
    assert len(source) == 1
    assert "damaged" in source.rejected[0].reason


def test_large_members_are_bad_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(make_image(0))
    write_tar(tmp_path / "s.tar", {"a.png": data})
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.png").write_bytes(data)
    monkeypatch.setattr(sources, "MAX_ENCODED_BYTES", len(data) - 1)
    for path in ("s.tar", "f"):
        with pytest.raises(ValueError, match="larger than"):
            open_source(str(tmp_path / path)).read(0)


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "none.tar", {"a.txt": b"text"})
    write_tar(tmp_path / "unlabelled.tar", {"a.png": encode(make_image(0))})
    (tmp_path / "packed.tar").write_bytes(gzip.compress((tmp_path / "none.tar").read_bytes()))
    (tmp_path / "file.bin").write_bytes(b"x")
    cases = {
        "": "data.path: expected a folder of images or .tar shards, got nothing",
        "missing": "found nothing at",
        "missing-{0..3}.tar": "missing-0.tar",
        "empty": "found none in 0 files",
        "none.tar": "expected images in 1 .tar shards, found none",
        "packed.tar": "expected an uncompressed tar archive",
        "file.bin": r"expected .tar shards, .parquet files or one folder, got .*file.bin",
        "pipe:cat x.tar": "got the shell command",
    }
    for path, text in cases.items():
        full = path if not path or path.startswith("pipe:") else str(tmp_path / path)
        with pytest.raises(ValueError, match=text) as error:
            open_source(full)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"for its 3 \.tar shards pass"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match=r"expected a\.cls"):
        open_source(str(tmp_path / "unlabelled.tar"), labelled=True)


def test_braces() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{x,y}/{1..2}") == ["x/1", "x/2", "y/1", "y/2"]
    assert expand_braces("plain{}") == ["plain{}"]
    for bad in ("{5..1}", "{0..99999999}", "{0..9999}{0..9999}"):
        with pytest.raises(ValueError, match=r"data\.path: expected"):
            expand_braces(bad)


def test_name_table_keeps_any_name() -> None:
    names = ["a", "", "ü/ö", "x" * 1000, os.fsdecode(b"\xff\xfe")]
    table = NameTable(names)
    assert [table[i] for i in range(len(table))] == names
    assert table.digest() != NameTable(["a" + "", "ü/ö"]).digest()
    assert NameTable(["ab", "c"]).digest() != NameTable(["a", "bc"]).digest()


def test_read_ahead_asks_for_each_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "s.tar", {f"{i:02d}.png": encode(make_image(i)) for i in range(20)})
    source = open_source(str(tmp_path / "s.tar"))
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, size, advice: asked.append((offset, size, advice)))
    monkeypatch.setattr(shards, "FETCH_BYTES", 8_192)
    plain = [source.read(i) for i in range(20)]
    assert asked == []
    source.read_ahead()
    assert [source.read(i) for i in (*range(20), *range(20))] == plain * 2
    last = (tmp_path / "s.tar").stat().st_size // 8_192
    assert [a for a in asked if a[0] <= 8_192 * last] == asked
    assert len(set(asked)) == len(asked) >= 4
    assert {a[1:] for a in asked} == {(8_192, os.POSIX_FADV_WILLNEED)}
