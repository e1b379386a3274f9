"""Self-distillation without labels (after DINO, Caron et al. 2021): an averaged teacher in one launch, with EmaPlan.

Teacher and student see different crops of an image; the student learns the teacher's sharpened, centred answer. The
teacher is the moving average of the student. `python examples/cookbook/teacher.py` trains and times both forms.
"""

import copy

import torch
from shared import GRID, Embedding, load_crops, make_blocks, race, run_blocks
from torch import Tensor, nn

import d2v_kernels as dk

WIDTH, DEPTH, OUTPUTS = 128, 6, 256
MOMENTUM, COLD, WARM = 0.99, 0.04, 0.1


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Mirrored and shifted, brighter or darker."""
    flips = torch.rand(2, generator=rng)
    images = images.flip(-1) if flips[0] < 0.5 else images
    shift = torch.randint(-6, 7, (2,), generator=rng).tolist()
    return images.roll(shift, (-2, -1)) * (0.7 + 0.6 * float(flips[1]))


class Encoder(nn.Module):
    """Images -> logits of `OUTPUTS` prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = Embedding(WIDTH), make_blocks(WIDTH, DEPTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, OUTPUTS, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(run_blocks(self.blocks, self.embed(images))[-1])
        assert x.shape[1] == GRID**2
        return self.head(nn.functional.normalize(x.mean(1), dim=-1))


class SelfDistillation(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.student = Encoder()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(OUTPUTS))
        self.fused, self.plan = fused, None

    def loss(self, images: Tensor, ids: Tensor, update: int) -> Tensor:
        rng = torch.Generator().manual_seed(update)
        views = [augment(images, rng) for _ in range(2)]
        with torch.no_grad():
            answers = [self.teacher(view) for view in views]
            wanted = [((a - self.centre) / COLD).softmax(-1) for a in answers]
            self.centre.lerp_(torch.cat(answers).mean(0), 0.1)
        found = [(self.student(view) / WARM).log_softmax(-1) for view in views]
        pairs = [(wanted[i] * found[1 - i]).sum(-1).mean() for i in range(2)]
        return -sum(pairs) / 2

    def after(self, update: int) -> None:
        """The teacher follows."""
        averages, sources = list(self.teacher.parameters()), list(self.student.parameters())
        if self.fused:
            self.plan = self.plan or dk.EmaPlan(averages, sources)
            self.plan.step(MOMENTUM)
            return
        with torch.no_grad():  # as published: one parameter after the other
            for average, source in zip(averages, sources, strict=True):
                average.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * source.detach().data)


if __name__ == "__main__":
    race(__doc__, lambda: SelfDistillation(True), lambda: SelfDistillation(False), lambda: load_crops(600)[0])
