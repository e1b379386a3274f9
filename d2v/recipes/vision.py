"""Recipes for images."""

from __future__ import annotations

from d2v.config import Config, Data, Decoder, Ema, Encoder, Head, Loss, Mask, Optim, Run, Stem, Target


def vision_base() -> Config:
    """data2vec 2.0, ViT-B/16 on ImageNet-1k (Baevski et al. 2022b; published configuration `base_images_only_task`).

    Not stock: bfloat16 autocast with float32 weights instead of pure float16; the class loss does not depend on the
    micro-batch (it equals the published one at 16 images of 16 masks); one learning-rate group of torch's AdamW.
    """
    return Config(
        recipe="vision-base",
        stem=Stem(image_size=224, patch_size=16),
        encoder=Encoder(
            width=768, heads=12, prenet_depth=2, depth=10, norm_order="post", norm_eps=1e-6, extra_tokens=1
        ),
        decoder=Decoder(layers=6, width=768, kernel=3, groups=16),
        mask=Mask(kind="block", ratio=0.8, adjust=0.07, span=3, inverse=True, copies=16, noise_std=0.01),
        target=Target(source="ffn", top_k=10, norm="instance", out_norm="layer"),
        loss=Loss(beta=0.0, scale=None, class_weight=0.01, class_rows=16 * 16),
        ema=Ema(start=0.9998, end=0.99999, anneal_steps=100_000),
        optim=Optim(learning_rate=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05, clip=4.0, warmup_steps=50_040),
        data=Data(global_batch=256, micro_batch=16, workers=8, crop_scale=(0.2, 1.0), flip=True),
        run=Run(steps=375_300, precision="bf16"),
    )


def vision_large() -> Config:
    """data2vec 2.0, ViT-L/16 on ImageNet-1k (published configuration `large_images_only_task`).

    Not stock: as `vision_base`; the class loss equals the published one at 8 images of 16 masks.
    """
    return vision_base().change(
        recipe="vision-large",
        encoder=dict(width=1024, heads=16, prenet_depth=0, depth=24),
        decoder=dict(layers=3, width=1024, kernel=5),
        mask=dict(ratio=0.75, adjust=0.1),
        target=dict(top_k=18),
        loss=dict(class_rows=8 * 16),
        ema=Ema(start=0.9998, end=0.99999, anneal_steps=150_000),
        optim=dict(learning_rate=4e-4),
        data=dict(global_batch=128, micro_batch=8),
    )


def vision_huge14() -> Config:
    """data2vec 2.0, ViT-H/14 on ImageNet-1k (published configuration `huge_images14_only_task`); the teacher stands
    still after 300 000 updates.

    Not stock: as `vision_base`; the class loss equals the published one at 8 images of 16 masks.
    """
    return vision_large().change(
        recipe="vision-huge14",
        stem=Stem(image_size=224, patch_size=14),
        encoder=dict(width=1280, heads=16, prenet_depth=0, depth=32),
        target=dict(top_k=24),
        ema=Ema(start=0.9998, end=1.0, anneal_steps=300_000),
        data=dict(global_batch=256, micro_batch=8),
        run=dict(steps=500_000),
    )


def vision_small() -> Config:
    """ViT-S/4 for 32 x 32 images (CIFAR and the like) on one GPU: our own recipe, not a published one.

    `vision_base` scaled down: width 384, 6 heads, 64 tokens, 8 masks of 75 %, 100 epochs of 50 000 images.
    """
    return vision_base().change(
        recipe="vision-small",
        stem=Stem(image_size=32, patch_size=4),
        encoder=dict(width=384, heads=6),
        decoder=dict(layers=4, width=384),
        mask=dict(ratio=0.75, adjust=0.1, copies=8),
        loss=dict(class_rows=256),
        ema=Ema(start=0.998, end=0.9999, anneal_steps=10_000),
        optim=dict(warmup_steps=2_000),
        data=dict(global_batch=256, micro_batch=None),
        run=dict(steps=19_500, checkpoint_every=2_000),
    )


