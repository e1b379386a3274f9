"""The block's MLP and the decoder's projection: what they compute, and what they keep for the backward pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2v
from d2v.model.decoder import ConvDecoder
from d2v.model.transformer import Mlp


def make_mlp(**changes: float) -> Mlp:
    return Mlp(dataclasses.replace(d2v.recipes.vision_tiny().encoder, **changes))


def plain(mlp: Mlp, x: Tensor) -> Tensor:
    return mlp.fc2(F.gelu(mlp.fc1(x)))


def kept_elements(module: nn.Module, call, x: Tensor) -> int:
    """Numbers kept for backward beside the weights and x."""
    given = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        place = t.untyped_storage().data_ptr()
        if place not in given:
            kept[place] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(x)
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("training", [False, True])
def test_mlp_computes_the_formula(dropout, training) -> None:
    mlp = make_mlp(activation_dropout=dropout).train(training)
    x = torch.randn(2, 5, mlp.fc1.in_features, requires_grad=True)
    if dropout and training:
        assert not torch.equal(mlp(x), mlp(x))
        return
    inputs = [x, *mlp.parameters()]
    got, want = mlp(x), plain(mlp, x)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad))


def test_mlp_keeps_the_hidden_layer_once() -> None:
    mlp = make_mlp(activation_dropout=0.0)
    x = torch.randn(2, 5, mlp.fc1.in_features)
    hidden = 10 * mlp.fc1.out_features
    assert kept_elements(mlp, mlp, x) == hidden
    assert kept_elements(mlp, lambda x: plain(mlp, x), x) == 2 * hidden


def test_compiled_mlp_is_one_graph() -> None:
    mlp = make_mlp(activation_dropout=0.0)
    x = torch.randn(2, 5, mlp.fc1.in_features)
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), mlp(x))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_projection_is_its_layers(layers) -> None:
    config = dataclasses.replace(d2v.recipes.text_tiny().decoder, projection_layers=layers)
    decoder = ConvDecoder(config, config.width, 1)
    x = torch.randn(7, config.width, requires_grad=True)
    inputs = [x, *decoder.proj.parameters()]
    got, want = decoder.project(x), decoder.proj(x)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad))
