"""What a step keeps: no tensor of all pairs of tokens, no predictions of visible tokens, no unused blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from support.families import make_batch, make_config, make_model
from torch import Tensor

FAMILIES = ["speech-base", "text-base", "vision-base", "speech1-base", "text1-base", "vision1-base"]


@pytest.mark.parametrize("name", ["speech-base", "speech1-base"])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_keeps_no_pairs_of_tokens(name: str, padded: bool) -> None:
    """Nothing saved for the backward pass is as large as (rows, heads, T, T), with ALiBi, padding, a learned scale."""
    model = make_model(make_config(name, alibi="learned"))
    inputs, lengths = make_batch(model.config, (6_000, 5_000 if padded else 6_000))
    tokens, _ = model.stem.measure(inputs, lengths)
    mask = torch.zeros(4 if model.config.version == 2 else 2, tokens, dtype=torch.bool)
    mask[:, 3:120] = True
    sizes: list[int] = []

    def note(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = model(inputs, lengths, masks=mask)
    seen = tokens if model.config.version == 1 else tokens - 117
    assert seen > 100
    heads = model.config.encoder.heads
    assert max(sizes) < mask.shape[0] * heads * seen * seen / 2
    out.loss.backward()
    assert model.positions.alibi is not None
    assert model.positions.alibi.scale.grad is not None


@pytest.mark.parametrize("name", ["speech-base", "text-base"])
def test_only_masked_tokens_are_projected(name: str) -> None:
    model = make_model(make_config(name))
    inputs, lengths = make_batch(model.config, (1_500, 1_500) if name.startswith("speech") else (30, 30))
    seen: list[torch.Size] = []
    assert model.decoder is not None
    proj = model.decoder.proj
    first = proj[0] if isinstance(proj, torch.nn.Sequential) else proj
    first.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape))
    out = model(inputs, lengths)
    assert seen == [(out.sample_size, model.config.decoder.width)]


@pytest.mark.parametrize("name", FAMILIES)
def test_state_and_copies(name: str) -> None:
    """The state holds all of a model; a copy is independent."""
    config = make_config(name)
    model, other = make_model(config, seed=0), make_model(config, seed=1)
    if config.stem.modality == "vision":
        inputs = torch.randn(2, 3, 32, 32)
    else:
        inputs, _ = make_batch(config, (1_500, 1_500) if config.stem.modality == "speech" else (30, 30))
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    assert torch.equal(other.encode(inputs).features, model.encode(inputs).features)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.teacher.update(0.5)
    assert torch.equal(other.teacher.encode(inputs).features, model.teacher.encode(inputs).features)
    assert not torch.equal(twin.encode(inputs).features, model.encode(inputs).features)
