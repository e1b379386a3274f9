"""Manifests and shell commands."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from pathlib import Path

import pytest
from support.images import encode, make_image, write_tar
from support.sounds import encode_sound, make_sound

from d2v import recipes
from d2v.config import Config
from d2v.data.decoding.sound import decode_audio
from d2v.data.index import open_source
from d2v.data.speech import Speech


def config(**data: object) -> Config:
    base = recipes.speech_tiny()
    return dataclasses.replace(base, data=dataclasses.replace(base.data, **data))  # type: ignore[arg-type]


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    folder = tmp_path / "audio" / "sub"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.wav").write_bytes(encode_sound(make_sound(i, 0.4 + 0.1 * i)))
    return tmp_path / "audio"


def test_fairseq_manifest(audio: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "train.tsv"
    manifest.write_text(f"{audio}\nsub/0.wav\t6400\nsub/1.wav\t8000\n\nsub/2.wav\t9600\n")
    (tmp_path / "train.ltr").write_text("H I |\nY O U | T H E R E |\n\nB Y E |\n")
    source = Speech(config()).open(str(manifest))
    assert source.lengths is not None
    assert source.lengths.tolist() == [6400, 8000, 9600]
    assert [source.read_transcript(i) for i in range(3)] == ["HI", "YOU THERE", "BYE"]
    assert len(decode_audio(source.read(1))[0]) == 8000
    # Lines stay aligned where short files are left out.
    longer = Speech(config(min_seconds=0.45)).open(str(manifest))
    assert [longer.read_transcript(i) for i in range(2)] == ["YOU THERE", "BYE"]


def test_paths_stay_inside_the_root(audio: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.wav"
    outside.write_bytes(encode_sound(make_sound(9, 0.5)))
    manifest = tmp_path / "m.tsv"
    lines = ["sub/0.wav\t6400", "../outside.wav\t8000", "sub/../../outside.wav\t8000", f"{outside}\t8000"]
    manifest.write_text("\n".join(["audio", *lines]))
    source = Speech(config()).open(str(manifest))
    assert [source.describe(i) for i in range(len(source))] == [str(audio / "sub/0.wav"), str(outside)]
    assert [r.name for r in source.rejected] == [f"{manifest}:3", f"{manifest}:4"]
    assert all("leads out of the root" in r.reason for r in source.rejected)


def test_labelled_table(audio: Path) -> None:
    table = audio / "labels.tsv"
    table.write_text("sub/0.wav\tyes\nsub/1.wav\tno\nsub/2.wav\tyes\n")
    source = Speech(config()).open(str(table), labelled=True, option="train")
    assert source.classes == ["no", "yes"]
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0, 1]
    table.write_text("sub/0.wav\tyes\nsub/1.wav\n")
    with pytest.raises(ValueError, match=r"train: expected path<TAB>label, got 'sub/1\.wav'"):
        Speech(config()).open(str(table), labelled=True, option="train")


def test_stored_members_of_an_archive(audio: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(audio / "a.zip", "w", zipfile.ZIP_STORED) as archive:
        archive.write(audio / "sub" / "2.wav", "x.wav")
        info = archive.getinfo("x.wav")
    offset = info.header_offset + 30 + len("x.wav")
    manifest = tmp_path / "m.tsv"
    manifest.write_text(f"audio\na.zip:{offset}:{info.file_size}\t9600\n")
    source = Speech(config()).open(str(manifest))
    assert source.read(0) == (audio / "sub" / "2.wav").read_bytes()


def test_commands_run_only_when_allowed(audio: Path, tmp_path: Path) -> None:
    manifest, proof = tmp_path / "m.tsv", tmp_path / "proof"
    manifest.write_text(f"audio\ntouch {proof} && cat {audio}/sub/1.wav |\t8000\nfalse |\t8000\n")
    with pytest.raises(ValueError, match=r"got a shell command in .*m\.tsv:2; --data\.allow-commands runs it"):
        Speech(config()).open(str(manifest))
    assert not proof.exists()
    source = Speech(config(allow_commands=True)).open(str(manifest))
    assert source.read(0) == (audio / "sub" / "1.wav").read_bytes()
    assert proof.exists()
    with pytest.raises(ValueError, match="exit code 1"):
        source.read(1)


def test_the_output_of_a_command_is_a_shard(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", {f"{i}.png": encode(make_image(i)) for i in range(3)})
    with pytest.raises(ValueError, match="got the shell command"):
        open_source(f"pipe:cat {shard}")
    source = open_source(f"pipe:cat {shard}", commands=True)
    again = open_source(f"pipe:cat {shard}", commands=True)
    assert source.read(2) == encode(make_image(2))
    assert source.digest() == again.digest()
    kept = Path(source.describe(0).split(":")[0])
    assert kept.exists()
    del source
    assert not kept.exists()
    with pytest.raises(ValueError, match="expected exit code 0"):
        open_source("pipe:exit 3", commands=True)


def test_manifests_that_cannot_be_used(tmp_path: Path) -> None:
    cases = {"": "expected lines", "/nowhere\n": "found none", "\xff": "UTF-8"}
    for text, message in cases.items():
        (tmp_path / "m.tsv").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=message):
            Speech(config()).open(str(tmp_path / "m.tsv"))
    (tmp_path / "m.tsv").write_text(f"{os.sep}nowhere\na.wav\t16000\n")
    source = Speech(config()).open(str(tmp_path / "m.tsv"))
    with pytest.raises(OSError, match="No such file"):
        source.read(0)


def test_counts_of_another_rate_are_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        (tmp_path / f"{i}.wav").write_bytes(encode_sound(make_sound(i, 0.5, 8_000), 8_000))
    manifest = tmp_path / "train.tsv"
    manifest.write_text(".\n0.wav\t4000\n1.wav\t4000\n2.wav\t4000\n")  # frames at 8 kHz
    source = Speech(config()).open(str(manifest))
    assert source.lengths is not None
    assert source.lengths.tolist() == [8_000] * 3
    assert "train.tsv says 4000 samples" in capsys.readouterr().err
