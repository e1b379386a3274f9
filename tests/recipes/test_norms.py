"""Layer norms of the models."""

from __future__ import annotations

import torch
from torch import nn

from d2v import recipes
from d2v.model.data2vec import build_model
from d2v.model.layers import LayerNorm


def test_gradients_of_bfloat16_inputs_are_summed_in_float32() -> None:
    x = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.bfloat16).expand(5_000, 4).requires_grad_()
    norm = LayerNorm(4)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.bfloat16
    out.backward(torch.ones_like(out))
    assert norm.bias.grad.tolist() == [5_000.0] * 4
    assert norm.weight.grad.round().tolist() == [5_000.0, -5_000.0, 5_000.0, -5_000.0]
    assert torch.equal(norm(x), nn.functional.layer_norm(x.float(), (4,)).bfloat16())
    assert torch.equal(norm(x.float()), nn.functional.layer_norm(x.float(), (4,), norm.weight, norm.bias))
    norm.bfloat16().zero_grad()
    norm(x).backward(torch.ones_like(x))
    assert norm.bias.grad.dtype == torch.bfloat16
    assert norm.bias.grad.tolist() == [4_992.0] * 4  # the nearest that there is below 5,000


def test_every_norm_that_is_called_is_one_of_those() -> None:
    """The convolutions' norms only hold what `norm_gelu` takes."""
    for recipe in (recipes.speech_tiny(), recipes.vision_tiny(), recipes.text_tiny()):
        names = [name for name, module in build_model(recipe).named_modules() if type(module) is nn.LayerNorm]
        assert all(".norms." in f".{name}" for name in names), names
