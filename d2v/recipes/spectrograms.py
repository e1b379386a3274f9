"""Recipes of spectrograms; `d2v.recipes` lists them."""

from __future__ import annotations

from d2v.config import Config
from d2v.recipes.vision import vision_base, vision_tiny


def eat_base() -> Config:
    """EAT, base on AudioSet-2M (Chen et al. 2024, "EAT: Self-Supervised Pre-Training with Efficient Audio Transformer";
    published configuration `pretraining_AS2M`): data2vec 2.0 of images on spectrograms of 10 s.

    Not stock: as `vision_base`; the class loss equals the published one at 12 recordings of 16 masks; of longer
    recordings a random part in place of the beginning; other rates are resampled by polyphase filters.
    """
    return vision_base().change(
        recipe="eat-base",
        stem=dict(modality="spectrograms", channels=1, frames=1024),
        encoder=dict(prenet_depth=0, depth=12),
        mask=dict(span=5),
        target=dict(top_k=12),
        loss=dict(class_weight=1.0, class_rows=12 * 16),
        optim=dict(learning_rate=5e-4, warmup_steps=53_333),
        data=dict(global_batch=48, micro_batch=12),
        run=dict(steps=400_000),
    )


def eat_large() -> Config:
    """EAT, large on AudioSet-2M (published configuration `pretraining_AS2M_large`). Not stock: as `eat_base`."""
    return eat_base().change(
        recipe="eat-large",
        encoder=dict(width=1024, heads=16, depth=24),
        decoder=dict(layers=3, width=1024, kernel=5),
        mask=dict(ratio=0.75, adjust=0.1),
        target=dict(top_k=24),
        ema=dict(anneal_steps=150_000),
        optim=dict(learning_rate=4e-4),
    )


def spectrograms_tiny() -> Config:
    """Sounds of about half a second on a CPU in minutes. Our own recipe, not a published one.

    Not stock: the blocks, optimiser and averaging of `vision_tiny`; EAT's class loss and inverse masks, of blocks of 3.
    """
    return vision_tiny().change(
        recipe="spectrograms-tiny",
        stem=dict(modality="spectrograms", channels=1, frames=64, patch_size=8),
        encoder=dict(extra_tokens=1),
        mask=dict(ratio=0.8, adjust=0.07, span=3, inverse=True, copies=4),
        target=dict(norm="instance"),
        loss=dict(class_weight=0.01),
        run=dict(steps=2_000, checkpoint_every=1_000),
    )
