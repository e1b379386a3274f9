"""Launch choices: data, from shape and dtype alone."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
from triton_kernels.conftest import run_child

pytest.importorskip("triton")
from d2v_kernels.triton import ema, layers, loss, norm, runtime, runtime_norm, tokens
from d2v_kernels.triton.runtime import Tile

WIDTHS = [1, 2, 7, 16, 31, 96, 100, 512, 768, 1024, 1280, 4096, 5000]


def tiles(channels: int) -> list[Tile]:
    lengths = itertools.product((1, 16, 100, 196, 512), (2, 4))
    one_read = [t for n, size in lengths if (t := layers.one_read_tile(n, channels, size))]
    return [
        layers.row_tile(channels), *one_read, layers.statistics_tile(channels),
        layers.combine_tile(channels, False), layers.combine_tile(channels, True), Tile.copy(channels),
        tokens.noise_tile(channels), Tile.columns(channels), loss.loss_tile(channels), runtime_norm.row_tile(channels),
        runtime_norm.backward_tile(channels, True), runtime_norm.backward_tile(channels, False),
    ]  # fmt: skip


@pytest.mark.parametrize("channels", WIDTHS)
def test_blocks_are_powers_of_two_and_fit(channels) -> None:
    for tile in tiles(channels):
        for n in (tile.rows, tile.channels, tile.warps):
            assert n >= 1
            assert n & (n - 1) == 0, tile
        assert tile.warps <= 16
        assert tile.rows * tile.channels <= 1 << 20  # Triton's largest block
        if channels <= 1280:
            assert tile.per_thread <= 64, tile


@pytest.mark.parametrize("channels", WIDTHS)
def test_whole_rows_are_whole(channels) -> None:
    for tile in (layers.row_tile(channels), layers.combine_tile(channels, True), runtime_norm.row_tile(channels),
                 runtime_norm.backward_tile(channels, True), runtime_norm.backward_tile(channels, False)):  # fmt: skip
        assert tile.channels >= channels


def test_published_settings() -> None:
    assert layers.one_read_tile(196, 768, 2) == Tile(256, 32, 8, 128)
    assert layers.one_read_tile(512, 768, 2) == Tile(512, 32, 16, 128)
    assert layers.one_read_tile(196, 768, 4) == Tile(256, 16, 8, 128)
    assert layers.one_read_tile(513, 768, 2) is None
    assert layers.statistics_tile(768).channels == 64  # 128 bytes of bfloat16
    assert layers.row_tile(768) == Tile(1, 1024, 1)
    assert tokens.noise_tile(768).channels == 256  # 1024 would waste a quarter of the random numbers
    assert tokens.noise_tile(1024).channels == 1024
    assert tokens.inverse_gather_tile(768, 16 * 39, 2) == Tile(256, 1024, 1)
    assert tokens.inverse_gather_tile(768, 16 * 39, 4).channels == 512


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ema.chunk_launch().chunk = 1


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 1000, 1024, 1025, 70001, 3_000_000])
def test_splits_cover_the_rows(rows) -> None:
    for tile, most, blocks in (
        (loss.loss_tile(768), loss.LOSS_SPLITS, 1),
        (runtime_norm.backward_tile(512, True), runtime_norm.GELU_SPLITS, 4),
        (runtime_norm.backward_tile(768, True), norm.NORM_SPLITS, 4),
    ):
        per_split = runtime.rows_per_split(rows, tile, most, blocks)
        splits = -(-rows // per_split)
        assert 1 <= splits <= most
        assert per_split % tile.rows == 0
        assert (splits - 1) * per_split < rows <= splits * per_split


def test_other_sizes_compile_nothing_new(needs_triton, triton_cache) -> None:
    """The launchers themselves, for other numbers of samples, rows, tensors and lengths of the same power of two."""
    done = run_child("-m", "support.triton_compile", "count", TRITON_CACHE_DIR=triton_cache)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    # 100 channels: the distance between samples is a multiple of 16 or not, and Triton distinguishes.
    first, all_sizes = counts.pop("odd width")
    assert (first, all_sizes) == (1, 2)
    assert len(counts) == 14
    for name, (first, all_sizes) in counts.items():
        assert first >= 1
        assert all_sizes == first, f"{name}: {first} kernels for the first size, {all_sizes} for all"
