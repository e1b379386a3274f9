"""`d2v features`: rows and index agree with encoding by hand; bad samples are left out."""

from __future__ import annotations

import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.families import make_config
from support.images import encode, make_image

import d2v
import d2v.evaluate.features
from d2v import recipes
from d2v.data import make_modality
from d2v.evaluate.features import extract
from d2v.model.saving import write_folder
from d2v.saved import load_model


@pytest.fixture
def setting(tmp_path: Path) -> tuple[str, str]:
    """A checkpoint and a folder with four images and a broken one."""
    torch.manual_seed(0)
    write_folder(d2v.Data2Vec(recipes.vision_tiny()), tmp_path / "model")
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(encode(make_image(i, (40, 36))))
    (tmp_path / "images" / "2b.png").write_bytes(b"broken")
    return str(tmp_path / "model"), str(tmp_path / "images")


def read_index(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


def test_commands_run_only_where_this_call_allows_them(setting: tuple[str, str], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        shard.add(Path(setting[1], "0.png"), "0.png")
    command = f"pipe:cat {shlex.quote(str(tmp_path / 'a.tar'))}"
    with pytest.raises(ValueError, match="shell command"):
        extract(setting[0], command, str(tmp_path / "out.npy"))
    assert "of 1 images" in extract(setting[0], command, str(tmp_path / "out.npy"), allow_commands=True)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_every_token(setting: tuple[str, str], tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out{suffix}"
    said = extract(*setting, str(output), batch=2)
    assert "256 rows of 64 of 4 images" in said and "left out 1" in said and "2b.png" in said
    rows = np.load(output) if suffix == ".npy" else load_file(output)["features"]
    assert rows.dtype == np.float32 and rows.shape == (256, 64)
    index = read_index(tmp_path / f"out{suffix}.index.tsv")
    used = [line for line in index if line[2] != "0"]
    assert [(int(a), int(b)) for _, a, b, _ in used] == [(0, 64), (64, 64), (128, 64), (192, 64)]
    assert [Path(name).name for name, *_ in used] == ["0.png", "1.png", "2.png", "3.png"]
    (lost,) = [line for line in index if line not in used]
    assert Path(lost[0]).name == "2b.png" and lost[1] == "192" and "image" in lost[3]
    model, config, _ = load_model(setting[0], "cpu")
    modality = make_modality(config)
    source = modality.open(setting[1], option="input")
    value = modality.eval_transform(modality.load(source, 0)[0])
    expected = model.teacher.encode(modality.prepare(torch.from_numpy(np.stack([value])))).features[0]
    np.testing.assert_allclose(rows[:64], expected.numpy(), atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "model", output.name, f"{output.name}.index.tsv"]


def test_mean_of_the_student(setting: tuple[str, str], tmp_path: Path) -> None:
    extract(*setting, str(tmp_path / "a.npy"), weights="student")
    extract(*setting, str(tmp_path / "b.npy"), weights="student", pool="mean")
    tokens, means = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    np.testing.assert_allclose(means, tokens.reshape(4, 64, 64).mean(1), atol=1e-5)


# ---- speech and text of any length ------------------------------------------------------------------------------


def write_model(folder: Path, recipe: str, text: Path | None = None, **sections: dict[str, Any]) -> str:
    """A small model with random weights."""
    torch.manual_seed(0)
    config = make_config(recipe)
    if text is not None:
        from d2v.interop.tokenizer import write_tokenizer

        write_tokenizer(folder.parent / "tokenizer", str(text), vocabulary=265, gpt2=None)
        sections |= {"data": {"tokenizer": str(folder.parent / "tokenizer")}}
        sections["stem"] = {"vocabulary": 265, **sections.get("stem", {})}
    write_folder(d2v.Data2Vec(config.change(**sections)), folder)
    if text is not None:
        shutil.copytree(folder.parent / "tokenizer", folder / "tokenizer")
    return str(folder)


def write_noise(path: Path, seconds: float, seed: int = 0) -> Path:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    values = 0.1 * np.random.default_rng(seed).standard_normal(round(16_000 * seconds))
    soundfile.write(path, values, 16_000, subtype="FLOAT")
    return path


@pytest.mark.parametrize("recipe", ["speech-base", "speech-tiny", "speech1-base"])
def test_a_long_recording_has_all_its_tokens(tmp_path: Path, recipe: str) -> None:
    """As many as a model that saw so long ones gives; the same ones, where its tokens see few others."""
    write_noise(tmp_path / "in" / "a.wav", 3.3)
    shown = dict.fromkeys(("short", "long"), np.zeros(0))
    for name, seconds in (("short", 1.0), ("long", 20.0)):
        model = write_model(tmp_path / name, recipe, data={"max_seconds": seconds})
        said = extract(model, str(tmp_path / "in"), str(tmp_path / f"{name}.npy"), layer=0)
        assert "left out" not in said and "cut" not in said
        shown[name] = np.load(tmp_path / f"{name}.npy")
    assert shown["short"].shape == shown["long"].shape
    if recipe != "speech-tiny":  # its stem takes the mean over the whole
        np.testing.assert_allclose(shown["short"], shown["long"], atol=1e-4)


def test_cut_where_asked_for(tmp_path: Path) -> None:
    for name, seconds in (("a", 3.0), ("b", 0.5)):
        write_noise(tmp_path / "in" / f"{name}.wav", seconds)
    model = write_model(tmp_path / "model", "speech-base", data={"max_seconds": 1.0})
    said = extract(model, str(tmp_path / "in"), str(tmp_path / "f.npy"), max_seconds=2.0)
    assert "; cut 1: " in said and "a.wav: cut to 2 of 3 s" in said
    (first, _, rows, note), second = read_index(tmp_path / "f.npy.index.tsv")
    assert first.endswith("a.wav") and int(rows) > 1.7 * int(second[2]) and note == "cut to 2 of 3 s" and not second[3]
    with pytest.raises(ValueError, match=r"max-tokens: expected nothing but for text, got 9 for a model of speech"):
        extract(model, str(tmp_path / "in"), str(tmp_path / "g.npy"), max_tokens=9)
    with pytest.raises(ValueError, match=r"max-seconds: expected at least .*, got -1"):
        extract(model, str(tmp_path / "in"), str(tmp_path / "g.npy"), max_seconds=-1.0)


def test_what_the_centre_crop_leaves_out_is_said(setting: tuple[str, str], tmp_path: Path) -> None:
    Path(setting[1], "3.png").write_bytes(encode(make_image(3, (36, 36))))
    said = extract(*setting, str(tmp_path / "f.npy"))
    assert "; cut 3: " in said and "0.png: cut to the middle 36 x 36 of 40 x 36" in said
    notes = [line[3] for line in read_index(tmp_path / "f.npy.index.tsv")]
    assert sum(note.startswith("cut to the middle") for note in notes) == 3 and notes.count("") == 1


def test_a_long_text_has_all_its_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"word{i}" for i in range(60)) + "\n\nshort one\n")
    shown = []
    for name, tokens in (("short", 24), ("long", 600)):
        stem = {"max_tokens": tokens, "learned_positions": False}
        model = write_model(tmp_path / name / "m", "text-base", tmp_path / "a.txt", stem=stem)
        said = extract(model, str(tmp_path / "a.txt"), str(tmp_path / f"{name}.npy"), layer=0)
        assert "left out" not in said and "of 2 texts" in said
        shown.append(np.load(tmp_path / f"{name}.npy"))
    assert shown[0].shape[0] > 60
    np.testing.assert_allclose(*shown, atol=1e-5)
    said = extract(model, str(tmp_path / "a.txt"), str(tmp_path / "cut.npy"), max_tokens=20)
    assert "; cut 1: document 1 of" in said and "cut to 20 of" in said
    assert read_index(tmp_path / "cut.npy.index.tsv")[0][2] == "20"


def test_no_file_vanishes(tmp_path: Path) -> None:
    """Damaged, empty, too short, not finite: named with the reason on the console and in the index."""
    import soundfile

    write_noise(tmp_path / "in" / "good.wav", 1.0)
    write_noise(tmp_path / "in" / "short.wav", 0.001)
    (tmp_path / "in" / "empty.wav").touch()
    (tmp_path / "in" / "page.wav").write_text("<html>404</html>")
    soundfile.write(tmp_path / "in" / "none.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "in" / "odd.wav", np.full(9000, np.nan, dtype=np.float32), 16_000, subtype="FLOAT")
    said = extract(write_model(tmp_path / "model", "speech-base"), str(tmp_path / "in"), str(tmp_path / "f.npy"))
    assert "of 1 utterances" in said and "left out 5: " in said
    index = {Path(name).name: (rows, note) for name, _, rows, note in read_index(tmp_path / "f.npy.index.tsv")}
    assert index.pop("good.wav")[1] == "" and len(index) == 5
    assert all(rows == "0" and note for rows, note in index.values())
    assert "shorter than" in index["short.wav"][1] and "not finite" in index["odd.wav"][1]


def test_features_that_are_not_finite_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(2):
        write_noise(tmp_path / "in" / f"{i}.wav", 1.0, seed=i)
    model = write_model(tmp_path / "model", "speech-base")
    encode = d2v.evaluate.features.encode_pieces
    spoil = lambda *a, **k: [f * (np.inf if i else 1.0) for i, f in enumerate(encode(*a, **k))]  # noqa: E731
    monkeypatch.setattr("d2v.evaluate.features.encode_pieces", spoil)
    said = extract(model, str(tmp_path / "in"), str(tmp_path / "f.npy"))
    assert "left out 1: " in said and "1.wav: features that are not finite" in said


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_features_depend_on_the_sample_alone(tmp_path: Path, weights: str) -> None:
    """Not on its neighbours in the batch, though published positions see padding, nor on the precision of training."""
    write_noise(tmp_path / "alone" / "a.wav", 1.0)
    write_noise(tmp_path / "both" / "a.wav", 1.0)
    write_noise(tmp_path / "both" / "b.wav", 3.0, seed=1)
    plain = write_model(tmp_path / "plain", "speech1-base")
    for name, change in (
        ("published", {"published": frozenset({"positions-see-padding"})}), ("half", {"run": {"precision": "bf16"}}),
    ):  # fmt: skip
        model = write_model(tmp_path / name, "speech1-base", **change)  # type: ignore[arg-type]
        rows = []
        for checkpoint, data in ((plain, "alone"), (model, "alone"), (model, "both")):
            extract(checkpoint, str(tmp_path / data), str(tmp_path / "f.npy"), weights=weights)
            rows.append(np.load(tmp_path / "f.npy"))
        assert np.array_equal(rows[0], rows[1])
        np.testing.assert_allclose(rows[2][: len(rows[0])], rows[0], atol=1e-5)
    extract(plain, str(tmp_path / "alone"), str(tmp_path / "f.npy"), weights=weights, precision="bf16")
    assert 1e-4 < np.abs(np.load(tmp_path / "f.npy") - rows[0]).max() < 0.3


def test_refused_before_anything_is_written(setting: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output: expected a name that ends in"):
        extract(*setting, str(tmp_path / "out.txt"))
    with pytest.raises(ValueError, match="pool: expected one of tokens, mean"):
        extract(*setting, str(tmp_path / "out.npy"), pool="max")
    for file in Path(setting[1]).iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(ValueError, match="input: expected images that can be decoded"):
        extract(*setting, str(tmp_path / "out.npy"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "model"]
