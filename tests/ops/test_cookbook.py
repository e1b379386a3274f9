"""`examples/cookbook`: each recipe learns on photographs, and its fused form has the losses of the plain one."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "cookbook"
FORMS: dict[str, Any] = {
    "mae": lambda names: [lambda ops=names[n]: names["MaskedAutoencoder"](ops) for n in ("Fused", "Plain")],
    "jepa": lambda names: [lambda fused=f: names["Jepa"](fused) for f in (True, False)],
    "teacher": lambda names: [lambda fused=f: names["SelfDistillation"](fused) for f in (True, False)],
    "layer_targets": lambda names: [lambda fused=f: names["Distillation"](fused) for f in (True, False)],
}


def test_every_recipe_is_here_and_short() -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
    assert set(files) == {*FORMS, "shared"}
    assert all(text.count("\n") <= 120 for text in files.values())


@pytest.mark.parametrize("name", FORMS)
def test_both_forms_learn_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    if name == "layer_targets":
        pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(FOLDER))
    names = runpy.run_path(str(FOLDER / f"{name}.py"))
    data = names["load_crops"](48)[0]
    shared = runpy.run_path(str(FOLDER / "shared.py"))
    (fused, _), (plain, _) = (shared["train"](make, 8, 12, data) for make in FORMS[name](names))
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(plain), rtol=2e-3, atol=1e-4)
    assert fused[-1] < fused[0]
