"""`examples/notebook.py` and `examples/load_model.py` run, a model is a line, and progress in a notebook is a bar."""

from __future__ import annotations

import json
import re
import runpy
import sys
import types
from pathlib import Path

import matplotlib
import pytest
import tqdm.auto
from support.families import make_config, make_model

import d2v
from d2v.model.data2vec import strip_pretraining
from d2v.model.saving import write_folder
from d2v.train.logging import Progress

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    text = (EXAMPLES / "notebook.py").read_text(encoding="utf-8")
    size = 'FOLDER, STEPS, CROPS = Path("small"), 6, {"pretrain": 3, "train": 4, "test": 3}'
    small = re.sub(r"^FOLDER, .*$", size, text, flags=re.MULTILINE)
    assert small != text
    cells = [cell for cell in re.split(r"^# %%", small, flags=re.MULTILINE)[1:] if not cell.startswith(" [markdown]")]
    assert len(cells) == 6
    names: dict[str, object] = {}
    for cell in cells:  # as a notebook does, one after the other in one space of names
        exec(compile(cell, "cell", "exec"), names)
    assert {p.name for p in (tmp_path / "small").iterdir()} >= {"curves.png", "probe.png", "run"}
    result = json.loads((tmp_path / "small" / "run" / "probe.json").read_text())
    assert result["linear_probe"].keys() == {"pretrained", "random_init", "pixels"}
    assert "Data2Vec(2.0, vision: 32 px, patch 4; 3 blocks" in capsys.readouterr().out


def test_a_model_is_a_line() -> None:
    model = make_model(make_config("vision-base"))
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        counts[name.startswith("teacher.")] += parameter.numel()
    expected = f"parameters: student {counts[False]:,}, teacher {counts[True]:,})"
    assert repr(model).endswith(expected) and "\n" not in repr(model)
    assert "(qkv): Linear" in repr(model.blocks)
    assert "teacher 0)" in repr(strip_pretraining(model))


@pytest.mark.parametrize("decoder", [True, False])
def test_a_folder_without_code(
    decoder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a folder, and from a hub, which is not asked here; a file that came without a decoder counts, too."""
    model = make_model(make_config("speech-base"))
    write_folder(model if decoder else strip_pretraining(model, teacher=False), tmp_path / "model")
    hub = types.ModuleType("huggingface_hub")
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, *allow_patterns))
        return str(tmp_path / "model")

    hub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for name in (str(tmp_path / "model"), "someone/model"):
        monkeypatch.setattr(sys, "argv", ["load_model.py", name])
        runpy.run_path(str(EXAMPLES / "load_model.py"), run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3 and lines[0] == repr(d2v.Data2Vec.from_checkpoint(tmp_path / "model"))
    assert asked == [("someone/model", "config.json", "model.safetensors")]
    assert (EXAMPLES / "load_model.py").read_text(encoding="utf-8").count("\n") <= 30


@pytest.mark.parametrize("kernel", [True, False])
def test_progress_in_a_notebook(
    kernel: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar, of widgets where there are some; IPython in a script is no notebook."""
    shell = types.SimpleNamespace(config={"IPKernelApp": {}} if kernel else {})
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    made = []

    class Bar(tqdm.auto.tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: object) -> None:
            made.append(options)
            super().__init__(**options)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    progress = Progress(2, 10)
    progress.advance()
    progress.show({"step": 3, "step_seconds": 0.1, "loss": 0.5})
    progress.say("note: something")
    progress.close()
    assert made == ([{"total": 10, "initial": 2, "unit": "update"}] if kernel else [])
    err = capsys.readouterr().err
    assert "note: something\n" in err
    assert ("3/10" in err and "loss 0.5000" in err) if kernel else err.startswith("update 3/10: loss 0.5000")
