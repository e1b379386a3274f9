"""Layers for `kernels`: each takes the place of a module's forward and reads that module's parameters."""

from torch import Tensor, nn

from . import gelu, gelu_linear


class GELU(nn.Module):
    """In place of `nn.GELU` (exact, not the tanh form)."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return gelu(input)


class GELULinear(nn.Module):
    """In place of a module that computes `linear(gelu(x))` with parameters `weight` and `bias`."""

    weight: Tensor
    bias: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """(..., in features) -> (..., out features)."""
        return gelu_linear(input, self.weight, self.bias)
