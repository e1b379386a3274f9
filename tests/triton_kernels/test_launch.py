"""Launch choices: data, from shape and dtype alone."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
from triton_kernels.conftest import run_child

from d2v_kernels.backends.triton import launch

WIDTHS = [1, 2, 7, 16, 31, 96, 100, 512, 768, 1024, 1280, 4096, 5000]


def tiles(channels: int) -> list[launch.Tile]:
    lengths = itertools.product((1, 16, 100, 196, 512), (2, 4))
    one_read = [t for n, size in lengths if (t := launch.instance_one_read(n, channels, size))]
    return [
        launch.layer_rows(channels), *one_read, launch.statistics(channels), launch.merge(channels),
        launch.combine(channels, False), launch.combine(channels, True), launch.copy_rows(channels),
        launch.noise_row(channels), launch.column_sums(channels), launch.loss(channels), launch.gelu_rows(channels),
        launch.gelu_backward_rows(channels),
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
    for tile in (launch.layer_rows(channels), launch.combine(channels, True), launch.gelu_rows(channels),
                 launch.gelu_backward_rows(channels)):  # fmt: skip
        assert tile.channels >= channels


def test_published_settings() -> None:
    assert launch.instance_one_read(196, 768, 2) == launch.Tile(256, 32, 8, 128)
    assert launch.instance_one_read(512, 768, 2) == launch.Tile(512, 32, 16, 128)
    assert launch.instance_one_read(196, 768, 4) == launch.Tile(256, 16, 8, 128)
    assert launch.instance_one_read(513, 768, 2) is None
    assert launch.statistics(768).channels == 64  # 128 bytes of bfloat16
    assert launch.layer_rows(768) == launch.Tile(1, 1024, 1)
    assert launch.noise_row(768).channels == 256  # 1024 would waste a quarter of the random numbers
    assert launch.noise_row(1024).channels == 1024
    assert launch.inverse_gather(768, 16 * 39, 2) == launch.InverseGather(256, 1024, 1)
    assert launch.inverse_gather(768, 16 * 39, 4).channels == 512


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        launch.ema().chunk = 1


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 1000, 1024, 1025, 70001, 3_000_000])
def test_splits_cover_the_rows(rows) -> None:
    for tile, per_split, most in (
        (launch.loss(768), launch.loss_rows_per_split(rows, launch.loss(768)), launch.LOSS_SPLITS),
        (launch.gelu_backward_rows(512), launch.gelu_rows_per_split(rows, launch.gelu_backward_rows(512)),
         launch.GELU_SPLITS),
    ):  # fmt: skip
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
    assert len(counts) == 12
    for name, (first, all_sizes) in counts.items():
        assert first >= 1
        assert all_sizes == first, f"{name}: {first} kernels for the first size, {all_sizes} for all"
