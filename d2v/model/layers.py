"""Steps that several parts share: norm and GELU, convolutions over time, lengths of padded rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from d2v_kernels import (
    conv_layer_norm_gelu,
    layer_norm_gelu,
    linear,
    multiply_into,
    prefers_conv_layer_norm_gelu,
)

NORM_EPS = 1e-5
_LEAST_CHANNELS = 16
"""Input channels below which a product over the channels of a few samples is too short to be fast."""


class LayerNorm(nn.LayerNorm):
    """Layer norm over C whose gradients are summed in float32.

    PyTorch's on the CPU sums those of weight and bias in the type of its input, also under autocast: in bfloat16 such a
    sum of ones stops at 256, whatever the number of tokens.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(...,C) -> (...,C) in the type of x."""
        if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16) or self.weight is None:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps).to(x.dtype)


class Linear(nn.Linear):
    """A linear layer whose products on a CPU are made by the quicker library; see `d2v_kernels.choose_products`."""

    def forward(self, x: Tensor) -> Tensor:
        """(...,C) -> (...,D)."""
        return linear(x, self.weight, self.bias)


def norm_gelu(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """GELU of a layer norm of x (..., C) over C, with gain and bias (C,) or without, in one pass."""
    return layer_norm_gelu(x.contiguous(), weight, bias, eps=NORM_EPS)


def standardise(x: Tensor, axis: int, weight: Tensor | None = None) -> Tensor:
    """x (B,T,C) with mean 0 and variance 1 along an axis, in float32 or above.

    weight: (B,T,1), 0 at what the statistics leave out, else 1; None: they leave out nothing.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if weight is None:
        variance, mean = torch.var_mean(x, axis, correction=0, keepdim=True)
        return (x - mean) / (variance + NORM_EPS).sqrt()
    weight = weight.to(x.dtype)
    count = weight.sum(axis, keepdim=True).clamp_min(1.0)
    centred = x - (x * weight).sum(axis, keepdim=True) / count
    variance = (centred.square() * weight).sum(axis, keepdim=True) / count
    return centred / (variance + NORM_EPS).sqrt()


def valid_positions(lengths: Tensor | None, tokens: int, device: torch.device) -> Tensor | None:
    """(B,T) bool on the device, True before the padding; None where there is no padding."""
    if lengths is None:
        return None
    return torch.arange(tokens, device=device) < lengths.to(device, non_blocking=True)[:, None]


def check_lengths(lengths: Tensor | None, batch: int, longest: int, shortest: int = 1) -> Tensor | None:
    """Lengths as given, or None where no row is padded.

    Raises:
        ValueError: anything but int64 (B,) on the host, from `shortest` to `longest`.
    """
    if lengths is None:
        return None
    if tuple(lengths.shape) != (batch,) or lengths.dtype != torch.int64 or lengths.device.type != "cpu":
        name = str(lengths.dtype).removeprefix("torch.")
        raise ValueError(
            f"lengths: expected int64 ({batch},) on the host, got {name} {tuple(lengths.shape)} on {lengths.device}"
        )
    if batch and not (int(lengths.min()) >= shortest and int(lengths.max()) <= longest):
        raise ValueError(f"lengths: expected {shortest} to {longest}, got {lengths.tolist()}")
    return lengths


