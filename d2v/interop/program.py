"""Encoders as programs of their own, which need no d2v: `torch.export` and ONNX."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v.config import Config
from d2v.config.inputs import find_kind
from d2v.data import make_modality
from d2v.data.dataset import Sample
from d2v.data.tokenizer import PADDING
from d2v.model.data2vec import Data2Vec
from d2v.model.teacher import PARTS, encode_measured

OPSET = 20


class Encoder(nn.Module):
    """Features of unmasked, unpadded inputs by the averaged weights, as `model.teacher.encode` has them."""

    def __init__(self, model: Data2Vec) -> None:
        super().__init__()
        teacher = dict(model.teacher.named_children())
        self.parts = nn.ModuleDict({name: teacher.get(name, model.get_submodule(name)) for name in PARTS})
        self.extra = model.config.encoder.extra_tokens
        self.eval().requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B,T,C) of inputs, as `Data2Vec.encode` takes them."""
        # A program has the views of the example's strides; others are copied.
        inputs = inputs.clone(memory_format=torch.contiguous_format)
        return encode_measured(dict(self.parts.items()), inputs, None, None)[:, self.extra :]


def make_program(model: Data2Vec) -> torch.export.ExportedProgram:
    """The encoder of a model on the CPU as a graph of PyTorch's own operators, for any batch and, but for images, any
    length."""
    example = make_example(model.config)
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if example.dim() != 4:
        dynamic[1] = torch.export.Dim.AUTO
    with torch.no_grad():
        program = torch.export.export(Encoder(model), (example,), dynamic_shapes=(dynamic,))
    return program.run_decompositions(
        {torch.ops.d2v.layer_norm_gelu.default: _layer_norm_gelu, torch.ops.d2v.attention.default: _attention}
    )


def make_example(config: Config) -> Tensor:
    """Two random samples of what a model takes, of no special length."""
    stem = config.stem
    if stem.modality == "vision":
        return torch.randn(2, stem.channels, stem.image_size, stem.image_size)
    if stem.modality == "text":
        return torch.randint(PADDING + 1, stem.vocabulary - 1, (2, min(40, stem.max_tokens - 1)))
    modality = make_modality(config)
    value = modality.placeholder()
    if "waveform" in find_kind(stem.modality).words:  # of any length, and this is the shortest
        value = np.resize(value, (6 * len(value) + 1, *value.shape[1:]))
    inputs, _ = modality.stack([Sample(0, 0, value, ())] * 2, training=False)
    return torch.randn_like(inputs) if inputs.is_floating_point() else inputs


def save_program(program: torch.export.ExportedProgram, file: Path) -> None:
    """Writes a program, an ONNX file where the name ends in .onnx; its input is `inputs`, its result `features`."""
    if file.suffix != ".onnx":
        torch.export.save(program, file)
        return
    for name in ("onnx", "onnxscript"):
        importlib.import_module(name)
    torch.onnx.export(
        program, (), file, dynamo=True, external_data=False, opset_version=OPSET,
        input_names=["inputs"], output_names=["features"], verbose=False,
    )  # fmt: skip


def _layer_norm_gelu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias, eps))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None, positions: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Without dropout and padding, of (B,T,H,D); extra tokens stand before those with positions, at no distance."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    logits = (q * rest[-1]) @ k.mT
    if slopes is not None and positions is not None:
        distances = (positions[:, None, :, None] - positions[:, None, None, :]).abs().to(logits.dtype)
        extra = query.shape[1] - positions.shape[1]
        logits = logits - slopes[:, None, None] * F.pad(distances, (extra, 0, extra, 0))
    return (logits.softmax(-1) @ v).transpose(1, 2).contiguous(), logits.logsumexp(-1)
