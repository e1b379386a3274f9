"""Order, workers, and the account of bad samples."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from d2v import recipes
from d2v.config import Config
from d2v.data.loader import BadSamples, order_samples, train_updates, validation_batches
from d2v.data.sources import Source, open_source
from d2v.data.vision import Batch, Note

CPU = torch.device("cpu")


def config(steps: int = 5, batch: int = 5, micro: int | None = None, workers: int = 0) -> Config:
    base = recipes.vision_tiny()
    data = dataclasses.replace(base.data, global_batch=batch, micro_batch=micro, workers=workers, crop_scale=(0.3, 1.0))
    return dataclasses.replace(base, data=data, run=dataclasses.replace(base.run, steps=steps))


def flatten(updates: list[list[Batch]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batches = [b for update in updates for b in update]
    masks = torch.cat([b.masks.mask for b in batches if b.masks is not None])
    keys = torch.cat([b.noise_keys for b in batches if b.noise_keys is not None])
    return torch.cat([b.images for b in batches]), masks, keys


def test_every_sample_once_per_epoch_and_batches_always_full() -> None:
    stream = order_samples(7, 3, 0, 21)
    for epoch in range(3):
        part = stream[7 * epoch : 7 * epoch + 7]
        assert sorted(i for i, _ in part) == list(range(7))
        assert {e for _, e in part} == {epoch}
    assert [i for i, _ in stream[:7]] != [i for i, _ in stream[7:14]]
    assert order_samples(7, 3, 5, 9) == stream[5:14]
    assert order_samples(7, 4, 0, 7) != stream[:7]
    assert len(order_samples(2, 0, 0, 9)) == 9


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
            assert batch.images.shape[0] == 5
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


def test_conversions_are_counted_per_sample(image_folder: Path) -> None:
    from support.images import make_image

    source = open_source(str(image_folder))
    make_image(0, mode="P").save(source.describe(2))
    make_image(0, mode="RGBA").save(source.describe(8))
    assert run_through(source, 0.0, None, steps=10).converted == {"palette": 1, "alpha": 1}
