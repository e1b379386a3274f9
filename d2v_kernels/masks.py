"""Which tokens are masked: the published samplers, reproducible for each sample.

A row of masks depends on (seed, epoch, sample id, copy) only, so it does not change with batch, worker or rank.
The native sampler and its Python twin here draw the same bits (a test compares them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _library, _mask_rules
from .registry import forced_backend

Kind = Literal["span", "rectangles", "token-span", "block", "random"]
KINDS = ("span", "rectangles", "token-span", "block", "random")
_GRID_KINDS = ("rectangles",)


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

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Masks:
        """The same masks on a device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Masks:
        """The same masks in pinned host memory, for asynchronous copies."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Masks:
        keep, restore = self.keep, self.restore
        return Masks(
            change(self.mask),
            None if keep is None else change(keep),
            None if restore is None else change(restore),
            change(self.rows),
        )


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
    """

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
            adjust: added to the ratio when block centres are counted ("block").
            inverse: draw visible blocks ("block").
            equal_counts: cut every row to the smallest count of the batch, as the published code does; then a mask
                depends on its batch.
            seed: any 64-bit integer.

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
        self.height, self.width = grid if grid is not None else (0, int(tokens or 0))
        self.tokens = self.width * (self.height or 1)
        if self.tokens < 1 or self.width < 1:
            raise ValueError(f"MaskSampler: expected at least 1 token, got tokens={tokens}, grid={grid}")
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"MaskSampler: ratio: expected 0 to 1, got {ratio}")
        if span < 1:
            raise ValueError(f"MaskSampler: span: expected at least 1, got {span}")
        self.kind, self.ratio, self.span, self.adjust = kind, float(ratio), int(span), float(adjust)
        self.inverse, self.equal_counts, self.seed = bool(inverse), bool(equal_counts), int(seed)
        self._native: Any = None

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
        ids = torch.as_tensor(sample_ids, dtype=torch.int64).contiguous()
        if ids.dim() != 1:
            raise ValueError(f"MaskSampler.draw: sample_ids: expected shape (samples,), got {tuple(ids.shape)}")
        if copies < 1:
            raise ValueError(f"MaskSampler.draw: copies: expected at least 1, got {copies}")
        if lengths is not None:
            lengths = self._check_lengths(lengths, ids.shape[0])
        module = _library.native_module() if forced_backend() in ("auto", "native") else None
        if module is None and forced_backend() == "native":
            raise NotImplementedError(f"MaskSampler: backend native cannot run: {_library.load_errors()}")
        if module is None:
            return _list_python(self._draw_python(ids, epoch, copies, lengths))
        return self._draw_native(module, ids, epoch, copies, lengths)

    def noise_keys(self, sample_ids: Sequence[int] | Tensor, epoch: int, *, copies: int = 1) -> Tensor:
        """Keys (samples * copies,) int64 for `Noise`, functions of (seed, epoch, sample id, copy)."""
        ids = torch.as_tensor(sample_ids, dtype=torch.int64).tolist()
        keys = [_mask_rules.row_state(self.seed, epoch, i, ~c) for i in ids for c in range(copies)]
        return torch.tensor([k - (1 << 64) if k >> 63 else k for k in keys], dtype=torch.int64)

    def _check_lengths(self, lengths: Tensor, samples: int) -> Tensor:
        if tuple(lengths.shape) != (samples,) or lengths.device.type != "cpu" or lengths.dtype != torch.int64:
            raise ValueError(
                f"MaskSampler.draw: lengths: expected int64 ({samples},) on the host, "
                f"got {lengths.dtype} {tuple(lengths.shape)} on {lengths.device}"
            )
        if samples and not (int(lengths.min()) >= 0 and int(lengths.max()) <= self.tokens):
            raise ValueError(f"MaskSampler.draw: lengths: expected 0 to {self.tokens}, got {lengths.tolist()}")
        if self.height:
            raise ValueError("MaskSampler.draw: lengths: expected a sampler of tokens, got one of a grid")
        return lengths.contiguous()

    def _draw_python(self, ids: Tensor, epoch: int, copies: int, lengths: Tensor | None) -> Tensor:
        rows = _mask_rules.draw_rows(self, ids.tolist(), epoch, copies, None if lengths is None else lengths.tolist())
        return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), self.tokens)

    def _draw_native(
        self, module: _library.Module, ids: Tensor, epoch: int, copies: int, lengths: Tensor | None
    ) -> Masks:
        if self._native is None:
            self._native = module.MaskSampler(
                self.kind, self.height, self.width, self.ratio, self.span, self.adjust, self.inverse,
                self.equal_counts, self.seed,
            )  # fmt: skip
        samples = ids.shape[0]
        mask = torch.empty((samples * copies, self.tokens), dtype=torch.bool)
        address = 0 if lengths is None else lengths.data_ptr()
        total, count = self._native.draw(ids.data_ptr(), samples, epoch, copies, address, mask.data_ptr())
        return _list_native(module, mask, total, count)

    def __getstate__(self) -> dict[str, object]:
        # The native object does not travel to loader workers; each makes its own.
        return {**self.__dict__, "_native": None}


def masks_from_bool(mask: Tensor) -> Masks:
    """`Masks` of a given bool tensor (N,T) on the host; keep and restore are None where counts differ."""
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


def _list_native(module: _library.Module, mask: Tensor, total: int, count: int) -> Masks:
    """Lists of a mask with `total` masked positions, `count` in every row, or -1 where rows differ."""
    rows, tokens = mask.shape
    numbers = torch.empty(total, dtype=torch.int64)
    if count < 0:
        module.mask_lists(mask.data_ptr(), rows, tokens, -1, 0, 0, numbers.data_ptr())
        return Masks(mask, None, None, numbers)
    visible = tokens - count
    keep = torch.empty((rows, visible), dtype=torch.int32)
    restore = torch.empty((rows, tokens), dtype=torch.int32)
    module.mask_lists(
        mask.data_ptr(), rows, tokens, visible, keep.data_ptr(), restore.data_ptr(), numbers.data_ptr()
    )  # fmt: skip
    return Masks(mask, keep, restore, numbers)