def convolve(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution over (B,T,C) with the result in the same layout; an even kernel's surplus position is cut."""
    if _suits_products(conv, x):
        x = x.to(product_dtype(x)).contiguous()
        return _StridedConvolution.apply(x, conv.weight, conv.bias, conv.stride[0])
    y = convolve_grid(conv, x)
    surplus = conv.kernel_size[0] % 2 == 0 and conv.padding[0] != 0
    return (y[:, :-1] if surplus else y).contiguous()


def convolve_grid(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution over (N,T,C) or (N,H,W,C), with the result (N,...,D) in the same layout where the library can.

    PyTorch brings what a convolution over a sequence gets into the order of channels first, by a copy. A grid of one
    row keeps its channels last, in the result and in the gradients, too.
    """
    x = x.movedim(-1, 1)
    if not isinstance(conv, nn.Conv1d) or not _keeps_layout(x):
        y: Tensor = conv(x)
        return y.movedim(1, -1)
    stride, padding, dilation = (1, *conv.stride), (0, *map(int, conv.padding)), (1, *conv.dilation)
    row = F.conv2d(x.unsqueeze(2), conv.weight.unsqueeze(2), conv.bias, stride, padding, dilation, conv.groups)
    return row.squeeze(2).movedim(1, -1)


def _keeps_layout(x: Tensor) -> bool:
    """Whether the library has convolutions with channels last for this device; on CPUs no bit of a run shall change."""
    return x.device.type == "cuda"


def takes_fused_layer(choice: str, x: Tensor) -> bool:
    """Whether `fused_layer` runs for this `run.convolution`; auto: where it was measured to be the quicker one."""
    if choice != "auto":
        return choice == "fused"
    return not torch.compiler.is_compiling() and prefers_conv_layer_norm_gelu(x.device.type, product_dtype(x))


def convolved_rows(choice: str, x: Tensor) -> Tensor:
    """x in the dtype that convolutions have, where they also give it back: in the operator for this `run.convolution`,
    and on GPUs, where a residual in float32 beside results of 16 bits is most of what a decoder moves."""
    return x.to(product_dtype(x)) if takes_fused_layer(choice, x) or _keeps_layout(x) else x


def fused_layer(conv: nn.Module, x: Tensor, residual: bool = False) -> Tensor:
    """GELU of a layer norm of a convolution of x (B,T,C) or (B,H,W,C), plus x if wanted, as one operator; the
    convolution has stride 1 and keeps the size of the grid."""
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d))
    return conv_layer_norm_gelu(x, conv.weight, conv.bias, residual=residual, eps=NORM_EPS)


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of matrix products of x: under autocast its own, but for float64, which it leaves alone."""
    place = x.device.type
    cast = torch.amp.is_autocast_available(place) and torch.is_autocast_enabled(place) and x.dtype != torch.float64
    return torch.get_autocast_dtype(place) if cast else x.dtype


def _suits_products(conv: nn.Conv1d, x: Tensor) -> bool:
    """Whether matrix products of the processor are the better way: the library wants channels first and copies."""
    stride, kernel = conv.stride[0], conv.kernel_size[0]
    plain = conv.padding == (0,) and conv.groups == 1 and conv.dilation == (1,)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not plain or conv.in_channels < _LEAST_CHANNELS:
        return False
    if x.shape[1] < kernel:  # PyTorch says what is wrong
        return False
    dtype, own = product_dtype(x), conv.weight.dtype
    return stride <= kernel <= 2 * stride and (dtype == own or (dtype == torch.bfloat16 and own == torch.float32))


def _windows(x: Tensor, kernel: int, stride: int, count: int) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the kernel, at most `stride` positions each, and for each (count, positions * C): what it meets in one
    sample (T,C), a view. Rows of a view do not overlap, so that it may be written too."""
    channels = x.shape[1]
    for first in range(0, kernel, stride):
        part = slice(first, min(first + stride, kernel))
        shape = (count, (part.stop - first) * channels)
        yield part, x.as_strided(shape, (stride * channels, 1), x.storage_offset() + first * channels)


class _StridedConvolution(torch.autograd.Function):
    """A convolution as products of views of the input: nothing is copied or transposed but the weight.

    Computes in the dtype of the input, which under autocast is not that of the parameters; their gradients have theirs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        """x (B,S,C) contiguous, weight (D,C,k), bias (D,): y (B,T,D), T = (S - k) // stride + 1."""
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.has_bias = stride, bias is not None
        outputs, _, kernel = weight.shape
        count = (x.shape[1] - kernel) // stride + 1
        taps = weight.to(x.dtype).permute(2, 1, 0).contiguous()  # (k,C,D)
        bias = None if bias is None else bias.to(x.dtype)
        y = x.new_empty(x.shape[0], count, outputs)
        for sample, result in zip(x, y, strict=True):
            windows = list(_windows(sample, kernel, stride, count))
            if x.itemsize == 2:  # what is rounded to 16 bits and added to should be small: the shorter part
                windows.reverse()
            for number, (part, window) in enumerate(windows):
                multiply_into(result, window, taps[part].flatten(0, 1), bias, add=number > 0)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad, (outputs, channels, kernel), stride = gradients[0].contiguous(), weight.shape, ctx.stride
        count = grad.shape[1]
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = torch.empty_like(x)
            of_x[:, count * stride :] = 0.0
            taps = weight.to(x.dtype).permute(0, 2, 1).contiguous()  # (D,k,C)
            for rows, result in zip(grad, of_x, strict=True):
                for part, window in _windows(result, kernel, stride, count):
                    multiply_into(window, rows, taps[:, part].flatten(1), add=part.start > 0)
        if ctx.needs_input_grad[1]:
            sums = weight.new_zeros(kernel, channels, outputs)
            for rows, sample in zip(grad, x, strict=True):
                for part, window in _windows(sample, kernel, stride, count):
                    _add_product(sums[part].view(-1, outputs), window, rows)
            of_weight = sums.permute(2, 1, 0)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = grad.sum((0, 1)).to(weight.dtype)
        return of_x, of_weight, of_bias, None


def _add_product(sums: Tensor, x: Tensor, y: Tensor) -> None:
    """sums (C,D) += x^T y of x (n,C) and y (n,D). A sum in their 16 bits would round every part's addition."""
    if sums.dtype == x.dtype:
        multiply_into(sums, x.mT, y, add=True)
    else:
        sums.add_((y.mT @ x).mT)  # in this order the library need not transpose the longer operand
