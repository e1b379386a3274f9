"""What breaks while a run trains: shards that vanish or are cut off, workers that die or hang."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.images import encode, make_image, write_tar
from support.sounds import encode_sound, make_sound

from d2v import recipes
from d2v.config import Config
from d2v.data import loader
from d2v.data.dataset import Sample, TrainSamples
from d2v.data.index import open_source
from d2v.data.loader import BadSamples, evaluation_batches, train_updates, validation_batches
from d2v.data.sources import Source
from d2v.data.speech import SPEECH

CPU = torch.device("cpu")


def config(workers: int = 0, timeout: float = 600.0) -> Config:
    base = recipes.vision_tiny()
    data = dataclasses.replace(base.data, global_batch=4, workers=workers)
    return dataclasses.replace(base, data=data, run=dataclasses.replace(base.run, steps=100, timeout=timeout))


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [
        write_tar(tmp_path / f"{s}.tar", {f"{i}.png": encode(make_image(10 * s + i)) for i in range(6)})
        for s in range(3)
    ]


def open_shards(shards: list[Path]) -> Source:
    return open_source(str(shards[0].parent / "*.tar"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_ends_the_run_by_its_name(shards: list[Path], workers: int) -> None:
    source = open_shards(shards)
    shards[1].unlink()
    with pytest.raises(OSError, match=r"^the shard .*1\.tar cannot be opened: No such file or directory; put it back"):
        list(train_updates(config(workers), source, 0, CPU))
    with pytest.raises(OSError, match=r"^the shard .*1\.tar cannot be opened"):
        list(validation_batches(config(workers), source, CPU))


def test_a_shard_that_is_cut_off_ends_the_run_by_its_name(shards: list[Path]) -> None:
    source = open_shards(shards)
    batches = train_updates(config(), source, 0, CPU)
    next(batches)
    os.truncate(shards[2], 2_000)
    with pytest.raises(OSError, match=r"^the shard .*2\.tar (is cut off|has changed)") as error:
        list(batches)
    assert "\n" not in str(error.value)
    with pytest.raises(OSError, match=r"2\.tar has changed: \d+ bytes when it was indexed, now 2000"):
        list(evaluation_batches(config(), open_after(source), CPU))


def open_after(source: Source) -> Source:
    """The same index in a process that has no shard open."""
    import pickle

    again: Source = pickle.loads(pickle.dumps(source))
    return again


def test_a_shard_that_is_overwritten_is_a_shard_of_bad_samples(shards: list[Path]) -> None:
    source = open_shards(shards)
    size = shards[0].stat().st_size
    shards[0].write_bytes(os.urandom(size))
    bad = BadSamples(source, 0.2, None)
    for batches in train_updates(config(), source, 0, CPU):
        bad.add(tuple(note for batch in batches for note in batch.notes))
    with pytest.raises(ValueError, match=r"expected at most 20\.0%.*got 6 of 18 .*0\.tar:.*\.png"):
        bad.check(400)
    assert len(bad.entries) == 6


CHANGE = (
    r"^changed since it was indexed: expected \d+ bytes of [-\d]+ [:\d]+\.\d{9}, got \d+ bytes of [-\d]+ [:\d]+\.\d{9}$"
)


def replace_file(path: Path, how: str) -> None:
    """Another file under the same name: of another size, or of the same and another time of change."""
    data = path.read_bytes()
    before = path.stat().st_mtime_ns
    path.write_bytes(data + b"\0" if how == "size" else data[::-1])
    os.utime(path, ns=(before, before + (1 if how == "time" else 0)))


@pytest.mark.parametrize("how", ["size", "time"])
@pytest.mark.parametrize("kind", ["folder", "list", "stored member"])
def test_a_file_that_is_replaced_is_a_bad_sample_by_its_name(tmp_path: Path, kind: str, how: str) -> None:
    for i in range(4):
        (tmp_path / f"{i}.wav").write_bytes(encode_sound(make_sound(i, 0.5)))
    names, path = [f"{i}.wav" for i in range(4)], tmp_path
    if kind == "stored member":
        data = [(tmp_path / name).read_bytes() for name in names]
        for i, part in enumerate(data):
            (tmp_path / f"{i}.zip").write_bytes(b"x" * 7 + part)
        names = [f"{i}.zip:7:{len(part)}" for i, part in enumerate(data)]
    if kind != "folder":
        path = tmp_path / "list.tsv"
        path.write_text("\n".join([str(tmp_path), *(f"{name}\t8000" for name in names)]) + "\n")
    source = open_source(str(path), SPEECH)
    target = tmp_path / ("2.zip" if kind == "stored member" else "2.wav")
    whole = [source.read(i) for i in range(4)]
    replace_file(target, how)
    assert [source.read(i) for i in (0, 1, 3)] == [whole[i] for i in (0, 1, 3)]
    with pytest.raises(ValueError, match=CHANGE):
        source.read(2)
    assert open_source(str(path), SPEECH).read(2) != whole[2] or kind == "stored member"  # a new index takes it


@pytest.mark.parametrize("how", ["size", "time"])
def test_a_replaced_image_is_listed_and_the_run_goes_on(image_folder: Path, how: str, tmp_path: Path) -> None:
    source = open_source(str(image_folder))
    replace_file(image_folder / source.names[1], how)
    bad = BadSamples(source, 0.5, tmp_path / "bad.jsonl")
    for batches in train_updates(config(), source, 0, CPU):
        bad.add(tuple(note for batch in batches for note in batch.notes))
    (entry,) = bad.entries
    assert entry["path"] == str(image_folder / source.names[1])
    assert re.match(CHANGE, entry["reason"])


def test_a_shard_that_is_replaced_by_one_of_the_same_size(shards: list[Path]) -> None:
    source = open_shards(shards)
    first = source.read(0)
    replace_file(shards[1], "time")  # its file is not open yet
    assert source.read(0) == first
    with pytest.raises(ValueError, match=CHANGE):
        source.read(7)
    replace_file(shards[0], "time")  # overwritten while it is open
    with pytest.raises(ValueError, match=CHANGE):
        source.read(1)


def test_a_worker_that_dies_ends_the_run_by_its_number(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "LOOK_SECONDS", 0.5)
    batches = train_updates(config(workers=2), open_source(str(image_folder)), 0, CPU)
    next(batches)
    workers = sorted(multiprocessing.active_children(), key=lambda w: w.pid or 0)
    assert len(workers) == 2
    os.kill(workers[1].pid or 0, signal.SIGKILL)
    end = time.monotonic() + 30
    while workers[1].is_alive():  # no exception here, in what would be the midst of an update
        assert time.monotonic() < end
        time.sleep(0.01)
    expected = rf"^data\.workers: loader worker 1 \(process {workers[1].pid}\) was killed by SIGKILL, perhaps for want"
    with pytest.raises(ChildProcessError, match=expected) as error:
        list(batches)
    assert "\n" not in str(error.value)
    assert time.monotonic() < end
    assert not workers[0].is_alive(), "the other worker ends with the loader"


def test_a_worker_that_hangs_ends_the_run(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(TrainSamples):
        """Storage that does not answer for one sample."""

        def __getitem__(self, index: Any) -> Sample:
            if index[0] == 7:
                time.sleep(60)
            return super().__getitem__(index)

    monkeypatch.setattr(loader, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(loader, "TrainSamples", Stuck)
    batches = train_updates(config(workers=1, timeout=5.0), open_source(str(image_folder)), 0, CPU)
    start = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"^data\.workers: no batch came from 1 loader workers in [5-9] s"):
        list(batches)
    assert time.monotonic() - start < 20
