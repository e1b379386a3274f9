"""A masked autoencoder (He et al. 2022) on gather_tokens, restore_tokens and masked_regression_loss.

The encoder sees a quarter of the patches of an image. `gather_tokens` takes them for several masks at once without
repeating the image; `restore_tokens` puts the results back among copies of a mask token; and the loss reads masked rows
of prediction and pixels where they lie. `python examples/cookbook/mae.py` trains and times both forms.
"""

import torch
from shared import GRID, Embedding, load_crops, make_blocks, patches_of, race, run_blocks
from torch import Tensor, nn

import d2v_kernels as dk

WIDTH, DEPTH, DECODER, MASKS = 128, 4, 64, 4


class Fused:
    """The operators."""

    gather = staticmethod(dk.gather_tokens)

    @staticmethod
    def restore(kept: Tensor, restore: Tensor, token: Tensor) -> Tensor:
        return dk.restore_tokens(kept, restore, fill=token)

    @staticmethod
    def loss(prediction: Tensor, target: Tensor, rows: Tensor, target_rows: Tensor) -> Tensor:
        return dk.masked_regression_loss(prediction, target, rows, target_rows).loss


class Plain:
    """The same in plain PyTorch."""

    @staticmethod
    def gather(x: Tensor, index: Tensor, clones: int) -> Tensor:
        return x.repeat_interleave(clones, 0).gather(1, index.long()[..., None].expand(-1, -1, x.shape[2]))

    @staticmethod
    def restore(kept: Tensor, restore: Tensor, token: Tensor) -> Tensor:
        tokens = token.expand(len(kept), restore.shape[1] - kept.shape[1], -1)
        return torch.cat([kept, tokens], 1).gather(1, restore.long()[..., None].expand(-1, -1, kept.shape[2]))

    @staticmethod
    def loss(prediction: Tensor, target: Tensor, rows: Tensor, target_rows: Tensor) -> Tensor:
        return (prediction.flatten(0, 1)[rows] - target.flatten(0, 1)[target_rows]).square().sum()


class MaskedAutoencoder(nn.Module):
    def __init__(self, ops: type) -> None:
        super().__init__()
        self.ops = ops
        self.embed, self.blocks = Embedding(WIDTH), make_blocks(WIDTH, DEPTH)
        self.narrow, self.token = nn.Linear(WIDTH, DECODER), nn.Parameter(torch.zeros(DECODER))
        self.positions = nn.Parameter(0.02 * torch.randn(GRID**2, DECODER))
        self.decoder, self.pixels = make_blocks(DECODER, 1), nn.Linear(DECODER, 16)
        self.masks = dk.MaskSampler("random", tokens=GRID**2, ratio=0.75)

    def loss(self, images: Tensor, ids: Tensor, update: int) -> Tensor:
        masks = self.masks.draw(ids, update, copies=MASKS).to(images.device)
        visible = self.ops.gather(self.embed(images), masks.keep, clones=MASKS)
        encoded = self.narrow(run_blocks(self.blocks, visible)[-1])
        full = self.ops.restore(encoded, masks.restore, self.token) + self.positions
        prediction = self.pixels(run_blocks(self.decoder, full)[-1])
        target = patches_of(images)
        target = ((target - target.mean(-1, True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()).contiguous()
        target_rows = masks.rows // GRID**2 // MASKS * GRID**2 + masks.rows % GRID**2  # masks share an image's row
        return self.ops.loss(prediction, target, masks.rows, target_rows) / masks.rows.numel() / 16

    def after(self, update: int) -> None:
        """Nothing moves but what the optimiser moves."""


if __name__ == "__main__":
    race(__doc__, lambda: MaskedAutoencoder(Fused), lambda: MaskedAutoencoder(Plain), lambda: load_crops(600)[0])
