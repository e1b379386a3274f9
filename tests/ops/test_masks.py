"""MaskSampler: exact counts, independence of batch, lists, published distributions."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tensors import BACKENDS

from d2v_kernels import MaskSampler, masks_from_bool, use_backend
from d2v_kernels.ops.masks import KINDS

PUBLISHED = {
    "speech 2.0": (dict(kind="block", tokens=999, ratio=0.5, adjust=0.05, span=5), 499),
    "speech 2.0 large": (dict(kind="block", tokens=999, ratio=0.55, adjust=0.1, span=5), 549),
    "images": (dict(kind="block", grid=(14, 14), ratio=0.8, adjust=0.07, span=3, inverse=True), 157),
    "images large": (dict(kind="block", grid=(14, 14), ratio=0.75, adjust=0.1, span=3, inverse=True), 147),
    "images huge": (dict(kind="block", grid=(16, 16), ratio=0.75, adjust=0.1, span=3, inverse=True), 192),
    "text 2.0": (dict(kind="random", tokens=512, ratio=0.48), 246),
    "text 2.0 large": (dict(kind="random", tokens=512, ratio=0.5), 256),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(backend, name) -> None:
    options, masked = PUBLISHED[name]
    with use_backend(backend):
        masks = MaskSampler(**options).draw([5, 9], 3, copies=4)
    assert masks.mask.sum(dim=1).tolist() == [masked] * 8
    assert len({tuple(row) for row in masks.mask.tolist()}) == 8


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS), grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), flat=st.booleans(),
    ratio=st.floats(0, 1), span=st.integers(1, 6), inverse=st.booleans(), equal=st.booleans(), seed=st.integers(),
)  # fmt: skip
def test_lists_agree_with_the_mask(backend, kind, grid, flat, ratio, span, inverse, equal, seed) -> None:
    where = dict(tokens=grid[0] * grid[1]) if flat and kind != "rectangles" else dict(grid=grid)
    sampler = MaskSampler(
        kind, **where, ratio=ratio, span=span, inverse=inverse and kind == "block", equal_counts=equal,
        seed=seed % 2**63,
    )  # fmt: skip
    with use_backend(backend):
        masks = sampler.draw([1, 2, 3], 0, copies=2)
    tokens, mask = sampler.tokens, masks.mask
    assert mask.shape == (6, tokens)
    assert masks.rows.tolist() == mask.flatten().nonzero()[:, 0].tolist()
    counts = mask.sum(dim=1)
    assert (masks.keep is not None) == bool((counts == counts[0]).all())
    assert not equal or masks.keep is not None
    if masks.keep is not None:
        order = torch.arange(tokens).expand(6, tokens)
        want = torch.cat([order[~mask].view(6, -1), order[mask].view(6, -1)], dim=1)
        assert torch.equal(masks.keep.long(), want[:, : masks.keep.shape[1]])
        assert torch.equal(masks.restore.long(), want.argsort(dim=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_belongs_to_its_sample(backend, kind) -> None:
    """Neither batch, order nor number of copies changes the mask of (seed, epoch, sample id, copy)."""
    sampler = MaskSampler(kind, grid=(12, 12), ratio=0.5, span=3, seed=7)
    with use_backend(backend):
        whole = sampler.draw(range(6), 2, copies=3).mask.view(6, 3, -1)
        part = sampler.draw([4, 1], 2, copies=2).mask.view(2, 2, -1)
        other_epoch = sampler.draw([4, 1], 3, copies=2).mask.view(2, 2, -1)
    assert torch.equal(part, whole[[4, 1], :2])
    assert not torch.equal(part, other_epoch)


@pytest.mark.parametrize("kind", KINDS)
def test_python_and_native_draw_the_same_bits(kind) -> None:
    for sizes, ratio, span, equal in itertools.product([(14, 14), (5, 9), (1, 1)], [0.2, 0.6], [1, 4], [False, True]):
        sampler = MaskSampler(kind, grid=sizes, ratio=ratio, span=span, equal_counts=equal, adjust=0.05, seed=-3)
        if kind == "block":
            sampler = MaskSampler(kind, grid=sizes, ratio=ratio, span=span, inverse=equal, adjust=0.05)
        drawn = []
        for backend in ("reference", "native"):
            with use_backend(backend):
                drawn.append(sampler.draw([0, 12345678901], 17, copies=3))
        assert torch.equal(drawn[0].mask, drawn[1].mask), (sizes, ratio, span)
        assert torch.equal(drawn[0].rows, drawn[1].rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["block", "random", "span", "token-span"])
def test_padding_is_never_masked(backend, kind) -> None:
    lengths = torch.tensor([0, 1, 7, 60, 100])
    with use_backend(backend):
        masks = MaskSampler(kind, tokens=100, ratio=0.5, span=5).draw(range(5), 0, copies=2, lengths=lengths)
        cut = MaskSampler(kind, tokens=100, ratio=0.5, span=5, equal_counts=True)
        assert cut.draw(range(5), 0, lengths=lengths).mask.sum() == 0
    for row, length in zip(masks.mask.view(5, 2, 100), lengths.tolist(), strict=True):
        assert not row[:, length:].any()
        assert length < 60 or row.any()


def test_noise_keys_are_distinct_and_belong_to_their_row() -> None:
    sampler = MaskSampler("random", tokens=4, ratio=0.5)
    keys = sampler.noise_keys(range(100), 0, copies=8)
    assert len(set(keys.tolist())) == 800
    assert sampler.noise_keys([42], 0, copies=2).tolist() == keys.view(100, 8)[42, :2].tolist()


def test_sampler_travels_to_workers() -> None:
    sampler = MaskSampler("random", tokens=50, ratio=0.5)
    first = sampler.draw([1], 0)
    again = pickle.loads(pickle.dumps(sampler)).draw([1], 0)
    assert torch.equal(first.mask, again.mask)


def test_masks_from_bool() -> None:
    drawn = MaskSampler("random", tokens=50, ratio=0.5).draw([1, 2], 0)
    made = masks_from_bool(drawn.mask)
    assert all(torch.equal(a, b) for a, b in zip(made, drawn, strict=True))
    assert masks_from_bool(torch.eye(3, 5).bool().cumsum(1).bool()).keep is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(kind="blocks", tokens=4, ratio=0.5), "kind: expected one of span"),
        (dict(kind="block", ratio=0.5), "one of tokens and grid"),
        (dict(kind="block", tokens=4, grid=(2, 2), ratio=0.5), "one of tokens and grid"),
        (dict(kind="block", tokens=0, ratio=0.5), "tokens: expected a whole number, 1 to"),
        (dict(kind="block", tokens=4, ratio=1.5), "ratio: expected 0 to 1, got 1.5"),
        (dict(kind="block", tokens=4, ratio=0.5, span=0), "span"),
        (dict(kind="random", tokens=4, ratio=0.5, inverse=True), "inverse"),
        (dict(kind="rectangles", tokens=4, ratio=0.5), "grid"),
    ],
)
def test_messages(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        MaskSampler(**options)


def test_draw_messages() -> None:
    sampler = MaskSampler("random", tokens=4, ratio=0.5)
    for call in (
        lambda: sampler.draw([1], 0, copies=0),
        lambda: sampler.draw([[1]], 0),
        lambda: sampler.draw([1], 0, lengths=torch.tensor([5])),
        lambda: sampler.draw([1], 0, lengths=torch.tensor([1, 2])),
        lambda: sampler.draw([1], 0, lengths=torch.tensor([1.0])),
    ):
        with pytest.raises(ValueError, match=r"MaskSampler\.draw: "):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_seed_counts(backend) -> None:
    sampler, other = (MaskSampler("random", tokens=40, ratio=0.5, seed=seed) for seed in (1, 2))
    with use_backend(backend):
        sampler.draw([3], 0)
        sampler.seed = 2
        assert torch.equal(sampler.draw([3], 0).mask, other.draw([3], 0).mask)
    assert torch.equal(sampler.noise_keys([3], 0), other.noise_keys([3], 0))
    with pytest.raises(AttributeError):
        sampler.ratio = 0.1  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{"adjust": math.nan}, {"adjust": 9.0}, {"span": math.nan}, {"span": 2**70}])
def test_parameters_have_bounds(options) -> None:
    with pytest.raises(ValueError, match=r"expected .* got"):
        MaskSampler("block", tokens=40, ratio=0.5, **options)


@pytest.mark.parametrize("options", [{"copies": 2**40}, {"copies": math.nan}, {"epoch": 0.5}])
def test_draws_have_bounds(options) -> None:
    with pytest.raises(ValueError, match=r"expected .* got"):
        MaskSampler("block", tokens=40, ratio=0.5).draw([0], **{"epoch": 0, **options})


def test_noise_keys_are_those_of_one_row_at_a_time() -> None:
    """The keys of all rows at once are the stream states of the rule, for any 64-bit words."""
    from d2v_kernels.ops.masks import _row_state

    for seed, epoch, ids in ((0, 0, [0]), (-1, 3, [5, 5, 2**62]), (2**63, -(2**62), [-1, -(2**63)]), (7, 1, [])):
        sampler = MaskSampler("random", tokens=8, ratio=0.5, seed=seed)
        keys = sampler.noise_keys(torch.tensor(ids, dtype=torch.int64), epoch, copies=3)
        expected = [_row_state(seed, epoch, i, ~copy) for i in ids for copy in range(3)]
        assert [int(key) % (1 << 64) for key in keys] == expected
        assert keys.dtype == torch.int64 and keys.shape == (3 * len(ids),)
