"""run.packed: blocks that get the valid tokens alone compute what they compute of padded rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.families import make_batch, make_config, make_model
from torch import Tensor

import d2v_kernels.ops.attention as engines
from d2v import Config, Data2Vec
from d2v.config.finetune import HeadSettings
from d2v.model.finetuned import FineTuned
from d2v.model.stems import positions
from d2v.model.task_heads import make_head
from d2v.model.transformer import AttentionBias, InputBlock, TransformerEncoder
from d2v_kernels import pack_lengths

# Recipe, fields of the encoder, and how often a training forward packs: of student and teacher.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "speech1": ("speech1-base", {}, 2),
    "speech1_pre_norm_and_prenet": ("speech1-base", {"norm_order": "pre", "prenet_depth": 1}, 2),
    "speech1_extra_tokens": ("speech1-base", {"extra_tokens": 2}, 2),
    "text1": ("text1-base", {}, 2),
    "speech_alibi": ("speech-base", {}, 1),
    "speech_alibi_and_extra_tokens": ("speech-base", {"extra_tokens": 2}, 0),
    "text": ("text-base", {}, 1),
    "text_alibi_table": ("text-base", {"alibi": "learned", "alibi_table": 40}, 0),
}
LENGTHS = {"speech": (2_000, 1_500, 700), "text": (31, 2, 9)}


def make(name: str, choice: str, **sections: Any) -> Config:
    recipe, encoder, _ = CASES[name]
    return make_config(recipe, **encoder).replace("run.packed", choice).change(**sections)


def batch_of(config: Config, equal: bool = False) -> tuple[Tensor, Tensor]:
    lengths = LENGTHS[config.stem.modality]
    return make_batch(config, lengths[:1] * 3 if equal else lengths)


def train(model: Data2Vec, equal: bool = False) -> tuple[dict[str, Tensor], int]:
    """Loss, predictions, targets and gradients of a batch, and how often rows were packed."""
    torch.manual_seed(1)
    model._drawn = 0  # the same masks at every call
    model.zero_grad()
    with mock.patch.object(positions, "pack_lengths", side_effect=pack_lengths) as packing:
        out = model(*batch_of(model.config, equal))
    out.loss.backward()
    results = {"loss": out.loss, "prediction": out.prediction, "targets": out.targets}
    results |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach().clone() for name, x in results.items()}, packing.call_count


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Against the largest of the tensor, of a gradient that is nothing but rounding of all gradients."""
    assert got.keys() == want.keys()
    largest = max(float(x.abs().max()) for x in want.values())
    for name, x in want.items():
        error = float((got[name] - x).abs().max()) / max(float(x.abs().max()), 1e-3 * largest)
        assert error <= tolerance, f"{name}: expected at most {tolerance} of the maximum, got {error:.2g}"


@pytest.mark.parametrize("one_by_one", [1 << 15, 0])
@pytest.mark.parametrize("name", CASES)
def test_training_equals_the_padded_form(monkeypatch, name: str, one_by_one: int) -> None:
    monkeypatch.setattr(engines, "ONE_BY_ONE", one_by_one)
    padded, count = train(make_model(make(name, "never")))
    assert count == 0
    packed, count = train(make_model(make(name, "always")))
    assert count == CASES[name][2]
    assert_near(packed, padded)


@pytest.mark.parametrize("name", CASES)
def test_features_equal_the_padded_form(name: str) -> None:
    config = make(name, "never")
    for layer in (None, 1):
        padded, packed = (
            make_model(config.replace("run.packed", choice)).encode(*batch_of(config), layer=layer)
            for choice in ("never", "always")
        )
        assert torch.equal(packed.valid, padded.valid)
        assert_near({"": packed.features[packed.valid]}, {"": padded.features[padded.valid]})
        assert not CASES[name][2] or not packed.features[~packed.valid].any()
        if padded.class_token is not None:
            assert_near({"": packed.class_token}, {"": padded.class_token})


@pytest.mark.parametrize("kind", ["tokens", "pooled", "votes", "sentence"])
@pytest.mark.parametrize("name", ["speech1", "text1", "speech_alibi", "text"])
def test_fine_tuning_equals_the_padded_form(name: str, kind: str) -> None:
    results = []
    for choice in ("never", "always"):
        encoder = make_model(make(name, choice))
        torch.manual_seed(2)
        head = make_head(HeadSettings(kind=kind, outputs=3), encoder.config.encoder.width)
        model = FineTuned(encoder, head, ["a", "b", "c"])
        inputs, lengths = batch_of(encoder.config)
        logits = model(inputs, lengths)
        if logits.dim() == 3:
            logits = logits[torch.arange(logits.shape[1]) < model.count_tokens(inputs, lengths)[:, None]]
        logits.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": logits.detach(), **gradients})
    assert_near(results[1], results[0])


@pytest.mark.parametrize("name", ["speech1", "text1", "text"])
def test_rows_without_padding_are_the_same_bits(name: str) -> None:
    results = [train(make_model(make(name, choice)), equal=True) for choice in ("never", "always", "auto")]
    assert [count for _, count in results] == [0, 0, 0]
    for other, _ in results[1:]:
        assert all(torch.equal(x, other[key]) for key, x in results[0][0].items())


