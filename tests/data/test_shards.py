"""Shards that are cut off: webdataset's reader, like tarfile, ends silently there; ours say what is missing."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import pytest
from support.images import encode, make_image, write_tar
from support.sounds import encode_sound, make_sound

from d2v.data import shards
from d2v.data.cache import IndexCache
from d2v.data.index import open_source
from d2v.data.pack import PackSettings, pack
from d2v.data.sources import Source
from d2v.data.speech import SPEECH

BLOCK = tarfile.BLOCKSIZE
CUTS = {"between members": 0, "in a header": 200, "behind a header": BLOCK}
"""Bytes that are left behind the last whole member."""


def write_images(path: Path, count: int = 20) -> int:
    """A shard; returns the place of its sixth member."""
    write_tar(path, {f"{i:03d}.png": encode(make_image(i)) for i in range(count)})
    with tarfile.open(path) as archive:
        return archive.getmembers()[5].offset


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


@pytest.mark.parametrize("what", CUTS)
@pytest.mark.parametrize("place", ["file", "pipe", "cache"])
def test_a_cut_shard_is_said(place: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    size = write_images(path) + CUTS[what]
    cut(path, size)
    if what != "behind a header":
        with tarfile.open(path) as archive:
            assert len(archive.getmembers()) == 5, "tarfile says nothing"
    cache = IndexCache(tmp_path / "cache", shared=True)

    def opened() -> Source:
        if place == "pipe":
            return open_source(f"pipe:cat {path}", commands=True)
        return open_source(str(path), cache=cache if place == "cache" else None)

    for source in (opened(), opened()):
        assert len(source) == 5
        (entry,) = source.rejected
        assert re.search(r"cut off: the shard ends|damaged from byte", entry.reason), entry


def test_a_stream_that_ends_early_is_said(tmp_path: Path) -> None:
    """A command whose exit code is that of its last part."""
    path = tmp_path / "a.tar"
    size = write_images(path)
    source = open_source(f"pipe:cat {path} | head -c {size}", commands=True)
    assert [entry.reason for entry in source.rejected] == [
        f"cut off: the shard ends at byte {size} without the zeros that end an archive"
    ]
    assert not open_source(f"pipe:cat {path}", commands=True).rejected


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("zeros", [BLOCK, 2 * BLOCK, 20 * BLOCK])
def test_whole_archives_are_whole(format_: int, zeros: int, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=format_) as archive:
        for i in range(3):
            data = encode(make_image(i))
            info = tarfile.TarInfo(f"{'long' * 40}/{i}.png" if format_ != tarfile.USTAR_FORMAT else f"{i}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        end = archive.offset
    data = (tmp_path / "a.tar").read_bytes()[:end]
    (tmp_path / "a.tar").write_bytes(data + bytes(zeros))
    source = open_source(str(tmp_path / "a.tar"))
    assert len(source) == 3 and not source.rejected
    (tmp_path / "a.tar").write_bytes(data)
    assert len(open_source(str(tmp_path / "a.tar")).rejected) == 1


def test_a_last_member_that_is_cut_off_is_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    size = write_images(path)
    (entry,) = open_source(str(cut(path, size - BLOCK - 100))).rejected
    assert entry.name.endswith("a.tar:004.png") and entry.reason == "cut off: the shard ends inside this member"


def test_the_record_of_a_pack_tells_how_many_are_missing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(12):
        (tmp_path / "in" / f"{i}.wav").write_bytes(encode_sound(make_sound(i, 0.3)))
    pack(str(tmp_path / "in"), tmp_path / "out", PackSettings("speech", shard_samples=6))
    pattern = str(tmp_path / "out" / "*.tar")
    assert not open_source(pattern, SPEECH).rejected
    shard = tmp_path / "out" / "shard-000001.tar"
    with tarfile.open(shard) as archive:
        place = archive.getmembers()[2].offset
    shard.write_bytes(shard.read_bytes()[:place] + bytes(2 * BLOCK))  # a whole archive, as tar sees it
    source = open_source(pattern, SPEECH)
    assert len(source) == 8
    assert source.rejected == [(str(shard), "holds 2 of the 6 samples that pack.json lists")]
    for text in ("[]", "no JSON", '{"shards": [{"name": "shard-000001.tar"}]}'):  # of something else
        (tmp_path / "out" / shards.RECORD).write_text(text)
        assert not open_source(pattern, SPEECH).rejected
