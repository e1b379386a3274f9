"""`python -m d2v_kernels.bench`: a user's own shapes against plain PyTorch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import summary
from d2v_kernels import registry
from d2v_kernels.bench import __main__ as bench
from d2v_kernels.bench import recipe
from d2v_kernels.bench.case import FAMILIES, Bytes, Place
from d2v_kernels.bench.measure import settle

ROOT = Path(__file__).resolve().parents[2]
CPU = Place(torch.device("cpu"))
KEYS = {"op", "case", "dtype", "device", "threads", "backend", "bytes", "formula", "errors", "seconds", "ratios",
        "median_ratios", "copy_bytes_per_second", "peak_bytes_per_second", "machine"}  # fmt: skip


def tiny(op: str) -> str:
    return ",".join(map(str, FAMILIES[op].tiny))


def run(*arguments: object) -> None:
    bench.main([*map(str, arguments), "--device", "cpu", "--budget", "0.01"])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == bench.REFUSED
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


@pytest.mark.parametrize("op", FAMILIES)
def test_every_operator_runs_at_a_tiny_shape(op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    dtypes = ["bf16"] if op.endswith("mixed") else ["fp32", "bf16"]
    against = "vector numpy" if op == "MaskSampler" else "eager"
    run(op, "--shape", tiny(op), "--dtype", ",".join(dtypes), "--against", against, "--json", file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    out = capsys.readouterr().out
    assert len(rows) == len(dtypes)
    for row in rows:
        assert set(row) >= KEYS
        assert row["op"].split()[0] == op and row["formula"].split(" with ")[0] in out
        assert {"d2v", "copy", against} <= set(row["seconds"]) and row["ratios"][against] > 0.0
        assert 0.0 < row["seconds"]["d2v"]["minimum"] <= row["seconds"]["d2v"]["median"]
        assert row["peak_bytes_per_second"] is None
    assert out.index("against float64") < out.index("of the copy rate")
    assert "peak not known" in out
    summary.main(["--files", str(file)])  # the project's own tables read these rows


def test_every_registered_operator_is_called_by_a_case() -> None:
    called: set[str] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func._schema.name.removeprefix("d2v::"))
            return func(*args, **(kwargs or {}))

    for family in FAMILIES.values():
        case = family.tiny_case()
        with registry.use_backend("reference"), Record():
            for name, call in case.make(CPU, 0).items():
                if name.startswith("d2v"):
                    call()
    left = set(registry.OPERATORS) - called
    assert left == {"gelu_backward_"} or not left, left


@pytest.mark.parametrize("options", [("--norm", "batch"), ("--norm", "none", "--out-norm", "layer")])
def test_norms(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    run("average_layers", "--shape", "3,2,20,32", "4,2,9,33", *options, "--peak", "100")
    out = capsys.readouterr().out
    assert out.count("of the peak") == 6 and "K=4, B=2, T=9, C=33" in out


def test_bytes_are_the_formula() -> None:
    size = Bytes("B*T*C*(K*item + result)", K=8, B=4, T=500, C=768, item=2, result=4)
    assert size == 4 * 500 * 768 * (8 * 2 + 4) == 30_720_000
    assert size.formula == "B*T*C*(K*item + result) with K=8, B=4, T=500, C=768, item=2, result=4"


# ---- what does not fit


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["average"], "operator: expected all or some of .*average_layers.*, got 'average'"),
        (["avg_layers"], "got 'avg_layers'; did you mean average_layers[?]$"),
        (["layer_norm"], "got 'layer_norm'; did you mean layer_norm_gelu[?]$"),
        (["average_layers", "--norm", "bogus"], "^--norm: invalid choice: 'bogus' .choose from .*instance"),
        ([], "operator: expected all or some of .*, got none"),
        (["average_layers", "--shape", "8,4,500"], r"expected 4 positive numbers \(K layers, B .*\), got '8,4,500'"),
        (["gelu", "--shape", "8,x"], r"expected 2 positive numbers \(R rows, C channels\), got '8,x'"),
        (["gelu", "--shape", "8,0"], "expected 2 positive numbers"),
        (["gelu", "--dtype", "int8"], "--dtype: expected some of fp32, bf16, fp16, fp64, got 'int8'"),
        (["gelu", "--against", "jax"], "--against: expected some of eager, compile, got 'jax'"),
        (["gelu", "--norm", "layer"], "--norm: expected one of average_layers beside it, got gelu"),
        (["gelu", "attention", "--shape", "8,8"], "--shape: expected one operator beside it, got 2"),
        (["dropout_add_layer_norm_mixed", "--shape", "2,6,32"], "expected bfloat16 or float16, got .*float32"),
        (["gelu", "--threads", "0"], "--threads: expected 1 or more, got 0"),
        (["gelu", "--compare", "nowhere"], "--compare: expected rows of an earlier --json, got nowhere, which cannot"),
        (["--from", "vision-huge"], "recipe: expected one of .*, got 'vision-huge'"),
        (["gelu", "--length", "3"], "--samples and --length: expected --from beside them"),
        (["gelu", "--from", "vision-tiny"], "--from: expected no operators.* beside it, got gelu$"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(words, refused(capsys, *arguments))


@pytest.mark.parametrize("text", ["", "op,seconds\n", '{"op": "gelu"}\n', "[1]", "\udcff"])
def test_what_is_compared_with_is_read_before_anything_is_timed(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(text.encode(errors="surrogateescape"))
    words = refused(capsys, "gelu", "--compare", file)
    assert words.startswith(f"--compare: expected rows of an earlier --json, got {file}, ")
    assert words.endswith(("line 1 of which is not one", "which is empty")) or "cannot be read" in words


def test_names_and_shapes_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    run("EmaPlan", "--shape", "8x32", "8, 32", "--dtype", "bfloat16", "--json", file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["op"], row["dtype"]) for row in rows] == [("update_ema_", "bfloat16")] * 2
    assert rows[0]["case"] == rows[1]["case"]


def test_files_that_are_there_or_tracked_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text("kept\n")
    assert "expected a new file" in refused(capsys, "gelu", "--json", old)
    assert old.read_text() == "kept\n"
    git = ["git", "-C", str(tmp_path)]
    if subprocess.run([*git, "init", "-q"], check=False, capture_output=True).returncode:
        pytest.skip("git is not installed")
    subprocess.run([*git, "add", "old.jsonl"], check=True)
    old.unlink()
    assert "that git does not track" in refused(capsys, "gelu", "--json", old)
    assert not old.exists()
    assert "in a folder that exists" in refused(capsys, "gelu", "--json", tmp_path / "none" / "rows.jsonl")


# ---- what is wrong or slow


@pytest.mark.parametrize(
    ("op", "error"), [("gather_tokens", 0.05), ("gather_tokens", float("nan")), ("restore_tokens", 0.0)]
)
def test_a_wrong_kernel_is_found_before_it_is_timed(
    op: str, error: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One wrong number, one NaN, and noise of other keys, as large as the right one."""
    right = registry.choose(registry.Case(op, "cpu", (torch.bfloat16,)))

    def wrong(*arguments: Any) -> torch.Tensor:
        if op == "restore_tokens":
            kept, restore, fill, keys, std = arguments
            arguments = kept, restore, fill, keys + 1, std
        result = right.implementations[op](*arguments)
        result[0, 0, 0] += error
        return result

    implementations = {**right.implementations, op: wrong}
    broken = registry.Backend("planted", implementations, lambda case: [])
    monkeypatch.setitem(registry._backends, "planted", broken)
    monkeypatch.setattr(registry, "_chosen", {})
    monkeypatch.setitem(registry.EXCEPTIONS, ("cpu", op), ("planted", "reference"))
    with pytest.raises(SystemExit) as end:
        run(op, "--shape", tiny(op), "--dtype", "bf16")
    assert end.value.code == bench.WRONG
    out, err = capsys.readouterr()
    assert "left out: d2v: differs from float64 by" in out and " ms" not in out
    assert "1 of 1 cases differ" in err


