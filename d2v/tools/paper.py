"""A model on paper: parameters, work and kept activations of a recipe, from a forward on tensors without memory."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from d2v.config import Config, Optim, Run
from d2v.data import make_modality
from d2v.data.dataset import Sample
from d2v.model import layers
from d2v.model.data2vec import Data2Vec
from d2v.model.masking import make_mask_sampler
from d2v.model.transformer import Block
from d2v.train.flops import count_flops, shape_of
from d2v_kernels import Masks


@dataclass(frozen=True)
class Sizes:
    """What a recipe's model counts."""

    trained: int
    """Parameters with a gradient."""
    averaged: int
    """Parameters of the teacher."""
    trained_blocks: int
    """Of the trained ones, those in transformer blocks, the units of sharding."""
    averaged_blocks: int
    blocks: int
    """Transformer blocks of the student; the teacher has as many."""
    activations: float
    """Bytes of a sample that a forward keeps, bfloat16 autocast."""
    casts: float
    """Bytes of the lower-precision copies of weights that a forward keeps, whatever the samples."""
    forward: float
    """FLOPs of a sample: student and teacher forward."""
    backward: float
    """FLOPs of a sample: backward of student and decoder."""


def count_sizes(config: Config) -> Sizes:
    """Counts a model's parameters, activations and work; no weight is allocated."""
    # Without what makes no difference, so that each model is counted once.
    return _count_sizes(config.change(optim=Optim(), run=Run(), data={"global_batch": 1, "micro_batch": None}))


@functools.lru_cache(maxsize=64)
def _count_sizes(config: Config) -> Sizes:
    inputs, model = [make_longest(config, samples) for samples in (1, 2)], _meta_model(config)
    (one_kept, masks), (two_kept, _) = (kept_bytes(config, x) for x in inputs)
    shape = shape_of(masks, 1, inputs[0].shape[1])
    total = count_flops(config, shape)
    # Student, positions and decoder are what grows with the copies; the stem's backward is counted with the forward.
    student = total - count_flops(config, shape._replace(copies=0, masked=0))
    inside = [p for m in model.modules() if isinstance(m, Block) for p in m.parameters()]
    return Sizes(
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        averaged=sum(p.numel() for p in model.teacher.parameters()),
        trained_blocks=sum(p.numel() for p in inside if p.requires_grad),
        averaged_blocks=sum(p.numel() for p in inside if not p.requires_grad),
        blocks=config.encoder.prenet_depth + config.encoder.depth,
        activations=float(two_kept - one_kept),
        casts=float(2 * one_kept - two_kept),
        forward=total - student * 2.0 / 3.0,
        backward=student * 2.0 / 3.0,
    )


def length_of(config: Config) -> float:
    """Of the longest sample: seconds of a waveform, tokens of a text; 0: all samples have one size."""
    data = config.data
    if "waveform" in config.traits:
        return data.max_seconds
    return float(data.block_tokens or config.stem.max_tokens) if "ids" in config.traits else 0.0


def make_longest(config: Config, samples: int) -> Tensor:
    """A batch of the longest samples that the settings allow, on the host; values do not count."""
    modality = make_modality(config)
    value = modality.placeholder()
    if length := length_of(config):
        value = np.resize(value, (round(length * modality.rate), *value.shape[1:]))
    return modality.prepare(modality.stack([Sample(0, 0, value, ())] * samples, training=False)[0])


def _meta_model(config: Config) -> Data2Vec:
    with torch.device("meta"):
        return Data2Vec(config)


def kept_bytes(config: Config, inputs: Tensor) -> tuple[int, Masks]:
    """Bytes that a forward under bfloat16 autocast keeps for its backward pass, weights not counted; and its masks."""
    # Float32 as the run's precision: the teacher's working copies, which keep no activation, are not made. Which
    # layers drop out cannot be drawn without memory.
    config = config.change(encoder={"layer_drop": 0.0}, run={"precision": "fp32"})
    masks, measured = draw_masks(config, inputs)
    with on_paper():
        model = Data2Vec(config).train()
        object.__setattr__(model.stem, "measure", lambda *_: measured)
        with torch.autocast("cpu", torch.bfloat16), keeping() as kept, forms_of_gpus():
            model(inputs, masks=masks)
        return count_bytes(kept, without=(*model.parameters(), *model.buffers())), masks


@contextlib.contextmanager
def keeping() -> Iterator[list[Tensor]]:
    """The tensors that a forward keeps for its backward pass."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def count_bytes(tensors: Iterable[Tensor], without: Iterable[Tensor] = ()) -> int:
    """Bytes of memory behind tensors, each piece of memory once; not those that `without` share."""
    own = {t.untyped_storage()._cdata for t in without}
    pieces = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(size for piece, size in pieces.items() if piece not in own)


class _Paper(FakeTensorMode):
    """A deep copy of a module copies the mode of its tensors, and with it weak references to memory: numbers that
    PyTorch takes along as they are and then frees once for every copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Paper:
        return self


@contextlib.contextmanager
def on_paper() -> Iterator[None]:
    """Tensors without memory."""
    with (
        mock.patch("torch.nn.init.trunc_normal_", lambda weight, **_: weight),  # it reads what it has drawn
        _Paper(allow_non_fake_inputs=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # copying parameters asks for their addresses
        yield


def draw_masks(config: Config, inputs: Tensor) -> tuple[Masks, Any]:
    """Masks, and what the stem measures of the inputs: its checks read them, so they run before there are tensors
    without memory."""
    measured = _meta_model(config).stem.measure(inputs, None)
    tokens = measured[0] if config.grid is None else None
    return make_mask_sampler(config, tokens=tokens).draw(range(len(inputs)), 0, copies=config.mask.copies), measured


@contextlib.contextmanager
def forms_of_gpus() -> Iterator[None]:
    """Meanwhile convolutions and norms take the forms that they have on GPUs, which keep more than those of CPUs."""
    with (
        mock.patch.object(layers, "_suits_products", return_value=False),
        mock.patch.object(layers, "_keeps_layout", return_value=True),
        mock.patch.object(layers.LayerNorm, "forward", torch.nn.LayerNorm.forward),
    ):
        yield
