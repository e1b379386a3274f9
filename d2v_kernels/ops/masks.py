"""Which tokens are masked: the published samplers, reproducible for each sample.

A row of masks depends on (seed, epoch, sample id, copy) only, so it does not change with batch, worker or rank. The
rules in plain Python at the end are the definition, which the native sampler reproduces bit for bit (a test compares
them): arithmetic is that of C (integers truncate, reals are doubles), and the random stream is splitmix64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _checks as check
from .. import _native
from ..registry import forced_backend

Kind = Literal["span", "rectangles", "token-span", "block", "random"]
KINDS = ("span", "rectangles", "token-span", "block", "random")
_GRID_KINDS = ("rectangles",)
MOST_TOKENS, MOST_POSITIONS, MOST_COPIES = (1 << 31) - 1, 1 << 28, 1 << 16
"""Tokens of a sampler, positions of all masks of a call, and masked copies of a sample."""


class Masks(NamedTuple):
    """Masks of N = samples * copies rows, copies of a sample adjacent; all tensors on the host."""

    mask: Tensor
    """(N,T) bool, True = masked."""
    keep: Tensor | None
    """(N,V) int32, visible positions in ascending order; None when rows mask different counts."""
    restore: Tensor | None
    """(N,T) int32: a visible position's rank among the visible, or V + a masked position's rank among the masked."""
    rows: Tensor
    """(P,) int64: numbers r * T + t of the masked positions, ascending."""

    def __repr__(self) -> str:
        rows, tokens = self.mask.shape
        return f"Masks({rows} rows of {tokens} tokens, {len(self.rows)} masked, {self.mask.device})"

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Masks:
        """The same masks on a device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Masks:
        """The same masks in pinned host memory, for asynchronous copies."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Masks:
        keep, restore = (None if t is None else change(t) for t in (self.keep, self.restore))
        return Masks(change(self.mask), keep, restore, change(self.rows))


@dataclass(frozen=True)
class MaskRule:
    """What masks are drawn by; see `MaskSampler`. A sequence has height 0 and its tokens as width."""

    kind: str
    height: int
    width: int
    ratio: float
    span: int
    adjust: float
    inverse: bool
    equal_counts: bool
    seed: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.width * (self.height or 1)


class MaskSampler:
    """Draws masks by one of the published rules.

    Kinds (Baevski et al. 2022, both papers; parameters in brackets are the published ones):
        "span": 1.0 speech: about ratio*T/span starts, spans of `span` tokens [ratio .65, span 10].
        "rectangles": 1.0 vision: rectangles of at least span^2 patches until ratio*T are masked [120/196, span 4].
        "token-span": 1.0 text: as span, cut at the end [.35, span 4].
        "block": 2.0 speech (1-D) and vision (2-D): blocks of side `span` around random centres, then exactly
            int(ratio*T) masked; `inverse` draws the visible blocks [speech .5, adjust .05, span 5; vision .8, adjust
            .07, span 3, inverse].
        "random": 2.0 text: T - int((1-ratio)*T) positions, uniformly [.48].

    Example:
        >>> sampler = MaskSampler("block", grid=(14, 14), ratio=0.8, adjust=0.07, span=3, inverse=True)
        >>> masks = sampler.draw([17, 4], epoch=0, copies=8)
        >>> masks.keep.shape  # the 39 patches that each of 8 masks of 2 images leaves
        torch.Size([16, 39])
    """

    __slots__ = ("_native", "rule")  # what is set by mistake is refused

    def __init__(
        self,
        kind: Kind,
        *,
        tokens: int | None = None,
        grid: tuple[int, int] | None = None,
        ratio: float,
        span: int = 1,
        adjust: float = 0.0,
        inverse: bool = False,
        equal_counts: bool = False,
        seed: int = 0,
    ) -> None:
        """
        Args:
            tokens: T of a sequence; or
            grid: (height, width) of an image in patches, T = height * width, row-major.
            ratio: masked fraction p (for span kinds the expected coverage without overlap).
            span: length or side of a block in tokens.
            adjust: -1 to 1, added to the ratio when block centres are counted ("block").
            inverse: draw visible blocks ("block").
            equal_counts: cut every row to the smallest count of the batch, as the published code does; then a mask
                depends on its batch.
            seed: any 64-bit integer; may be changed later, for the draws that follow.

        Raises:
            ValueError: an unknown kind or a parameter out of range.
        """
        if kind not in KINDS:
            raise ValueError(f"MaskSampler: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if (tokens is None) == (grid is None):
            raise ValueError(f"MaskSampler: expected one of tokens and grid, got tokens={tokens}, grid={grid}")
        if kind in _GRID_KINDS and grid is None:
            raise ValueError(f"MaskSampler: {kind}: expected a grid, got tokens={tokens}")
        if inverse and kind != "block":
            raise ValueError(f"MaskSampler: inverse: expected kind block, got {kind}")
        op, (height, width) = "MaskSampler", grid if grid is not None else (0, tokens)
        height = check.whole(op, "height of grid", height, 0 if grid is None else 1, MOST_TOKENS)
        width = check.whole(op, "tokens" if grid is None else "width of grid", width, 1, MOST_TOKENS // (height or 1))
        span, seed = check.whole(op, "span", span, 1, MOST_TOKENS), check.whole(op, "seed", seed, *_WORDS)
        check.require(0.0 <= ratio <= 1.0, op, "ratio", "0 to 1", ratio)
        check.require(-1.0 <= adjust <= 1.0, op, "adjust", "-1 to 1", adjust)
        self.rule = MaskRule(
            kind, height, width, float(ratio), span, float(adjust), bool(inverse), bool(equal_counts), seed
        )
        self._native: Any = None

    def __repr__(self) -> str:
        rule = self.rule
        place = f"grid=({rule.height}, {rule.width})" if rule.height else f"tokens={rule.width}"
        names = ("ratio", "span", "adjust", "inverse", "equal_counts", "seed")
        return f"MaskSampler({rule.kind!r}, {place}, {', '.join(f'{n}={getattr(rule, n)!r}' for n in names)})"

    @property
    def tokens(self) -> int:
        """T."""
        return self.rule.tokens

    @property
    def equal_counts(self) -> bool:
        """Whether every row is cut to the smallest count of its batch."""
        return self.rule.equal_counts

    @property
    def seed(self) -> int:
        """What the draws depend on beside epoch, sample and copy."""
        return self.rule.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.rule = replace(self.rule, seed=check.whole("MaskSampler", "seed", seed, *_WORDS))

    def draw(
        self, sample_ids: Sequence[int] | Tensor, epoch: int, *, copies: int = 1, lengths: Tensor | None = None
    ) -> Masks:
        """Masks of the given samples.

        Args:
            sample_ids: one integer a sample; int64 tensor or sequence.
            epoch: pass over the data.
            copies: masked copies M of each sample.
            lengths: (samples,) int64 on the host: valid tokens; positions beyond are never masked.

        Returns:
            `Masks` with samples * copies rows.
        """
        ids, epoch, copies = self._check_draw(sample_ids, epoch, copies)
        if lengths is not None:
            lengths = self._check_lengths(lengths, ids.shape[0])
        module = _native.native_module() if forced_backend() in ("auto", "native") else None
        if module is None and forced_backend() == "native":
            raise NotImplementedError(f"MaskSampler: backend native cannot run: {_native.load_errors()}")
        if module is None:
            return _list_python(self._draw_python(ids, epoch, copies, lengths))
        return self._draw_native(module, ids, epoch, copies, lengths)

    def noise_keys(self, sample_ids: Sequence[int] | Tensor, epoch: int, *, copies: int = 1) -> Tensor:
        """Keys (samples * copies,) int64 for `Noise`, functions of (seed, epoch, sample id, copy)."""
        ids, epoch, copies = self._check_draw(sample_ids, epoch, copies)
        return torch.from_numpy(_noise_states(self.rule.seed, epoch, ids.numpy(), copies).view(np.int64))

    def _check_draw(self, sample_ids: Sequence[int] | Tensor, epoch: int, copies: int) -> tuple[Tensor, int, int]:
        op = "MaskSampler.draw"
        try:
            ids = torch.as_tensor(sample_ids, device=None if isinstance(sample_ids, Tensor) else "cpu")
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{op}: sample_ids: expected int64 numbers, got {sample_ids!r:.80} ({error})") from None
        if ids.numel() > 0 and (ids.dtype.is_floating_point or ids.dtype.is_complex or ids.device.type != "cpu"):
            raise TypeError(f"{op}: sample_ids: expected integers on the host, got {ids.dtype} on {ids.device}")
        check.require(ids.dim() == 1, op, "sample_ids", "shape (samples,)", tuple(ids.shape))
        epoch, copies = check.whole(op, "epoch", epoch, *_WORDS), check.whole(op, "copies", copies, 1, MOST_COPIES)
        positions = len(ids) * copies * self.tokens
        check.require(positions <= MOST_POSITIONS, op, "samples * copies * tokens", f"0 to {MOST_POSITIONS}", positions)
        return ids.to(torch.int64).contiguous(), epoch, copies

    def _check_lengths(self, lengths: Tensor, samples: int) -> Tensor:
        if tuple(lengths.shape) != (samples,) or lengths.device.type != "cpu" or lengths.dtype != torch.int64:
            raise ValueError(
                f"MaskSampler.draw: lengths: expected int64 ({samples},) on the host, "
                f"got {lengths.dtype} {tuple(lengths.shape)} on {lengths.device}"
            )
        check.storage("MaskSampler.draw", [lengths])
        if samples and not (int(lengths.min()) >= 0 and int(lengths.max()) <= self.tokens):
            raise ValueError(f"MaskSampler.draw: lengths: expected 0 to {self.tokens}, got {lengths.tolist()}")
        if self.rule.height:
            raise ValueError("MaskSampler.draw: lengths: expected a sampler of tokens, got one of a grid")
        return lengths.contiguous()

    def _draw_python(self, ids: Tensor, epoch: int, copies: int, lengths: Tensor | None) -> Tensor:
        limits = None if lengths is None else lengths.tolist()
        rows = _draw_rows(self.rule, ids.tolist(), epoch, copies, limits)
        return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), self.tokens)

    def _draw_native(
        self, module: _native.Module, ids: Tensor, epoch: int, copies: int, lengths: Tensor | None
    ) -> Masks:
        if self._native is None or self._native[0] is not self.rule:
            self._native = self.rule, module.MaskSampler(*astuple(self.rule))
        limits = None if lengths is None else lengths.numpy()
        arrays = self._native[1].draw(ids.numpy(), epoch, copies, limits)
        tensors: list[Any] = [None if a is None else torch.from_numpy(a) for a in arrays]
        return Masks(*tensors)

    def __getstate__(self) -> tuple[None, dict[str, object]]:
        # The native object does not travel to loader workers; each makes its own.
        return None, {"rule": self.rule, "_native": None}


def masks_from_bool(mask: Tensor) -> Masks:
    """`Masks` of a given bool tensor (N,T) on the host; keep and restore are None where counts differ.

    Example:
        >>> masks_from_bool(torch.tensor([[False, True, False, True]])).restore.tolist()
        [[0, 2, 1, 3]]
    """
    if mask.dim() != 2 or mask.dtype != torch.bool or mask.device.type != "cpu":
        raise ValueError(f"masks_from_bool: expected bool (N, T) on the host, got {mask.dtype} {tuple(mask.shape)}")
    return _list_python(mask)


def _list_python(mask: Tensor) -> Masks:
    rows, tokens = mask.shape
    counts = mask.sum(dim=1)
    numbers = mask.flatten().nonzero()[:, 0]
    if rows == 0 or not bool((counts == counts[0]).all()):
        return Masks(mask, None, None, numbers)
    visible = tokens - int(counts[0])
    keep = (~mask).nonzero()[:, 1].reshape(rows, visible).to(torch.int32)
    rank_visible = (~mask).cumsum(dim=1) - 1
    rank_masked = mask.cumsum(dim=1) - 1 + visible
    return Masks(mask, keep, torch.where(mask, rank_masked, rank_visible).to(torch.int32), numbers)


# ---- the rules

_LOW64 = (1 << 64) - 1
_WORDS = -(1 << 63), _LOW64
_STEP = 0x9E3779B97F4A7C15
_ATTEMPTS = 10  # placements tried for one rectangle
_MIN_ASPECT = 0.3


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _LOW64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _LOW64
    return z ^ (z >> 31)


def _noise_states(seed: int, epoch: int, ids: np.ndarray, copies: int) -> np.ndarray:
    """uint64 (samples * copies,): `_row_state(seed, epoch, id, ~copy)` of all rows at once; uint64 wraps."""
    first = np.array([[seed & _LOW64], [epoch & _LOW64]], dtype=np.uint64)
    state = np.zeros((len(ids), copies), dtype=np.uint64)
    for word in (*first, ids.astype(np.uint64)[:, None], ~np.arange(copies, dtype=np.uint64)):
        z = (state ^ word) + np.uint64(_STEP)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = z ^ (z >> np.uint64(31))
    return state.reshape(-1)


def _row_state(seed: int, epoch: int, sample_id: int, copy: int) -> int:
    """Start of a row's stream: each number is absorbed in turn."""
    state = 0
    for word in (seed, epoch, sample_id, copy):
        state = _mix(((state ^ (word & _LOW64)) + _STEP) & _LOW64)
    return state


