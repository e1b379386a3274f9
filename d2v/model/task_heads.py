"""What stands on a fine-tuned encoder: one module for each kind of head (data2vec 2.0, section 4)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v.config.finetune import HeadSettings


class Head(nn.Module):
    """Base of the heads: `settings`, and a forward from the encoder's output to logits."""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        self.settings = settings
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, encoded: Tensor, extra: int, valid: Tensor | None) -> Tensor:
        """Logits of encoded tokens.

        Args:
            encoded: (B,E+T,C), E extra tokens first.
            extra: E.
            valid: (B,T) bool, False at padding; None: no padding.
        """
        raise NotImplementedError


class TokenHead(Head):
    """Linear layer on every token: (B,T,K)."""

    def __init__(self, settings: HeadSettings, width: int) -> None:
        super().__init__(settings)
        self.out = _linear(width, settings.outputs)

    def forward(self, encoded: Tensor, extra: int, valid: Tensor | None) -> Tensor:
        """(B,T,K) logits of all tokens, padding included."""
        result: Tensor = self.out(self.dropout(encoded[:, extra:]))
        return result


class PooledHead(Head):
    """Pool, layer norm, linear layer: (B,K). Published for images: mean of the patches, norm, linear."""

    def __init__(self, settings: HeadSettings, width: int) -> None:
        super().__init__(settings)
        hidden = settings.hidden or width
        self.dense = _linear(width, hidden) if settings.hidden else None
        self.norm = nn.LayerNorm(hidden, eps=settings.norm_eps) if settings.norm_eps is not None else None
        self.out = _linear(hidden, settings.outputs)

    def forward(self, encoded: Tensor, extra: int, valid: Tensor | None) -> Tensor:
        """(B,K) logits of the samples."""
        if self.settings.pool == "class":
            if not extra:
                raise ValueError("head: expected an encoder with a class token for pool class, got none")
            pooled = encoded[:, extra - 1]
            pooled = pooled if self.dense is None else self.dense(pooled)
        else:
            tokens = encoded[:, extra + self.settings.skip_tokens :]
            shown = None if valid is None else valid[:, self.settings.skip_tokens :]
            tokens = tokens if self.dense is None else self.dense(tokens)
            pooled = mean_tokens(tokens, shown) if self.settings.pool == "mean" else vote(tokens, shown)
        pooled = pooled if self.norm is None else self.norm(pooled)
        result: Tensor = self.out(self.dropout(pooled))
        return result


class SentenceHead(Head):
    """First token, dense layer, tanh, linear layer: (B,K) (RoBERTa; data2vec 1.0 and 2.0 on GLUE)."""

    def __init__(self, settings: HeadSettings, width: int) -> None:
        super().__init__(settings)
        self.dense = _linear(width, settings.hidden or width)
        self.out = _linear(settings.hidden or width, settings.outputs)

    def forward(self, encoded: Tensor, extra: int, valid: Tensor | None) -> Tensor:
        """(B,K) logits of the sequences."""
        first = torch.tanh(self.dense(self.dropout(encoded[:, extra])))
        result: Tensor = self.out(self.dropout(first))
        return result


class VoteHead(TokenHead):
    """Linear layer on every token, then "linear softmax" pooling of their probabilities p: sum p^2 / sum p, as a logit
    (Wang et al. 2019; the published audio classifier): (B,K)."""

    def forward(self, encoded: Tensor, extra: int, valid: Tensor | None) -> Tensor:
        """(B,K) logits of the samples."""
        return vote(super().forward(encoded, extra, valid), valid)


class VocabularyHead(Head):
    """Dense layer, GELU, layer norm, linear layer to the vocabulary: (B,T,K) (masked language models)."""

    def __init__(self, settings: HeadSettings, width: int) -> None:
        super().__init__(settings)
        self.dense = _linear(width, width)
        self.norm = nn.LayerNorm(width, eps=settings.norm_eps if settings.norm_eps is not None else 1e-5)
        self.out = _linear(width, settings.outputs)

    def forward(self, encoded: Tensor, extra: int, valid: Tensor | None) -> Tensor:
        """(B,T,K) logits of all tokens."""
        result: Tensor = self.out(self.norm(F.gelu(self.dense(encoded[:, extra:]))))
        return result


_KINDS: dict[str, Any] = {
    "tokens": TokenHead,
    "pooled": PooledHead,
    "sentence": SentenceHead,
    "votes": VoteHead,
    "vocabulary": VocabularyHead,
}


def make_head(settings: HeadSettings, width: int) -> Head:
    """A head with random weights (truncated normal, 0.02) for an encoder of `width` channels."""
    if settings.kind not in _KINDS:
        raise ValueError(f"head: expected a kind of {', '.join(_KINDS)}, got {settings.kind!r}")
    head: Head = _KINDS[settings.kind](settings, width)
    return head


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
