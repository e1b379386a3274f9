"""Damaged and edited run folders, made from a seed: each resumes to the same bits or is refused with one sentence."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from d2v.files import checksum
from d2v.folder import MODEL, load_tensors
from soak.cases import RANDOM, make_data, options
from soak.jobs import assert_same_weights, call

STEPS, EVERY = 6, 2
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 10**6, 10**18, 10**40, 0.5, 1e308, float("nan"), "", "x", "../x", [], [1], {}, {"a": 1},
)  # fmt: skip


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from nodes(value[key])


def pick(folder: Path, rng: random.Random) -> tuple[Path, Any, Any, Any]:
    """A JSON file of the run, its content, and a place in it: large files are not more likely, nor large parts."""
    file = rng.choice([*sorted(folder.glob("checkpoints/step-*/*.json")), folder / "config.json"])
    content = json.loads(file.read_text())
    owner, key = rng.choice(list(nodes(content))) if rng.random() < 0.5 else (content, rng.choice(list(content)))
    while isinstance(owner[key], (dict, list)) and owner[key] and rng.random() < 0.7:
        owner = owner[key]
        key = rng.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
    return file, content, owner, key


def edit(folder: Path, rng: random.Random) -> str:
    """Another value of another or of the same type."""
    file, content, owner, key = pick(folder, rng)
    old = owner[key]
    owner[key] = (
        old + rng.choice([-1, 1, 2]) if isinstance(old, (int, float)) and rng.random() < 0.5 else rng.choice(VALUES)
    )
    file.write_text(json.dumps(content))
    return f"{file.name}: {key} {str(old)[:40]} -> {owner[key]}"


def drop(folder: Path, rng: random.Random) -> str:
    """A key or an item less."""
    file, content, owner, key = pick(folder, rng)
    del owner[key]
    file.write_text(json.dumps(content))
    return f"{file.name}: without {key}"


def nest(folder: Path, rng: random.Random) -> str:
    """A value, or a whole file, nested more deeply than anything can read."""
    file, content, owner, key = pick(folder, rng)
    depth = rng.choice([50, 900, 100_000])
    owner[key] = "MARK"
    text = json.dumps(content).replace('"MARK"', "[" * depth + "]" * depth)
    file.write_text(text if rng.random() < 0.7 else "[" * depth)
    return f"{file.name}: {key} nested {depth} times"


def any_file(folder: Path, rng: random.Random) -> Path:
    """A file of the run that is not empty."""
    return rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size))


def cut(folder: Path, rng: random.Random) -> str:
    """A file cut off."""
    file = any_file(folder, rng)
    data = file.read_bytes()
    file.write_bytes(data[: (size := rng.randrange(len(data)))])
    return f"{file.name}: {size} of {len(data)} bytes"


def flip(folder: Path, rng: random.Random) -> str:
    """A bit that is another."""
    file = any_file(folder, rng)
    data = bytearray(file.read_bytes())
    data[place := rng.randrange(len(data))] ^= 1 << (bit := rng.randrange(8))
    file.write_bytes(data)
    return f"{file.name}: bit {bit} of byte {place}"


def zero(folder: Path, rng: random.Random) -> str:
    """A block that never reached the disk."""
    file = any_file(folder, rng)
    data = bytearray(file.read_bytes())
    place = rng.randrange(len(data))
    data[place : place + 512] = bytes(len(data[place : place + 512]))
    file.write_bytes(data)
    return f"{file.name}: zeros from byte {place}"


def remove(folder: Path, rng: random.Random) -> str:
    """A file less."""
    file = any_file(folder, rng)
    file.unlink()
    return f"without {file.name} of {file.parent.name}"


def swap(folder: Path, rng: random.Random) -> str:
    """The same file of two checkpoints exchanged."""
    one, other = sorted(folder.glob("checkpoints/step-*"))[-2:]
    name = rng.choice(sorted(p.name for p in one.iterdir()))
    kept = (one / name).read_bytes()
    (one / name).write_bytes((other / name).read_bytes())
    (other / name).write_bytes(kept)
    return f"{name} of two checkpoints exchanged"


def rename(folder: Path, rng: random.Random) -> str:
    """A checkpoint under the name of another step."""
    last = sorted(folder.glob("checkpoints/step-*"))[-1]
    name = f"step-{rng.choice([3, 5, 6, 10**9]):08d}"
    last.rename(last.with_name(name))
    return f"{last.name} called {name}"


DAMAGES: tuple[Callable[[Path, random.Random], str], ...] = (
    edit,
    edit,
    drop,
    nest,
    cut,
    flip,
    zero,
    remove,
    swap,
    rename,
)


def sign(folder: Path) -> None:
    """Checksums of the text files as if who edited them had known how: only the checks of the values are left."""
    for checkpoint in folder.glob("checkpoints/step-*"):
        index = checkpoint / "metadata.json"
        try:
            value = json.loads(index.read_text())
            value.pop("sum", None)
            value["texts"] = {n: checksum((checkpoint / n).read_bytes()) for n in value["texts"]}
            index.write_text(json.dumps({**value, "sum": checksum(json.dumps(value).encode())}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue


def damage_and_resume(folder: Path, *, damages: int = 200, seed: int = 0) -> dict[str, int]:
    """Damages copies of a stopped run in `damages` ways, resumes one half and exports the other.

    Each must end with the bits of the whole run, or with exit code 2 and one sentence. Every fourth has its checksums
    made anew: it must be refused, or go on; what its values mean cannot be known then. Returns how often each happened;
    `AssertionError` names the damage.
    """
    data = make_data("vision", folder / "data")
    whole, clean, run, export = (folder / name for name in ("whole", "clean", "run", "export"))

    def command(place: Path) -> list[str]:
        more = ("--run.keep-checkpoints", "4", *RANDOM)
        return ["pretrain", *options("vision", data, place, STEPS, *more, every=EVERY, batch=4, small=True)]

    code, text = call(command(whole))
    assert code == 0, text
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    run.rename(clean)
    reference = folder / "reference"
    code, text = call(["export", "--checkpoint", str(clean), "--format", "safetensors", "--output", str(reference)])
    assert code == 0, text
    counts: Counter[str] = Counter()
    for number in range(damages):
        rng = random.Random(1000 * seed + number)
        for old in (run, export):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(clean, run)
        (run / ".lock").unlink(missing_ok=True)
        what = f"damage {number}, {DAMAGES[number % len(DAMAGES)](run, rng)}"
        signed = rng.random() < 0.25
        if signed:
            sign(run)
        exports = rng.random() < 0.4
        arguments = ["export", "--checkpoint", str(run), "--format", "safetensors", "--output", str(export)]
        if not exports:
            arguments = (
                command(run) if rng.random() < 0.5 else ["pretrain", "--run.dir", str(run), "--run.threads", "1"]
            )
        try:
            code, text = call(arguments)
        except Exception as error:
            raise AssertionError(f"{what}, {arguments[0]}: {type(error).__name__}: {error}") from error
        sentences = [line for line in text.splitlines() if line.startswith("d2v: ")]
        assert code in (0, 2), f"{what}: expected exit code 0 or 2, got {code}: {text}"
        assert "Traceback" not in text and len(sentences) == (code == 2), f"{what}: expected one sentence, got {text!r}"
        assert code == 0 or len(sentences[0]) < 1500, f"{what}: {sentences[0][:3000]}"
        if code == 0 and not signed:
            try:
                if not exports:
                    assert_same_weights(run, whole)
                else:
                    got, expected = (load_tensors(place, MODEL) for place in (export, reference))
                    assert {n: t.tolist() for n, t in got.items()} == {n: t.tolist() for n, t in expected.items()}
            except AssertionError as error:
                raise AssertionError(f"{what}, {arguments}: silently different: {error}") from error
        counts["refused" if code else "went on" if signed else "equal"] += 1
    return dict(counts)
