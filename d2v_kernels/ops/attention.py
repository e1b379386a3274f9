"""Attention over dense or packed sequences: one function, and which engine runs it.

An engine answers `why_not` with a list of reasons like a backend of an operator; the first with an empty list runs.
Besides PyTorch's and xformers' own kernels there is the operator `torch.ops.d2v.attention` (an engine by each backend)
for what they cannot do. Packed sequences go to xformers on GPUs, else padded or one by one to an engine for dense ones.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks as check
from .. import registry
from .attention_operator import attention_operator, check_inputs
from .packing import Packed, pack_lengths


class Alibi(NamedTuple):
    """Bias -max(scale_h, 0) * slopes_h * |pos_i - pos_j| (Press et al. 2022; data2vec 2.0 learns the scale)."""

    slopes: Tensor
    """(H,) float32; `alibi_slopes` gives the published ones; 0 leaves a head without bias."""
    positions: Tensor
    """(N,V) int32 or int64: original positions of the last V of T tokens; the first T - V, extra tokens, have bias 0
    to and from every token. (total,) for packed sequences, which have no extra tokens."""
    scale: Tensor | None = None
    """(H,) or (1,) float32, learned; None for 1. Its gradient is 0 where it is below 0, and bitwise repeatable."""


ONE_BY_ONE = 1 << 15
"""Elements of a packed query that a sequence has on average where each is worth a call of its own on a CPU."""


@dataclass(frozen=True)
class Request:
    """What decides on an engine."""

    device: str
    dtype: torch.dtype
    width: int
    packed: bool = False
    masked: bool = False
    alibi: bool = False
    dropout: bool = False
    dropout_keys: bool = False


def alibi_slopes(heads: int, device: torch.device | str = "cpu") -> Tensor:
    """(heads,) float32: 2^(-8 (h+1) / heads) for a power of two, else as published (Press et al. 2022, code).

    Otherwise with P the largest power of two below: the P slopes of P heads, then every second one of 2P heads.

    Example:
        >>> x, positions = torch.randn(1, 6, 4, 8), torch.arange(6)[None]
        >>> attend(x, x, x, alibi=Alibi(alibi_slopes(4), positions)).shape
        torch.Size([1, 6, 4, 8])
    """
    heads = check.whole("alibi_slopes", "heads", heads, 1, 1 << 16)
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-8.0 * (h + 1) / (2 * power)) for h in range(0, 2 * (heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    valid: Tensor | None = None,
    packed: Packed | None = None,
    alibi: Alibi | None = None,
    dropout: float = 0.0,
    dropout_keys: Tensor | None = None,
    engine: str = "auto",
) -> Tensor:
    """Self-attention softmax(scale * q k^T + bias) v of each head (Vaswani et al. 2017, 3.2), softmax in float32.

    Args:
        query, key, value: (N,T,H,D), or (total,H,D) where `packed` (`scaled_dot_product_attention` takes (N,H,T,D));
            one floating dtype; copied where the last stride is not 1.
        scale: of the logits; None: D^-0.5.
        valid: keys that count: (N,T) bool, or (N,) integer lengths of the valid beginnings; on the tensors' device.
            None: all. Not with `packed`. A query whose row has no valid key gives 0, and lends no gradient.
        packed: layout of sequences that lie one after the other.
        alibi: bias by distance of positions.
        dropout: probability in [0, 1) that a weight is dropped; pass 0 in evaluation. Where this library's own operator
            runs it is rounded to 1/256, and what is kept is divided by what that leaves.
        dropout_keys: (N,) int64, one key a row (sequence): the dropped weights are a pure function of key, head, query
            and key position, so they depend on neither batch nor rank. None: drawn from the device's generator.
        engine: "auto", or one of `ENGINES` to force it.

    Returns:
        Shape and dtype of query. Differentiable in query, key, value and the scale of `alibi`.

    Raises:
        ValueError, TypeError: what does not fit. NotImplementedError: the engine cannot run this; lists the reasons.

    Example:
        >>> q, k, v = torch.randn(3, 2, 10, 4, 8)  # 2 rows of 10 tokens, 4 heads of width 8
        >>> attend(q, k, v, valid=torch.tensor([10, 7])).shape
        torch.Size([2, 10, 4, 8])
    """
    names = {"query": query, "key": key, "value": value}
    query, key, value = (check.side_by_side("attend", name, x) for name, x in names.items())
    _check(query, key, value, valid, packed, alibi, dropout, dropout_keys)
    drops = 1 if dropout > 0.0 else 0  # a branch: under `torch.compile` the comparison itself may be symbolic
    name = _choose(
        engine, query.device.type, query.dtype, operator.index(query.shape[-1]), packed is not None,
        valid is not None, alibi is not None, drops == 1, dropout_keys is not None and drops == 1,
    )  # fmt: skip
    if scale is None:
        scale = query.shape[-1] ** -0.5
    else:
        check.require(-math.inf < scale < math.inf, "attend", "scale", "a finite number", scale)
    return _run(ENGINES[name], query, key, value, _Options(scale, valid, packed, alibi, dropout, dropout_keys))


class _Options(NamedTuple):
    scale: float
    valid: Tensor | None
    packed: Packed | None
    alibi: Alibi | None
    dropout: float
    dropout_keys: Tensor | None


def _check(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, packed: Packed | None, alibi: Alibi | None,
    dropout: float, dropout_keys: Tensor | None,
) -> None:  # fmt: skip
    op = "attend"
    check.strided(op, query, key, value)
    layout = "3 dimensions (total, H, D)" if packed is not None else "4 dimensions (N, T, H, D)"
    good = query.dim() == (4 if packed is None else 3)
    check.require(good, op, "query", layout, f"shape {tuple(query.shape)}")
    rows = query.shape[0] if packed is None else len(packed.lengths)
    if packed is not None:
        check.require(valid is None, op, "valid", "None with packed sequences", "a tensor")
        total = sum(packed.lengths)
        check.require(total == query.shape[0], op, "total of packed lengths", query.shape[0], total)
        query, key, value = (x[None] for x in (query, key, value))  # one row, for the checks below
    else:
        _check_layout(query, valid, alibi)
    lengths, mask = (None, valid) if valid is not None and valid.dim() == 2 else (valid, None)
    check_inputs(op, query, key, value, lengths=lengths, valid=mask)
    check.dropout(op, dropout, "dropout keys", query)  # without keys they are drawn
    if dropout_keys is not None:
        check.shape(op, "dropout keys", dropout_keys, (rows,))
    if alibi is None:
        return
    _, tokens, heads, _ = query.shape
    check.shape(op, "slopes", alibi.slopes, (heads,))
    if alibi.scale is not None:
        shape = tuple(alibi.scale.shape)
        check.require(shape in ((heads,), (1,)), op, "shape of the bias's scale", f"({heads},) or (1,)", shape)
    if packed is not None:
        check.shape(op, "positions", alibi.positions, (tokens,))
    else:
        place = tuple(alibi.positions.shape)
        fits = len(place) == 2 and place[0] == rows and place[1] <= tokens
        check.require(fits, op, "shape of positions", f"({rows}, at most {tokens})", place)


def _check_layout(query: Tensor, valid: Tensor | None, alibi: Alibi | None) -> None:
    """Refuses (N,H,T,D) where other arguments tell tokens from heads."""
    _, tokens, heads, _ = query.shape
    by_valid = valid is not None and valid.shape[1:] == (heads,)
    by_slopes = alibi is not None and alibi.slopes.shape == (tokens,)
    if tokens != heads and (by_valid or by_slopes):
        got = f"{tuple(query.shape)}, which fits as (N, H, T, D): transpose(1, 2)"
        check.fail("attend", "query", "(N, T, H, D)", got)


# ---- choice


def prefers_packed(device: str, dtype: torch.dtype, width: int, *, alibi: bool = False) -> bool:
    """Whether `attend` has an engine that takes packed sequences as they are, in heads of this width.

    Example:
        >>> prefers_packed("cpu", torch.float32, 64)
        False
    """
    return ENGINES[_choose("auto", device, dtype, width, True, False, alibi, False, False)].packed


def preferred_engines(request: Request) -> tuple[str, ...]:
    """Engines in the order in which "auto" tries them."""
    if request.packed and request.device == "cuda" and not request.alibi:
        return ("xformers", "sdpa", "triton", "reference", "flex")
    if request.device == "cuda":
        return ("sdpa", "triton", "flex", "reference")
    # PyTorch makes the (rows, heads, T, T) weights for a bias and for dropout; without them it is about as quick in
    # float32, and its calls cost the host less (the log). In bfloat16 its gradient takes up to 13 times as long as
    # composed products, so there ours comes first: forward and backward took 0.07 to 0.41 of its time with AMX, and
    # 0.10 to 0.43 through float32 (AVX-512, oneDNN held to it), where its forward alone is up to 1.8 times as quick;
    # T = 17 to 1500, one thread. A rule by dtype and not a race: no bit of a resumed run may hang on a timing.
    ours = request.dropout or request.alibi or request.dtype == torch.bfloat16
    return ("native", "sdpa", "reference", "triton") if ours else ("sdpa", "native", "reference", "triton")


_chosen: dict[tuple[Any, ...], str] = {}


def _choose(forced: str, *fields: Any) -> str:
    """`choose_engine`, remembered: one dictionary look-up a call. Constants only, so that `torch.compile` asks once."""
    question = (forced, registry.forced_backend(), torch.are_deterministic_algorithms_enabled(), *fields)
    name = _chosen.get(question)
    if name is None:
        name = choose_engine(Request(*fields), forced)
        if fields[0] != "cuda" or not torch.cuda.is_current_stream_capturing():
            _chosen[question] = name
    return name


# What torch.compiler.assume_constant_result does, without importing the compiler and Triton with it.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_engine(request: Request, forced: str = "auto") -> str:
    """Name of the engine that runs a request; `NotImplementedError` with all reasons where none does."""
    if forced not in ("auto", *ENGINES):
        raise ValueError(f"attend: engine: expected auto or one of {', '.join(ENGINES)}, got {forced!r}")
    names = preferred_engines(request) if forced == "auto" else (forced,)
    reasons = []
    for name in names:
        why_not = why_not_engine(name, request)
        if not why_not:
            return name
        reasons += [f"{name}: {reason}" for reason in why_not]
    raise NotImplementedError(f"attend: no engine of {', '.join(names)} can run {request}: " + "; ".join(reasons))


def why_not_engine(name: str, request: Request, *, probe: bool = True) -> list[str]:
    """Reasons why an engine cannot run a request; empty when it can.

    Other projects' kernels are tried once in a process, for each dtype and width; without `probe` an empty list says
    only that nothing known speaks against a trial.
    """
    engine = ENGINES[name]
    reasons = engine.limits(request)
    return reasons or (_probe_failure(name, request.dtype, request.width) if probe and engine.probed else [])


def _reasons(*found: tuple[bool, str]) -> list[str]:
    return [words for holds, words in found if holds]


def _xformers_limits(request: Request) -> list[str]:
    dtype = check.dtype_name(request.dtype)
    return _reasons(
        (request.device != "cuda", f"runs on cuda, not on {request.device}"),
        (dtype not in ("float16", "bfloat16"), f"has float16 and bfloat16, not {dtype}"),
        (not request.packed, "is used for packed sequences"),
        (request.alibi, "has no bias from kept positions"),
        (request.dropout_keys, "has no dropout from row keys"),
    )


def _sdpa_limits(request: Request) -> list[str]:
    return _reasons(
        (request.alibi, "would need the bias as a (rows, heads, T, T) tensor"),
        (request.dropout_keys, "has no dropout from row keys"),
    )


def _flex_limits(request: Request) -> list[str]:
    atomics = "adds up the gradient of the bias's scale with atomics (deterministic algorithms are wanted)"
    return _reasons(
        (request.device != "cuda", f"is used on cuda, not on {request.device}"),
        (request.packed, "is not used for packed sequences"),
        (request.dropout, "has no dropout"),
        (torch.are_deterministic_algorithms_enabled(), atomics),
        (request.dtype == torch.float64, "has no float64"),
    )


def _operator_limits(request: Request, backend: str) -> list[str]:
    forced = registry.forced_backend()
    found = {b.name: b for b in registry.backends()}
    if forced in found and forced != backend and "attention" in found[forced].implementations:
        return [f"backend {forced} is forced"]
    case = registry.Case("attention", request.device, (request.dtype,), (str(request.width),))
    reasons = found[backend].why_not(case)
    if not reasons and (chosen := registry.choose(case, forced).name) != backend:
        return [f"the operator takes its backend {chosen} here; use_backend chooses another"]
    return reasons


# ---- engines


def _attend_by_xformers(query: Tensor, key: Tensor, value: Tensor, options: _Options) -> Tensor:
    ops = importlib.import_module("xformers.ops")
    packed = options.packed
    assert packed is not None
    bias = packed.made.get("xformers")
    if bias is None:  # a sequence without tokens has no block
        lengths = [n for n in packed.lengths if n > 0]
        bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=query.device)
        packed.made["xformers"] = bias
    inputs = (x[None] for x in (query, key, value))
    out: Tensor = ops.memory_efficient_attention(*inputs, attn_bias=bias, p=options.dropout, scale=options.scale)
    return out[0]


def _attend_by_sdpa(query: Tensor, key: Tensor, value: Tensor, options: _Options) -> Tensor:
    valid, empty = _keys_and_empty_rows(options.valid, query.shape[1])
    mask = None if valid is None else valid[:, None, None, :]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=options.dropout, scale=options.scale)
    return _with_zeros(out.transpose(1, 2), empty)


def _attend_by_operator(query: Tensor, key: Tensor, value: Tensor, options: _Options) -> Tensor:
    slopes = positions = None
    if options.alibi is not None:
        slopes, positions = _effective_slopes(options.alibi, query.dtype), options.alibi.positions
    keys = options.dropout_keys
    if options.dropout > 0.0 and keys is None:
        keys = torch.randint(0, 2**62, (query.shape[0],), device=query.device)
    lengths = mask = None
    if options.valid is not None:
        lengths, mask = (None, options.valid) if options.valid.dim() == 2 else (options.valid, None)
    rest = (slopes, positions, lengths, mask, keys, options.dropout, options.scale)
    return attention_operator(query, key, value, *rest)[0]


def _attend_by_flex(query: Tensor, key: Tensor, value: Tensor, options: _Options) -> Tensor:
    slopes, place, extra = None, None, 0
    if options.alibi is not None:
        slopes = _effective_slopes(options.alibi, query.dtype)
        extra = query.shape[1] - options.alibi.positions.shape[1]
        place = F.pad(options.alibi.positions, (extra, 0))
    valid, empty = _keys_and_empty_rows(options.valid, query.shape[1])

    def score(s: Tensor, n: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if slopes is not None and place is not None:
            distance = (place[n, i] - place[n, j]).abs().to(s.dtype)
            s = s - slopes[h] * torch.where((i >= extra) & (j >= extra), distance, 0.0)
        return s if valid is None else torch.where(valid[n, j], s, -math.inf)

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = _flex_function(query.device.type)(q, k, v, score_mod=score, scale=options.scale)
    return _with_zeros(out.transpose(1, 2), empty)


@functools.cache
def _flex_function(device: str) -> Callable[..., Any]:
    function: Callable[..., Any] = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
    # Without compilation it makes the (rows, heads, T, T) tensor; that serves tests on a CPU alone.
    return torch.compile(function) if device == "cuda" else function


def _effective_slopes(alibi: Alibi, dtype: torch.dtype) -> Tensor:
    compute = check.compute_dtype(dtype)
    slopes = alibi.slopes.to(compute)
    if alibi.scale is None:
        return slopes
    return slopes * alibi.scale.to(compute).clamp(min=0.0)


def _keys_and_empty_rows(valid: Tensor | None, tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """(N,T) keys that count, and (N,) rows without one.

    Kernels differ in what they do with such a row: it gets all keys, then the documented 0 is written.
    """
    if valid is None:
        return None, None
    mask = valid if valid.dim() == 2 else torch.arange(tokens, device=valid.device) < valid[:, None]
    empty = ~mask.any(1)
    return mask | empty[:, None], empty


def _with_zeros(out: Tensor, empty: Tensor | None) -> Tensor:
    return out if empty is None else out.masked_fill(empty[:, None, None, None], 0.0)


def _run(engine: Engine, query: Tensor, key: Tensor, value: Tensor, options: _Options) -> Tensor:
    """Packed sequences through an engine for dense ones, where it takes no packed ones."""
    packed = options.packed
    if packed is None or engine.packed:
        return engine.run(query, key, value, options)
    if query.shape[0] == 0:
        return query.clone()
    one_by_one = query.device.type == "cpu" and query.numel() >= ONE_BY_ONE * len(packed.lengths)
    return (_run_each if one_by_one else _run_padded)(engine, query, key, value, options, packed)


def _run_each(engine: Engine, query: Tensor, key: Tensor, value: Tensor, options: _Options, packed: Packed) -> Tensor:
    """A call for each sequence, on views."""
    results, alibi, keys, lengths = [], options.alibi, options.dropout_keys, list(packed.lengths)
    places = None if alibi is None else alibi.positions[None].split(lengths, 1)
    rows = (x[None].split(lengths, 1) for x in (query, key, value))
    for n, (q, k, v) in enumerate(zip(*rows, strict=True)):
        if lengths[n] > 0:
            biased = alibi if alibi is None or places is None else alibi._replace(positions=places[n])
            own = None if keys is None else keys[n : n + 1]
            results.append(engine.run(q, k, v, options._replace(packed=None, alibi=biased, dropout_keys=own)))
    return torch.cat(results, 1).squeeze(0)


def _run_padded(engine: Engine, query: Tensor, key: Tensor, value: Tensor, options: _Options, packed: Packed) -> Tensor:
    """Rows of the longest length, and back; no host read."""
    alibi = options.alibi
    if alibi is not None:
        places = F.pad(alibi.positions, (0, 1))[packed.places(packed.longest)[1][0]]
        alibi = alibi._replace(positions=places.view(len(packed.lengths), -1))
    dense = options._replace(packed=None, valid=packed.starts.diff(), alibi=alibi)
    return packed.unpad(engine.run(packed.pad(query), packed.pad(key), packed.pad(value), dense))


class Engine(NamedTuple):
    """One way to attend."""

    run: Callable[[Tensor, Tensor, Tensor, _Options], Tensor]
    limits: Callable[[Request], list[str]]
    """Reasons why it cannot run a request."""
    packed: bool = False
    """Takes packed sequences as they are."""
    probed: bool = False
    """Tried once in a process before it is used."""


ENGINES = {
    "xformers": Engine(_attend_by_xformers, _xformers_limits, packed=True, probed=True),
    "sdpa": Engine(_attend_by_sdpa, _sdpa_limits),
    "native": Engine(_attend_by_operator, functools.partial(_operator_limits, backend="native")),
    "triton": Engine(_attend_by_operator, functools.partial(_operator_limits, backend="triton")),
    "flex": Engine(_attend_by_flex, _flex_limits, probed=True),
    "reference": Engine(_attend_by_operator, functools.partial(_operator_limits, backend="reference")),
}


# ---- live probes


def _probe(engine: str, dtype: torch.dtype, width: int, device: torch.device) -> str:
    """Empty when a tiny forward and backward ran and was right, else what went wrong."""
    try:
        generator = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay where they are
        x = [torch.randn((48, 2, width), device=device, dtype=dtype, generator=generator) for _ in range(3)]
        options, other = _Options(width**-0.5, None, pack_lengths([17, 31], device), None, 0.0, None), "sdpa"
        if engine == "flex":
            slopes, scale = torch.ones(2, device=device), torch.ones(2, device=device, requires_grad=True)
            alibi, other = Alibi(slopes, torch.arange(48, device=device)[None], scale), "reference"
            options, x = options._replace(packed=None, alibi=alibi), [t[None] for t in x]
        x = [t.requires_grad_() for t in x]
        results = []
        for name in (engine, other):
            y = _run(ENGINES[name], x[0], x[1], x[2], options)
            results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), x)])
        for got, wanted in zip(*results, strict=True):
            error = float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())
            if not error < 0.05:
                return f"its result differs from PyTorch's by {error:.2g} of the maximum"
    except Exception as error:  # a library that does not fit this torch fails in many ways
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


_probed: dict[tuple[Any, ...], str] = {}


def _probe_failure(engine: str, dtype: torch.dtype, width: int) -> list[str]:
    question = (engine, dtype, width, torch.cuda.current_device())
    if question not in _probed:
        if torch.cuda.is_current_stream_capturing():
            return ["was not tried before this graph capture (call once outside it)"]
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(0)  # a probe reads its result, once a process
        _probed[question] = _probe(engine, dtype, width, torch.device("cuda", question[-1]))
        torch.cuda.set_sync_debug_mode(before)
    failure = _probed[question]
    return [f"a trial run failed ({failure})"] if failure else []
