"""A joint-embedding predictor with block masks (after I-JEPA, Assran et al. 2023), on MaskSampler and EmaPlan.

A context encoder sees a block of patches; a predictor, given positions, says what an averaged encoder makes of the
whole image elsewhere. `MaskSampler` draws the blocks as functions of (seed, epoch, image, copy), so that they do not
depend on batch, rank or number of workers. `python examples/cookbook/jepa.py` trains and times both forms.
"""

import copy

import torch
from shared import GRID, Embedding, load_crops, make_blocks, race, run_blocks
from torch import Tensor, nn

import d2v_kernels as dk

WIDTH, DEPTH, PREDICTOR, BLOCKS = 128, 4, 64, 4


MASKS = dk.MaskSampler("block", grid=(GRID, GRID), ratio=0.7, adjust=0.1, span=3, inverse=True)


class Jepa(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.encoder = nn.ModuleDict({"embed": Embedding(WIDTH), "blocks": make_blocks(WIDTH, DEPTH)})
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.narrow, self.wide = nn.Linear(WIDTH, PREDICTOR), nn.Linear(PREDICTOR, WIDTH)
        self.token, self.positions = nn.Parameter(torch.zeros(PREDICTOR)), nn.Parameter(torch.randn(GRID**2, PREDICTOR))
        self.predictor = make_blocks(PREDICTOR, 2)
        self.plan = None

    def draw(self, ids: Tensor, update: int) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept, how it is put back, and the masked rows."""
        masks = MASKS.draw(ids, update, copies=BLOCKS)
        if self.fused:
            return masks.keep, masks.restore, masks.rows
        order = masks.mask.long().argsort(stable=True, dim=1)
        return order[:, : masks.keep.shape[1]], order.argsort(1), masks.mask.flatten().nonzero()[:, 0]

    def loss(self, images: Tensor, ids: Tensor, update: int) -> Tensor:
        keep, restore, rows = (t.to(images.device) for t in self.draw(ids, update))
        with torch.no_grad():
            whole = run_blocks(self.teacher["blocks"], self.teacher["embed"](images))[-1]
            target = nn.functional.layer_norm(whole, (WIDTH,))
        context = run_blocks(self.encoder["blocks"], self.gather(self.encoder["embed"](images), keep))[-1]
        full = self.restore(self.narrow(context), restore) + self.positions
        prediction = self.wide(run_blocks(self.predictor, full)[-1])
        target_rows = rows // GRID**2 // BLOCKS * GRID**2 + rows % GRID**2
        if self.fused:
            total = dk.masked_regression_loss(prediction, target, rows, target_rows, beta=1.0).loss
        else:
            chosen = prediction.flatten(0, 1)[rows], target.flatten(0, 1)[target_rows]
            total = nn.functional.smooth_l1_loss(*chosen, reduction="sum")
        return total / rows.numel() / WIDTH

    def gather(self, x: Tensor, keep: Tensor) -> Tensor:
        if self.fused:
            return dk.gather_tokens(x, keep, clones=BLOCKS)
        return x.repeat_interleave(BLOCKS, 0).gather(1, keep[..., None].expand(-1, -1, x.shape[2]))

    def restore(self, kept: Tensor, restore: Tensor) -> Tensor:
        if self.fused:
            return dk.restore_tokens(kept, restore, fill=self.token)
        tokens = self.token.expand(len(kept), restore.shape[1] - kept.shape[1], -1)
        return torch.cat([kept, tokens], 1).gather(1, restore[..., None].expand(-1, -1, kept.shape[2]))

    def after(self, update: int) -> None:
        """The teacher follows: one launch for all parameters, or a loop over them."""
        averages, sources = list(self.teacher.parameters()), list(self.encoder.parameters())
        if self.fused:
            self.plan = self.plan or dk.EmaPlan(averages, sources)
            self.plan.step(0.996)
            return
        with torch.no_grad():
            for average, source in zip(averages, sources, strict=True):
                average.lerp_(source, 1 - 0.996)


if __name__ == "__main__":
    race(__doc__, lambda: Jepa(True), lambda: Jepa(False), lambda: load_crops(600)[0])