def test_an_opponent_that_differs_is_found() -> None:
    family = FAMILIES["gelu"]
    case = family.make("", 8, 32, dtype=torch.float32, goals={})

    def make(place: Place, seed: int) -> Any:
        contenders = case.make(place, seed)
        return {**contenders, "eager": lambda: [t + 1.0 for t in contenders["eager"]()]}

    names, reasons, errors = settle(bench.replace(case, make=make), CPU, ["eager"])
    assert names == ["d2v"] and "differs from float64" in reasons["eager"]
    assert errors["d2v"] < 1e-6 < errors["eager"]


def test_the_slower_row_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "rows.jsonl", tmp_path / "quicker.jsonl"
    run("gelu", "--shape", "8,32", "9,33", "--json", file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    capsys.readouterr()
    assert bench.find_slower(rows, rows) == []
    assert capsys.readouterr().out.count("ok ") == 2
    for key in ("minimum", "median", "spread"):
        rows[1]["seconds"]["d2v"][key] /= 50.0  # so that the same again is slower
    other.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "case": "gone"}]))
    with pytest.raises(SystemExit) as end:
        run("gelu", "--shape", "9,33", "--compare", other)
    assert end.value.code == bench.SLOWER
    assert re.search(r"slower  gelu forward \+ backward 9 x 33 float32 cpu 1: \d+\.\d+ of", capsys.readouterr().out)
    rows[1]["machine"]["torch"] = "1.0"
    for key in ("minimum", "median"):
        rows[1]["seconds"]["d2v"][key] *= 2500.0
    other.write_text(json.dumps(rows[1]) + "\n")
    run("gelu", "--shape", "4,33", "9,33", "--compare", other)
    out = capsys.readouterr().out
    assert "new     gelu forward + backward 4 x 33" in out and "another torch: stored 1.0, now " in out
    found = refused(capsys, "gelu", "--shape", "4,33", "--compare", other)
    assert found == (
        f"--compare: expected a row of what is asked for, got {other} with gelu forward + backward 9 x 33 float32 cpu 1"
    )


