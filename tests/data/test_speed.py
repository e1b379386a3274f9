"""Random speed of speech: pitch, lengths that the index knows, what depends on what, where there is none."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.sounds import write_sounds

from d2v import recipes
from d2v.config import Config
from d2v.data.dataset import Batch, EvaluationSamples, Group, SampleRef, TrainSamples
from d2v.data.decoding.sound import normalise_waveform, resample
from d2v.data.loader import evaluation_batches, train_updates, validation_batches
from d2v.data.sampler import BUCKET_RATIO, UpdateSampler
from d2v.data.sources import Source
from d2v.data.speech import RandomSpeed, Speech
from d2v.finetune.data import Labelled, LabelledSource, open_classes

CPU = torch.device("cpu")
RATE = 16_000


def config(speed: float = 0.3, **data: object) -> Config:
    base = recipes.get("speech-tiny")
    settings = {"global_batch": 4, "workers": 0, "min_seconds": 0.0, "speed": speed, **data}
    run = dataclasses.replace(base.run, steps=6)
    return dataclasses.replace(base, data=dataclasses.replace(base.data, **settings), run=run)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sounds(tmp_path_factory.mktemp("sounds"))


def loudest(values: np.ndarray) -> float:
    """Hertz."""
    power = np.abs(np.fft.rfft(values * np.hanning(len(values)), 1 << 17))
    return float(power.argmax()) * RATE / (1 << 17)


def test_a_tone_changes_its_pitch_by_the_speed() -> None:
    speech = Speech(config())
    assert speech.speed is not None
    times = np.arange(RATE) / RATE
    tone = normalise_waveform(np.sin(2 * np.pi * 440 * times) + 0.5 * np.sin(2 * np.pi * 7_000 * times))
    met = set()
    for epoch in range(12):
        (percent,) = speech.speed.percents(np.array([RATE]), epoch, 5).tolist()
        played = speech.speed_perturb(tone, epoch, 5)
        assert len(played) == -(-RATE * 100 // percent)
        assert loudest(played) == pytest.approx(440 * percent / 100, abs=1.0)
        assert played.dtype == np.float32
        assert played.std() == pytest.approx(1.0, abs=1e-3)
        if percent >= 118:  # 7 kHz would be above 8 kHz: it is filtered out, not folded back
            power = np.abs(np.fft.rfft(played * np.hanning(len(played)))) ** 2
            assert power[np.arange(len(power)) * RATE / len(played) > 4_000].sum() < 1e-3 * power.sum()
        met.add(percent)
    assert min(met) < 90 < 110 < max(met), "the seed gives slow and fast ones"


def test_the_low_pass_is_that_of_the_library() -> None:
    from scipy.signal import resample_poly

    values = np.random.default_rng(0).standard_normal(3_000).astype(np.float32)
    cases = ((44_100, 160, 441), (160 * 74, 50, 37), (160 * 135, 20, 27), (8_000, 2, 1), (15_999, 16_000, 15_999))
    for rate, up, down in cases:
        assert np.array_equal(resample(values, rate), resample_poly(values, up, down)), rate


def test_speeds_are_a_function_of_seed_epoch_and_sample() -> None:
    speed = RandomSpeed(seed=3, spread=0.3, shortest=2_000, longest=320_000)
    whole = speed.draw(7, 0, 5_000)
    assert [int(speed.draw(7, i, 1)[0]) for i in (0, 1, 17, 4_999)] == whole[[0, 1, 17, 4_999]].tolist()
    assert np.array_equal(speed.draw(7, 100, 50), whole[100:150])
    for other in (speed.draw(8, 0, 5_000), dataclasses.replace(speed, seed=4).draw(7, 0, 5_000)):
        assert abs(np.corrcoef(whole, other)[0, 1]) < 0.05
    assert (whole.min(), whole.max()) == (speed.slowest, speed.fastest) == (74, 135)
    # The logarithm is uniform: as many slow ones as fast ones, a variance of s^2 / 3.
    assert np.log(whole / 100).mean() == pytest.approx(0.0, abs=0.01)
    assert np.log(whole / 100).std() == pytest.approx(0.3 / np.sqrt(3), rel=0.03)


def test_nothing_becomes_too_short_or_needs_a_crop() -> None:
    speed = RandomSpeed(seed=0, spread=1.0, shortest=2_000, longest=10_000)
    lengths = np.random.default_rng(0).integers(2_000, 10_001, 4_000)
    played = speed.lengths(lengths, 0)
    assert played.min() == 2_000
    assert played.max() == 10_000
    assert (played < lengths).sum() > 1_000 < (played > lengths).sum()
    assert speed.lengths(np.array([10_000] * 99), 1).max() == 10_000
    # What is longer than the longest crop is cropped at any speed; from `recorded` on it fills it at any speed.
    assert speed.lengths(np.full(999, speed.recorded), 2).min() >= 10_000
    assert speed.lengths(np.full(999, speed.recorded), 2).max() > 2 * speed.recorded
    assert all(speed.longest_of(n) >= speed.lengths(np.full(99, n), 3).max() for n in (2_000, 3_333, 9_999))


@pytest.mark.parametrize("seconds", [20.0, 0.4])
def test_the_index_knows_the_lengths(sounds: Path, seconds: float) -> None:
    """Also of recordings that are longer than the longest crop."""
    speech = Speech(config(speed=0.5, max_seconds=seconds))
    source = speech.open(str(sounds))
    assert source.lengths is not None
    data = TrainSamples(source, speech, 0)
    for epoch in (0, 1):
        lengths = speech.perturbed_lengths(source.lengths, epoch)
        for i in range(len(source)):
            assert min(len(data[(i, epoch)].value), speech.longest) == lengths[i]
    assert len({len(data[(3, epoch)].value) for epoch in range(6)}) > 3


def test_crops_are_of_the_shortest_as_played(sounds: Path) -> None:
    settings = config(unequal="crop")
    source = Speech(settings).open(str(sounds))
    widths = [batches[0].inputs.shape[1] for batches in train_updates(settings, source, 0, CPU)]
    slots = UpdateSampler(settings, source, 0, 6)
    speech = Speech(settings)
    for width, batch in zip(widths, slots, strict=True):
        played = [speech.speed_perturb(speech.load(source, s.sample_id)[0], s.epoch, s.sample_id) for s in batch]
        assert width == min(map(len, played))
        assert batch[0].group is not None
        assert batch[0].group.lengths == tuple(map(len, played))


def test_a_replacement_is_long_enough_as_played(tmp_path: Path) -> None:
    """And what is sound but too short at its speed does not count as bad."""
    speech = Speech(config())
    source = speech.open(str(write_sounds(tmp_path)))
    assert source.lengths is not None
    broken = int(np.argsort(source.lengths)[8])
    Path(source.describe(broken)).write_bytes(b"")
    data = TrainSamples(source, speech, 0)
    for epoch in range(20):
        length = int(speech.perturbed_lengths(source.lengths, epoch)[broken])
        if (speech.perturbed_lengths(source.lengths, epoch) >= length).sum() > 1:
            sample = data[SampleRef(broken, epoch, Group(((broken, epoch),), (length,), length))]
            assert len(sample.value) >= length
            assert {note.sample_id for note in sample.notes if note.kind == "bad"} == {broken}


class Numbers(Source):
    """An index of samples without content."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths, self.shards, self.rejected, self.left_out = lengths, None, [], {}

    def __len__(self) -> int:
        return len(self.lengths)


