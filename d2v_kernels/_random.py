"""Random numbers that are a pure function of a key and a place, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW32 = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers held in int64 (the wrapped product has the right bits)."""
    product = b * a
    return (product >> 32) & _LOW32, product & _LOW32


def philox(key: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) with counter (c0, c1, c2 or 0, 0); 32-bit numbers held in int64."""
    x0, x1, *more = torch.broadcast_tensors(*counter)
    x2, x3 = more[0] if more else torch.zeros_like(x0), torch.zeros_like(x0)
    k0, k1 = key & _LOW32, (key >> 32) & _LOW32
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, x0)
        high1, low1 = _multiply(0xCD9E8D57, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return x0, x1, x2, x3


def dropout_threshold(dropout: float) -> int:
    """An element is dropped where its 32-bit number is below this one."""
    return round(dropout * 2.0**32)


def keep_mask(keys: Tensor, rows: tuple[Tensor, ...], count: int, dropout: float) -> Tensor:
    """(..., count) bool, True where dropout keeps an element: number i is word i % 4 of Philox with counter
    (i / 4, *rows); keys and rows have a last dimension of 1 for it."""
    groups = torch.arange((count + 3) // 4, device=keys.device)
    words = philox(keys, (groups, *rows))
    return torch.stack(words, dim=-1).flatten(-2)[..., :count] >= dropout_threshold(dropout)


def dropped_bytes(dropout: float) -> int:
    """Of 256 numbers, so many drop a weight of attention: the nearest to `dropout`, 255 at most."""
    return min(round(dropout * 256), 255)


def keep_weights(keys: Tensor, rows: tuple[Tensor, ...], count: int, dropout: float) -> Tensor:
    """As `keep_mask`, of attention's weights, sixteen decisions a call: key j goes by byte `place` / 4 from the top of
    word `place` % 4 of Philox with counter (j / 64 * 4 + j % 8 / 2, *rows), where place is j / 8 % 8 * 2 + j % 2."""
    j = torch.arange(count, device=keys.device)
    call, place = j // 64 * 4 + j % 8 // 2, j // 8 % 8 * 2 + j % 2
    calls = torch.arange((count + 63) // 64 * 4, device=keys.device)
    words = torch.stack(philox(keys, (calls, *rows)), dim=-1).flatten(-2)[..., call * 4 + place % 4]
    return ((words >> (24 - place // 4 * 8)) & 255) >= dropped_bytes(dropout)
