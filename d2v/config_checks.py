"""Which settings of a configuration belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config


def require(condition: bool, name: str, expected: str, config: Any) -> None:
    """`ValueError` naming a setting by its dotted name, what was expected and what was given."""
    if not condition:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_model(config: Config) -> None:
    """Which stem, positions, masks, speed and version belong together."""
    stem, version = config.stem, config.version
    sequence = stem.modality != "vision"
    require(stem.kind == "stock" or stem.modality == "speech", "stem.kind", "stock unless speech", config)
    require(stem.positions != "conv" or sequence, "stem.positions", "other than conv for vision", config)
    require(stem.positions != "relative" or not sequence, "stem.positions", "relative for vision only", config)
    require(stem.gradient_scale >= 0.0, "stem.gradient_scale", "0 or more", config)
    require(len(stem.convolutions) >= 1, "stem.convolutions", "at least 1", config)
    require(stem.position_layers >= 1, "stem.position_layers", "1 or more", config)
    if version == 1 and stem.modality == "text":
        known = stem.mask_token is not None and 0 <= stem.mask_token < stem.vocabulary
        require(known, "stem.mask_token", f"0 to {stem.vocabulary - 1}", config)
    if config.mask.kind == "rectangles":
        require(not sequence, "mask.kind", "a kind for sequences", config)
    require(0.0 <= config.data.speed <= 1.0, "data.speed", "0 to 1", config)
    require(config.data.speed == 0.0 or stem.modality == "speech", "data.speed", "0 unless speech", config)
    equal = config.mask.kind not in ("rectangles", "token-span")
    require(version == 1 or equal, "mask.kind", "block, random or span for version 2", config)
    fixed = stem.positions == "sincos"
    require(fixed or not config.decoder.positions_masked, "decoder.positions_masked", "False without sincos", config)
    require(fixed or not config.decoder.positions_all, "decoder.positions_all", "False without sincos", config)
    grid = config.encoder.alibi_distance != "sequence"
    require(not (grid and sequence), "encoder.alibi_distance", "sequence unless vision", config)
    both = stem.positions == "relative" and config.encoder.alibi != "none"
    require(not both, "encoder.alibi", "none with relative positions", config)
    heads = config.encoder.alibi_heads if config.encoder.alibi != "none" else None
    require(heads is None or 1 <= heads <= config.encoder.heads, "encoder.alibi_heads", "1 to encoder.heads", config)
    check_graph(config)


def check_graph(config: Config) -> None:
    """What cannot be one graph: each choice of skipped blocks would be another, and counts read on the host end one."""
    whole = config.run.compile_scope == "network"
    dropped = config.encoder.layer_drop > 0.0
    require(not (whole and dropped), "run.compile_scope", "blocks with encoder.layer_drop", config)
    counted = "masked-tokens-only-teacher" in config.published
    require(not (whole and counted), "run.compile_scope", "blocks with masked-tokens-only-teacher", config)


def check_run(config: Any) -> None:
    """How long, how often and on how many ranks; `config` has a section `run` and one `data`."""
    run = config.run
    require(run.steps >= 0, "run.steps", "0 or more", config)
    for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
        require(getattr(run, name) >= 1, f"run.{name}", "1 or more", config)
    for name in ("threads", "keep_every", "shard_ranks"):
        value = getattr(run, name)
        require(value is None or value >= 1, f"run.{name}", "1 or more", config)
    require(run.timeout >= 5.0, "run.timeout", "5 or more", config)
    require(run.shard_ranks is None or run.parallel == "fsdp", "run.shard_ranks", "nothing without fsdp", config)
    # The scaler of the loss would have to agree over the shards of each gradient.
    require(run.parallel == "ddp" or run.precision != "fp16", "run.precision", "fp32 or bf16 with fsdp", config)
    whole = run.compile_scope == "network"
    require(run.compile or not whole, "run.compile_scope", "blocks without run.compile", config)
    # Sharded blocks gather their weights one by one.
    require(run.parallel == "ddp" or not whole, "run.compile_scope", "blocks with fsdp", config)
    alone = run.parallel == "ddp" and not run.compile
    require(alone or not run.teacher_graph, "run.teacher_graph", "False with fsdp or run.compile", config)
