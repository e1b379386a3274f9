"""Fused operators for data2vec pre-training: native (C++/CUDA), Triton, and plain PyTorch as their definition."""

from . import _define, _native
from . import triton as _triton
from .ops.attention import Alibi, alibi_slopes, attend, prefers_packed
from .ops.convolution import conv_layer_norm_gelu, prefers_conv_layer_norm_gelu
from .ops.ema import EmaPlan, merge_ema_state, split_ema_state, update_ema_
from .ops.gelu import gelu, gelu_linear, layer_norm_gelu
from .ops.layers import average_layers
from .ops.loss import RegressionLoss, masked_regression_loss
from .ops.masks import Masks, MaskSampler, masks_from_bool
from .ops.norm import dropout_add_layer_norm, prefers_dropout_add_layer_norm
from .ops.packing import Packed, pack_lengths
from .ops.tokens import Noise, gather_tokens, restore_tokens
from .products import choose_products, linear, multiply_into
from .registry import register_backend, use_backend

register_backend(_native.backend())
register_backend(_triton.backend())
register_backend(_define.REFERENCE)

__version__ = "0.1.0"

__all__ = [
    "Alibi",
    "EmaPlan",
    "MaskSampler",
    "Masks",
    "Noise",
    "Packed",
    "RegressionLoss",
    "__version__",
    "alibi_slopes",
    "attend",
    "average_layers",
    "choose_products",
    "conv_layer_norm_gelu",
    "dropout_add_layer_norm",
    "gather_tokens",
    "gelu",
    "gelu_linear",
    "layer_norm_gelu",
    "linear",
    "masked_regression_loss",
    "masks_from_bool",
    "merge_ema_state",
    "multiply_into",
    "pack_lengths",
    "prefers_conv_layer_norm_gelu",
    "prefers_dropout_add_layer_norm",
    "prefers_packed",
    "restore_tokens",
    "split_ema_state",
    "update_ema_",
    "use_backend",
]
