"""Monitors of learning: how they are measured, and when they mean that a run has failed.

The published monitor `target_std` is pinned near 1 wherever targets are instance- or batch-normed and layer-normed: it
stays there when nothing is learned. So others stand beside it: `explained_variance`, `content_spread`, and the
effective ranks of the local encoder's output (`stem_rank`) and of the targets (`target_rank`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from d2v.config import Config, Run
    from d2v.model.targets import Output

_EPS = 1e-6
RANK_ROWS = 2048
"""Most rows that an effective rank is taken over: bounds its cost."""
RANK_LIMIT = 1.05
"""Effective rank that counts as collapsed: one direction holds all but 1 % of the variance."""
DIVERGED = 5.0
"""Loss over that of predictions that are all 0. A new model is below 2: it has its first predictions to unlearn."""
RUNNING = 3
"""Lines running in which one monitor under its limit counts as collapse by itself."""
_CONSTANT = 1e-10
"""Variance over mean square below which rows differ by no more than rounding in float32."""


def measure_content_spread(targets: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Standard deviation over samples at a fixed position, averaged over positions and channels.

    What the position alone does not explain; 0 when every sample has the same target. targets (B,T,C) -> 0-D; NaN for
    fewer than 2 samples. lengths (B,): tokens of a row before its padding, which does not count; positions that fewer
    than 2 rows have are left out.
    """
    if len(targets) < 2:
        return torch.full((), math.nan, device=targets.device)
    values = targets.float()
    if lengths is None:
        return (values.var(dim=0, unbiased=True) + _EPS).sqrt().mean()
    places = torch.arange(values.shape[1], device=values.device)
    valid = (places < lengths.to(values.device)[:, None])[..., None]
    count = valid.sum(dim=0)
    mean = (values * valid).sum(dim=0) / count.clamp_min(1)
    variance = ((values - mean).square() * valid).sum(dim=0) / (count - 1).clamp_min(1)
    return (variance + _EPS).sqrt()[count[:, 0] >= 2].mean()


