"""Order, workers, and the account of bad samples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v import recipes
from d2v.config import Config
from d2v.data.loader import BUCKET_RATIO, BadSamples, SampleOrder, UpdateSampler, train_updates, validation_batches
from d2v.data.samples import Batch, Note
from d2v.data.sources import Rejected, Source, open_source

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


def test_every_sample_once_per_epoch_and_batches_always_full() -> None:
    order = SampleOrder(7, 3)
    stream = order.take(0, 21)
    for epoch in range(3):
        part = stream[7 * epoch : 7 * epoch + 7]
        assert sorted(i for i, _ in part) == list(range(7))
        assert {e for _, e in part} == {epoch}
    assert [i for i, _ in stream[:7]] != [i for i, _ in stream[7:14]]
    assert order.take(5, 9) == stream[5:14]
    assert SampleOrder(7, 4).take(0, 7) != stream[:7]
    assert len(SampleOrder(2, 0).take(0, 9)) == 9


def test_samples_of_about_equal_length_stand_together() -> None:
    lengths = np.random.default_rng(0).integers(1_000, 320_000, 103)
    order = SampleOrder(103, 3, lengths, group=8)
    stream = order.take(0, 8 * 60)
    for epoch in range(4):
        assert sorted(i for i, e in stream[103 * epoch : 103 * epoch + 103]) == list(range(103))
    ratios, firsts = [], []
    for start in range(0, len(stream), 8):
        group = stream[start : start + 8]
        values = lengths[[i for i, _ in group]]
        if group[0][1] == group[-1][1]:  # a group that straddles two epochs has two lengths
            ratios.append(values.max() / values.min())
            firsts.append(values.mean())
    # Groups of 8 of 103 samples span several buckets of 10 %; unsorted ones span a factor of about 10.
    assert np.median(ratios) < 1.5 < BUCKET_RATIO**8
    assert np.abs(np.corrcoef(firsts, np.arange(len(firsts)))[0, 1]) < 0.4, "lengths must not follow the order"
    assert [i for i, _ in stream[:103]] != [i for i, _ in stream[103:206]]
    assert SampleOrder(103, 3, lengths, group=8).take(250, 30) == stream[250:280]
    tiny = SampleOrder(3, 0, lengths[:3], group=8)
    assert all(sorted(tiny.epoch(e)) == [0, 1, 2] for e in range(9))


def test_groups_are_the_micro_batches() -> None:
    lengths = np.arange(1, 101) ** 2
    for batch, micro, group in ((12, 4, 4), (12, None, 12), (10, 4, 10)):
        assert UpdateSampler(config(5, batch, micro), 100, 0, 5, lengths).order.group == group


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
    assert run_through(source, 0.0, None, steps=10).converted == {"palette": 1, "alpha": 1}
