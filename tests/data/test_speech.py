"""Decoding, lengths, crops and padding of speech."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from support.images import write_tar
from support.sounds import encode_sound, make_sound, write_sounds

from d2v import recipes
from d2v.config import Config
from d2v.data.dataset import Batch, Collate, EvaluationSamples, cut_to_smallest
from d2v.data.decoding import sound
from d2v.data.decoding.sound import count_resampled, decode_audio, find_cut, normalise_waveform, resample
from d2v.data.loader import BadSamples, train_updates, validation_batches
from d2v.data.sampler import UpdateSampler
from d2v.data.speech import Speech

CPU = torch.device("cpu")


def config(recipe: str = "speech-tiny", steps: int = 4, **data: object) -> Config:
    base = recipes.get(recipe)
    settings = {"global_batch": 4, "workers": 0, "min_seconds": 0.0, "unequal": "crop", **data}
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, **settings),  # type: ignore[arg-type]
        run=dataclasses.replace(base.run, steps=steps),
    )


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    return write_sounds(tmp_path / "sounds")


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_formats_rates_and_channels(kind: str) -> None:
    mono = make_sound(0, 0.5)
    values, converted = decode_audio(encode_sound(mono, kind=kind))
    assert converted == ()
    assert values.shape == mono.shape
    assert values.dtype == np.float32
    assert np.abs(values - mono).max() < (0.1 if kind == "OGG" else 1e-4)
    stereo = np.stack([mono, np.zeros_like(mono)], axis=1)
    values, converted = decode_audio(encode_sound(stereo, 8_000, kind=kind))
    assert converted == ("2 channels to mono", "8000 Hz to 16000 Hz")
    assert len(values) == 2 * len(mono)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_a_tone_keeps_its_pitch_and_level(rate: int) -> None:
    time = np.arange(rate) / rate
    values = resample(np.sin(2 * np.pi * 440 * time).astype(np.float32), rate)
    assert len(values) == 16_000 == count_resampled(rate, rate)
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert np.abs(values - expected)[500:-500].max() < 5e-3
    if rate > 16_000:  # what 16 kHz cannot hold is filtered out, not folded back
        high = resample(np.sin(2 * np.pi * 9_500 * time).astype(np.float32), rate)
        assert np.abs(high[500:-500]).max() < 0.05


def test_damaged_files_give_one_sentence() -> None:
    sound = make_sound(1, 0.5)
    broken = sound.copy()
    broken[100] = np.nan
    cases = {
        "cut off": [encode_sound(sound)[:5_000]],
        "cut off|malformed": [encode_sound(np.tile(sound, 8), kind="OGG")[:s] for s in (3_000, 9_000)],
        "lost sync|cut off": [encode_sound(sound, kind="FLAC")[:4_000]],
        "not recognised": [b"", b"not audio at all"],
        "no samples": [encode_sound(np.zeros(0, np.float32))],
        "not finite": [encode_sound(broken, subtype="FLOAT")],
        "sample rate": [encode_sound(sound, 100)],
    }
    for text, files in cases.items():
        for data in files:
            with pytest.raises(ValueError, match=text) as error:
                decode_audio(data)
            assert "\n" not in str(error.value)
            assert "0x" not in str(error.value)
    assert find_cut(encode_sound(sound)) is None
    assert find_cut(encode_sound(sound)[:-16]) is None
    piped = bytearray(encode_sound(sound))
    piped[40:44] = b"\xff\xff\xff\xff"  # the size that a pipe's writer cannot know
    assert find_cut(bytes(piped)) is None


def test_a_header_cannot_ask_for_absurd_memory() -> None:
    data = bytearray(encode_sound(make_sound(0, 0.3), kind="FLAC"))
    data[21] |= 0x0F
    data[22:26] = b"\xff\xff\xff\xff"  # 36 bits of sample count in STREAMINFO
    with pytest.raises(ValueError, match="expected at most"):
        decode_audio(bytes(data))


def test_normalisation_is_of_the_whole_utterance() -> None:
    values = normalise_waveform(make_sound(3, 0.5) + np.float32(0.3))
    assert abs(values.mean()) < 1e-5
    assert values.std() == pytest.approx(1.0, abs=0.03)
    assert np.array_equal(normalise_waveform(np.full(100, 0.25, np.float32)), np.zeros(100, np.float32))
    stem = torch.nn.functional.layer_norm(torch.from_numpy(make_sound(3, 0.5)), (8_000,)).numpy()
    np.testing.assert_allclose(normalise_waveform(make_sound(3, 0.5)), stem, atol=1e-5)


def test_index_knows_lengths_and_leaves_out_what_is_short(sounds: Path) -> None:
    (sounds / "ant" / "short.wav").write_bytes(encode_sound(make_sound(0, 0.05)))
    (sounds / "ant" / "broken.wav").write_bytes(b"nothing")
    source = Speech(config()).open(str(sounds))
    assert len(source) == 12
    assert source.left_out == {"shorter than 0.135 s": 1}
    assert [(Path(r.name).name, r.reason) for r in source.rejected] == [("broken.wav", "Format not recognised.")]
    assert source.lengths is not None
    for i in range(len(source)):
        assert len(decode_audio(source.read(i))[0]) == source.lengths[i]
    longer = Speech(config(min_seconds=0.6)).open(str(sounds))
    assert 0 < len(longer) < 12
    assert longer.digest() != source.digest()
    with pytest.raises(ValueError, match=r"data\.path: expected utterances, got 1 unreadable, 13 shorter than 5 s"):
        Speech(config(min_seconds=5.0)).open(str(sounds))


def test_settings_that_speech_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"data\.min_seconds: expected 0 or more and less"):
        Speech(config(min_seconds=30.0))
    with pytest.raises(ValueError, match=r"data\.max_seconds: expected at least 0\.135"):
        Speech(config(max_seconds=0.1))


def flatten(updates: list[list[Batch]]) -> list[torch.Tensor]:
    batches = [b for update in updates for b in update]
    return [t for b in batches for t in (b.inputs, b.masks.mask, b.noise_keys) if t is not None]  # type: ignore[union-attr]


def test_crops_are_of_the_shortest_and_masks_of_the_crop(sounds: Path) -> None:
    settings = config(steps=9)
    speech = Speech(settings)
    source = speech.open(str(sounds))
    assert source.lengths is not None
    whole = {float(v): i for i in range(len(source)) for v in speech.load(source, i)[0][::997]}
    assert whole
    for batches in train_updates(settings, source, 0, CPU):
        (batch,) = batches
        assert batch.lengths is None
        assert batch.masks is not None
        tokens = speech.stem.count_tokens(batch.inputs.shape[1])
        assert batch.masks.mask.shape == (16, tokens)
        assert batch.inputs.shape[1] in source.lengths
    short = dataclasses.replace(settings, data=dataclasses.replace(settings.data, max_seconds=0.2))
    starts = set()
    limited = Speech(short)
    for batches in train_updates(short, limited.open(str(sounds)), 0, CPU):
        assert batches[0].inputs.shape == (4, 3_200)
        starts |= {float(v) for v in batches[0].inputs[:, 0]}
    assert len(starts) > 30, "crops of one utterance begin at different places"


def test_padding_in_place_of_crops(sounds: Path) -> None:
    for recipe in ("speech-tiny", "speech1-tiny"):
        settings = config(recipe, steps=7, unequal="pad", global_batch=5)  # batches straddle epochs
        speech = Speech(settings)
        source = speech.open(str(sounds))
        for batches in train_updates(settings, source, 0, CPU):
            (batch,) = batches
            assert batch.lengths is not None
            assert batch.token_lengths is not None
            assert batch.masks is not None
            rows = batch.token_lengths.repeat_interleave(settings.mask.copies)
            padding = torch.arange(batch.masks.mask.shape[1]) >= rows[:, None]
            assert not (batch.masks.mask & padding).any()
            assert recipe == "speech1-tiny" or batch.masks.keep is not None
            counts = batch.masks.mask.sum(1)
            assert recipe == "speech1-tiny" or (counts == counts[0]).all()
            for row, length in zip(batch.inputs, batch.lengths.tolist(), strict=True):
                assert row[length:].abs().max() == 0 if length < len(row) else True
                assert float(row[:length].std()) == pytest.approx(1.0, abs=0.05)
        assert sum(len(b) for b in validation_batches(settings, source, CPU)) == 12


@pytest.mark.parametrize("speed", [0.0, 0.3])
def test_results_do_not_depend_on_workers_and_can_start_anywhere(sounds: Path, speed: float) -> None:
    source = Speech(config(speed=speed)).open(str(sounds))
    whole = list(train_updates(config(steps=8, micro_batch=2, speed=speed), source, 0, CPU))
    other = list(train_updates(config(steps=8, micro_batch=2, speed=speed, workers=2), source, 3, CPU))
    pairs = list(zip(flatten(whole[3:]), flatten(other), strict=True))
    assert len(pairs) == 5 * 2 * 3
    assert all(torch.equal(a, b) for a, b in pairs)


def test_shards_and_folders_give_the_same_batches(sounds: Path, tmp_path: Path) -> None:
    folder = Speech(config()).open(str(sounds))
    members = {f"{i:02d}.wav": folder.read(i) for i in range(len(folder))}
    members |= {f"{i:02d}.txt": f"word {i}\n".encode() for i in range(len(folder))}
    members |= {f"{i:02d}.cls": str(i % 3).encode() for i in range(len(folder))}
    shards = Speech(config()).open(str(write_tar(tmp_path / "s.tar", members)), labelled=True)
    assert shards.read_transcript(3) == "word 3"
    assert shards.classes == ["0", "1", "2"]
    pairs = zip(*(flatten(list(train_updates(config(), s, 0, CPU))) for s in (folder, shards)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_files_that_break_later_are_replaced_and_listed(sounds: Path) -> None:
    settings = config(steps=3)
    source = Speech(settings).open(str(sounds))
    for index, data in ((2, b""), (5, encode_sound(np.full(9_000, np.nan, np.float32), subtype="FLOAT"))):
        Path(source.describe(index)).write_bytes(data)
    source.base.stamps[:] = -1  # type: ignore[attr-defined]  # what a file is, not that it changed
    bad = BadSamples(source, 0.5, None)
    news = []
    for batches in train_updates(settings, source, 0, CPU):
        for batch in batches:
            assert torch.isfinite(batch.inputs).all()
            news += bad.add(batch.notes)
    assert sorted(e["id"] for e in bad.entries) == [2, 5]
    assert {e["reason"] for e in bad.entries} == {"Format not recognised.", "samples that are not finite"}
    assert len(news) == len(bad.converted) == 2, "each kind of conversion is said once"
    assert news[0].startswith("converted: ")


@pytest.mark.parametrize("samples", [1, 999, 1000, 1001, 5432])
def test_long_recordings_are_normalised_in_pieces(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = make_sound(0, 0.5)[:samples] + np.float32(0.3)
    wide = values.astype(np.float64)
    expected = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5)
    whole = normalise_waveform(values)
    assert np.array_equal(whole, expected.astype(np.float32))
    monkeypatch.setattr(sound, "PIECE", 1000)
    assert np.allclose(normalise_waveform(values), expected, rtol=2e-7, atol=0)
    if samples <= 1000:
        assert np.array_equal(normalise_waveform(values), whole)


def test_memory_of_a_long_recording() -> None:
    """Normalising takes the result and one piece, not several copies in float64."""
    values = np.zeros(20_000_000, np.float32)
    values[::7] = 1.0
    tracemalloc.start()
    try:
        normalise_waveform(values)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < values.nbytes + 4 * 8 * sound.PIECE


def test_features_of_a_sample_do_not_depend_on_its_batch(sounds: Path) -> None:
    settings = config()
    speech = Speech(settings)
    data = EvaluationSamples(speech.open(str(sounds)), speech)
    together = Collate(speech)([data[i] for i in range(6)])
    features = speech.raw_features("log_mel", together)
    assert features.shape == (6, 80)
    for i in range(6):
        alone = speech.raw_features("log_mel", Collate(speech)([data[i]]))
        torch.testing.assert_close(features[i : i + 1], alone)


def test_transcripts_beside_the_files(sounds: Path) -> None:
    source = Speech(config()).open(str(sounds))
    Path(source.describe(0)).with_suffix(".txt").write_text(" hello world \n", encoding="utf-8")
    assert source.read_transcript(0) == "hello world"
    with pytest.raises(OSError, match="No such file"):
        source.read_transcript(1)


def test_rows_of_two_epochs_are_cut_to_the_fewest_masked() -> None:
    mask = torch.rand(6, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    keys = torch.arange(6)
    cut = cut_to_smallest(mask, keys)
    assert cut.sum(1).tolist() == [int(mask.sum(1).min())] * 6
    assert not (cut & ~mask).any()
    assert torch.equal(cut, cut_to_smallest(mask, keys))
    assert not torch.equal(cut, cut_to_smallest(mask, keys + 1))


@pytest.mark.parametrize("speed", [0.0, 0.3])
def test_crops_and_masks_do_not_depend_on_ranks(sounds: Path, speed: float) -> None:
    for batch, micro, ranks, unequal in (
        (8, None, 2, "crop"),
        (8, 4, 4, "crop"),
        (12, 4, 2, "crop"),
        (8, None, 2, "pad"),
    ):
        settings = config(steps=6, global_batch=batch, micro_batch=micro, unequal=unequal, speed=speed)
        source = Speech(settings).open(str(sounds))
        whole = list(train_updates(settings, source, 1, CPU))
        parts = [list(train_updates(settings, source, 1, CPU, rank, ranks)) for rank in range(ranks)]
        for update, expected in enumerate(whole):
            shares = [part[update] for part in parts]
            assert len({len(share) for share in shares}) == 1
            for one, other in zip(rows_of(expected), rows_of([b for s in shares for b in s]), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), (batch, micro, ranks, unequal)


@pytest.mark.parametrize(("unequal", "speed"), [("crop", 0.0), ("pad", 0.0), ("crop", 0.4), ("pad", 0.4)])
def test_batches_hold_at_most_so_many_seconds_on_any_number_of_ranks(sounds: Path, unequal: str, speed: float) -> None:
    settings = config(steps=6, global_batch=8, batch_seconds=1.5, unequal=unequal, speed=speed)
    source = Speech(settings).open(str(sounds))
    whole = list(train_updates(settings, source, 0, CPU))
    parts = [list(train_updates(settings, source, 0, CPU, rank, 2)) for rank in range(2)]
    assert len({len(update) for update in whole}) > 1
    for update, expected in enumerate(whole):
        shares = [part[update] for part in parts]
        assert len(shares[0]) == len(shares[1])
        for batch in expected + shares[0] + shares[1]:
            assert batch.inputs.numel() <= 1.5 * 16_000
        for one, other in zip(rows_of(expected), rows_of(shares[0] + shares[1]), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def rows_of(batches: list[Batch]) -> list[tuple[torch.Tensor, ...]]:
    """(waveform without its padding, masks of its copies without theirs, noise keys) of every sample in order."""
    rows: list[tuple[torch.Tensor, ...]] = []
    for batch in batches:
        assert batch.masks is not None
        assert batch.noise_keys is not None
        copies = len(batch.noise_keys) // len(batch)
        for i, values in enumerate(batch.inputs):
            samples = len(values) if batch.lengths is None else int(batch.lengths[i])
            part = slice(i * copies, (i + 1) * copies)
            tokens = batch.masks.mask.shape[1] if batch.token_lengths is None else int(batch.token_lengths[i])
            rows.append((values[:samples], batch.masks.mask[part, :tokens], batch.noise_keys[part]))
    return rows


@pytest.mark.parametrize("speed", [0.0, 0.3])
def test_a_sample_shorter_than_the_index_says_is_replaced_by_one_that_is_not(sounds: Path, speed: float) -> None:
    settings = config(steps=6, global_batch=4, micro_batch=4, speed=speed)
    source = Speech(settings).open(str(sounds))
    assert source.lengths is not None
    longest = int(source.lengths.argmax())
    Path(source.describe(longest)).write_bytes(encode_sound(make_sound(0, 0.2), kind="FLAC"))
    source.base.stamps[:] = -1  # type: ignore[attr-defined]  # what a file is, not that it changed
    bad = BadSamples(source, 0.5, None)
    widths = []
    for batches in train_updates(settings, source, 0, CPU):
        bad.add(batches[0].notes)
        widths.append(batches[0].inputs.shape[1])
    assert [(e["id"], e["reason"].split(":")[0]) for e in bad.entries] == [(longest, "shorter than the index says")]
    lengths = [Speech(settings).perturbed_lengths(source.lengths, epoch) for epoch in range(3)]
    expected = [
        min(int(lengths[s.epoch][s.sample_id]) for s in batch) for batch in UpdateSampler(settings, source, 0, 6)
    ]
    assert widths == expected