def measure_explained_variance(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - mean squared error / variance of the target over rows; both (P,C) -> 0-D. 0: no better than the mean."""
    error = (prediction.float() - target.float()).square().mean()
    variance = target.float().var(dim=0, unbiased=False).mean()
    return 1.0 - error / (variance + _EPS)


def measure_effective_rank(features: Tensor, lengths: Tensor | None = None, limit: int = RANK_ROWS) -> Tensor:
    """exp of the entropy of the covariance's eigenvalues, divided by their sum: effective rank of the covariance matrix
    (Roy and Vetterli 2007, definition 1). 1: one direction holds everything; C: all directions alike.

    Args:
        features: (B,T,C), any floating dtype.
        lengths: (B,) int64 on the host: tokens of a row before its padding, which does not count; None: all T.
        limit: most rows taken, evenly spread over the valid ones.

    Returns:
        0-D float32. 1 for rows that are equal up to rounding, NaN for fewer than 2 rows and for values that are not
        finite.
    """
    batch, tokens, width = features.shape
    rows = _choose_rows(batch, tokens, lengths, limit)
    if len(rows) < 2:
        return torch.full((), math.nan, device=features.device)
    rows = rows.to(features.device, non_blocking=True)
    values = features.detach().reshape(batch * tokens, width).index_select(0, rows).float()
    finite = values.isfinite().all()
    # The solver refuses NaN by an exception, which would hide the alarm.
    values = values.nan_to_num(0.0, 0.0, 0.0)
    values = values / values.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    centred = values - values.mean(dim=0)
    # The smaller of both products has the same eigenvalues above 0.
    product = centred.T @ centred if width <= len(rows) else centred @ centred.T
    eigenvalues = torch.linalg.eigvalsh(product).clamp_min(0.0)
    total = eigenvalues.sum()
    shares = eigenvalues / total.clamp_min(torch.finfo(torch.float32).tiny)
    rank = torch.special.entr(shares).sum().exp()
    rank = torch.where(total > _CONSTANT * values.square().sum(), rank, 1.0)
    return torch.where(finite, rank, math.nan)


def _choose_rows(batch: int, tokens: int, lengths: Tensor | None, limit: int) -> Tensor:
    """Numbers b * T + t of at most `limit` valid tokens, on the host, evenly spread."""
    rows = torch.arange(batch * tokens)
    if lengths is not None:
        rows = rows[(torch.arange(tokens) < lengths[:, None]).flatten()]
    if len(rows) <= limit:
        return rows
    return rows[torch.arange(limit) * len(rows) // limit]


@torch.no_grad()
def measure(out: Output, token_lengths: Tensor | None = None) -> dict[str, float]:
    """Monitors of one micro-batch, by one read from the device.

    Args:
        out: of a training forward.
        token_lengths: (B,) int64 on the host, tokens of each sample before its padding; None: no padding.

    Returns:
        explained_variance; content_spread; target_rank; stem_rank.
    """
    with torch.autocast(out.targets.device.type, enabled=False):
        values = {
            "explained_variance": measure_explained_variance(out.prediction, out.target),
            "content_spread": measure_content_spread(out.targets, token_lengths),
            "target_rank": measure_effective_rank(out.targets, token_lengths),
            "stem_rank": measure_effective_rank(out.features, token_lengths),
        }
    return dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist(), strict=True))


# ---- alarms ---------------------------------------------------------------------------------------------------------

_MEANINGS = {
    "prediction_std": "the predictions hardly vary",
    "content_spread": "the targets are the same for every sample",
    "stem_rank": "the local encoder gives nearly the same direction for all tokens",
    "target_rank": "the targets lie along one direction",
}
_ADVICE = {
    "stem_rank": "a lower --stem.gradient-scale (speech)",
    "content_spread": "--ema.start and --ema.end nearer to 1",
    "target_rank": "another --target.norm",
}


def find_failure(line: Mapping[str, Any], run: Run, samples: int, lines: dict[str, int] | None = None) -> str | None:
    """Why a run must stop after this line of metrics, and what to try; None while it may go on.

    Two rules. A loss or gradient norm that is not finite stops at any time. After `run.collapse_begin` updates, two of
    the monitors prediction_std, content_spread, stem_rank and target_rank under their limits in one line stop the run,
    or one of the last three in `RUNNING` lines running: a line of one alone may have a harmless reason, say a
    micro-batch of equal samples. prediction_std alone never stops: a student that gives the mean may have begun just
    now. A monitor that is NaN is under its limit.

    Args:
        line: metrics, with `step`; monitors that it lacks do not count.
        run: the limits.
        samples: rows that content_spread was taken over; below 2 the second rule does not apply.
        lines: for how many lines each monitor has been under its limit, this one included; updated. None: unknown.
    """
    if broken := find_broken(line):
        return broken
    if samples < 2:
        return None
    lines = {} if lines is None else lines
    alarms = find_alarms(line, run)
    counts = {name: lines.get(name, 0) + 1 for name in alarms}
    lines.clear()
    lines.update(counts)
    if line["step"] <= run.collapse_begin or not run.stops_on_collapse:
        return None
    lasting = any(counts[name] >= RUNNING for name in alarms if name != "prediction_std")
    if len(alarms) < 2 and not lasting:
        return None
    return f"collapse: {explain_alarms(alarms, counts if len(alarms) == 1 else {})}"


def find_broken(line: Mapping[str, Any]) -> str | None:
    """A loss or gradient norm of a line that is not finite, in words, and what to try; or None."""
    broken = {k: line[k] for k in ("loss", "grad_norm") if k in line and not math.isfinite(line[k])}
    if not broken:
        return None
    found = ", ".join(f"{k} {v}" for k, v in broken.items())
    return f"not finite: {found}; try a lower --optim.learning-rate, a longer warm-up or a smaller --optim.clip"


def find_divergence(line: Mapping[str, Any], config: Config) -> str | None:
    """Why a run whose loss, a mean over the updates of a line, is far above that of predicting 0 must stop."""
    # Norms give targets a deviation of 1; a smaller one means collapse, not divergence.
    zero = config.encoder.width * config.loss_scale * max(1.0, line["target_std"]) ** 2
    times = line["loss"] / zero
    if times <= DIVERGED or not config.run.stops_on_collapse:
        return None
    advice = "try a lower --optim.learning-rate, more --optim.warmup-steps or a smaller --optim.clip"
    return f"diverged: loss {line['loss']:.3g}, {times:.2g} times that of predicting 0 (limit {DIVERGED:g}); {advice}"


def find_alarms(line: Mapping[str, Any], run: Run) -> dict[str, tuple[float, float]]:
    """Monitors of a line that are under their limit or NaN: name -> (value, limit)."""
    limits = {
        "prediction_std": run.collapse_prediction_std, "content_spread": run.collapse_content_spread,
        "stem_rank": RANK_LIMIT, "target_rank": RANK_LIMIT,
    }  # fmt: skip
    # `not >=`, so that NaN raises the alarm.
    return {k: (line[k], limit) for k, limit in limits.items() if k in line and not line[k] >= limit}


def find_low_ranks(line: Mapping[str, Any]) -> dict[str, str]:
    """Effective ranks of a line that are under their limit or NaN, each with a sentence: worth a word at any time, also
    while nothing else agrees."""
    low = [k for k in ("stem_rank", "target_rank") if k in line and not line[k] >= RANK_LIMIT]
    return {k: f"{k} {line[k]:.2g} (limit {RANK_LIMIT:g}): {_MEANINGS[k]}; try {_ADVICE[k]}" for k in low}


def explain_alarms(alarms: Mapping[str, tuple[float, float]], lines: Mapping[str, int]) -> str:
    """Values, limits, what they mean, and what to try; lines: those that a monitor is known to have lasted for."""
    lasted = {name: f" in {count} lines running" for name, count in lines.items()}
    found = ", ".join(f"{n} {value:.2g} (limit {limit:g}){lasted.get(n, '')}" for n, (value, limit) in alarms.items())
    meanings = " and ".join(_MEANINGS[name] for name in alarms)
    advice = dict.fromkeys(["a lower --optim.learning-rate", "more --optim.warmup-steps"])
    advice |= dict.fromkeys(_ADVICE[name] for name in alarms if name in _ADVICE)
    return f"{found}: {meanings}; try {', '.join(advice)}; docs/monitoring.md says more"


def check_teacher(config: Config) -> None:
    """`ValueError` for a moving average that never moves, of a run that begins at random: its targets would stay those
    of random weights. No monitor sees that, as such targets vary like others; the settings say it before the run. A
    teacher that stands still on purpose has `ema.freeze_after`."""
    ema = config.ema
    if ema.freeze_after is None and min(ema.start, ema.end) == 1.0:
        raise ValueError(
            f"ema.start, ema.end: expected a decay below 1, got {ema.start:g} and {ema.end:g}: the teacher would keep "
            "its random weights; --ema.freeze-after 0 says that this is meant, --model.init begins with trained ones"
        )
