"""Signals: every format, both orders of axes, rates, what is refused, and the way to a probe."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from support.sounds import encode_sound

from d2v import recipes
from d2v.cli import main
from d2v.config import Config
from d2v.data import make_modality
from d2v.data.dataset import Modality, Sample
from d2v.data.sources import Source
from d2v.signals import decode_signal
from d2v.train.flops import Shape, count_flops


def make_values(seed: int, samples: int = 80, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((samples, channels)) * 5.0 + 2.0


def make_config(path: Path, **sections: dict[str, Any]) -> Config:
    base = recipes.signals_tiny().change(stem={"channels": 3}, data={"path": str(path)})
    return base.change(**sections)


def open_all(config: Config) -> tuple[Modality, Source, list[np.ndarray]]:
    modality = make_modality(config)
    source = modality.open(config.data.path)
    return modality, source, [modality.load(source, i)[0] for i in range(len(source))]


def as_npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def as_csv(values: np.ndarray, mark: str = ",", head: str = "") -> bytes:
    return (head + "\n".join(mark.join(map(repr, row)) for row in values.tolist())).encode()


def normalise(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(0)) / values.std(0)


VALUES = make_values(0)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.npy", as_npy(VALUES)),
        ("a.npy", as_npy(VALUES.T)),
        ("a.npy", as_npy(np.asfortranarray(VALUES).astype(">f8"))),
        ("a.csv", as_csv(VALUES)),
        ("a.csv", as_csv(VALUES, ";", "I;II;nose\n")),
        ("a.csv", b"\xef\xbb\xbf" + as_csv(VALUES, "\t").replace(b"\n", b"\r\n")),
        ("a.wav", encode_sound((VALUES / 64).astype(np.float32), 100, subtype="FLOAT")),
        ("A.CSV", as_csv(VALUES)),
    ],
)
def test_formats(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    _, source, (value,) = open_all(make_config(tmp_path))
    assert source.lengths is not None and source.lengths.tolist() == [80]
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, normalise(VALUES), atol=2e-6)


def test_edf(tmp_path: Path) -> None:
    edf = pytest.importorskip("pyedflib", reason="pyedflib is not installed")
    values = make_values(3, samples=200)
    names = ["a", "b", "c"]
    heads = edf.highlevel.make_signal_headers(names, sample_frequency=100, physical_min=-30, physical_max=30)
    edf.highlevel.write_edf(str(tmp_path / "a.edf"), np.ascontiguousarray(values.T), heads)
    _, _, (value,) = open_all(make_config(tmp_path))
    np.testing.assert_allclose(value, normalise(values), atol=1e-3)


def test_one_channel_and_whole_numbers(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.int16) ** 2
    (tmp_path / "a.npy").write_bytes(as_npy(values))
    _, _, (value,) = open_all(make_config(tmp_path, stem={"channels": 1}))
    np.testing.assert_allclose(value, normalise(values[:, None].astype(float)), atol=1e-6)


def test_other_rates_are_resampled_and_counted(tmp_path: Path) -> None:
    """A slow wave at 250 Hz is the same wave at 100 Hz; the index has its new length."""
    wave = np.sin(2 * np.pi * 3 * np.arange(501) / 250)[:, None] * [1.0, 0.5, -1.0]
    soundfile.write(tmp_path / "a.wav", wave, 250, subtype="DOUBLE")
    modality, source, (value,) = open_all(make_config(tmp_path))
    assert source.lengths is not None and source.lengths.tolist() == [201] == [len(value)]
    assert modality.load(source, 0)[1] == ("250 Hz to 100 Hz",)
    expected = np.sin(2 * np.pi * 3 * np.arange(201) / 100) * np.sqrt(2)
    np.testing.assert_allclose(value[20:-20, 0], expected[20:-20], atol=0.02)
    np.testing.assert_allclose(value[:, 1], -value[:, 2], atol=1e-5)


def test_a_still_channel_becomes_0(tmp_path: Path) -> None:
    values = make_values(1)
    values[:, 1] = 0.1
    (tmp_path / "a.npy").write_bytes(as_npy(values))
    _, _, (value,) = open_all(make_config(tmp_path))
    assert not value[:, 1].any() and np.isfinite(value).all()
    np.testing.assert_allclose(value[:, 0].std(), 1.0, atol=1e-5)


def test_where_both_axes_fit_time_comes_first(tmp_path: Path) -> None:
    values = make_values(2, samples=50, channels=50)
    (tmp_path / "a.npy").write_bytes(as_npy(values))
    _, _, (value,) = open_all(make_config(tmp_path, stem={"channels": 50}))
    np.testing.assert_allclose(value, normalise(values), atol=2e-6)


HOLED = np.where(np.arange(240).reshape(80, 3) == 100, np.nan, VALUES)
BROKEN = {
    "nan.npy": (as_npy(HOLED), "expected finite values, got nan in row 33, column 1"),
    "wide.npy": (as_npy(make_values(0, channels=5)), "expected stem.channels 3 in one axis, got an array (80, 5)"),
    "cube.npy": (as_npy(np.zeros((4, 3, 2))), "expected real numbers (time, channels), got float64 of shape (4, 3, 2)"),
    "objects.npy": (as_npy(np.array([{}, 1], dtype=object)), "allow_pickle"),
    "words.npy": (as_npy(np.array(["a", "b"])), "expected real numbers"),
    "empty.csv": (b"", "expected real numbers (time, channels), got float64 of shape (0, 0)"),
    "head.csv": (b"a,b,c\n", "shape (0, 0)"),
    "gap.csv": (b"1,2,3\n4,,6\n", "could not convert string ''"),
    "ragged.csv": (b"1,2,3\n4,5\n", "columns"),
    "large.csv": (b"1,2,3\n4,1e200,6\n", "expected finite values, got 1e+200 in row 1, column 1"),
    "infinite.csv": (b"1,2,3\n4,inf,6\n", "expected finite values, got inf in row 1, column 1"),
    "bytes.csv": (b"\xff\x00\x80", "not UTF-8"),
    "cut.wav": (encode_sound(VALUES.astype(np.float32), 100)[:200], "cut off"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    """Beside a sound file it is rejected with its name; alone it ends the command with it."""
    data, reason = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"data.path: expected recordings, got 1 unreadable, for example .*{name}: "):
        open_all(make_config(tmp_path))
    (tmp_path / "z.npy").write_bytes(as_npy(VALUES))
    _, source, values = open_all(make_config(tmp_path))
    assert len(values) == 1
    ((found, text),) = source.rejected
    assert found == str(tmp_path / name)
    assert reason in text


def test_short_ones_and_other_endings_are_counted(tmp_path: Path) -> None:
    for i, length in enumerate((80, 24, 90)):
        (tmp_path / f"{i}.npy").write_bytes(as_npy(make_values(i, length)))
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.mat").write_text("x")
    _, source, values = open_all(make_config(tmp_path))
    assert len(values) == 2
    assert source.left_out["files that end in .mat"] == 1 and source.left_out["files that end in .txt"] == 1
    assert any("shorter than" in reason for reason in source.left_out)


def test_unequal_lengths_are_padded_or_cropped(tmp_path: Path) -> None:
    for i, length in enumerate((80, 50, 1500)):
        (tmp_path / f"{i}.npy").write_bytes(as_npy(make_values(i, length)))
    for unequal, shape in (("pad", (3, 1000, 3)), ("crop", (3, 50, 3))):
        modality, _, values = open_all(make_config(tmp_path, data={"unequal": unequal, "path": str(tmp_path)}))
        samples = [Sample(i, 0, value, ()) for i, value in enumerate(values)]
        inputs, lengths = modality.stack(samples, training=True)
        assert tuple(inputs.shape) == shape
        if unequal == "pad":
            assert lengths is not None and lengths.tolist() == [80, 50, 1000]
            assert not inputs[0, 80:].any() and torch.equal(inputs[1, :50], torch.from_numpy(values[1]))
        else:
            assert lengths is None


def test_shards_and_lists(tmp_path: Path) -> None:
    """Labelled, with a damaged member and one of other channels; lengths are those of resampled signals."""
    wave = encode_sound((VALUES / 64).astype(np.float32), 200, subtype="FLOAT")
    members = {
        "a.npy": as_npy(VALUES.T), "b.wav": wave, "c.csv": as_csv(VALUES[:60]), "d.npy": as_npy(VALUES)[:90],
        "e.npy": as_npy(make_values(0, channels=4)),
    }  # fmt: skip
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members.items():
            for member, content in ((name, data), (f"{name[0]}.cls", b"1" if name[0] in "ad" else b"0")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    config = make_config(tmp_path / "x.tar", data={"min_seconds": 0.3})
    for _ in range(2):  # the second time from the index in the cache
        cached = config.change(data={"cache": str(tmp_path / "cache")})
        modality = make_modality(cached)
        source = modality.open(cached.data.path, labelled=True)
        source.prepare(tmp_path / "run", fresh=False)
        assert source.lengths is not None and source.labels is not None
        assert source.lengths.tolist() == [80, 60] and source.labels.tolist() == [1, 0]
        assert [entry.name.split("/")[-1] for entry in source.rejected] == ["x.tar:d.npy", "x.tar:e.npy"]
    (tmp_path / "c.csv").write_bytes(members["c.csv"])
    (tmp_path / "list.tsv").write_text("c.csv\tx\n")
    listed = make_modality(config).open(str(tmp_path / "list.tsv"), labelled=True)
    assert listed.classes == ["x"] and listed.lengths is not None and listed.lengths.tolist() == [60]


def test_decoding_gives_no_rate_where_there_is_none() -> None:
    assert decode_signal(as_npy(VALUES))[1] is None
    assert decode_signal(encode_sound(VALUES.astype(np.float32), 123))[1] == 123


def test_work_of_the_stem_counts_its_channels() -> None:
    shape = Shape(samples=1, copies=1, tokens=19, visible=8, masked=11, length=100)
    one, three = (count_flops(recipes.signals_tiny().change(stem={"channels": n}), shape) for n in (1, 3))
    # Forward of student and teacher and the gradient of the weights; not of the input.
    assert three - one == 3 * 2.0 * 19 * 10 * 64 * 2


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pre-training, features of a recording that is longer than any in training, and a probe."""
    for name in ("train", "test"):
        for label, factor in (("slow", 2.0), ("fast", 12.0)):
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(6):
                rng = np.random.default_rng([i, len(name), int(factor)])
                values = np.sin(2 * np.pi * factor * np.arange(60 + 5 * i)[:, None] / 100 + rng.uniform(0, 6, 3))
                values += 0.3 * rng.standard_normal(values.shape)
                np.save(tmp_path / name / label / f"{i}.npy", values)
    data, run = str(tmp_path / "train"), str(tmp_path / "run")
    options = ["--stem.channels", "3", "--run.steps", "3", "--data.global-batch", "4", "--data.workers", "0"]
    assert main(["pretrain", "signals-tiny", "--data.path", data, "--run.dir", run, *options, "--run.threads", "1",
                 "--run.device", "cpu", "--data.max-seconds", "0.7"]) == 0  # fmt: skip
    np.save(tmp_path / "long.npy", make_values(5, samples=400))
    (tmp_path / "one").mkdir()
    (tmp_path / "long.npy").rename(tmp_path / "one" / "long.npy")
    common = ["--checkpoint", run, "--device", "cpu"]
    assert main(["features", *common, "--input", str(tmp_path / "one"), "--output", str(tmp_path / "f.npy")]) == 0
    assert np.load(tmp_path / "f.npy").shape == (39, 64)
    capsys.readouterr()
    probe = ["evaluate", "probe", *common, "--train", data, "--test", str(tmp_path / "test"), "--labels-per-class", "2"]
    assert main([*probe, "--baselines", "random_init", "power_spectrum"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["linear_probe"]["power_spectrum"] == 1.0
    assert main(["export", "--checkpoint", run, "--format", "safetensors", "--output", str(tmp_path / "out")]) == 0
    assert "torch.randn(1, 10 * 100, 3)" in (tmp_path / "out" / "README.md").read_text()
    for form, text in (("huggingface", "expected a data2vec 1.0 model"), ("fairseq", "expected speech, vision, text")):
        assert main(["export", "--checkpoint", run, "--format", form, "--output", str(tmp_path / form)]) == 2
        assert text in capsys.readouterr().err
    arguments = ["--checkpoint", run, "--train", data, "--test", data, "--run.dir", str(tmp_path / "tuned")]
    assert main(["finetune", "vision-classify", *arguments]) == 2
    assert "task: expected none for a model of signals, got vision-classify" in capsys.readouterr().err
    assert (
        main(["evaluate", "maps", *common, "--input", str(tmp_path / "one"), "--output", str(tmp_path / "maps")]) == 0
    )
    assert (tmp_path / "maps" / "maps.png").is_file()
