"""Recipe of signals; `d2v.recipes` lists it."""

from __future__ import annotations

from d2v.config import Config, Data, Decoder, Ema, Encoder, Mask, Optim, Run, Stem, Target


def signals_tiny() -> Config:
    """Signals of N channels on a CPU in a minute: 12 channels at 100 Hz unless told otherwise, a token each 100 ms. Our
    own recipe, not a published one.

    As `speech_tiny` but for the stem: two convolutions of all channels together.
    """
    return Config(
        recipe="signals-tiny",
        stem=Stem(
            modality="signals", positions="sincos", position_scale=0.1, channels=12, sample_rate=100,
            convolutions=((64, 10, 5), (64, 2, 2)),
        ),
        encoder=Encoder(width=64, heads=4, depth=3, norm_order="pre", norm_eps=1e-6, init_std=None),
        decoder=Decoder(layers=3, width=64, kernel=3, groups=16),
        mask=Mask(kind="block", ratio=0.6, span=3, copies=4),
        target=Target(source="block", top_k=3, norm="instance", out_norm="layer"),
        ema=Ema(start=0.98, end=0.999),
        optim=Optim(learning_rate=2e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05, clip=3.0, warmup_steps=100),
        data=Data(global_batch=32, workers=1, min_seconds=0.0, max_seconds=10.0, unequal="pad"),
        run=Run(steps=1_000, log_every=50, checkpoint_every=500),
    )  # fmt: skip
