"""Recipes of speech and other signals; `d2v.recipes` lists them."""

from __future__ import annotations

from d2v.config import Config, Data, Decoder, Ema, Encoder, Head, Mask, Optim, Run, Stem, Target

_SMALL_CONVOLUTIONS = ((256, 10, 5), (256, 3, 2), (256, 3, 2), (256, 3, 2), (256, 3, 2), (256, 2, 2), (256, 2, 2))


def speech_base() -> Config:
    """data2vec 2.0, speech base on LibriSpeech 960 h (Baevski et al. 2022b; published configuration
    `base_audio_only_task`).

    Not stock: bfloat16 autocast with float32 weights instead of pure float16; padding is invisible; masks are drawn for
    the frames of the crop, not cropped with an offset of their own. A batch is 24 crops of 20 s.
    """
    return Config(
        recipe="speech-base",
        stem=Stem(modality="speech", positions="conv"),
        encoder=Encoder(
            width=768, heads=12, prenet_depth=0, depth=12, norm_eps=1e-5, alibi="learned", dropout=0.1,
            attention_dropout=0.1, prenet_dropout=0.1, layer_drop=0.05,
        ),
        decoder=Decoder(layers=4, width=384, kernel=7, groups=16, input_dropout=0.1),
        mask=Mask(kind="block", ratio=0.5, adjust=0.05, span=5, copies=8, noise_std=0.01),
        target=Target(source="ffn", top_k=8, norm="instance"),
        ema=Ema(start=0.999, end=0.99999, anneal_steps=75_000, scope="encoder"),
        optim=Optim(learning_rate=7.5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, warmup_steps=8_000),
        data=Data(global_batch=24, micro_batch=3, workers=8),
        run=Run(steps=400_000, precision="bf16"),
    )  # fmt: skip


def speech_large() -> Config:
    """data2vec 2.0, speech large on Libri-light (published configuration `large_audio_only_task`); the teacher stands
    still after 300 000 updates.

    Not stock: as `speech_base`. A batch is 48 crops of 20 s.
    """
    return speech_base().change(
        recipe="speech-large",
        encoder=dict(width=1024, heads=16, prenet_depth=8, depth=16, layer_drop=0.0),
        decoder=dict(width=768),
        mask=dict(ratio=0.55, adjust=0.1, copies=12),
        target=dict(top_k=16),
        ema=Ema(start=0.9997, end=1.0, anneal_steps=300_000, scope="encoder"),
        optim=dict(learning_rate=4e-4, clip=1.0, warmup_steps=10_000),
        data=dict(global_batch=48, micro_batch=1),
        run=dict(steps=600_000),
    )


def speech1_base() -> Config:
    """data2vec 1.0, speech base on LibriSpeech 960 h (Baevski et al. 2022a; published configuration
    `base_librispeech`).

    Not stock: bfloat16 autocast with float32 weights; every row keeps its own number of masked frames; padding is
    invisible; one teacher step per update with accumulation too. A batch is 176 crops of 20 s.
    """
    return Config(
        recipe="speech1-base",
        version=1,
        stem=Stem(modality="speech", positions="conv"),
        encoder=Encoder(
            width=768, heads=12, depth=12, norm_eps=1e-5, dropout=0.1, attention_dropout=0.1, prenet_dropout=0.1,
            layer_drop=0.05,
        ),
        head=Head(layers=1),
        mask=Mask(kind="span", ratio=0.65, span=10),
        target=Target(source="ffn", top_k=8, norm="instance"),
        ema=Ema(start=0.999, end=0.9999, anneal_steps=30_000, scope="layers"),
        optim=Optim(
            learning_rate=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, schedule="tri-stage",
            warmup_steps=12_000, hold_steps=360_000, final_rate=0.01,
        ),
        data=Data(global_batch=176, micro_batch=11, workers=8),
        run=Run(steps=400_000, precision="bf16"),
    )  # fmt: skip


def speech_small() -> Config:
    """data2vec 2.0 for about 100 h of speech on one GPU: our own recipe, not a published one.

    `speech_base` scaled down: width 384, 6 heads, 256 channels in the waveform stem, 4 masks, 50 000 updates.
    """
    return speech_base().change(
        recipe="speech-small",
        stem=dict(convolutions=_SMALL_CONVOLUTIONS),
        encoder=dict(width=384, heads=6),
        decoder=dict(width=192),
        mask=dict(copies=4),
        ema=Ema(start=0.998, end=0.9999, anneal_steps=20_000, scope="encoder"),
        optim=dict(clip=1.0, warmup_steps=4_000),
        data=dict(global_batch=32, micro_batch=None),
        run=dict(steps=50_000, checkpoint_every=2_000),
    )


def speech_tiny() -> Config:
    """Spoken words on a CPU in minutes. Our own recipe, not a published one.

    Not stock: log-mel stem (`stem.kind`), fixed positions scaled by 0.1, no ALiBi, pre-norm blocks, block outputs as
    targets and a layer norm of their mean (each has the published instance norm, which takes the speaker's colour out:
    norms over the samples gave 3 to 9 points less for a speaker never heard); PyTorch's initial weights, fast
    averaging (.98 to .999); words of any length, padded in place of cropped to the shortest of the batch.
    """
    return Config(
        recipe="speech-tiny",
        stem=Stem(modality="speech", kind="log-mel", positions="sincos", position_scale=0.1),
        encoder=Encoder(width=64, heads=4, depth=3, norm_order="pre", norm_eps=1e-6, init_std=None),
        decoder=Decoder(layers=3, width=64, kernel=3, groups=16),
        mask=Mask(kind="block", ratio=0.6, span=3, copies=4),
        target=Target(source="block", top_k=3, norm="instance", out_norm="layer"),
        ema=Ema(start=0.98, end=0.999),
        optim=Optim(learning_rate=2e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05, clip=3.0, warmup_steps=100),
        data=Data(global_batch=32, workers=1, min_seconds=0.0, unequal="pad"),
        run=Run(steps=2_000, log_every=50, checkpoint_every=1_000),
    )


def speech1_tiny() -> Config:
    """data2vec 1.0 on spoken words on a CPU in minutes. Our own recipe, not a published one.

    Not stock: as `speech_tiny`, with 1.0's mask tokens and head.
    """
    return speech_tiny().change(
        recipe="speech1-tiny",
        version=1,
        head=Head(layers=1),
        mask=Mask(kind="span", ratio=0.65, span=3),
    )


def signals_tiny() -> Config:
    """Signals of N channels on a CPU in a minute: 12 channels at 100 Hz unless told otherwise, a token each 100 ms. Our
    own recipe, not a published one.

    As `speech_tiny` but for the stem: two convolutions of all channels together.
    """
    return speech_tiny().change(
        recipe="signals-tiny",
        stem=Stem(
            modality="signals", positions="sincos", position_scale=0.1, channels=12, sample_rate=100,
            convolutions=((64, 10, 5), (64, 2, 2)),
        ),
        data=dict(max_seconds=10.0),
        run=dict(steps=1_000, checkpoint_every=500),
    )  # fmt: skip
