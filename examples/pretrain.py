"""All of data2vec 2.0 for images, in plain PyTorch on the operators of d2v_kernels: `python examples/pretrain.py`.

A student encodes the visible patches of a few masked copies of each image, and a small convolutional decoder predicts
the masked ones: not their pixels, but the mean of the last layers of a teacher, which sees the whole image and whose
weights are a moving average of the student's (Baevski et al. 2022, "Efficient Self-supervised Learning with
Contextualized Target Representations for Vision, Speech and Language").
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2v_kernels as dk

GRID, PATCH = 8, 4  # images of 32 x 32 pixels, 64 tokens
WIDTH, HEADS, DEPTH = 64, 4, 4
BATCH, COPIES = 16, 4  # each image has four masks, and the teacher's work is shared by them
TOP = 3  # layers whose mean is the target


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH**2, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(GRID**2, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """Every block's output: of all tokens (B,T,C), or of those that each copy keeps (B*COPIES,V,C)."""
        patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        x = self.embed(patches) + self.positions
        if keep is not None:
            x = dk.gather_tokens(x, keep, clones=COPIES)
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return outputs[1:]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=4) for _ in range(2))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (GRID, GRID))
        for conv in self.convs:
            y = conv(x.movedim(-1, 1)).movedim(1, -1)
            x = x + F.gelu(F.layer_norm(y, (WIDTH,)))
        return self.proj(x.flatten(1, 2))


class Data2Vec(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.decoder = Encoder(), Decoder()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.masks = dk.MaskSampler("block", grid=(GRID, GRID), ratio=0.75, span=3)

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """(B,T,C): the teacher sees the whole image; its last layers, normalised, averaged, and normalised again."""
        return dk.average_layers(self.teacher(images)[-TOP:], norm="instance", out_norm="layer")

    def forward(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Loss of a batch. A mask depends on the image's id, the epoch and the copy, on nothing else."""
        masks = self.masks.draw(ids, epoch, copies=COPIES).to(images.device)
        visible = self.student(images, masks.keep)[-1]
        noise = dk.Noise(0.01, torch.randint(2**62, (len(visible),), device=images.device))
        prediction = self.decoder(dk.restore_tokens(visible, masks.restore, fill=noise))
        # masks.rows numbers the masked positions of all copies; the copies of an image share one row of targets.
        target_rows = masks.rows // GRID**2 // COPIES * GRID**2 + masks.rows % GRID**2
        result = dk.masked_regression_loss(prediction, self.targets(images), masks.rows, target_rows, scale=WIDTH**-0.5)
        return result.loss / len(masks.rows)


def make_images(count: int) -> Tensor:
    """Coloured gratings: each has an orientation, a frequency and a phase of its own."""
    y, x = torch.meshgrid(*2 * [torch.linspace(-1.0, 1.0, GRID * PATCH)], indexing="ij")
    angle, phase = 3.1416 * torch.rand(2, count, 1, 1, 1)
    wave = torch.sin((4.0 + 8.0 * torch.rand(count, 1, 1, 1)) * (angle.cos() * x + angle.sin() * y) + 2.0 * phase)
    return wave * torch.randn(count, 3, 1, 1) + 0.1 * torch.randn(count, 3, GRID * PATCH, GRID * PATCH)


def train(model: Data2Vec, images: Tensor, updates: int) -> list[float]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.05)
    average = dk.EmaPlan(list(model.teacher.parameters()), list(model.student.parameters()))
    losses = []
    for update in range(updates):
        ids = torch.randint(len(images), (BATCH,))
        loss = model(images[ids], ids, epoch=update)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        average.step(0.99 + 0.009 * update / updates)  # the teacher changes ever more slowly
        losses.append(loss.item())
        if (update + 1) % 20 == 0:
            print(f"update {update + 1}: loss {sum(losses[-20:]) / 20:.3f}")
    return losses


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(Data2Vec().to(device), make_images(512).to(device), updates=400)