def test_auto_is_the_padded_form_on_a_cpu() -> None:
    assert Config().run.packed == "auto"
    results = [train(make_model(make("speech1", choice))) for choice in ("never", "auto")]
    assert results[1][1] == 0
    assert all(torch.equal(x, results[1][0][key]) for key, x in results[0][0].items())


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"compile": True}},
        {"encoder": {"drop_path": 0.1}},
        {"published": frozenset({"statistics-over-padding"})},
        {"published": frozenset({"loss-on-padding"})},
        {"published": frozenset({"norms-over-batch"})},
    ],
    ids=str,
)
def test_what_needs_padded_rows_gets_them(sections: dict[str, Any]) -> None:
    assert train(make_model(make("speech1", "always", **sections)))[1] == 0


def test_one_graph_has_padded_rows() -> None:
    """A compiler that sees the whole forward never sees packed rows."""
    results = []
    for choice in ("never", "always"):
        model = make_model(make("text1", choice))
        model.compile(backend="eager")
        results.append(train(model))
    assert [count for _, count in results] == [0, 0]
    assert all(torch.equal(x, results[1][0][key]) for key, x in results[0][0].items())


@pytest.mark.parametrize("lengths", [[0, 1, 6, 3], [1, 1], [0, 0], [4], []], ids=str)
def test_any_lengths(lengths: list[int]) -> None:
    """Each sequence as if it were alone; 0 where there is none."""
    config = make_config("speech1-base", norm_order="pre").encoder
    torch.manual_seed(0)
    context, blocks = InputBlock(config), TransformerEncoder(config)
    x = torch.randn(len(lengths), 7, config.width, requires_grad=True)
    bias = AttentionBias(packed=pack_lengths(lengths, "cpu"), tokens=7)
    assert context(x, bias).shape == (1, sum(lengths), config.width)
    out = blocks(context(x, bias), bias)
    assert out.shape == x.shape
    grad = torch.randn_like(out)
    out.backward(grad)
    for row, n in enumerate(lengths):
        alone = x.detach()[row : row + 1, :n].requires_grad_()
        if n > 0:
            y = blocks(context(alone))
            y.backward(grad[row : row + 1, :n])
            assert_near({"y": out[row, :n].detach(), "x": x.grad[row, :n]}, {"y": y[0].detach(), "x": alone.grad[0]})
        assert not out[row, n:].any()
        assert not x.grad[row, n:].any()


def test_dropout_is_repeatable_and_of_training_only() -> None:
    dropouts = {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.1, "prenet_dropout": 0.1}
    config = make("speech1", "always", encoder=dropouts)
    model = make_model(config)
    (first, count), (second, _) = train(model), train(model)
    assert count == 2
    assert all(torch.equal(x, second[key]) for key, x in first.items())
    silent = train(make_model(make("speech1", "always")))[0]
    assert torch.equal(first["targets"], silent["targets"])
    assert not torch.allclose(first["prediction"], silent["prediction"], atol=1e-3)
    # Recomputed blocks draw the same once more.
    model.context.recompute = model.blocks.recompute = True
    again = train(model)[0]
    assert all(torch.equal(x, again[key]) for key, x in first.items())


def test_under_autocast() -> None:
    """In bfloat16, with the teacher's working copies."""
    results = []
    for choice in ("never", "always"):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(train(make_model(make("speech1", choice, run={"precision": "bf16"}))))
    assert results[1][1] == 2
    assert all(x.isfinite().all() for x in results[1][0].values())
    for name in ("loss", "prediction", "targets"):
        torch.testing.assert_close(results[1][0][name].float(), results[0][0][name].float(), rtol=0.1, atol=0.1)


class FakeXformers:
    """What `attend` calls of xformers, in plain PyTorch: attention within blocks of the diagonal."""

    def __init__(self) -> None:
        self.masks: list[list[int]] = []
        self.calls = 0
        mask = SimpleNamespace(from_seqlens=self.from_seqlens)
        self.fmha = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=mask))

    def from_seqlens(self, lengths: list[int], device: torch.device) -> Tensor:
        self.masks.append(lengths)
        row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        return row[:, None] == row

    def memory_efficient_attention(self, *inputs: Tensor, attn_bias: Tensor, p: float, scale: float) -> Tensor:
        self.calls += 1
        assert all(x.dim() == 4 and x.shape[0] == 1 for x in inputs)
        rows = (x.transpose(1, 2) for x in inputs)
        return F.scaled_dot_product_attention(*rows, attn_mask=attn_bias, dropout_p=p, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("name", ["speech1", "text1", "speech_alibi"])
def test_auto_goes_to_xformers_where_it_runs(monkeypatch, name: str) -> None:
    padded = train(make_model(make(name, "never")))[0]
    fake = FakeXformers()
    importing = engines.importlib.import_module
    monkeypatch.setattr(
        engines.importlib, "import_module", lambda name: fake if name == "xformers.ops" else importing(name)
    )

    def limits(request: engines.Request) -> list[str]:
        return [] if request.packed and not request.alibi else ["is for packed sequences without a bias"]

    there = engines.ENGINES["xformers"]._replace(limits=limits, probed=False)
    monkeypatch.setitem(engines.ENGINES, "xformers", there)
    monkeypatch.setattr(engines, "preferred_engines", lambda request: ("xformers", "native", "reference"))
    monkeypatch.setattr(engines, "_chosen", {})
    packed, count = train(make_model(make(name, "auto")))
    assert_near(packed, padded)
    assert count == (0 if name == "speech_alibi" else 2)
    if count == 0:
        assert fake.calls == 0
        return
    depth = make(name, "auto").encoder.depth
    assert fake.calls == 2 * depth  # student, and teacher
    assert len(fake.masks) == 2  # one of each, shared by the blocks
    assert fake.masks[0] == fake.masks[1]