def vision_tiny() -> Config:
    """The quick start: 32 x 32 grey texture crops on a CPU in minutes. Our own recipe, not a published one.

    Not stock: pre-norm blocks, positions scaled by 0.1, no class loss, block outputs as targets (stock: MLP outputs;
    they gave 2 to 7 points less here), layer norm of each target tensor, two masks a crop that mask blocks (`inverse`
    off), PyTorch's initial weights (N(0, 0.02) is too small for width 64), fast
    averaging (.97 to .999) that fits 6000 updates, images standardised one by one, quarter turns, no scaling crop.
    """
    return Config(
        recipe="vision-tiny",
        stem=Stem(image_size=32, patch_size=4, position_scale=0.1),
        encoder=Encoder(width=64, heads=4, prenet_depth=0, depth=3, norm_order="pre", norm_eps=1e-6, init_std=None),
        decoder=Decoder(layers=2, width=64, kernel=3, groups=4),
        mask=Mask(kind="block", ratio=0.75, span=3, inverse=False, copies=2),
        target=Target(source="block", top_k=3, norm="layer", out_norm="layer"),
        loss=Loss(beta=0.0, class_weight=0.0),
        ema=Ema(start=0.97, end=0.999),
        optim=Optim(learning_rate=4e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05, clip=3.0, warmup_steps=600),
        data=Data(
            global_batch=16, workers=1, crop_scale=(1.0, 1.0), flip=True, rotate=True, grey=True, standardise="sample"
        ),
        run=Run(steps=6_000, log_every=50, checkpoint_every=2_000, precision="fp32"),
    )


def vision1_base() -> Config:
    """data2vec 1.0, ViT-B/16 on ImageNet-1k (Baevski et al. 2022a), as in the separate repository that produced the
    published models: 120 masked patches, a linear head, layer norm of each target tensor, everything averaged, 800
    epochs.

    Not stock: bfloat16 autocast with float32 weights; the data augmentation has no colour jitter.
    """
    return Config(
        recipe="vision1-base",
        version=1,
        stem=Stem(image_size=224, patch_size=16, positions="relative"),
        encoder=Encoder(
            width=768, heads=12, depth=12, norm_order="pre", norm_eps=1e-6, layer_scale=1e-4, key_bias=False,
            extra_tokens=1, init_rescale=True, attention_dropout=0.05, drop_path=0.25,
        ),
        head=Head(layers=1),
        mask=Mask(kind="rectangles", ratio=120 / 196, span=4),
        target=Target(source="block", top_k=6, norm="layer", out_norm="layer"),
        loss=Loss(beta=2.0, scale=1 / 768),  # the mean over all elements
        ema=Ema(start=0.9998, end=0.9998, scope="all"),
        optim=Optim(
            learning_rate=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, decay_all=False, clip=3.0,
            warmup_steps=6_250, final_rate=0.005,
        ),
        data=Data(global_batch=2048, micro_batch=128, workers=8, crop_scale=(0.08, 1.0)),
        run=Run(steps=500_000, precision="bf16"),
    )  # fmt: skip


def vision1_large() -> Config:
    """data2vec 1.0, ViT-L/16 on ImageNet-1k, the first 800 epochs, as in the separate repository.

    Not stock: as `vision1_base`. The published second stage of 800 epochs starts from the first with an averaging of
    .9999 and half the warm-up.
    """
    return vision1_base().change(
        recipe="vision1-large",
        encoder=dict(width=1024, heads=16, depth=24, layer_scale=1e-5, attention_dropout=0.15, drop_path=0.2),
        loss=dict(scale=1 / 1024),
        optim=dict(learning_rate=1e-3, warmup_steps=24_960, final_rate=0.01),
        data=dict(global_batch=4096, micro_batch=64),
        run=dict(steps=249_600),
    )


def vision1_tiny() -> Config:
    """data2vec 1.0 on 32 x 32 grey texture crops on a CPU in minutes. Our own recipe, not a published one.

    Not stock: the data, optimiser and averaging of `vision_tiny`, layer scale from 1; 1.0's mask token, relative
    positions and head.
    """
    return vision_tiny().change(
        recipe="vision1-tiny",
        version=1,
        stem=dict(positions="relative", position_scale=1.0),
        encoder=dict(extra_tokens=1, key_bias=False, layer_scale=1.0),
        head=Head(layers=1),
        mask=Mask(kind="rectangles", ratio=0.6, span=2),
        optim=dict(learning_rate=2e-3, warmup_steps=100),
    )
