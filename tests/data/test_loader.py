"""Order, workers, and the account of bad samples."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch

from d2v import recipes
from d2v.config import Config
from d2v.data.dataset import Batch, Note
from d2v.data.index import open_source
from d2v.data.loader import BadSamples, train_updates, validation_batches
from d2v.data.sources import Rejected, Source
from d2v_kernels import Masks

CPU = torch.device("cpu")


def config(steps: int = 5, batch: int = 5, micro: int | None = None, workers: int = 0) -> Config:
    base = recipes.vision_tiny()
    data = dataclasses.replace(base.data, global_batch=batch, micro_batch=micro, workers=workers, crop_scale=(0.3, 1.0))
    return dataclasses.replace(base, data=data, run=dataclasses.replace(base.run, steps=steps))


def flatten(updates: list[list[Batch]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batches = [b for update in updates for b in update]
    masks = torch.cat([b.masks.mask for b in batches if b.masks is not None])
    keys = torch.cat([b.noise_keys for b in batches if b.noise_keys is not None])
    return torch.cat([b.inputs for b in batches]), masks, keys


def test_results_do_not_depend_on_workers_or_micro_batches(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    state = torch.get_rng_state()
    expected = flatten(list(train_updates(config(), source, 0, CPU)))
    for workers, micro in ((1, None), (2, None), (0, 2), (2, 2)):
        found = flatten(list(train_updates(config(workers=workers, micro=micro), source, 0, CPU)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (workers, micro)
    assert torch.equal(state, torch.get_rng_state()), "the loader must leave the run's random state alone"


def test_a_run_can_start_at_any_update(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    whole = list(train_updates(config(), source, 0, CPU))
    rest = list(train_updates(config(), source, 3, CPU))
    assert len(rest) == 2
    for a, b in zip(flatten(whole[3:]), flatten(rest), strict=True):
        assert torch.equal(a, b)


def test_shards_and_folders_give_the_same_batches(image_folder: Path, tmp_path: Path) -> None:
    from support.images import write_tar

    folder = open_source(str(image_folder))
    members = {f"{i:03d}.png": folder.read(i) for i in range(len(folder))}
    shards = open_source(str(write_tar(tmp_path / "s.tar", members)))
    pairs = zip(*(flatten(list(train_updates(config(), s, 0, CPU))) for s in (folder, shards)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_validation_covers_every_sample(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    assert [len(b) for b in validation_batches(config(), source, CPU)] == [5, 5, 2]


def run_through(source: Source, allowed: float, file: Path | None, steps: int = 5) -> BadSamples:
    bad = BadSamples(source, allowed, file)
    bad.start_file()
    for update, batches in enumerate(train_updates(config(steps), source, 0, CPU)):
        for batch in batches:
            assert batch.inputs.shape[0] == 5
            bad.add(batch.notes)
        bad.write()
        bad.check((update + 1) * 5)
    return bad


def test_bad_samples_are_counted_once_and_listed(image_folder: Path, tmp_path: Path) -> None:
    source = open_source(str(image_folder))
    broken = Path(source.describe(4))
    broken.write_bytes(b"nonsense")
    source = open_source(str(image_folder))
    file = tmp_path / "bad.jsonl"
    bad = run_through(source, 0.2, file, steps=12)
    listed = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(e["id"], e["path"]) for e in listed] == [(4, str(broken))]
    assert "cannot identify" in listed[0]["reason"]
    again = BadSamples(source, 0.2, file)
    again.restore(json.loads(json.dumps(bad.state())))
    again.add((Note(4, 1, "bad", "again"),))
    again.write()
    assert len(file.read_text().splitlines()) == 1


def test_too_many_bad_samples_stop_with_a_summary(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    for i in (1, 5, 7):
        Path(source.describe(i)).write_bytes(b"")
    with pytest.raises(ValueError, match=r"at most 20\.0%.* got 3 of 12 \(25\.0%\); for example .*\.png: ") as error:
        run_through(source, 0.2, None)
    assert "\n" not in str(error.value)
    for i in range(len(source)):
        Path(source.describe(i)).write_bytes(b"")
    with pytest.raises(ValueError, match="64 samples in a row"):
        run_through(source, 1.0, None)


def test_what_the_index_rejects_is_judged_against_the_whole_index(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    source.rejected = [Rejected("x.png", "cut off")]
    BadSamples(source, 0.1, None).check(1)  # 1 of 13, though only one sample was tried yet
    with pytest.raises(ValueError, match=r"got 1 of 13 \(7\.7%\); for example x\.png: cut off"):
        BadSamples(source, 0.05, None).check(0)


def test_conversions_are_counted_per_sample(image_folder: Path) -> None:
    from support.images import make_image

    source = open_source(str(image_folder))
    make_image(0, mode="P").save(source.describe(2))
    make_image(0, mode="RGBA").save(source.describe(8))
    source = open_source(str(image_folder))
    assert run_through(source, 0.0, None, steps=10).converted == {"palette": 1, "alpha": 1}


def test_batches_of_two_ranks_are_those_of_one(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    for published in (frozenset[str](), frozenset({"equal-mask-counts"})):
        for recipe in ("vision-tiny", "vision1-tiny"):
            settings = dataclasses.replace(recipes.get(recipe), published=published)
            settings = dataclasses.replace(settings, data=dataclasses.replace(config(4, 8).data, global_batch=8))
            settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, steps=4))
            whole = list(train_updates(settings, source, 1, CPU))
            parts = [list(train_updates(settings, source, 1, CPU, rank, 2)) for rank in range(2)]
            for update, (expected,) in enumerate(whole):
                shares = [part[update][0] for part in parts]
                assert torch.equal(torch.cat([b.inputs for b in shares]), expected.inputs)
                assert expected.masks is not None
                masks = [b.masks.mask for b in shares if b.masks is not None]
                assert torch.equal(torch.cat(masks), expected.masks.mask), (recipe, published)
    sizes = [[len(b) for b in validation_batches(config(batch=8), source, CPU, rank, 5)] for rank in range(5)]
    assert sizes == [[2, 1], [2, 1], [2], [2], [2]]
    seen = [b.inputs for rank in range(5) for b in validation_batches(config(batch=8), source, CPU, rank, 5)]
    (one,) = validation_batches(config(batch=12), source, CPU)
    assert torch.equal(torch.cat(seen).flatten(1).sum(1).sort().values, one.inputs.flatten(1).sum(1).sort().values)


def test_ranks_come_to_the_same_verdict(image_folder: Path, tmp_path: Path) -> None:
    source = open_source(str(image_folder))
    source.rejected = [Rejected("x.png", "cut off")]
    ranks = [BadSamples(source, 0.2, tmp_path / "bad.jsonl" if rank == 0 else None) for rank in range(3)]
    found = [
        (Note(1, 0, "bad", "odd"), Note(2, 0, "converted", "grey")),
        (Note(1, 1, "bad", "odd"), Note(5, 0, "bad", "cut"), Note(3, 0, "converted", "grey")),
        (Note(6, 0, "bad", "cut"), Note(4, 0, "converted", "alpha"), Note(9, 1, "converted", "grey")),
    ]
    for bad, notes in zip(ranks, found, strict=True):
        bad.add(notes)
        bad.check(12)  # none has seen enough by itself
    with pytest.raises(ValueError, match="expected take to come first"):
        ranks[0].add_entries([])
    lists = json.loads(json.dumps([bad.take() for bad in ranks]))
    news = [bad.add_entries([entry for part in lists for entry in part]) for bad in ranks]
    assert news[0] == [f"converted: alpha, first in {source.describe(4)}"]
    for bad in ranks:
        assert {e["id"] for e in bad.entries} == {None, 1, 5, 6}
        assert bad.converted == {"grey": 2, "alpha": 1}
        assert bad.take() == []
        with pytest.raises(ValueError, match=r"got 3 of 12 \(25\.0%\)"):
            bad.check(12)
    ranks[0].write()
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 4
    again = BadSamples(source, 0.2, None)
    again.restore(ranks[0].state())
    assert again.take() == []
    with pytest.raises(ValueError, match=r"data\.path: none can be read; for example x\.png"):
        ranks[1].add((Note(7, 2, "fatal", "none can be read"),))


def test_a_batch_survives_its_way_from_a_worker() -> None:
    masks = Masks(torch.rand(6, 7) > 0.5, None, torch.arange(42, dtype=torch.int32).view(6, 7), torch.arange(5))
    for inputs in (torch.rand(3, 5, 5)[:, ::2], torch.zeros(0, 4, dtype=torch.int64), torch.ones(3, 1 << 19)):
        batch = Batch(inputs, torch.tensor([1, 2, 3]), None, masks, None, (Note(1, 0, "bad", "odd"),))
        again = pickle.loads(pickle.dumps(batch))
        assert type(again) is Batch
        assert torch.equal(again.inputs, inputs)
        assert again.inputs.dtype == inputs.dtype
        assert again.lengths is not None
        assert again.lengths.tolist() == [1, 2, 3]
        assert again.token_lengths is None
        assert again.noise_keys is None
        assert again.notes == batch.notes
        alone = pickle.loads(pickle.dumps(Batch(inputs, None, None, None, None, ())))
        assert torch.equal(alone.inputs, inputs)
        assert alone.masks is None
        assert isinstance(again.masks, Masks)
        for one, other in zip(again.masks, masks, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert torch.equal(one, other)
                assert one.dtype == other.dtype


def test_shards_in_turn_on_any_workers_and_ranks_from_any_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.images import encode, make_image, write_tar

    for s in range(4):
        write_tar(tmp_path / f"{s}.tar", {f"{i:02d}.png": encode(make_image(10 * s + i)) for i in range(7)})
    source = open_source(str(tmp_path / "*.tar"))

    def updates(first: int, workers: int = 0, rank: int = 0, ranks: int = 1, steps: int = 15) -> list[list[Batch]]:
        base = config(steps, batch=8, workers=workers)
        data = dataclasses.replace(base.data, shuffle="shards", shuffle_buffer=10, shuffle_shards=2)
        return list(train_updates(dataclasses.replace(base, data=data), source, first, CPU, rank, ranks))

    whole = updates(0)
    assert all(torch.equal(a, b) for a, b in zip(flatten(whole[6:]), flatten(updates(6, workers=2)), strict=True))
    parts = [updates(6, rank=rank, ranks=2) for rank in range(2)]
    joined = [one + other for one, other in zip(*parts, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(flatten(whole[6:]), flatten(joined), strict=True))
    reads: list[int] = []
    read = type(source).read

    def count(self: Source, index: int) -> bytes:
        reads.append(index)
        return read(self, index)

    monkeypatch.setattr(type(source), "read", count)
    updates(100_000, steps=100_002)
    assert len(reads) == 16, "nothing before the position is read"
