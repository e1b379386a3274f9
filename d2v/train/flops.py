"""Work of an update in floating-point operations, counted from the configuration, and the peaks of GPUs: MFU.

Model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B) is (FLOPs that the model needs) / (seconds x peak).
Counted are matrix products and convolutions, a multiply-add as 2; activations that are computed again in backward are
not counted a second time. With rows of t tokens of width C, hidden width H, one block costs a row

    t (8 C^2 + 4 C H) + 4 t^2 C     (four projections and the MLP; query-key and weight-value products)

and an update costs

    3 (student + positions + decoder or head + stem) + teacher

where 3 stands for forward and backward, which is twice the forward; the student's N rows hold the visible tokens (1.0:
all), the teacher's B rows all tokens; a first layer that sees the data has no gradient of its input and counts 2.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from d2v.model.stems import InputStem, make_stem

if TYPE_CHECKING:
    from d2v.config import Config, Encoder, SharedDecoder
    from d2v.data.dataset import Batch
    from d2v_kernels import Masks

PEAKS = {
    "A100": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200": 989e12,
    "B200": 2250e12,
}
"""Dense bfloat16 products with float32 sums, FLOP/s, by the words that a GPU's name must contain. As commonly quoted
from NVIDIA's specifications (half of a figure that is given with sparsity only), not measured and not checked against
the sheets here."""


class Shape(NamedTuple):
    """Sizes of a micro-batch that its work depends on."""

    samples: int
    """B."""
    copies: int
    """Student rows M of a sample."""
    tokens: int
    """T, padding counted: it is computed."""
    visible: int
    """V; 1.0: T."""
    masked: int
    """P, positions that are predicted, in all rows."""
    length: int
    """Waveform samples of a row; other inputs: not used."""


def shape_of(masks: Masks, samples: int, length: int) -> Shape:
    """Sizes of a training batch, known on the host. length: values of a row, see `Shape`."""
    rows, tokens = masks.mask.shape
    visible = tokens if masks.keep is None else masks.keep.shape[1]
    return Shape(samples, rows // samples, tokens, visible, len(masks.rows), length)


def count_work(config: Config, batch: Batch) -> dict[str, float]:
    """`tokens` that the teacher reads (padding and copies do not count) and `flops` of one micro-batch, for `rates`."""
    assert batch.masks is not None
    shape = shape_of(batch.masks, len(batch), batch.inputs.shape[1])
    lengths = batch.token_lengths
    tokens = shape.samples * shape.tokens if lengths is None else int(lengths.sum())
    return {"tokens": float(tokens), "flops": count_flops(config, shape)}


def describe_rates(
    rates: Mapping[str, float], config: Config, device: torch.device, ranks: int = 1
) -> dict[str, float]:
    """`tokens_per_second`, and `mfu` (0 to 1) for bf16 and fp16 runs on GPUs whose peak is known.

    rates: what `MetricWindow.rates` made of the counts of `count_work`, summed over `ranks` equal devices.
    """
    line = {"tokens_per_second": rates["tokens"]} if "tokens" in rates else {}
    if device.type == "cuda" and config.run.precision != "fp32" and "flops" in rates:
        peak = find_peak(torch.cuda.get_device_name(device))
        if peak is not None:
            line["mfu"] = rates["flops"] / (peak * ranks)
    return line


def find_peak(name: str) -> float | None:
    """Peak of a GPU by the name that its driver gives ("NVIDIA H100 80GB HBM3"), or None: unknown, or a part of one
    (MIG). The entry with most words that are in the name wins."""
    words = set(name.replace("-", " ").split())
    fitting = [entry for entry in PEAKS if set(entry.split()) <= words and "MIG" not in words]
    return PEAKS[max(fitting, key=lambda entry: len(entry.split()))] if fitting else None


def count_flops(config: Config, shape: Shape) -> float:
    """FLOPs of forward and backward of one micro-batch; optimiser and moving average have no products."""
    encoder = config.encoder
    shape = shape._replace(visible=shape.visible + config.mask.count_shown(shape.tokens - shape.visible))
    samples, rows = shape.samples, shape.samples * shape.copies
    seen = encoder.extra_tokens + (shape.visible if config.version == 2 else shape.tokens)
    full = encoder.extra_tokens + shape.tokens
    prenet, main = encoder.prenet_depth, encoder.depth
    student = rows * _count_block(encoder, seen) * (prenet + main * (1.0 - encoder.layer_drop))
    teacher = samples * _count_block(encoder, full) * (prenet + main)
    positions = _count_positions(config, shape.tokens)
    first, rest, fixed = _stem_of(config).count_flops(shape.tokens, shape.length)
    trained = student + rows * positions + _count_prediction(config, shape, rows)
    shared = config.stem.kind == "log-mel"  # the fixed part, by student and teacher
    again = first + rest + (0.0 if shared else fixed) if config.ema.scope == "all" else 0.0
    return 3.0 * trained + teacher + samples * (2.0 * first + 3.0 * rest + fixed + positions + again)


def _count_block(encoder: Encoder, tokens: int) -> float:
    width, hidden = encoder.width, int(encoder.width * encoder.mlp_ratio)
    return tokens * (8.0 * width * width + 4.0 * width * hidden) + 4.0 * tokens * tokens * width


def _count_positions(config: Config, tokens: int) -> float:
    """Of a row: grouped convolutions from C to C channels."""
    stem, width = config.stem, config.encoder.width
    if stem.positions != "conv":
        return 0.0
    kernel = max(3, stem.position_width // stem.position_layers)
    surplus = 1 - kernel % 2  # an even kernel yields one position more, which is cut
    return stem.position_layers * 2.0 * (tokens + surplus) * kernel * width * width / stem.position_groups


@lru_cache(maxsize=8)
def _stem_of(config: Config) -> InputStem:
    """Without weights."""
    with torch.device("meta"):
        return make_stem(config)


def _count_prediction(config: Config, shape: Shape, rows: int) -> float:
    """Decoder of all tokens of all rows and its projection of the masked ones (2.0), or the head of those (1.0)."""
    width = config.encoder.width
    if config.version == 1:
        sizes = [width, *[2 * width] * (config.head.layers - 1), width]
        return shape.masked * 2.0 * sum(a * b for a, b in itertools.pairwise(sizes))
    if config.decoder.kind == "conv":
        work = _count_convolutions(config.decoder, width, 1 if config.grid is None else 2, shape, rows)
    else:
        work = _count_blocks(config, shape, rows)
    if config.shared_decoder.layers > 0:
        work += _count_convolutions(config.shared_decoder, width, 1, shape, rows)
    if config.loss.reconstruction > 0.0:
        work += shape.masked * 2.0 * width * _stem_of(config).raw_width
    return work


def _count_convolutions(decoder: SharedDecoder, width: int, dims: int, shape: Shape, rows: int) -> float:
    inputs = [width] + [decoder.width] * decoder.layers
    convolutions = sum(2.0 * decoder.kernel**dims * c * decoder.width / decoder.groups for c in inputs[:-1])
    first = int(inputs[-1] * decoder.projection_ratio)
    sizes = [inputs[-1], *[first] * (decoder.projection_layers - 1), width]
    products = sum(a * b for a, b in itertools.pairwise(sizes))
    return rows * shape.tokens * convolutions + shape.masked * 2.0 * products


def _count_blocks(config: Config, shape: Shape, rows: int) -> float:
    """Decoders of transformer blocks; those of kind cross have the masked tokens alone, and products with the rest."""
    decoder, width = config.decoder, config.encoder.width
    if decoder.kind == "transformer":
        inner = dataclasses.replace(config.encoder, width=decoder.width, heads=decoder.heads)
        blocks = decoder.layers * _count_block(inner, shape.tokens)
        return rows * (blocks + 2.0 * shape.tokens * width * decoder.width) + shape.masked * 2.0 * width * decoder.width
    own = shape.masked * (20.0 * decoder.width**2 + 4.0 * shape.visible * decoder.width)
    others = rows * shape.visible * 4.0 * width * decoder.width
    once = 2.0 / 3.0  # the first layer's input, positions, needs no gradient
    return decoder.layers * (own + others) + shape.masked * (1.0 + once) * 2.0 * width * decoder.width
