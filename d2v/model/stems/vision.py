"""Images: patches as tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from d2v.config import Config, Stem
from d2v.model.stems.base import InputStem, StemFlops
from d2v.model.transformer import initialise_linears
from d2v_kernels import linear


class PatchStem(InputStem):
    """Patch embedding: a convolution whose kernel and stride are the patch (data2vec 2.0, images)."""

    def __init__(self, config: Stem, width: int) -> None:
        """
        Args:
            config: image size, patch size, channels; the patch divides the image.
            width: channels C of a token.
        """
        super().__init__()
        if config.patch_size < 1 or config.image_size % config.patch_size:
            raise ValueError(
                f"stem.patch_size: expected a divisor of stem.image_size {config.image_size}, got {config.patch_size}"
            )
        self.raw_width = config.patch_size**2 * config.channels
        self.image_shape = (config.channels, config.image_size, config.image_size)
        local = self.make_projection(config.width, width)
        self.proj = nn.Conv2d(config.channels, local, config.patch_size, config.patch_size)
        # Xavier on the flattened (C, channels * p * p) kernel, as published; the bias keeps the module's default.
        nn.init.xavier_uniform_(self.proj.weight.view(local, -1))

    def measure(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[int, Tensor | None]:
        """Tokens T of such inputs, and the valid tokens a row: None, all.

        Raises:
            ValueError, TypeError: inputs of another shape or dtype, or lengths.
        """
        if lengths is not None:
            raise ValueError(f"lengths: expected None for images, got a tensor of shape {tuple(lengths.shape)}")
        if not inputs.is_floating_point():
            raise TypeError(f"inputs: expected floating images, got {str(inputs.dtype).removeprefix('torch.')}")
        if inputs.dim() != 4 or tuple(inputs.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"inputs: expected shape (B, {expected}), got {tuple(inputs.shape)}")
        return (inputs.shape[2] // self.proj.kernel_size[0]) * (inputs.shape[3] // self.proj.kernel_size[1]), None

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Tokens (B,T,C), patches row by row, of images (B, channels, H, W) that `measure` took; lengths: None."""
        # Patches do not overlap, so the convolution is one matrix product; its result has channels last, as the
        # token operators need them, without a transposed copy.
        batch, channels, height, width = inputs.shape
        p = self.proj.kernel_size[0]
        patches = inputs.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        flat = patches.reshape(batch, (height // p) * (width // p), channels * p * p)
        x = linear(flat, self.proj.weight.flatten(1), self.proj.bias)
        return x if self.project is None else self.project(x)

    def raw_tokens(self, inputs: Tensor) -> Tensor:
        """(B,T,p*p*channels): pixels of each patch row by row, the channels of a pixel together (published order)."""
        p = self.proj.kernel_size[0]
        return inputs.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def count_flops(self, tokens: int, length: int) -> StemFlops:
        """Of the patches, and of the projection."""
        projection = 0 if self.project is None else self.project.weight.numel()
        return 2.0 * tokens * self.proj.weight.numel(), 2.0 * tokens * projection, 0.0

    def initialise_model(self, model: Any) -> None:
        """As published: the projection; 1.0: head and learned tokens."""
        initialise_linears(self.project, model.config.encoder.init_std)
        if model.head is not None:
            initialise_linears(model.head, model.config.encoder.init_std)
            for token in (model.mask_token, model.context.extra_tokens):
                if token is not None:
                    nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)


def make_stem(config: Config) -> PatchStem:
    """The stem of images."""
    return PatchStem(config.stem, config.encoder.width)
