"""Fused operators for data2vec pre-training: native (C++/CUDA), Triton, and plain PyTorch as their definition."""

from . import _library, _schema
from .attention import Alibi, Packed, alibi_slopes, attend, pack_lengths
from .backends import native as _native
from .backends import reference as _reference
from .backends import triton as _triton
from .ema import EmaPlan, merge_ema_state, split_ema_state, update_ema_
from .gelu import gelu, gelu_linear, layer_norm_gelu
from .layers import average_layers
from .loss import RegressionLoss, masked_regression_loss
from .masks import Masks, MaskSampler, masks_from_bool
from .norm import dropout_add_layer_norm
from .registry import register_backend, use_backend
from .tokens import Noise, gather_tokens, restore_tokens

_library.load()
_schema.register_operators()
register_backend(_native.BACKEND)
register_backend(_triton.BACKEND)
register_backend(_reference.BACKEND)

__all__ = [
    "Alibi",
    "EmaPlan",
    "MaskSampler",
    "Masks",
    "Noise",
    "Packed",
    "RegressionLoss",
    "alibi_slopes",
    "attend",
    "average_layers",
    "dropout_add_layer_norm",
    "gather_tokens",
    "gelu",
    "gelu_linear",
    "layer_norm_gelu",
    "masked_regression_loss",
    "masks_from_bool",
    "merge_ema_state",
    "pack_lengths",
    "restore_tokens",
    "split_ema_state",
    "update_ema_",
    "use_backend",
]
