"""Masks have the distribution of the published samplers: 2000 stored draws of each configuration against 2000 of ours.

Another random generator cannot give the same bits, so means are compared. Every bound is five standard errors of the
difference of two means of 2000 rows (rows of one batch that share a cut are counted as one), estimated from our draws;
per-position probabilities take the largest of up to 512 such differences, where 5.5 standard errors have a chance of
about 2e-5 under equality.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.golden import FOLDERS
from support.tensors import BACKENDS
from torch import Tensor

from d2v_kernels import MaskSampler, use_backend

ROWS = 2000
LENGTHS = [499, 400, 300, 200]
CASES = {
    "d2v1_audio_base_B1_T499": (dict(kind="span", tokens=499, ratio=0.65, span=10), 1),
    "d2v1_audio_base_B8_T499": (dict(kind="span", tokens=499, ratio=0.65, span=10, equal_counts=True), 8),
    "d2v1_audio_base_B4_pad": (dict(kind="span", tokens=499, ratio=0.65, span=10, equal_counts=True), 4),
    "d2v2_audio_base_block1d_T499": (dict(kind="block", tokens=499, ratio=0.5, adjust=0.05, span=5), 1),
    "d2v2_audio_base_inmodel_T499": (dict(kind="span", tokens=499, ratio=0.5, span=5, equal_counts=True), 8),
    "d2v2_image_base_block2d": (dict(kind="block", grid=(14, 14), ratio=0.8, adjust=0.07, span=3, inverse=True), 1),
    "d2v2_text_base_T512": (dict(kind="random", tokens=512, ratio=0.48), 1),
    "d2v1_text_base_T512": (dict(kind="token-span", tokens=512, ratio=0.35, span=4), 1),
    "d2v1_vision_base": (dict(kind="rectangles", grid=(14, 14), ratio=75 / 196, span=4), 1),
}
STATISTICS = json.loads((FOLDERS[0] / "masks.json").read_text())["statistics"]


def draw(name: str) -> tuple[Tensor, int]:
    """(ROWS, T) masks and the rows of a batch that are cut to one count."""
    options, batch = CASES[name]
    sampler = MaskSampler(**options, seed=11)
    lengths = torch.tensor(LENGTHS) if name.endswith("pad") else None
    batches = [sampler.draw(range(i, i + batch), 0, lengths=lengths).mask for i in range(0, ROWS, batch)]
    return torch.cat(batches), batch


def assert_same_mean(ours: Tensor, published: float, batch: int, what: str) -> None:
    """Mean of a per-row quantity against the published mean of as many rows."""
    groups = ours.double().view(-1, batch).mean(dim=1)
    error = float(groups.std()) * math.sqrt(2 / len(groups))
    got = float(ours.double().mean())
    assert abs(got - published) <= 5 * error + 1e-9, f"{what}: published {published}, got {got} +- {error}"


def span_starts(mask: Tensor) -> Tensor:
    """Number of masked runs in each row."""
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
    return (mask & ~before).sum(dim=1)


def neighbour_agreement(grid: Tensor) -> Tensor:
    """Share of side-by-side and one-above-the-other pairs that are equal, per row."""
    across = (grid[:, :, 1:] == grid[:, :, :-1]).flatten(1)
    down = (grid[:, 1:] == grid[:, :-1]).flatten(1)
    return torch.cat([across, down], dim=1).double().mean(dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_distribution(backend, name) -> None:
    if backend == "reference" and name != "d2v1_vision_base":
        pytest.skip("the Python twin draws the same bits as the native sampler (test_masks.py)")
    with use_backend(backend):
        mask, batch = draw(name)
    published = STATISTICS[name]
    tokens = mask.shape[1]
    counts = mask.sum(dim=1)
    valid = torch.tensor(LENGTHS).repeat(ROWS // batch) if name.endswith("pad") else torch.tensor(tokens)
    fraction = counts.double() / valid
    assert_same_mean(fraction, published["masked_fraction"]["mean"], batch, "masked share of the valid positions")
    spread = published["masked_fraction"]["std"]
    assert abs(float(fraction.std(correction=0)) - spread) <= 0.25 * spread + 1e-9
    if "grid" in published:
        agreement = neighbour_agreement(mask.view(-1, *published["grid"]))
        assert_same_mean(agreement, published["neighbour_agreement"], batch, "neighbour agreement")
    else:
        assert_same_mean(span_starts(mask), published["masked_spans_per_row_mean"], batch, "spans per row")
        assert_same_mean(
            counts.double(), published["masked_spans_per_row_mean"] * published["masked_span_length_mean"], batch,
            "spans times their length",
        )  # fmt: skip
    _compare_positions(mask, torch.tensor(published["position_probability"], dtype=torch.float64), batch)


def _compare_positions(mask: Tensor, published: Tensor, batch: int) -> None:
    ours = mask.double()
    groups = ours.view(-1, batch, mask.shape[1]).mean(dim=1)
    error = groups.std(dim=0).clamp(min=1 / len(groups)) * math.sqrt(2 / len(groups))
    z = (ours.mean(dim=0) - published).abs() / error
    # Stored probabilities are rounded; the bound holds for the largest of all positions.
    assert float(z.max()) <= 5.5, f"position {int(z.argmax())}: {float(z.max())} standard errors"


def test_a_wrong_rule_is_noticed() -> None:
    """The test has the power to tell neighbouring settings apart."""
    published = STATISTICS["d2v1_audio_base_B1_T499"]["masked_spans_per_row_mean"]
    right = MaskSampler("span", tokens=499, ratio=0.65, span=10, seed=11).draw(range(ROWS), 0).mask
    wrong = MaskSampler("span", tokens=499, ratio=0.65, span=9, seed=11).draw(range(ROWS), 0).mask
    assert_same_mean(span_starts(right), published, 1, "spans per row")
    with pytest.raises(AssertionError, match="spans per row"):
        assert_same_mean(span_starts(wrong), published, 1, "spans per row")
