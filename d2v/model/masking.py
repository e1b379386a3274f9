"""Masks of a forward: drawn or given, checked against the inputs, as lists on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2v.config import Config
from d2v_kernels import Masks, MaskSampler, masks_from_bool


def make_mask_sampler(config: Config, seed: int | None = None, tokens: int | None = None) -> MaskSampler:
    """The sampler of `config.mask` on the tokens of `config.stem`.

    Args:
        seed: `config.run.seed` unless given.
        tokens: T of a sequence; images have the grid of their stem.

    2.0 needs the same count in every row: where the rule or padding makes them differ, all are cut to the smallest.
    """
    mask, sequence = config.mask, config.grid is None
    if sequence and tokens is None:
        raise ValueError(f"tokens: expected the tokens of a row of {config.stem.modality}, got None")
    equal = "equal-mask-counts" in config.published or (config.version == 2 and sequence)
    return MaskSampler(
        mask.kind, tokens=tokens if sequence else None, grid=config.grid, ratio=mask.ratio,
        span=mask.span, adjust=mask.adjust, inverse=mask.inverse, equal_counts=equal,
        seed=config.run.seed if seed is None else seed,
    )  # fmt: skip


@dataclass(frozen=True)
class MaskedRows:
    """Masks of the student's N rows, and where their padding starts."""

    masks: Masks
    """`rows` lists the positions that enter the loss."""
    copies: int
    """Rows M of each sample."""
    lengths: Tensor | None
    """(N,) tokens of a row before the padding, on the host; None: no padding."""
    kept_lengths: Tensor | None
    """(N,) the same of its visible tokens alone, on the device of the masks."""


def resolve_masks(
    config: Config, masks: Tensor | Masks | None, batch: int, tokens: int, lengths: Tensor | None, first_id: int
) -> MaskedRows:
    """Masks with lists for `batch` samples of T tokens.

    Args:
        masks: given bool (N,T) or `Masks`, or None: drawn for samples `first_id`, `first_id` + 1, ...
        lengths: (batch,) tokens before the padding, on the host; None: no padding.

    Raises:
        ValueError: masks that do not fit; 2.0: rows that mask different counts; rows that show padding only.
    """
    if masks is None:
        # The published random masks of 2.0 text know nothing of padding.
        hits_padding = "loss-on-padding" in config.published and config.mask.kind == "random"
        sampler, ids = make_mask_sampler(config, tokens=tokens), list(range(first_id, first_id + batch))
        masks = sampler.draw(ids, epoch=0, copies=config.mask.copies, lengths=None if hits_padding else lengths)
    elif isinstance(masks, Tensor):
        masks = _from_tensor(config, masks)
    rows = masks.mask.shape[0]
    if masks.mask.dim() != 2 or masks.mask.shape[1] != tokens or batch == 0 or rows % batch or rows == 0:
        raise ValueError(
            f"masks: expected (N, {tokens}) with N a multiple of the {batch} samples, got {tuple(masks.mask.shape)}"
        )
    if config.version == 2 and (masks.keep is None or masks.restore is None):
        counts = masks.mask.sum(dim=1)
        odd = (counts != counts[0]).nonzero()[:, 0].tolist()
        raise ValueError(
            f"masks: expected the same number of masked positions in every row, row 0 has {int(counts[0])}; got "
            f"{counts[odd].tolist()[:8]} in rows {odd[:8]}"
        )
    if config.mask.keep_masked > 0.0 and config.version == 2:
        masks = show_masked(config, masks)
    copies = rows // batch
    if lengths is None:
        return MaskedRows(masks, copies, None, None)
    return _with_padding(config, masks, copies, lengths.repeat_interleave(copies))


def _from_tensor(config: Config, mask: Tensor) -> Masks:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"masks: expected bool (N, T), got {mask.dtype} {tuple(mask.shape)}")
    masks = masks_from_bool(mask.detach().cpu())
    if config.version == 2 and masks.keep is None and mask.shape[0] > 0:
        cut = "visible-count-of-row-0" in config.published and config.decoder.kind != "cross"
        return cut_to_first_row(masks) if cut else masks
    return masks


def _with_padding(config: Config, masks: Masks, copies: int, lengths: Tensor) -> MaskedRows:
    """Padding leaves the loss and is counted among the visible tokens. Lists that already lie on a device are taken as
    they are: their sampler knew the lengths."""
    tokens = masks.mask.shape[1]
    valid = torch.arange(tokens, device=masks.mask.device) < lengths.to(masks.mask.device)[:, None]
    if masks.mask.device.type == "cpu":
        # 1.0 sees its masked tokens, too.
        rows = (~(valid & ~masks.mask).any(dim=1)).nonzero()[:8, 0].tolist() if config.version == 2 else []
        if rows:
            raise ValueError(f"masks: expected a visible token before the padding in every row, got none in {rows}")
        if "loss-on-padding" not in config.published:
            masks = masks._replace(rows=masks.rows[valid.flatten()[masks.rows]])
    kept = lengths
    if masks.keep is not None:
        # Kept positions ascend, so padding comes last among them too.
        kept = (masks.keep < lengths.to(masks.keep.device)[:, None]).sum(dim=1)
    return MaskedRows(masks, copies, lengths, kept)


def cut_to_first_row(masks: Masks) -> Masks:
    """Lists with row 0's number of visible tokens in every row, as the published code makes them.

    A row that masks fewer loses its last visible tokens; in one that masks more, its first masked tokens stay visible.
    """
    mask = masks.mask
    visible = mask.shape[1] - int(mask[0].sum())
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return _with_order(masks, order[:, :visible], order[:, visible:])


def show_masked(config: Config, masks: Masks) -> Masks:
    """Lists with `mask.keep_masked` of the masked tokens of each row among the visible ones; `mask` and `rows` keep
    them. They are spread over the row; the published sort gives its first ones ("visible-count-of-row-0")."""
    assert masks.keep is not None and masks.restore is not None
    visible, order = masks.keep.shape[1], masks.restore.argsort(dim=1)
    hidden = order[:, visible:]
    masked = hidden.shape[1]
    extra = config.mask.count_shown(masked)
    shown = torch.arange(masked) < extra
    if "visible-count-of-row-0" not in config.published and extra > 0:
        shown = torch.zeros(masked, dtype=torch.bool)
        shown[(2 * torch.arange(extra) + 1) * masked // (2 * extra)] = True
    return _with_order(masks, torch.cat([order[:, :visible], hidden[:, shown]], dim=1), hidden[:, ~shown])


def _with_order(masks: Masks, shown: Tensor, hidden: Tensor) -> Masks:
    """Lists of the positions that the student sees, in any order, and of those that it does not, ascending."""
    shown = shown.sort(dim=1).values
    restore = torch.cat([shown, hidden], dim=1).argsort(dim=1)
    return Masks(masks.mask, shown.to(torch.int32), restore.to(torch.int32), masks.rows)