class _Stream:
    """splitmix64 (Steele, Lea, Flood 2014)."""

    def __init__(self, state: int) -> None:
        self.state = state

    def next64(self) -> int:
        self.state = (self.state + _STEP) & _LOW64
        return _mix(self.state)

    def below(self, n: int) -> int:
        """Uniform integer in [0, n), n < 2^32."""
        return ((self.next64() >> 32) * n) >> 32

    def uniform(self) -> float:
        """Uniform double in [0, 1)."""
        return (self.next64() >> 11) * 2.0**-53

    def choose(self, items: list[int], count: int) -> list[int]:
        """`count` distinct items by a partial Fisher-Yates shuffle."""
        for i in range(count):
            j = i + self.below(len(items) - i)
            items[i], items[j] = items[j], items[i]
        return items[:count]


def _positions(mask: list[bool], value: bool) -> list[int]:
    return [t for t, m in enumerate(mask) if m == value]


def _block(s: MaskRule, stream: _Stream, length: int) -> list[bool]:
    p = 1.0 - s.ratio if s.inverse else s.ratio
    target = int(length * p)
    height, width = (s.height, s.width) if s.height else (1, length)
    area = s.span * s.span if s.height else s.span
    mask = [False] * length
    for _ in range(int(length * (p + s.adjust) / area)):
        centre = stream.below(length)
        row, column = divmod(centre, width)
        rows = range(-(s.span // 2), s.span - s.span // 2) if s.height else range(1)
        for dr in rows:
            for dc in range(-(s.span // 2), s.span - s.span // 2):
                r = min(max(row + dr, 0), height - 1)
                mask[r * width + min(max(column + dc, 0), width - 1)] = True
    excess = sum(mask) - target
    for t in stream.choose(_positions(mask, excess > 0), abs(excess)):
        mask[t] = excess < 0
    return [not m for m in mask] if s.inverse else mask


def _random(s: MaskRule, stream: _Stream, length: int) -> list[bool]:
    mask = [False] * length
    for t in stream.choose(list(range(length)), length - int(length * (1.0 - s.ratio))):
        mask[t] = True
    return mask


def _spans(starts: list[int], span: int, length: int) -> list[bool]:
    mask = [False] * length
    for start in starts:
        for t in range(start, min(start + span, length)):
            mask[t] = True
    return mask


def _span(s: MaskRule, stream: _Stream, length: int) -> list[bool]:
    count = max(int(s.ratio * length / s.span + stream.uniform()), 1)
    reserve = s.span if length - s.span > count else length - count - 1
    starts = max(length - max(reserve, 0), 0)
    return _spans(stream.choose(list(range(starts)), min(count, starts)), s.span, length)


def _token_span(s: MaskRule, stream: _Stream, length: int) -> list[bool]:
    count = int(s.ratio * length / s.span + stream.uniform())
    return _spans(stream.choose(list(range(length)), min(count, length)), s.span, length)


def _rectangles(s: MaskRule, stream: _Stream, length: int) -> list[bool]:
    target, smallest = int(s.ratio * length + 0.5), s.span * s.span
    log_low, log_high = math.log(_MIN_ASPECT), math.log(1.0 / _MIN_ASPECT)
    mask = [False] * length
    count = 0
    while count < target:
        cap = target - count
        placed = 0
        for _ in range(_ATTEMPTS):
            area = smallest + stream.uniform() * (cap - smallest)
            aspect = math.exp(log_low + stream.uniform() * (log_high - log_low))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (1 <= h < s.height and 1 <= w < s.width):
                continue
            top, left = stream.below(s.height - h + 1), stream.below(s.width - w + 1)
            cells = [r * s.width + c for r in range(top, top + h) for c in range(left, left + w)]
            new = [t for t in cells if not mask[t]]
            if 0 < len(new) <= cap:
                for t in new:
                    mask[t] = True
                placed = len(new)
                break
        if not placed:
            break
        count += placed
    return mask


_RULES = {"block": _block, "random": _random, "span": _span, "token-span": _token_span, "rectangles": _rectangles}


def _draw_rows(
    rule: MaskRule, sample_ids: list[int], epoch: int, copies: int, lengths: list[int] | None
) -> list[list[bool]]:
    """One list of T booleans for each (sample, copy)."""
    rows, streams = [], []
    for n, sample_id in enumerate(sample_ids):
        length = rule.tokens if lengths is None else lengths[n]
        for copy in range(copies):
            stream = _Stream(_row_state(rule.seed, epoch, sample_id, copy))
            mask = _RULES[rule.kind](rule, stream, length) if length else []
            rows.append(mask + [False] * (rule.tokens - length))
            streams.append(stream)
    if rule.equal_counts and rows:
        target = min(sum(mask) for mask in rows)
        for mask, stream in zip(rows, streams, strict=True):
            masked = _positions(mask, True)
            stream.choose(masked, target)  # moves the chosen ones to the front; the others are cleared
            for t in masked[target:]:
                mask[t] = False
    return rows
