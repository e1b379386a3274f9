"""What predicts from a fine-tuned encoder's output (data2vec 2.0, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v.config.finetune import HeadSettings
from d2v.model.layers import LayerNorm

_KINDS = ("tokens", "pooled", "sentence", "votes", "vocabulary")


class Head(nn.Module):
    """From the encoder's output to logits, as `HeadSettings.kind` says.

    tokens: linear layer on every token: (B,T,K). votes: the same, then "linear softmax" pooling of the tokens'
    probabilities p: sum p^2 / sum p, as a logit (Wang et al. 2019; the published audio classifier): (B,K). pooled:
    pool, layer norm, linear layer: (B,K); published for images: mean of the patches, norm, linear. sentence: first
    token, dense layer, tanh, linear layer: (B,K) (RoBERTa; data2vec 1.0 and 2.0 on GLUE). vocabulary: dense layer,
    GELU, layer norm, linear layer to the vocabulary: (B,T,K) (masked language models).
    """

    def __init__(self, settings: HeadSettings, width: int) -> None:
        super().__init__()
        kind, eps = settings.kind, settings.norm_eps
        if kind not in _KINDS:
            raise ValueError(f"head: expected a kind of {', '.join(_KINDS)}, got {kind!r}")
        hidden = settings.hidden if kind in ("pooled", "sentence") and settings.hidden else width
        has_dense = kind in ("sentence", "vocabulary") or (kind == "pooled" and settings.hidden > 0)
        if kind == "vocabulary" and eps is None:
            eps = 1e-5
        self.settings = settings
        self.dropout = nn.Dropout(settings.dropout)
        self.dense = _linear(width, hidden) if has_dense else nn.Identity()
        has_norm = kind in ("pooled", "vocabulary") and eps is not None
        self.norm = LayerNorm(hidden, eps=eps) if has_norm else nn.Identity()  # type: ignore[arg-type]
        self.out = _linear(hidden, settings.outputs)

    def forward(self, encoded: Tensor, extra: int, valid: Tensor | None) -> Tensor:
        """Logits (B,K) of samples, or (B,T,K) of all tokens, padding included.

        Args:
            encoded: (B,E+T,C), E extra tokens first.
            extra: E.
            valid: (B,T) bool, False at padding; None: no padding.
        """
        kind, x = self.settings.kind, encoded[:, extra:]
        if kind == "vocabulary":
            return self.out(self.norm(F.gelu(self.dense(x))))
        if kind == "pooled":
            x = self.norm(self._pool(encoded, extra, valid))
        elif kind == "sentence":
            x = torch.tanh(self.dense(self.dropout(x[:, 0])))
        logits = self.out(self.dropout(x))
        return vote(logits, valid) if kind == "votes" else logits

    def _pool(self, encoded: Tensor, extra: int, valid: Tensor | None) -> Tensor:
        if self.settings.pool == "class":
            if not extra:
                raise ValueError("head: expected an encoder with a class token for pool class, got none")
            return self.dense(encoded[:, extra - 1])
        tokens = self.dense(encoded[:, extra + self.settings.skip_tokens :])
        shown = None if valid is None else valid[:, self.settings.skip_tokens :]
        return mean_tokens(tokens, shown) if self.settings.pool == "mean" else vote(tokens, shown)


def make_head(settings: HeadSettings, width: int) -> Head:
    """A head with random weights (truncated normal, 0.02) for an encoder of `width` channels."""
    return Head(settings, width)


def mean_tokens(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """(B,C): mean over the valid tokens of (B,T,C)."""
    if valid is None:
        return tokens.mean(dim=1)
    weight = valid[..., None].to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1)


def vote(logits: Tensor, valid: Tensor | None) -> Tensor:
    """Logit (B,K) of P = sum_t p_t^2 / sum_t p_t over the valid tokens, p = sigmoid(logits (B,T,K)), in float32."""
    log_p = F.logsigmoid(logits.float())
    if valid is not None:
        log_p = log_p.masked_fill(~valid[..., None], -torch.inf)
    pooled = (torch.logsumexp(2.0 * log_p, dim=1) - torch.logsumexp(log_p, dim=1)).clamp(max=-1e-7)
    return (pooled - torch.log(-torch.expm1(pooled))).to(logits.dtype)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
