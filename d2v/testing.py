"""What a kind of input of one's own has to keep, as one check: `check_modality(config)`, for a test of one's own."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from d2v.config import Config
from d2v.data.dataset import Batch
from d2v.data.loader import train_updates
from d2v.folder import MODEL, list_checkpoints, load_tensors
from d2v.model.data2vec import Data2Vec
from d2v.model.stems import PADDING
from d2v.train.pretraining import Pretraining, open_data, pretrain
from d2v_kernels import use_backend

CPU, TOLERANCE = torch.device("cpu"), 1e-4
"""TOLERANCE: of what is the same but for rounding, over the largest value."""


def check_modality(config: Config, samples: int = 4) -> list[str]:
    """Checks a kind of input with a model of it on the CPU, in a temporary folder; returns a line a check.

    The same samples come from the same seed; tokens are as many as counted; masks leave out padding; gradients reach
    every parameter; operators agree with their references; padding changes nothing before it; a resumed run is the same
    bit for bit. With a small configuration it takes seconds.

    Args:
        config: data.path names at least `samples` samples.
        samples: of a batch, 2 or more.

    Raises:
        AssertionError: the check, what was expected and what was found. ValueError: settings or data of no use.
    """
    kinds = "dropout", "attention_dropout", "activation_dropout", "prenet_dropout", "layer_drop", "drop_path"
    with tempfile.TemporaryDirectory(prefix="d2v-check-") as folder:
        config = config.change(
            stem=dict(dropout=0.0, gradient_scale=1.0), encoder=dict.fromkeys(kinds, 0.0),
            decoder=dict(input_dropout=0.0), optim=dict(warmup_steps=0),
            data=dict(global_batch=samples, micro_batch=None, batch_seconds=None, workers=0, valid=None),
            run=dict(dir=str(Path(folder) / "whole"), steps=4, extend=0, checkpoint_every=2, log_every=2,
                     keep_checkpoints=2, keep_best=None, precision="fp32", device="cpu", compile=False),
        )  # fmt: skip
        _require(Config.from_json(config.to_json()) == config, "configuration", "the same from its JSON", "another")
        lines = _check_batch(config.change(run=dict(dir=str(Path(folder) / "batch"))))
        return [*lines, _check_resumed(config, Path(folder) / "parts")]


def _require(condition: bool, check: str, expected: str, got: object) -> None:
    if not condition:
        raise AssertionError(f"{check}: expected {expected}, got {got}")


def _require_same(one: Tensor, other: Tensor, check: str, expected: str) -> None:
    error = float((one - other).detach().abs().max()) / max(float(one.detach().abs().max()), 1e-12)
    _require(error <= TOLERANCE, check, expected, f"a difference of {error:.2g} of the largest value")


def _check_resumed(config: Config, parts: Path) -> str:
    """A run, and a copy of it from its first checkpoint on."""
    whole = list_checkpoints(pretrain(config) / "checkpoints")
    shutil.copytree(config.run.dir, parts)
    shutil.rmtree(list_checkpoints(parts / "checkpoints")[-1])
    pretrain(config.change(run=dict(dir=str(parts))))
    tensors, again = (load_tensors(c[-1], MODEL) for c in (whole, list_checkpoints(parts / "checkpoints")))
    odd = [n for n, tensor in tensors.items() if not torch.equal(tensor, again[n])]
    _require(not odd, "resumed run", "the same weights as of the whole run", f"others in {odd[:3]}")
    return "resumed run: the same, bit for bit"


def _check_batch(config: Config) -> list[str]:
    """Checks of one batch by an untrained model."""
    source, _ = open_data(config)
    source.prepare(Path(config.run.dir), fresh=True)
    batch, again = (next(train_updates(config, source, 0, CPU))[0] for _ in range(2))
    objective = Pretraining(config, source, None, CPU)
    model, inputs = objective.model.train(), objective.inputs_of(batch, CPU)
    _require(bool(torch.isfinite(inputs).all()), "samples", "finite values", "NaN or infinity")
    _require(torch.equal(batch.inputs, again.inputs), "samples", "the same from the same seed, epoch and id", "others")
    return [
        f"samples: inputs {tuple(inputs.shape)}, the same from the same seed", _check_tokens(objective, batch, inputs),
        _check_gradients(objective, batch), _check_padding(model.eval(), inputs, batch.lengths),
    ]  # fmt: skip


def _check_tokens(objective: Pretraining, batch: Batch, inputs: Tensor) -> str:
    """Shapes of features and masks, and where masks lie."""
    model, lengths = objective.model, batch.lengths
    tokens, valid = model.stem.measure(inputs, lengths)
    features = model.stem(model.stem.mark(inputs, lengths), valid)
    shape, expected = tuple(features.shape), (len(batch), tokens, objective.config.encoder.width)
    _require(shape == expected, "tokens", f"features {expected}, as `measure` says", shape)
    before = torch.tensor([tokens] * len(batch)) if valid is None else valid
    if lengths is not None:
        counted = [objective.modality.count_tokens(n) for n in lengths.tolist()]
        _require(counted == before.tolist(), "tokens", f"{counted}, as of `count_tokens`", before.tolist())
    mask: Tensor = batch.masks.mask  # type: ignore[union-attr]
    rows = torch.arange(tokens) < before.repeat_interleave(len(mask) // len(batch))[:, None]
    _require(not bool((mask & ~rows).any()), "masks", "nothing masked in the padding", "masked tokens there")
    seen, hidden = int((rows & ~mask).sum(1).min()), int(mask.sum(1).min())
    fits = min(seen, hidden) > 0 if objective.config.version == 2 else bool(mask.any())
    _require(fits, "masks", "a visible and a masked token in every row", f"{seen} and {hidden}")
    return f"tokens and masks: {tokens} a row, at least {seen} of them visible and {hidden} masked"


def _check_gradients(objective: Pretraining, batch: Batch) -> str:
    """Loss and gradients of a training forward, by the chosen operators and by their references."""
    model, found = objective.model, []
    for backend in ("auto", "reference"):
        model.zero_grad()
        with use_backend(backend):
            loss = objective.run_model(model, batch, CPU).loss
            loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss})
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    lacking = [n for n in trained if n not in found[0] or not bool(found[0][n].any())]
    _require(not lacking, "gradients", "one of every parameter", f"none of {', '.join(lacking[:5])}")
    for name, value in found[0].items():
        _require_same(value, found[1][name], "operators", f"{name} as from the reference operators")
    return f"gradients: reach all {len(trained)} parameters, as from the reference operators"


def _check_padding(model: Data2Vec, inputs: Tensor, given: Tensor | None) -> str:
    """All samples but the longest, cut to two thirds, alone and beside it with other values behind their end."""
    if model.grid is not None:
        return "padding: none, a grid is always full"
    lengths = torch.full((len(inputs),), inputs.shape[1]) if given is None else given.clone()
    others = [row for row in range(len(inputs)) if row != int(lengths.argmax())]
    lengths[others] = lengths[others] * 2 // 3
    padded = inputs.clone()
    for row in others:
        rest = padded[row, lengths[row] :]
        _ = rest.normal_() if rest.is_floating_point() else rest.fill_(PADDING)
    try:
        batch = model.encode(padded, lengths)
    except (ValueError, TypeError) as error:
        if given is not None:
            raise
        return f"padding: none, the stem takes no lengths ({error})"
    _require(not bool(batch.valid[others].all()), "padding", "lengths refused, or fewer valid tokens", "all valid")
    for row in others:
        alone = model.encode(inputs[row : row + 1, : lengths[row]]).features[0]
        beside = batch.features[row, batch.valid[row]]
        _require(alone.shape == beside.shape, "padding", f"{len(alone)} valid tokens, as alone", len(beside))
        _require_same(alone, beside, "padding", "the same features beside a longer sample as alone")
    return "padding: changes nothing before it"