def test_groups_are_of_about_equal_length_as_played() -> None:
    settings = config(global_batch=8, unequal="crop")
    lengths = np.random.default_rng(0).integers(8_000, 160_000, 400)
    groups = [slot[0].group for slot in UpdateSampler(settings, Numbers(lengths), 0, 100)]
    ratios = [max(g.lengths) / min(g.lengths) for g in groups if g is not None and g.lengths is not None]
    assert len(ratios) == 100
    assert np.median(ratios) < BUCKET_RATIO**2


def inputs_of(batches: list[Batch]) -> list[torch.Tensor]:
    return [b.inputs for b in batches]


def test_epochs_differ_and_evaluation_has_no_speed(sounds: Path) -> None:
    fast, plain = (config(speed, unequal="pad", global_batch=6) for speed in (0.3, 0.0))
    source = Speech(fast).open(str(sounds))
    for make in (validation_batches, evaluation_batches):
        one, other = (inputs_of(list(make(settings, source, CPU))) for settings in (fast, plain))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    seen: dict[int, set[int]] = {}
    data, still = TrainSamples(source, Speech(fast), 0), EvaluationSamples(source, Speech(fast))
    for i in range(len(source)):
        seen[i] = {len(data[(i, epoch)].value) for epoch in range(5)}
        assert np.array_equal(data[(i, 3)].value, data[(i, 3)].value)
        assert len(still[i].value) == len(Speech(plain).load(source, i)[0])
    assert all(len(lengths) > 2 for lengths in seen.values())


def test_fine_tuning_plays_the_same_way(sounds: Path) -> None:
    speech = Speech(config())
    source, classes = open_classes(speech, str(sounds), "train", None, skip=False)
    assert classes == ["ant", "bee", "cat"]
    part = source.take(np.array([1, 4, 7]))
    assert isinstance(part, LabelledSource)
    labelled = Labelled(speech)
    for epoch in range(3):
        value, target = TrainSamples(part, labelled, 0)[(2, epoch)].value
        expected = speech.speed_perturb(speech.load(source.base, 7)[0], epoch, 2)  # samples count in the training set
        assert np.array_equal(value, expected)
        assert target == part.targets[2]
        assert len(value) == labelled.perturbed_lengths(np.asarray(part.lengths), epoch)[2]
        assert np.array_equal(EvaluationSamples(part, labelled)[2].value[0], speech.load(source.base, 7)[0][:])


def test_values_and_modalities_that_are_refused() -> None:
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"data\.speed: expected 0 to 1, got"):
            config(speed=value)
    for name in ("vision-tiny", "text-tiny"):
        base = recipes.get(name)
        with pytest.raises(ValueError, match=r"data\.speed: expected 0 unless speech, got 0\.3"):
            dataclasses.replace(base, data=dataclasses.replace(base.data, speed=0.3))


def test_cost() -> None:
    """Below a millisecond for 0.6 s; here with room for a busy machine."""
    speech = Speech(config())
    values = normalise_waveform(np.random.default_rng(0).standard_normal(9_600).astype(np.float32))
    for epoch in range(200):  # the filters of all speeds
        speech.speed_perturb(values, epoch, 0)
    begin = time.process_time()
    for epoch in range(200):
        speech.speed_perturb(values, epoch, 0)
    assert (time.process_time() - begin) / 200 < 3e-3
