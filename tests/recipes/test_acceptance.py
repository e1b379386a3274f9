"""Properties that any correct data2vec has: positions, restoring, targets, averaging, loss, gradient, decoder reach."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.golden import load_case
from support.tensors import BACKENDS

from d2v import Config, Data2Vec, recipes
from d2v.config import Decoder, Ema, Encoder
from d2v.interop.fairseq.config import parse_convolutions
from d2v.model.decoder import ConvDecoder
from d2v.model.stems import LogMelStem, SinCosPositions, WaveformStem
from d2v.model.stems.positions import AlibiScale, relative_index, sincos_positions
from d2v.model.stems.speech import mel_filters
from d2v.model.targets import make_targets
from d2v.train.optim import learning_rate_at
from d2v_kernels import (
    MaskSampler,
    Noise,
    average_layers,
    gather_tokens,
    masked_regression_loss,
    restore_tokens,
    use_backend,
)


def small(class_weight: float = 0.0) -> Config:
    config = recipes.vision_tiny()
    return dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, extra_tokens=1),
        mask=dataclasses.replace(config.mask, copies=4),
        loss=dataclasses.replace(config.loss, class_weight=class_weight),
    )


def test_positions_equal_the_published_table() -> None:
    tensors, record = load_case("kernel_positions")
    width, side = record["config"]["dim"], record["config"]["grid"]
    torch.testing.assert_close(sincos_positions(width, (side, side)), tensors["sincos2d"], rtol=0.0, atol=1e-12)


def test_position_quarters() -> None:
    table = sincos_positions(32, (3, 5))
    quarter = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64).repeat_interleave(8)
    assert torch.equal(table[0], quarter)
    below = table[5]  # row 1, column 0
    assert torch.equal(below[:16], table[0, :16])
    assert not torch.equal(below[16:], table[0, 16:])


def test_position_scale() -> None:
    x = torch.randn(2, 15, 32)
    encoder = Encoder(width=32, heads=4)
    stock = SinCosPositions(encoder, (3, 5))
    assert torch.allclose(SinCosPositions(encoder, (3, 5), 0.1)(x) - x, 0.1 * stock.table.expand(2, -1, -1), atol=1e-6)
    assert torch.equal(SinCosPositions(encoder, (3, 5), 0.0)(x), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_restoring_undoes_gathering(backend: str) -> None:
    masks = MaskSampler("block", grid=(14, 14), ratio=0.8, adjust=0.07, span=3, inverse=True).draw([0, 1], 0, copies=3)
    assert masks.keep is not None
    assert masks.restore is not None
    x = torch.randn(2, 196, 64)
    with use_backend(backend):
        kept = gather_tokens(x, masks.keep, clones=3)
        full = restore_tokens(kept, masks.restore, fill=Noise(0.01, torch.arange(6)))
    clones = x.repeat_interleave(3, dim=0)
    assert torch.equal(full[~masks.mask], clones[~masks.mask])
    noise = full[masks.mask]
    assert abs(float(noise.mean())) < 4 * 0.01 / noise.numel() ** 0.5
    assert float(noise.std()) == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
class TestTargets:
    def test_statistics(self, backend: str) -> None:
        layer = 3.0 * torch.randn(2, 196, 96) + 5.0
        with use_backend(backend):
            y = average_layers([layer] * 4, norm="instance")
            z = average_layers([layer, layer.flip(0)], norm="instance", out_norm="layer")
        assert float(y.mean(dim=1).abs().max()) < 1e-5
        assert torch.allclose(y.var(dim=1, correction=0), torch.ones(2, 96), atol=1e-4)
        assert float(z.mean(dim=2).abs().max()) < 1e-5
        assert torch.allclose(z.var(dim=2, correction=0), torch.ones(2, 196), atol=1e-3)

    def test_identical_layers_average_to_themselves(self, backend: str) -> None:
        layer = torch.randn(2, 20, 32)
        with use_backend(backend):
            torch.testing.assert_close(average_layers([layer] * 5, norm="none"), layer)
            one = average_layers([layer], norm="instance")
            torch.testing.assert_close(average_layers([layer] * 3, norm="instance"), one)

    def test_invariance(self, backend: str) -> None:
        layers = [torch.randn(2, 50, 32) for _ in range(3)]
        changed = [7.0 * layers[0], layers[1] + torch.randn(2, 1, 32), layers[2]]
        with use_backend(backend):
            before, after = average_layers(layers), average_layers(changed)
        torch.testing.assert_close(after, before, rtol=0.0, atol=1e-4)


def test_decay_schedule() -> None:
    ema = Ema(start=0.999, end=0.99999, anneal_steps=75_000)
    assert ema.decay(37_500, 400_000) == pytest.approx(0.999495, abs=1e-12)
    assert ema.decay(75_000, 400_000) == ema.decay(400_000, 400_000) == 0.99999
    assert Ema(start=0.95, end=0.995).decay(1500, 3000) == pytest.approx(0.9725, abs=1e-12)


def test_teacher_starts_as_the_student() -> None:
    model = Data2Vec(small())
    own = dict(model.named_parameters())
    for name, p in model.teacher.named_parameters():
        assert torch.equal(p, own[name]), name
    model.teacher.update(0.5)
    for name, p in model.teacher.named_parameters():
        assert torch.equal(p, own[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scale(backend: str) -> None:
    target = torch.randn(10, 768)
    with use_backend(backend):
        squared = masked_regression_loss(target + 1.0, target, scale=768**-0.5).loss
        smooth = masked_regression_loss(target + 1.0, target, beta=4.0, scale=2.0).loss
    assert float(squared) / 10 == pytest.approx(768**0.5, rel=1e-5)
    assert float(smooth) / 10 == pytest.approx(768 * 0.125 * 2.0, rel=1e-5)


def gradients(config: Config, masks: torch.Tensor, images: torch.Tensor, parts: int = 1) -> dict[str, torch.Tensor]:
    """Gradients of (sum of losses) / (masked positions), over `parts` micro-batches."""
    torch.manual_seed(0)
    model = Data2Vec(config)
    total = 0
    for x, m in zip(images.chunk(parts), masks.chunk(parts), strict=True):
        noise = torch.zeros(m.shape[0], int(m[0].sum()), config.encoder.width)
        out = model(x, masks=m, noise=noise)
        total += out.sample_size
        sum(out.losses.values(), torch.zeros(())).backward()
    return {n: p.grad / total for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    largest = max(float(g.abs().max()) for g in a.values())
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("class_weight", [0.0, 0.01])
def test_more_copies_of_the_same_masks_change_no_gradient(class_weight: float) -> None:
    images = torch.randn(4, 3, 32, 32)
    masks = MaskSampler("block", grid=(8, 8), ratio=0.75, span=3).draw(range(4), 0).mask
    once = gradients(small(class_weight), masks, images)
    assert_same(once, gradients(small(class_weight), masks.repeat_interleave(2, dim=0), images))
    # Micro-batches add up to the same update.
    assert_same(once, gradients(small(class_weight), masks, images, parts=2))


def test_published_class_loss_grows_with_the_micro_batch() -> None:
    config = dataclasses.replace(small(0.01), published=frozenset({"class-loss-per-micro-batch"}))
    images = torch.randn(2, 3, 32, 32)
    mask = MaskSampler("block", grid=(8, 8), ratio=0.75, span=3).draw(range(2), 0).mask
    torch.manual_seed(0)
    model = Data2Vec(config)
    weights = []
    for m in (mask, mask.repeat_interleave(2, dim=0)):
        out = model(images, masks=m)
        weights.append(float(out.losses["cls"].detach()) / out.sample_size)
    assert weights[1] == pytest.approx(2 * weights[0], rel=1e-4)


def test_published_class_loss_equals_ours_at_the_stated_rows() -> None:
    config = dataclasses.replace(small(0.01), loss=dataclasses.replace(small(0.01).loss, class_rows=8))
    images = torch.randn(2, 3, 32, 32)
    losses = []
    for published in (frozenset[str](), frozenset({"class-loss-per-micro-batch"})):
        torch.manual_seed(0)
        model = Data2Vec(dataclasses.replace(config, published=published))
        losses.append(float(model(images).losses["cls"].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(("layers", "kernel"), [(2, 3), (1, 5), (2, 4), (6, 3)])
def test_decoder_reach(layers: int, kernel: int) -> None:
    """A token changes predictions up to layers * (kernel // 2) away on either axis, and none beyond."""
    torch.manual_seed(0)
    decoder = ConvDecoder(Decoder(layers=layers, width=16, kernel=kernel, groups=1), 16, dims=2).double()
    side = 17
    x = torch.randn(1, side * side, 16, dtype=torch.float64)
    changed = x.clone()
    changed[0, 8 * side + 8] += 1.0
    with torch.no_grad():
        difference = decoder.project(decoder(x, (side, side)) - decoder(changed, (side, side)))
    moved = (difference.view(side, side, 16) - decoder.proj.bias).abs().sum(dim=2) > 0
    reach = layers * (kernel // 2)
    away = (torch.arange(side) - 8).abs()
    outside = torch.maximum(away[:, None], away[None, :]) > reach
    assert not moved[outside].any()
    if kernel % 2:
        assert moved[~outside].all()


def test_decoder_of_sequences() -> None:
    """One axis instead of two: the same decoder, with the published projection of several layers."""
    config = Decoder(layers=3, width=24, kernel=7, groups=4, projection_layers=2, projection_ratio=2.0)
    decoder = ConvDecoder(config, 16, dims=1)
    assert [tuple(c.weight.shape) for c in decoder.blocks] == [(24, 4, 7), (24, 6, 7), (24, 6, 7)]
    assert decoder.project(decoder(torch.randn(2, 11, 16), (11,))).shape == (2, 11, 16)
    assert [tuple(m.weight.shape) for m in (decoder.proj[0], decoder.proj[2])] == [(48, 24), (16, 48)]


def test_frames_of_published_lengths() -> None:
    tensors, record = load_case("kernel_positions")
    stem = WaveformStem(dataclasses.replace(recipes.speech_base().stem), 8)
    assert stem.spec == parse_convolutions(record["config"]["conv_spec"])
    counts = [stem.count_tokens(n) for n in tensors["conv_len/in"].tolist()]
    assert counts == tensors["conv_len/out"].tolist()


@pytest.mark.parametrize("heads", [4, 8, 12])
def test_alibi_equals_the_published_bias(heads: int) -> None:
    tensors, _ = load_case("kernel_positions")
    scale = AlibiScale(Encoder(width=heads * 4, heads=heads, alibi="fixed"))
    alibi = scale.attention_bias(None, torch.arange(12)[None]).alibi_of(0)
    assert alibi is not None
    places = alibi.positions[0]
    bias = -alibi.slopes[:, None, None] * (places[:, None] - places).abs()
    torch.testing.assert_close(bias, tensors[f"alibi1d/h{heads}"].float(), rtol=1e-6, atol=1e-6)


def test_relative_index_equals_the_published_one() -> None:
    tensors, _ = load_case("d2v1_vision")
    assert torch.equal(relative_index((8, 8)), tensors["relative_position_index"])


def test_relative_index_of_a_rectangle() -> None:
    """Offsets decide: equal ones share a row, different ones do not; the class token has three rows of its own."""
    index = relative_index((2, 3))
    offsets = {}
    for i in range(6):
        for j in range(6):
            offset = (i // 3 - j // 3, i % 3 - j % 3)
            assert offsets.setdefault(offset, int(index[1 + i, 1 + j])) == int(index[1 + i, 1 + j])
    assert sorted(offsets.values()) == list(range(15))
    assert [int(index[0, 1]), int(index[1, 0]), int(index[0, 0])] == [15, 16, 17]


def test_targets_normed_over_samples_leave_padding_out() -> None:
    config = dataclasses.replace(small(), target=dataclasses.replace(small().target, norm="position", out_norm="none"))
    layers = [3.0 * torch.randn(4, 6, 5) + 2.0 for _ in range(2)]
    lengths = torch.tensor([6, 6, 4, 6])
    y = make_targets(config, layers, lengths)
    assert not y[2, 4:].any()
    for t, rows in ((0, [0, 1, 2, 3]), (5, [0, 1, 3])):
        parts = [x[rows, t] for x in layers]
        expected = sum((p - p.mean(dim=0)) / (p.var(dim=0, correction=0) + 1e-5).sqrt() for p in parts) / 2
        torch.testing.assert_close(y[rows, t], expected, rtol=1e-4, atol=1e-5)


def test_mel_filters() -> None:
    """Each band is a triangle over the bands beside it: together they are 1 between the first and the last peak."""
    filters = mel_filters(20)
    assert filters.shape == (257, 20)
    assert bool((filters >= 0).all())
    peaks = filters.argmax(dim=0)
    assert bool((peaks.diff() > 0).all())
    total = filters.sum(dim=1)[int(peaks[0]) + 1 : int(peaks[-1])]
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-5)


def test_log_mel_tokens_hear_their_frequency() -> None:
    config = dataclasses.replace(recipes.speech_tiny().stem, mel_bins=20)
    stem = LogMelStem(config, 8)
    seen: list[torch.Tensor] = []
    stem.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    time = torch.arange(8_000) / 16_000
    stem(torch.stack([torch.sin(2 * torch.pi * f * time) for f in (300.0, 3_000.0)]))
    loudest = seen[0].view(2, -1, 3, 20).argmax(dim=3)
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, 2840.0, 22) / 2595.0) - 1.0)
    for row, frequency in enumerate((300.0, 3_000.0)):
        band = int(loudest[row].flatten().mode().values)
        assert float(edges[band]) < frequency < float(edges[band + 2])


@pytest.mark.parametrize("kind", ["speech1-base", "vision1-base"])
def test_learning_rates_of_the_first_version(kind: str) -> None:
    optim, steps = recipes.get(kind).optim, recipes.get(kind).run.steps
    peak = optim.learning_rate
    if kind == "speech1-base":  # tri-stage: .03, .9, .07 of the run
        rates = [learning_rate_at(optim, u + 1, steps) for u in (0, 12_000, 372_000, 386_000, 400_000)]
        assert rates == pytest.approx([0.01 * peak, peak, peak, 0.1 * peak, 0.01 * peak])
    else:
        rates = [learning_rate_at(optim, u + 1, steps) for u in (0, 6_250, steps)]
        assert rates == pytest.approx([0.0, peak, 1e-5])
