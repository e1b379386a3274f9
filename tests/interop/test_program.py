"""Encoders as programs that need no d2v: torch.export and ONNX."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import d2v
from d2v import recipes
from d2v.config import Config
from d2v.interop.convert import export_checkpoint
from d2v.interop.program import make_example, make_program, save_program
from d2v.model.saving import write_folder


def small(name: str) -> Config:
    """A recipe with an encoder of few channels."""
    config = recipes.get(name)
    stem = dataclasses.replace(
        config.stem, convolutions=tuple((16, k, s) for _, k, s in config.stem.convolutions), image_size=32
    )  # fmt: skip
    encoder = dataclasses.replace(
        config.encoder, width=32, heads=4, depth=2, prenet_depth=min(1, config.encoder.prenet_depth)
    )
    return dataclasses.replace(
        config, stem=stem, encoder=encoder, target=dataclasses.replace(config.target, top_k=1),
        decoder=dataclasses.replace(config.decoder, width=32, groups=4),
    )  # fmt: skip


def untrained(name: str) -> d2v.Data2Vec:
    torch.manual_seed(0)
    model = d2v.Data2Vec(small(name)).eval().drop_training_settings()
    for parameter in model.teacher.parameters():  # as after some updates
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def others(example: Tensor) -> list[Tensor]:
    """Inputs of other batch sizes and lengths."""
    if example.dim() == 4:
        return [torch.randn(batch, *example.shape[1:]) for batch in (1, 3)]
    longer = torch.cat([example, example.flip(1)], 1)  # (B,S), (B,S,N)
    return [longer[:1, : example.shape[1] // 2 + 1], torch.cat([longer, longer.flip(0)])[:3, : example.shape[1] + 7]]


NAMES = ["vision-tiny", "speech-base", "speech-tiny", "text1-tiny", "signals-tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_programs_are_the_teacher(name: str, tmp_path: Path) -> None:
    model = untrained(name)
    program = make_program(model)
    assert not [n for n in program.graph.nodes if str(n.target).startswith("d2v")]
    run, cases = program.module(), others(make_example(model.config))
    wanted = [model.teacher.encode(inputs).features for inputs in cases]
    assert not torch.allclose(wanted[0], model.encode(cases[0]).features, rtol=1e-2, atol=1e-2)
    for inputs, features in zip(cases, wanted, strict=True):
        torch.testing.assert_close(run(inputs), features, rtol=1e-4, atol=1e-4)
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    save_program(program, tmp_path / "encoder.onnx")
    session = runtime.InferenceSession(str(tmp_path / "encoder.onnx"), providers=["CPUExecutionProvider"])
    for inputs, features in zip(cases, wanted, strict=True):
        (found,) = session.run(["features"], {"inputs": inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), features, rtol=1e-4, atol=1e-4)


def test_the_command_writes_what_a_process_without_d2v_reads(tmp_path: Path) -> None:
    model = untrained("vision-tiny")
    write_folder(model, tmp_path / "run")
    said = export_checkpoint(str(tmp_path / "run"), "program", str(tmp_path / "out"))
    assert said.startswith(str(tmp_path / "out" / "encoder.pt2"))
    assert Config.from_json((tmp_path / "out" / "config.json").read_text()).stem == model.config.stem
    inputs = make_example(model.config)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch\n"
        f"program = torch.export.load({str(tmp_path / 'out' / 'encoder.pt2')!r}).module()\n"
        f"torch.save(program(torch.load({str(tmp_path / 'inputs.pt')!r})), {str(tmp_path / 'features.pt')!r})\n"
        "assert 'd2v' not in sys.modules and 'd2v_kernels' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    features = torch.load(tmp_path / "features.pt")
    torch.testing.assert_close(features, model.teacher.encode(inputs).features, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="output: expected an absent or empty folder"):
        export_checkpoint(str(tmp_path / "run"), "onnx", str(tmp_path / "out"))
