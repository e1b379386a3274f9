"""The stream of samples: epochs, groups of equal length, windows over shards, shares of ranks, seconds of a batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
import pytest

from d2v import recipes
from d2v.config import Config
from d2v.data.sampler import BUCKET_RATIO, SampleOrder, UpdateSampler, fill, read_in_turn
from d2v.data.sources import Source


class Numbers(Source):
    """An index of samples without content."""

    def __init__(self, samples: int, lengths: np.ndarray | None = None, shards: np.ndarray | None = None) -> None:
        self.samples, self.lengths, self.shards, self.rejected, self.left_out = samples, lengths, shards, [], {}

    def __len__(self) -> int:
        return self.samples


def config(steps: int = 5, batch: int = 5, micro: int | None = None, **data: Any) -> Config:
    base = recipes.get("speech-tiny")
    settings = dataclasses.replace(base.data, global_batch=batch, micro_batch=micro, unequal="crop", **data)
    return dataclasses.replace(base, data=settings, run=dataclasses.replace(base.run, steps=steps))


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
        assert UpdateSampler(config(5, batch, micro), Numbers(100, lengths), 0, 5).order.group == group


def test_ranks_share_the_stream_of_one_process() -> None:
    for batch, micro, ranks in ((12, 2, 3), (12, 2, 2), (12, None, 3), (11, 3, 2), (10, 4, 3), (7, None, 7)):
        alone = UpdateSampler(config(4, batch, micro), Numbers(5), 1, 4)
        parts = [UpdateSampler(config(4, batch, micro), Numbers(5), 1, 4, rank=r, ranks=ranks) for r in range(ranks)]
        for update in range(1, 4):
            shares = [part.refs(update) for part in parts]
            assert {len(share) for share in shares} == {part.count(update) for part in parts}
            assert len(shares[0]) == math.ceil(math.ceil(batch / ranks) / (micro or batch))
            joined = [batch for share in shares for batch in share]
            assert all(joined)
            if micro is not None and batch % (micro * ranks) == 0:
                assert joined == alone.refs(update)
            assert [slot for batch in joined for slot in batch] == [s for b in alone.refs(update) for s in b]


def test_ranks_that_cannot_share_an_update() -> None:
    with pytest.raises(ValueError, match=r"data\.global_batch: expected at least 4, one a rank, got 3"):
        UpdateSampler(config(4, 3), Numbers(9), 0, 4, ranks=4)
    with pytest.raises(ValueError, match=r"data\.micro_batch: expected .* the 2 micro-batches .* got 1 \(3 samples"):
        UpdateSampler(config(4, 3, 1), Numbers(9), 0, 4, ranks=2)


def shards_of(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


def test_shards_are_read_in_their_own_order_but_for_a_window() -> None:
    sizes = [37, 50, 1, 44, 60, 3, 52, 49, 40, 41, 58, 12, 50, 30, 47, 33, 20, 45, 50, 28]
    shards, samples = shards_of(sizes), sum(sizes)
    order = SampleOrder(samples, 5, shards=shards, buffer=64, turns=8)
    stream = order.take(0, 3 * samples)
    first = np.cumsum([0, *sizes])[:-1]
    for epoch in range(3):
        ids = np.array([i for i, _ in stream[epoch * samples : (epoch + 1) * samples]])
        assert sorted(ids) == list(range(samples))
        for start in range(8, samples, 8):  # what was read so far is one stretch of each shard, but for the window
            part = ids[:start]
            for shard, size in enumerate(sizes):
                places = np.sort(part[shards[part] == shard] - first[shard])
                if len(places):
                    gaps = np.diff(np.append(places, places[0] + size)) - 1
                    assert size - gaps.max() - len(places) <= 64
        for start in range(0, samples - 64, 16):
            assert len(set(shards[ids[start : start + 64]])) <= 3 * 8
    assert [i for i, _ in stream[:samples]] != [i for i, _ in stream[samples : 2 * samples]]
    again = SampleOrder(samples, 5, shards=shards, buffer=64, turns=8)
    assert again.take(700, 300) == stream[700:1000]
    assert SampleOrder(samples, 6, shards=shards, buffer=64, turns=8).take(0, 50) != stream[:50]


def test_every_place_of_an_epoch_is_as_likely_for_every_sample() -> None:
    samples, epochs = 400, 300
    order = SampleOrder(samples, 1, shards=shards_of([20] * 20), buffer=50, turns=8)
    places = np.empty((epochs, samples))
    same = 0.0
    for epoch in range(epochs):
        ids = order.epoch(epoch)
        places[epoch, ids] = np.arange(samples)
        same += np.mean(ids[1:] // 20 == ids[:-1] // 20)
    error = samples / math.sqrt(12 * epochs)
    assert np.abs(places.mean(0) - (samples - 1) / 2).max() < 5 * error
    assert abs(same / epochs - 1 / 8) < 0.05, "neighbours come from the shards read in turn"
    # The order of two samples of one shard is nearly as often one as the other: both are mostly in one window.
    ahead = np.mean(places[:, 1::20] < places[:, 0::20])
    assert 0.4 < ahead < 0.5


def test_shards_in_turn_end_together() -> None:
    shards = shards_of([10, 20, 5, 40])
    sizes = np.bincount(shards)
    order, rank = read_in_turn(np.random.default_rng(0), shards, 4)
    assert sorted(rank) == list(range(75))
    assert sorted(order) == list(range(75))
    for shard in range(4):
        assert (np.diff(order[shards[order] == shard]) % sizes[shard] == 1 % sizes[shard]).all()
    assert set(shards[order[:15]]) == set(shards[order[-15:]]) == {0, 1, 2, 3}


def test_a_rank_reads_its_part_of_the_shards_in_order() -> None:
    shards = shards_of([50] * 16)
    vision = recipes.get("vision-tiny")
    data = dataclasses.replace(vision.data, global_batch=64, micro_batch=8, shuffle="shards", shuffle_buffer=200)
    settings = dataclasses.replace(vision, data=data)
    source = Numbers(800, shards=shards)
    ranks = [UpdateSampler(settings, source, 0, 50, rank, 4) for rank in range(4)]
    apart = []
    for update in range(50):
        shares = [[s.sample_id for batch in sampler.refs(update) for s in batch] for sampler in ranks]
        each = [len(set(shards[share])) for share in shares]
        apart.append(sum(each) / len(set(shards[np.concatenate(shares)])))
        for share in shares:
            steps = np.diff(share)[np.diff(shards[share]) == 0]
            assert (steps < 0).sum() <= 2 * len(set(shards[share])), "in the order of the file but for where it wraps"
    assert np.mean(apart) < 1.6, "at most the shards at the edges of a share are read by two ranks"
    mixed = UpdateSampler(dataclasses.replace(settings, data=dataclasses.replace(data, shuffle="full")), source, 0, 50)
    assert len(set(shards[[s.sample_id for batch in mixed.refs(0)[:2] for s in batch]])) > 8


def test_groups_of_equal_length_within_windows() -> None:
    rng = np.random.default_rng(3)
    lengths, shards = rng.integers(16_000, 320_000, 1_003), shards_of([17] * 59)
    sampler = UpdateSampler(
        config(400, 8, shuffle="shards", shuffle_buffer=200), Numbers(1_003, lengths, shards), 0, 400
    )
    ids: list[int] = []
    ratios = []
    for batch in sampler:
        group = batch[0].group
        assert group is not None
        assert group.crop == min(int(lengths[s.sample_id]) for s in batch)
        ratios.append(max(group.lengths or ()) / group.crop)
        ids += [s.sample_id for s in batch]
    for epoch in range(3):
        assert sorted(ids[epoch * 1_003 : (epoch + 1) * 1_003]) == list(range(1_003))
    assert np.median(ratios) < 1.2
    for start in range(0, 1_003 - 200, 50):
        assert len(set(shards[ids[start : start + 200]])) <= 6 * 8
    with pytest.raises(ValueError, match=r"data\.shuffle: expected full unless"):
        UpdateSampler(config(shuffle="shards"), Numbers(9), 0, 1)


@pytest.mark.parametrize("unequal", ["crop", "pad"])
def test_batches_of_limited_seconds(unequal: Literal["crop", "pad"]) -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(16_000, 20 * 16_000, 500)
    settings = config(30, 24, batch_seconds=60.0)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, unequal=unequal))
    source = Numbers(500, lengths)
    for micro in (None, 8):
        data = dataclasses.replace(settings.data, micro_batch=micro)
        limited = dataclasses.replace(settings, data=data)
        alone = UpdateSampler(limited, source, 0, 30)
        parts = [UpdateSampler(limited, source, 0, 30, rank, 4) for rank in range(4)]
        counts = set()
        for update in range(30):
            whole = [slot for batch in alone.refs(update) for slot in batch]
            shares = [part.refs(update) for part in parts]
            assert {len(share) for share in shares} == {part.count(update) for part in parts}
            counts.add(len(shares[0]))
            assert [slot for share in shares for batch in share for slot in batch] == whole
            for batch in [b for share in shares for b in share] + alone.refs(update):
                group = batch[0].group
                assert group is not None
                assert all(slot.group == group for slot in batch)
                each = [int(lengths[s.sample_id]) for s in batch]
                assert group.crop == (min(group.lengths or ()) if unequal == "crop" else None)
                assert len(batch) * (group.crop or max(each)) <= 60 * 16_000
                assert len(batch) <= (micro or 24)
        assert len(counts) > 1, "long utterances need more micro-batches"


def test_seconds_that_cannot_be() -> None:
    source = Numbers(9, np.full(9, 80_000))
    with pytest.raises(
        ValueError, match=r"data\.batch_seconds: expected at least 5, the longest utterance .* got 4\.0"
    ):
        UpdateSampler(config(batch_seconds=4.0), source, 0, 1)
    with pytest.raises(ValueError, match=r"data\.global_batch: expected a multiple of the 2 ranks .* got 5"):
        UpdateSampler(config(batch_seconds=10.0), source, 0, 1, ranks=2)
    with pytest.raises(ValueError, match=r"data\.batch_seconds: expected speech"):
        UpdateSampler(config(batch_seconds=10.0), Numbers(9), 0, 1)
    assert fill([4, 3, 5, 9], 10, crop=False) == [(0, 2), (2, 3), (3, 4)]
    assert fill([4, 3, 5, 9], 10, crop=True) == [(0, 3), (3, 4)]
