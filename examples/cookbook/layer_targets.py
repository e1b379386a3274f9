"""Layer-averaged targets for an encoder of Hugging Face transformers: data2vec's idea on a model that is not ours.

A frozen ViT gives the hidden states of its last K layers; `average_layers` standardises each over the tokens of an
image, averages them and standardises the mean, in one pass. A student of half the depth learns these targets at all
tokens. `python examples/cookbook/layer_targets.py` trains and times both forms.
"""

import torch
from shared import CHANNELS, PATCH, SIZE, load_crops, race
from torch import Tensor, nn

import d2v_kernels as dk

WIDTH, DEPTH, TOP = 128, 8, 6


def make_encoder(depth: int) -> nn.Module:
    """A ViT of transformers, untrained here; `ViTModel.from_pretrained(...)` gives a trained one."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "num_hidden_layers": depth}
    config = ViTConfig(image_size=SIZE, patch_size=PATCH, num_channels=CHANNELS, **sizes)
    return ViTModel(config, add_pooling_layer=False)


def average_plain(layers: tuple[Tensor, ...]) -> Tensor:
    """As the published code of data2vec does it: each layer by itself, as (B,C,T) and back."""
    normed = [nn.functional.instance_norm(layer.float().transpose(1, 2)).transpose(1, 2) for layer in layers]
    return nn.functional.layer_norm(sum(normed) / len(normed), (WIDTH,))


def average_fused(layers: tuple[Tensor, ...]) -> Tensor:
    return dk.average_layers(layers, norm="instance", out_norm="layer")


class Distillation(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.teacher, self.student = make_encoder(DEPTH).requires_grad_(False).eval(), make_encoder(DEPTH // 2)
        self.predict = nn.Linear(WIDTH, WIDTH)
        self.fused = fused

    def loss(self, images: Tensor, ids: Tensor, update: int) -> Tensor:
        with torch.no_grad():
            layers = self.teacher(images, output_hidden_states=True).hidden_states[-TOP:]
            target = (average_fused if self.fused else average_plain)(layers)
        prediction = self.predict(self.student(images).last_hidden_state)
        if self.fused:
            total = dk.masked_regression_loss(prediction, target).loss
        else:
            total = nn.functional.mse_loss(prediction, target, reduction="sum")
        return total / target.numel()

    def after(self, update: int) -> None:
        """The teacher stays as it is."""


if __name__ == "__main__":
    race(__doc__, lambda: Distillation(True), lambda: Distillation(False), lambda: load_crops(600)[0])
