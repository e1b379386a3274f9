"""The count of floating-point operations against PyTorch's counter, and the table of peaks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2v import recipes
from d2v.config import Config
from d2v.data.dataset import Batch
from d2v.model.data2vec import Data2Vec
from d2v.model.masking import make_mask_sampler
from d2v.train.flops import PEAKS, Shape, count_flops, count_work, describe_rates, find_peak
from d2v_kernels import choose_products

SAMPLES = 2
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def countable() -> Iterator[None]:
    """Products that PyTorch's counter knows."""
    choose_products("library")
    yield
    choose_products("auto")


def change(config: Config, **sections: dict[str, Any]) -> Config:
    parts = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **parts)


def make_batch(config: Config, model: Data2Vec) -> Batch:
    torch.manual_seed(0)
    stem = config.stem
    if stem.modality == "vision":
        inputs = torch.randn(SAMPLES, 3, stem.image_size, stem.image_size)
    elif stem.modality == "text":
        inputs = torch.randint(5, stem.vocabulary, (SAMPLES, 40))
    else:
        inputs = torch.randn(SAMPLES, 9_000)
    tokens, _ = model.stem.measure(inputs, None)  # type: ignore[operator]
    sampler = make_mask_sampler(config, tokens=tokens)
    masks = sampler.draw(list(range(SAMPLES)), 0, copies=config.mask.copies)
    return Batch(inputs, None, None, masks, None, ())


def _attention(query: list[int], *_: Any, **__: Any) -> int:
    rows, tokens, heads, width = query
    return 4 * rows * heads * tokens * tokens * width


def _attention_backward(_grad: list[int], query: list[int], *_: Any, **__: Any) -> int:
    return 2 * _attention(query)


def _convolution_backward(grad: list[int], _x: list[int], weight: list[int], *rest: Any, **__: Any) -> int:
    wanted = rest[7]  # gradients of input and weight
    return 2 * grad[0] * math.prod(grad[2:]) * math.prod(weight) * (wanted[0] + wanted[1])


def _product_added(_: list[int], left: list[int], right: list[int], **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


# PyTorch's counter does not look into operators that it does not know, and takes the gradient of a grouped
# convolution's weight for that of one without groups.
OPERATORS = {
    torch.ops.aten.addmm_: _product_added,
    torch.ops.d2v.attention: _attention,
    torch.ops.d2v.attention_backward: _attention_backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
}

CASES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "vision": ("vision-tiny", {}),
    "vision, class token and prenet": ("vision-tiny", {"encoder": {"extra_tokens": 1, "prenet_depth": 2}}),
    "vision, many copies": ("vision-tiny", {"mask": {"copies": 6}, "decoder": {"layers": 3, "kernel": 5}}),
    "vision, narrow patches": ("vision-tiny", {"stem": {"width": 20}}),
    "vision, some masked visible": ("vision-tiny", {"mask": {"keep_masked": 0.3}}),
    "vision, transformer decoder": ("vision-tiny", {"decoder": {"kind": "transformer", "heads": 4}}),
    "vision, cross decoder": ("vision-tiny", {"decoder": {"kind": "cross", "heads": 4}}),
    "vision, shared decoder and pixels": (
        "vision-tiny",
        {
            "shared_decoder": {"layers": 2, "width": 32, "groups": 4},
            "loss": {"reconstruction": 0.1},
        },
    ),
    "vision 1.0": ("vision1-tiny", {}),
    "speech": ("speech-tiny", {}),
    "speech, waveform": ("speech-base", {}),
    "speech, frozen front end": ("speech-base", {"stem": {"gradient_scale": 0.0}}),
    "speech 1.0": ("speech1-tiny", {}),
    "speech 1.0, waveform": ("speech1-base", {}),
    "text": ("text-tiny", {}),
    "text, projection of three layers": ("text-tiny", {"decoder": {"projection_layers": 3}}),
    "text, narrow tokens": ("text-tiny", {"stem": {"width": 20}}),
    "text 1.0": ("text1-tiny", {}),
}