# ---- recipes


def test_shapes_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(recipe.recipe_calls("vision-tiny", 3, None, torch.float32))
    ops = {op for op, *_ in found}
    assert ops >= {"average_layers", "gather_tokens", "restore_tokens", "masked_regression_loss", "update_ema_"}
    (layers,) = (shape for op, shape, *_ in found if op == "average_layers")
    gathered = next(shape for op, shape, *_ in found if op == "gather_tokens" and shape[3] > 1)
    assert layers[1] == gathered[0] == 3 and layers[2:] == gathered[1:3]
    assert all(len(shape) == len(FAMILIES[op].sizes) for op, shape, *_ in found)


@pytest.mark.parametrize("name", ["speech-tiny", "text1-tiny"])
def test_a_recipe_through_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        "--from",
        name,
        "--samples",
        2,
        "--length",
        1 if "speech" in name else 32,
        "--dtype",
        "bf16",
        "--against",
        "none",
    )
    out = capsys.readouterr().out
    assert f"{name}, 2 samples: " in out and "average_layers" in out and "bfloat16" in out


def test_without_d2v_the_command_works_and_says_what_recipes_need() -> None:
    code = (
        "import sys; sys.modules['d2v'] = None; from d2v_kernels.bench.__main__ import main;"
        "main('gelu --shape 8,32 --budget 0.01 --device cpu'.split()); main(['--from', 'vision-tiny'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == bench.REFUSED and "GB/s" in done.stdout
    assert re.fullmatch(
        r"--from needs the package d2v with its recipes \(pip install 'd2v\[train\]'\): .*\n", done.stderr
    )


def test_help_explains_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    out = capsys.readouterr().out
    for op, family in FAMILIES.items():
        assert f"  {op}\n      {bench.explain(family.sizes)}: {','.join(map(str, family.usual))}" in out
    assert "exit status" in out and out.count("(default:") >= 13
