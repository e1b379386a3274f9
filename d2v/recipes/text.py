"""Recipes of text; `d2v.recipes` lists them."""

from __future__ import annotations

from d2v.config import Config, Data, Decoder, Ema, Encoder, Head, Loss, Mask, Optim, Run, Stem, Target


def text_base() -> Config:
    """data2vec 2.0, text base on Books and Wikipedia (Baevski et al. 2022b; published configuration
    `base_text_only_task`).

    Not stock: bfloat16 autocast with float32 weights instead of pure float16; padding is never masked and never in the
    loss. The vocabulary is that of RoBERTa; blocks of 512 tokens.
    """
    return Config(
        recipe="text-base",
        stem=Stem(modality="text", positions="none", dropout=0.1, vocabulary=50_265, max_tokens=512),
        encoder=Encoder(
            width=768, heads=12, depth=12, norm_eps=1e-5, input_norm=False, dropout=0.1, attention_dropout=0.1
        ),
        decoder=Decoder(
            layers=5, width=768, kernel=9, groups=1, residual=False, projection_layers=2, projection_ratio=2.0,
            input_dropout=0.1,
        ),
        mask=Mask(kind="random", ratio=0.48, span=1, copies=8, noise_std=0.01),
        target=Target(source="ffn", top_k=12, norm="instance"),
        loss=Loss(beta=0.0, scale=1.0),
        ema=Ema(start=0.9999, end=0.99999, anneal_steps=100_000, scope="blocks"),
        optim=Optim(
            learning_rate=2e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, clip=1.0, warmup_steps=4_000
        ),
        data=Data(global_batch=64, micro_batch=4, workers=4),
        run=Run(steps=1_000_000, precision="bf16"),
    )  # fmt: skip


def text_large() -> Config:
    """data2vec 2.0, text large (published configuration `large_text_only_task`).

    Not stock: as `text_base`.
    """
    return text_base().change(
        recipe="text-large",
        encoder=dict(width=1024, heads=16, depth=24),
        mask=dict(ratio=0.5),
        target=dict(top_k=24, norm="layer", out_norm="instance"),
        optim=dict(learning_rate=1e-4),
        data=dict(micro_batch=2),
        run=dict(steps=600_000),
    )


def text1_base() -> Config:
    """data2vec 1.0, text base on Books and Wikipedia (Baevski et al. 2022a; published configuration `base`).

    Not stock: bfloat16 autocast with float32 weights; the teacher sees the whole text, as the paper says (the published
    code gives it the masked tokens alone); one teacher step per update with accumulation too.
    """
    return Config(
        recipe="text1-base",
        version=1,
        stem=Stem(
            modality="text", positions="none", dropout=0.1, vocabulary=50_265, max_tokens=512, mask_token=50_264
        ),
        encoder=Encoder(
            width=768, heads=12, depth=12, norm_eps=1e-5, input_norm=False, dropout=0.1, attention_dropout=0.1
        ),
        head=Head(layers=2),
        mask=Mask(kind="token-span", ratio=0.35, span=4),
        target=Target(source="ffn", top_k=10, norm="layer"),
        loss=Loss(beta=4.0, scale=1.0),
        ema=Ema(start=0.999, end=0.9999, anneal_steps=300_000, scope="blocks"),
        optim=Optim(
            learning_rate=2e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, clip=5.0, warmup_steps=10_000
        ),
        data=Data(global_batch=256, micro_batch=16, workers=4),
        run=Run(steps=1_000_000, precision="bf16"),
    )  # fmt: skip


def text_small() -> Config:
    """data2vec 2.0 for a few GB of text on one GPU: our own recipe, not a published one.

    `text_base` scaled down: width 384, 6 heads, 8 blocks, 16 384 tokens of vocabulary, blocks of 256, 100 000 updates.
    """
    return text_base().change(
        recipe="text-small",
        stem=dict(vocabulary=16_384, max_tokens=256),
        encoder=dict(width=384, heads=6, depth=8),
        decoder=dict(layers=4, width=384),
        mask=dict(copies=4),
        target=dict(top_k=8),
        ema=Ema(start=0.999, end=0.9999, anneal_steps=50_000, scope="blocks"),
        optim=dict(learning_rate=5e-4),
        data=dict(global_batch=64, micro_batch=None),
        run=dict(steps=100_000, checkpoint_every=2_000),
    )


def text_tiny() -> Config:
    """A little text on a CPU in minutes. Our own recipe, not a published one.

    Not stock: pre-norm blocks, a layer norm of the mean target, PyTorch's initial weights, averaging (.9995 to .9999)
    of the whole encoder, 2048 tokens of vocabulary, blocks of 64. Faster averaging or a
    longer run collapses here: content_spread falls.
    """
    return Config(
        recipe="text-tiny",
        stem=Stem(modality="text", positions="none", vocabulary=2_048, max_tokens=64),
        encoder=Encoder(
            width=64, heads=4, depth=3, norm_order="pre", norm_eps=1e-6, input_norm=False, init_std=None
        ),
        decoder=Decoder(layers=3, width=64, kernel=5, groups=4),
        mask=Mask(kind="random", ratio=0.48, copies=4),
        target=Target(source="ffn", top_k=3, norm="instance", out_norm="layer"),
        ema=Ema(start=0.9995, end=0.9999, scope="all"),
        optim=Optim(learning_rate=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05, clip=3.0, warmup_steps=100),
        data=Data(global_batch=16, workers=1),
        run=Run(steps=1_000, log_every=50, checkpoint_every=500),
    )  # fmt: skip


def text1_tiny() -> Config:
    """data2vec 1.0 on a little text on a CPU in minutes. Our own recipe, not a published one.

    Not stock: as `text_tiny`, with 1.0's mask tokens and head.
    """
    return text_tiny().change(
        recipe="text1-tiny",
        version=1,
        stem=dict(mask_token=2_047),
        head=Head(layers=2),
        mask=Mask(kind="token-span", ratio=0.35, span=4),
    )