def small(recipe: str, changes: dict[str, dict[str, Any]]) -> Config:
    config = recipes.get(recipe)
    if recipe.endswith("base"):
        config = change(
            config,
            encoder={"width": 32, "heads": 4, "prenet_depth": min(config.encoder.prenet_depth, 1), "depth": 2},
            stem={"convolutions": ((24, 10, 5), (24, 3, 2), (24, 3, 2), (24, 2, 2)), "position_groups": 8},
            target={"top_k": 2},
            mask={"copies": 3 if config.version == 2 else 1},
            **({"decoder": {"width": 32, "groups": 4, "layers": 2}} if config.version == 2 else {}),
        )
    config = change(config, encoder={"layer_drop": 0.0}, run={"precision": "fp32"})
    return change(config, **changes)


@pytest.mark.parametrize("case", CASES)
def test_count_against_pytorch(case: str) -> None:
    config = small(*CASES[case])
    torch.manual_seed(0)
    model = Data2Vec(config).train()
    batch = make_batch(config, model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=OPERATORS) as counter:
        model(batch.inputs, masks=batch.masks).loss.backward()
    assert count_work(config, batch)["flops"] == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_a_block_of_known_size() -> None:
    """ViT-B on 196 patches: 17.6 GMACs with its class token (Dosovitskiy et al. 2021), less the classifier's 0.8 M."""
    config = recipes.vision_base()
    encoder = dataclasses.replace(config.encoder, prenet_depth=0, depth=12)
    config = dataclasses.replace(config, encoder=encoder, decoder=dataclasses.replace(config.decoder, layers=0))
    shape = Shape(samples=1, copies=1, tokens=196, visible=196, masked=0, length=224)
    # Student three times, teacher once; patches twice and once more.
    patches = 2 * 196 * 768 * 768
    assert (count_flops(config, shape) - 3 * patches) / 4 + patches == pytest.approx(2 * 17.56e9, rel=0.01)


def test_layer_drop_is_work_not_done() -> None:
    config = small("speech1-base", {})
    shape = Shape(samples=2, copies=1, tokens=100, visible=100, masked=60, length=4_100)
    whole = count_flops(config, shape)
    half = count_flops(change(config, encoder={"layer_drop": 0.5}), shape)
    none = count_flops(change(config, encoder={"layer_drop": 0.999999}), shape)
    assert whole > half > none
    assert half == pytest.approx((whole + none) / 2, rel=1e-4)


def test_work_of_a_batch() -> None:
    config = small("text-tiny", {})
    batch = make_batch(config, Data2Vec(config))
    work = count_work(config, batch)
    assert batch.masks is not None and batch.masks.keep is not None
    shape = Shape(2, config.mask.copies, 40, batch.masks.keep.shape[1], len(batch.masks.rows), 40)
    assert work == {"tokens": 80.0, "flops": count_flops(config, shape)}
    padded = dataclasses.replace(batch, token_lengths=torch.tensor([40, 7]))
    assert count_work(config, padded) == {"tokens": 47.0, "flops": work["flops"]}


def test_peaks() -> None:
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H200": 989e12, "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12, "NVIDIA B200": 2250e12, "NVIDIA A30": 165e12,
    }  # fmt: skip
    assert {name: find_peak(name) for name in names} == names
    for unknown in (
        "Tesla V100-SXM2-16GB",
        "NVIDIA GeForce RTX 3060",
        "AMD Instinct MI300X",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "",
    ):
        assert find_peak(unknown) is None
    assert all(1e14 < peak < 1e16 for peak in PEAKS.values())


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipes.vision_base()
    rates = {"tokens": 50.0, "flops": 2 * 98.9e12}
    assert describe_rates(rates, config, CPU) == {"tokens_per_second": 50.0}
    assert describe_rates({}, config, CPU) == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    gpu = torch.device("cuda", 0)
    assert describe_rates(rates, config, gpu, ranks=2) == {"tokens_per_second": 50.0, "mfu": pytest.approx(0.1)}
    # The peak is that of bfloat16 products.
    assert "mfu" not in describe_rates(rates, change(config, run={"precision": "fp32"}), gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Something")
    assert "mfu" not in describe_rates(rates, config, gpu)
