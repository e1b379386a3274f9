"""The shapes that a recipe of `d2v` calls operators with: a training forward of it on tensors without memory."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .._define import NAMESPACE

SAMPLE_RATE = 16_000
USUAL_LENGTH = {"vision": 0.0, "speech": 5.0, "text": 512.0, "signals": 10.0}
"""Of a sample: seconds, tokens."""
Found = tuple[str, tuple[int, ...], torch.dtype, dict[str, Any]]
"""Operator, the numbers of its `--shape`, dtype, options."""
Parts = tuple[tuple[int, ...], Tensor, dict[str, Any]]

READERS: dict[str, Callable[..., Parts]] = {
    "average_layers": lambda layers, norm, out_norm, *_: (
        (len(layers), *layers[0].shape), layers[0], {"norm": norm, "out_norm": out_norm}),
    "gather_tokens": lambda x, index, clones: ((*x.shape, clones, index.shape[1]), x, {}),
    "restore_tokens": lambda kept, restore, *_: ((*restore.shape, *kept.shape[1:]), kept, {}),
    "masked_regression_loss": lambda p, target, rows, target_rows, beta, *_: (
        (len(p if rows is None else rows), *target.shape), p, {"beta": beta}),
    "layer_norm_gelu": lambda x, *_: (tuple(x.shape), x, {}),
    "conv_layer_norm_gelu": lambda x, weight, *_: (
        (x.shape[0], x.shape[1:-1].numel(), x.shape[-1], weight.shape[0], x.shape[-1] // weight.shape[1],
         weight.shape[2]), x, {"axes": x.dim() - 2}),
    "gelu": lambda x: ((x.numel() // x.shape[-1], x.shape[-1]), x, {}),
    "attention": lambda q, *rest: (tuple(q.shape), q, {"dropout": rest[-2]}),
    "dropout_add_layer_norm": lambda x, *rest: (tuple(x.shape), x, {"dropout": rest[4]}),
    "dropout_add_layer_norm_mixed": lambda x, *rest: (tuple(x.shape), x, {"dropout": rest[4]}),
}  # fmt: skip
"""Operator -> from the arguments of a call, the numbers of its shape, a tensor of its dtype, and its options."""


class Recorder(TorchDispatchMode):
    """Collects what operators of `torch.ops.d2v` are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Found] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = func._schema.name.partition("::")[2]
        if op in READERS and func.namespace == NAMESPACE:
            sizes, tensor, options = READERS[op](*args)
            found = op, tuple(int(n) for n in sizes), tensor.dtype, options
            self.found.setdefault(repr(found), found)
        return func(*args, **(kwargs or {}))


def make_inputs(config: Any, samples: int, length: float, seed: int) -> Tensor:
    """Random samples of a batch for a `d2v.config.Config`, on the host; length: see `USUAL_LENGTH`."""
    stem, generator = config.stem, torch.Generator().manual_seed(seed)
    if stem.modality == "vision":
        return torch.randn((samples, stem.channels, stem.image_size, stem.image_size), generator=generator)
    if stem.modality == "text":
        tokens = torch.randint(5, stem.vocabulary - 1, (samples, int(length)), generator=generator)
        tokens[:, 0] = 0
        return tokens
    if stem.modality == "signals":
        return torch.randn((samples, int(stem.sample_rate * length), stem.channels), generator=generator)
    return torch.randn(samples, int(SAMPLE_RATE * length), generator=generator)


def recipe_calls(name: str, samples: int, length: float | None, dtype: torch.dtype) -> Iterator[Found]:
    """Every distinct call of an operator that a bench has, in the order of the first ones, and the moving average of
    the blocks. In bfloat16 and float16 under autocast, as a run with that precision.

    Raises:
        ValueError: no recipe of this name. ModuleNotFoundError: `d2v` is not installed.
    """
    try:
        recipes, model, masking = (importlib.import_module(f"d2v.{part}") for part in
                                   ("recipes", "model.data2vec", "model.masking"))  # fmt: skip
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"--from needs the package d2v with its recipes (pip install 'd2v[train]'): {error}"
        ) from None
    config = recipes.get(name)
    # The teacher's working copies, which a run with 16 bits makes, need addresses; autocast below stands in for them.
    # Which layers drop out cannot be drawn without memory.
    run, encoder = (dataclasses.replace(part, **values) for part, values in
                    ((config.run, {"precision": "fp32"}), (config.encoder, {"layer_drop": 0.0})))  # fmt: skip
    config = dataclasses.replace(config, run=run, encoder=encoder)
    inputs = make_inputs(config, samples, USUAL_LENGTH[config.stem.modality] if length is None else length, 0)
    with torch.device("meta"):
        # Checks of the inputs read them, so they run before there are tensors without memory.
        measured = model.Data2Vec(config).stem.measure(inputs, None)
    sampler = masking.make_mask_sampler(config, tokens=None if config.stem.modality == "vision" else measured[0])
    masks = sampler.draw(list(range(samples)), 0, copies=config.mask.copies)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying the teacher's parameters asks for their addresses
        with mock.patch("torch.nn.init.trunc_normal_", lambda weight, **_: weight):  # it reads what it has drawn
            network = model.Data2Vec(config).train()
        object.__setattr__(network.stem, "measure", lambda *_: measured)
        with torch.autocast("cpu", dtype, enabled=dtype.itemsize == 2), Recorder() as recorder:
            network(inputs, masks=masks)
    yield from recorder.found.values()
    encoder = config.encoder
    yield (
        "update_ema_",
        (encoder.width, encoder.prenet_depth + encoder.depth),
        torch.float32,
        {"copies": dtype.itemsize == 2},
    )
