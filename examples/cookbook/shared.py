"""What the recipes of this folder share: real images, a small vision transformer, and a race of two forms of a step."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

SIZE, PATCH, GRID = 32, 4, 8
CHANNELS = 1


def load_crops(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(count,1,32,32) crops of photographed brick, grass and gravel (scikit-image), and which it is of each."""
    from skimage import data

    rng = torch.Generator().manual_seed(seed)
    photographs = torch.stack(
        [torch.tensor(make()).float() / 255 - 0.5 for make in (data.brick, data.grass, data.gravel)]
    )
    kinds = torch.arange(count) % 3
    corners = torch.randint(photographs.shape[-1] - SIZE, (count, 2), generator=rng).tolist()
    crops = [photographs[k, y : y + SIZE, x : x + SIZE] for k, (y, x) in zip(kinds.tolist(), corners, strict=True)]
    return torch.stack(crops)[:, None] * 4, kinds


def patches_of(images: Tensor) -> Tensor:
    """(B,c,32,32) -> (B,64,16c): the patches, row by row."""
    return nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


def make_blocks(width: int, depth: int) -> nn.ModuleList:
    """Transformer blocks with the norm in front, as in ViT."""
    options = {"dim_feedforward": 4 * width, "dropout": 0.0, "activation": "gelu", "batch_first": True}
    return nn.ModuleList(nn.TransformerEncoderLayer(width, 4, norm_first=True, **options) for _ in range(depth))


class Embedding(nn.Module):
    """Patches -> tokens (B,64,C) with learned positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(CHANNELS * PATCH**2, width)
        self.positions = nn.Parameter(0.02 * torch.randn(GRID**2, width))

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(patches_of(images)) + self.positions


def run_blocks(blocks: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """Every block's output."""
    outputs = []
    for block in blocks:
        x = block(x)
        outputs.append(x)
    return outputs


def train(make: Callable[[], nn.Module], updates: int, batch: int, data: Tensor) -> tuple[list[float], list[float]]:
    """Losses and seconds of all updates. The model has `loss(inputs, ids, update)` and `after(update)`."""
    torch.manual_seed(0)
    model = make().to(data.device)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses, seconds = [], []
    for update in range(updates):
        ids = (torch.arange(batch) + batch * update) % len(data)
        start = time.perf_counter()
        loss = model.loss(data[ids], ids, update)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        model.after(update)
        losses.append(loss.item())  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def race(text: str, fused: Callable[[], nn.Module], plain: Callable[[], nn.Module], load: Callable[[], Tensor]) -> None:
    """Trains both forms in turn on the same data and prints losses and the ratio of their times."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--updates", type=int, default=20, help="updates of a run")
    parser.add_argument("--batch", type=int, default=32, help="samples of an update")
    parser.add_argument("--turns", type=int, default=3, help="runs of each form")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load().to("cuda" if torch.cuda.is_available() else "cpu")
    medians: list[list[float]] = []
    for turn in range(options.turns):
        runs = [train(make, options.updates, options.batch, data) for make in (fused, plain)]
        medians.append([statistics.median(seconds) for _, seconds in runs])
        (first, *_, last), (plain_first, *_, plain_last) = runs[0][0], runs[1][0]
        print(f"turn {turn + 1}: loss {first:.4f} to {last:.4f}; plain form {plain_first:.4f} to {plain_last:.4f}")
    ratios = sorted(b / a for a, b in medians)
    low, high = ratios[0], ratios[-1]
    print(f"a step of the plain form takes {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) times as long")
