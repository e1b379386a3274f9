"""Random calls of every public operator, valid and invalid, in a process of its own.

Call number i of a seed is always the same: `python tests/support/fuzz.py --seed 0 --first 17 --calls 1`. A valid one is
compared, with its gradients, with the reference in float64; an invalid one must be refused with expected and got.
Prints a line before each call, so that whoever watches knows what crashed or hung, and one for each finding.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import d2v_kernels as dk

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float64: 1e-7}
BACKENDS = ("reference", "native")
HUGE = (10**9, 2**31, 2**63, 10**30)
NAN, INF = math.nan, math.inf
Arguments = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Operator:
    """How calls of one operator are drawn."""

    run: Callable[..., Any]
    build: Callable[[random.Random, torch.dtype], Arguments]
    rows: tuple[str, ...] = ()
    """Floating tensors of rows, of any strides but where they are written or a vector (weight, bias)."""
    tensors: tuple[str, ...] = ()
    """Other tensors, whose dtype is fixed."""
    fitted: tuple[str, ...] = ()
    """Tensors and lists that must have the shape they have."""
    ranges: tuple[str, ...] = ()
    """Index tensors in which -1 and 10^6 are out of range."""
    numbers: dict[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    """Values that an argument cannot have."""
    gradients: tuple[str, ...] = ()
    extra: tuple[Callable[[random.Random, Arguments], bool], ...] = ()
    """What else makes arguments invalid; False where it cannot, with these."""


# ---- tensors


def size(r: random.Random, low: int = 1, high: int = 9) -> int:
    return r.choice([low, r.randint(low, high), r.randint(low, high), r.choice([high, 2 * high + 1])])


def floats(r: random.Random, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Normal numbers, as they are or as a slice of something larger."""
    generator = torch.Generator().manual_seed(r.getrandbits(40))
    layout = r.choice(["plain", "plain", "slice", "apart", "swapped", "offset"])
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)
    if x.dim() == 0 or layout == "plain":
        return x
    if layout == "slice":
        return torch.cat([x, x, x], -1)[..., shape[-1] : 2 * shape[-1]]
    if layout == "offset":
        return torch.cat([x.flatten()[:1], x.flatten()])[-x.numel() or 1 :].view(x.shape) if x.numel() else x
    if x.dim() < 2:
        return x
    if layout == "apart":
        return x.repeat_interleave(2, -2)[..., ::2, :]
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else x


def integers(r: random.Random, shape: Sequence[int], high: int, dtype: torch.dtype | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(r.getrandbits(40))
    dtype = dtype or r.choice([torch.int32, torch.int64])
    return torch.randint(0, max(high, 1), tuple(shape), generator=generator, dtype=dtype)


def keys(r: random.Random, count: int) -> Tensor:
    return torch.tensor([r.getrandbits(62) for _ in range(count)], dtype=torch.int64)


# ---- operators


def build_gelu(r: random.Random, dtype: torch.dtype) -> Arguments:
    return {"x": floats(r, [size(r, 0) for _ in range(r.randint(1, 4))], dtype)}


def build_gelu_linear(r: random.Random, dtype: torch.dtype) -> Arguments:
    h, c = size(r), size(r)
    shape = [size(r, 0) for _ in range(r.randint(0, 2))]
    bias = floats(r, [c], dtype) if r.random() < 0.5 else None
    return {"x": floats(r, [*shape, h], dtype), "weight": floats(r, [c, h], dtype), "bias": bias}


def build_norm_gelu(r: random.Random, dtype: torch.dtype) -> Arguments:
    c = size(r, 1, 40)
    weight, bias = (floats(r, [c], r.choice(FLOATS)) if r.random() < 0.5 else None for _ in range(2))
    x = floats(r, [*(size(r, 0) for _ in range(r.randint(1, 2))), c], dtype)
    return {"x": x, "weight": weight, "bias": bias, "eps": r.choice([1e-5, 1e-3, 1.0])}


def build_convolution(r: random.Random, dtype: torch.dtype) -> Arguments:
    groups, narrow, axes = r.randint(1, 3), r.randint(1, 4), r.randint(1, 2)
    wide, residual = r.randint(3, 5), r.random() < 0.3
    taps = [r.randint(1, 5) for _ in range(axes)]
    x = floats(r, [size(r, 0), *(size(r, 0) for _ in range(axes)), groups * narrow], dtype)
    outputs = groups * (narrow if residual else wide)
    weight, bias = floats(r, [outputs, narrow, *taps], dtype), floats(r, [outputs], r.choice(FLOATS))
    return {"x": x, "weight": weight, "bias": bias if r.random() < 0.5 else None, "residual": residual,
            "eps": r.choice([0.1, 1.0])}  # fmt: skip


def build_layers(r: random.Random, dtype: torch.dtype) -> Arguments:
    b, t, c = size(r), size(r), size(r, 1, 40)
    layers = [floats(r, (b, t, c), dtype) for _ in range(r.randint(1, 4))]
    lengths = integers(r, [b], t + 1, torch.int64) if r.random() < 0.4 else None
    norms = ("none", "layer", "instance", "batch")
    return {"layers": torch.stack(layers) if r.random() < 0.3 else layers, "norm": r.choice(norms),
            "out_norm": r.choice(norms), "lengths": lengths, "eps": r.choice([1e-5, 1e-2])}  # fmt: skip


def build_gather(r: random.Random, dtype: torch.dtype) -> Arguments:
    b, t, clones = size(r), size(r), r.randint(1, 4)
    x = floats(r, (b, t, size(r, 0, 40)), dtype)
    return {"x": x, "index": integers(r, (b * clones, size(r)), t), "clones": clones}


def build_restore(r: random.Random, dtype: torch.dtype) -> Arguments:
    n, v, t, f, c = size(r), size(r, 0), size(r), size(r), size(r, 1, 40)
    kind = r.choice(["vector", "rows", "noise"])
    fill = {"vector": lambda: floats(r, [c], dtype), "rows": lambda: floats(r, [n, f, c], dtype),
            "noise": lambda: dk.Noise(r.random(), keys(r, n))}[kind]()  # fmt: skip
    return {"kept": floats(r, (n, v, c), dtype), "restore": integers(r, (n, t), v + f), "fill": fill}


def build_loss(r: random.Random, dtype: torch.dtype) -> Arguments:
    rows, c, p = size(r, 1, 20), size(r, 1, 40), size(r)
    prediction, target = floats(r, (rows, c), dtype), floats(r, (rows, c), dtype)
    chosen = torch.tensor(r.sample(range(rows), min(p, rows))) if r.random() < 0.5 else None
    other = integers(r, [len(chosen)], rows) if chosen is not None else None
    return {"prediction": prediction, "target": target, "prediction_rows": chosen, "target_rows": other,
            "beta": r.choice([0.0, 0.5, 2.0]), "scale": r.choice([1.0, 0.01, -2.0])}  # fmt: skip


def build_dropout_norm(r: random.Random, dtype: torch.dtype) -> Arguments:
    shape = size(r), size(r), size(r, 1, 40)
    weight, bias = (floats(r, shape[-1:], r.choice(FLOATS)) if r.random() < 0.5 else None for _ in range(2))
    return {"branch": floats(r, shape, dtype), "residual": floats(r, shape, dtype), "weight": weight, "bias": bias,
            "dropout": r.choice([0.0, 0.3, 0.99]), "keys": keys(r, shape[0]), "eps": 1e-5}  # fmt: skip


def build_mixed_norm(r: random.Random, dtype: torch.dtype) -> Arguments:
    a = build_dropout_norm(r, dtype if dtype.itemsize == 2 else torch.bfloat16)
    return {**a, "residual": floats(r, a["branch"].shape, torch.float32), "copy": True}


def build_attend(r: random.Random, dtype: torch.dtype) -> Arguments:
    n, t, h, d = size(r, 1, 4), size(r, 1, 40), size(r, 1, 4), size(r, 1, 20)
    query, key, value = (floats(r, (n, t, h, d), dtype) for _ in range(3))
    valid = r.choice([None, integers(r, [n], t + 1), integers(r, [n, t], 2).bool()])
    alibi = None
    if r.random() < 0.5:
        scale = floats(r, [r.choice([1, h])], torch.float32) if r.random() < 0.5 else None
        alibi = dk.Alibi(dk.alibi_slopes(h), integers(r, (n, r.randint(0, t)), 50), scale)
    return {"query": query, "key": key, "value": value, "valid": valid, "alibi": alibi,
            "dropout": r.choice([0.0, 0.0, 0.4]), "dropout_keys": keys(r, n), "engine": "auto"}  # fmt: skip


def build_packed(r: random.Random, dtype: torch.dtype) -> Arguments:
    lengths = [size(r, 0, 12) for _ in range(size(r, 1, 4))]
    shape = sum(lengths), size(r, 1, 4), size(r, 1, 20)
    return {**{name: floats(r, shape, dtype) for name in ("query", "key", "value")},
            "packed": dk.pack_lengths(lengths, "cpu")}  # fmt: skip


def build_ema(r: random.Random, dtype: torch.dtype) -> Arguments:
    shapes = [[size(r, 0, 30) for _ in range(r.randint(0, 3))] for _ in range(r.randint(1, 4))]
    lists = [[floats(r, s, r.choice(FLOATS)) for s in shapes] for _ in range(3)]
    if r.random() < 0.2:
        lists[1][0] = torch._neg_view(lists[1][0])
    decay = r.choice([0.0, 0.5, 0.999, 1.0, torch.tensor(0.25, dtype=torch.float64)])
    copies = lists[2] if r.random() < 0.5 else None
    return {"averages": lists[0], "sources": lists[1], "decay": decay, "copies": copies}


def build_split(r: random.Random, dtype: torch.dtype) -> Arguments:
    shapes = [[size(r, 0, 30) for _ in range(r.randint(0, 3))] for _ in range(r.randint(1, 3))]
    halves = [dk.split_ema_state(torch.randn(s)) for s in shapes]
    sources = [floats(r, s, r.choice(FLOATS[:3])).contiguous() for s in shapes]
    return {"averages": [h for h, _ in halves], "sources": sources, "decay": r.choice([0.0, 0.9, 1.0]),
            "low": [low for _, low in halves]}  # fmt: skip


def run_list(averages: Any, sources: Any, decay: Any, copies: Any = None, low: Any = None) -> list[Tensor]:
    dk.update_ema_(averages, sources, decay, copies=copies, low=low)
    return _averages(averages, copies, low)


def run_plan(averages: Any, sources: Any, decay: Any, copies: Any = None, low: Any = None) -> list[Tensor]:
    dk.EmaPlan(averages, sources, copies, low=low).step(decay)
    return _averages(averages, copies, low)


def run_moved_plan(averages: Any, sources: Any, decay: Any, copies: Any = None) -> list[Tensor]:
    """The tensors of a plan get other memory, and maybe another shape, between making it and the step."""
    held = [torch.zeros(s.shape, dtype=s.dtype) for s in averages]
    plan = dk.EmaPlan(averages, held, copies)
    for h, s in zip(held, sources, strict=False):
        h.data = s.resolve_neg()
    plan.step(decay)
    return _averages(averages, copies, None)


def _averages(averages: list[Tensor], copies: list[Tensor] | None, low: list[Tensor] | None) -> list[Tensor]:
    if low is not None:
        averages = [dk.merge_ema_state(*pair) for pair in zip(averages, low, strict=True)]
    return [*averages, *(copies or [])]


def build_sampler(r: random.Random, dtype: torch.dtype) -> Arguments:
    kind = r.choice(["span", "rectangles", "token-span", "block", "random"])
    grid = (size(r), size(r)) if kind == "rectangles" or r.random() < 0.3 else None
    tokens = None if grid else size(r, 1, 60)
    ids = [r.randint(-(2**63), 2**63 - 1) for _ in range(size(r, 0))]
    lengths = None if grid or r.random() < 0.5 else integers(r, [len(ids)], tokens + 1, torch.int64)
    return {"kind": kind, "tokens": tokens, "grid": grid, "ratio": r.random(), "span": r.randint(1, 12),
            "adjust": r.choice([0.0, 0.07, -0.2]), "equal_counts": r.random() < 0.5, "seed": r.getrandbits(63),
            "sample_ids": ids, "epoch": r.randint(0, 1000), "copies": r.randint(1, 4), "lengths": lengths}  # fmt: skip


def run_sampler(sample_ids: Any, epoch: Any, copies: Any, lengths: Any, **options: Any) -> list[Tensor]:
    sampler = dk.MaskSampler(**options)
    masks = sampler.draw(sample_ids, epoch, copies=copies, lengths=lengths)
    sampler.seed = 5
    drawn = [masks, sampler.draw(sample_ids, epoch, copies=copies, lengths=lengths)]
    found = [t for m in drawn for t in m if t is not None]
    return [t.double() for t in [*found, sampler.noise_keys(sample_ids, epoch, copies=copies) % 1000]]


# ---- what makes arguments invalid beside the general ways


def overlap(name: str) -> Callable[[random.Random, Arguments], bool]:
    """An entry that is written is expanded, overlaps partly with itself, or lies where another one does."""

    def change(r: random.Random, a: Arguments) -> bool:
        if not a.get(name):
            return False
        k = r.randrange(len(a[name]))
        t = a[name][k]
        kind = r.choice(["expanded", "windows", "twice"])
        if t.numel() < 2 or (t.dtype == torch.int16 and kind != "twice"):
            return False
        if kind == "twice":
            for other in a:
                if isinstance(a[other], list):
                    a[other].append(a[other][k] if other == name else a[other][k].clone())
        elif kind == "expanded":
            a[name][k] = t.flatten()[:1].expand(t.numel()).view(t.shape)
        else:
            a[name][k] = torch.zeros(t.numel() + 1, dtype=t.dtype).as_strided((t.numel(),), (1,))[: t.numel()]
            rows, columns = 2, t.numel()
            for other in a:
                if isinstance(a[other], list):
                    a[other][k] = torch.zeros(rows, columns, dtype=a[other][k].dtype)
            a[name][k] = torch.zeros(2 * columns, dtype=t.dtype).as_strided((rows, columns), (1, 1))
        return True

    return change


def shifted_source(r: random.Random, a: Arguments) -> bool:
    """A source that begins one element after its average."""
    t = a["averages"][0]
    if t.numel() < 2:
        return False
    buffer = torch.zeros(t.numel() + 1, dtype=t.dtype)
    a["averages"][0], a["sources"][0] = buffer[:-1].view(t.shape), buffer[1:].view(t.shape)
    return True


def negated(name: str) -> Callable[[random.Random, Arguments], bool]:
    def change(r: random.Random, a: Arguments) -> bool:
        if not a.get(name):
            return False
        a[name][0] = torch._neg_view(a[name][0])
        return True

    return change


def shorter(name: str) -> Callable[[random.Random, Arguments], bool]:
    def change(r: random.Random, a: Arguments) -> bool:
        if not a.get(name):
            return False
        a[name] = a[name][:-1]
        return True

    return change


EMA: dict[str, Any] = dict(
    fitted=("sources", "copies"), rows=("averages", "sources", "copies"),
    numbers={"decay": [NAN, -0.1, 1.5, INF, torch.tensor(0.5), torch.ones(1, dtype=torch.float64)]},
    extra=(overlap("averages"), overlap("copies"), shifted_source, negated("averages"), negated("copies"),
           shorter("sources")),
)  # fmt: skip
SPLIT: dict[str, Any] = {
    **EMA, "fitted": ("sources",), "rows": ("averages", "sources"),
    "extra": (overlap("averages"), overlap("low"), negated("averages"), shorter("low"), shorter("sources")),
}  # fmt: skip
NORM: dict[str, Any] = dict(
    rows=("branch", "residual"), tensors=("keys",), fitted=("residual", "keys", "weight"),
    numbers={"dropout": [NAN, -0.1, 1.0, 7.0], "eps": [NAN, 0.0, -1.0, INF]},
    gradients=("branch", "residual", "weight", "bias"),
)  # fmt: skip
ATTEND: dict[str, Any] = dict(
    rows=("query", "key", "value"), fitted=("key", "value"), gradients=("query", "key", "value")
)
OPERATORS = {
    "gelu": Operator(dk.gelu, build_gelu, tensors=("x",), gradients=("x",)),
    "gelu_linear": Operator(
        dk.gelu_linear, build_gelu_linear, tensors=("x", "weight", "bias"), fitted=("bias",),
        gradients=("x", "weight", "bias"),
    ),
    "layer_norm_gelu": Operator(
        dk.layer_norm_gelu, build_norm_gelu, rows=("weight", "bias"), tensors=("x",), fitted=("weight", "bias"),
        numbers={"eps": [NAN, 0.0, -1.0, INF]}, gradients=("x", "weight", "bias"),
    ),
    "conv_layer_norm_gelu": Operator(
        dk.conv_layer_norm_gelu, build_convolution, tensors=("x", "weight"), fitted=("bias",),
        numbers={"eps": [NAN, 0.0, -1.0, INF]}, gradients=("x", "weight", "bias"),
    ),
    "average_layers": Operator(
        dk.average_layers, build_layers, rows=("layers",), tensors=("lengths",), fitted=("lengths",),
        ranges=("lengths",), numbers={"eps": [NAN, 0.0, -1.0, INF], "norm": ["", "x"], "out_norm": ["layer,x"]},
    ),
    "gather_tokens": Operator(
        dk.gather_tokens, build_gather, rows=("x",), tensors=("index",), fitted=(), ranges=("index",),
        numbers={"clones": [0, -1, *HUGE, NAN]}, gradients=("x",),
    ),
    "restore_tokens": Operator(
        dk.restore_tokens, build_restore, rows=("kept",), tensors=("restore",), ranges=(),
        numbers={"fill": [None, 3.0, dk.Noise(NAN, torch.zeros(1, dtype=torch.int64))]}, gradients=("kept", "fill"),
    ),
    "masked_regression_loss": Operator(
        dk.masked_regression_loss, build_loss, rows=(), tensors=("prediction", "target", "prediction_rows"),
        fitted=("target_rows",), ranges=("prediction_rows", "target_rows"),
        numbers={"beta": [NAN, -1.0, INF], "scale": [NAN, INF]}, gradients=("prediction",),
    ),
    "dropout_add_layer_norm": Operator(dk.dropout_add_layer_norm, build_dropout_norm, **NORM),
    "dropout_add_layer_norm mixed": Operator(dk.dropout_add_layer_norm, build_mixed_norm, **NORM),
    "attend": Operator(
        dk.attend, build_attend, **ATTEND,
        numbers={"dropout": [NAN, -0.1, 1.0], "engine": ["x"], "scale": [NAN, INF],
                 "alibi": [dk.Alibi(torch.ones(77), torch.zeros(1, 1, dtype=torch.int64))]},
    ),
    "attend packed": Operator(dk.attend, build_packed, **ATTEND, numbers={"valid": [torch.ones(1)]}),
    "update_ema_": Operator(run_list, build_ema, **EMA),
    "EmaPlan": Operator(run_plan, build_ema, **EMA),
    "EmaPlan moved": Operator(run_moved_plan, build_ema, fitted=("sources",), rows=("sources",)),
    "update_ema_ split": Operator(run_list, build_split, **SPLIT),
    "EmaPlan split": Operator(run_plan, build_split, **SPLIT),
    "MaskSampler": Operator(
        run_sampler, build_sampler, tensors=("lengths",), fitted=("lengths",), ranges=("lengths",),
        numbers={"kind": ["x"], "ratio": [NAN, -0.1, 1.5], "span": [0, -1, NAN, *HUGE[1:]],
                 "adjust": [NAN, INF, 2.0, -5.0], "seed": [NAN, 10**30, 0.5], "epoch": [NAN, 0.5, 10**30],
                 "copies": [0, -1, NAN, 0.5, *HUGE], "sample_ids": [[0.5], [NAN], [2**64], [[1]]],
                 "tokens": [0, -1, NAN, *HUGE[1:]]},
    ),
    "pack_lengths": Operator(
        lambda lengths: dk.pack_lengths(lengths, "cpu").starts, lambda r, _: {"lengths": [r.randint(0, 99)] * 3},
        numbers={"lengths": [[-1], [NAN], [0.5], [2**31], [2**30] * 2, [10**30], torch.ones(2)]},
    ),
    "alibi_slopes": Operator(
        dk.alibi_slopes, lambda r, _: {"heads": r.randint(1, 40)}, numbers={"heads": [0, -1, NAN, 0.5, *HUGE]}
    ),
}  # fmt: skip


def spoil(r: random.Random, op: Operator, a: Arguments) -> str:
    """Makes arguments invalid; returns how, or nothing where the way that was drawn does not apply."""
    ways = [("number", n) for n in op.numbers] + [("extra", k) for k in range(len(op.extra))]
    ways += [(way, n) for n in (*op.rows, *op.tensors) for way in ("dtype", "complex", "freed", "cut", "sparse")]
    ways += [("dims", n) for n in op.rows]
    ways += [(way, n) for n in op.fitted for way in ("longer", "meta")] + [("range", n) for n in op.ranges]
    way, name = r.choice(ways)
    if way == "number":
        a[name] = r.choice(op.numbers[name])
        if name == "tokens":
            a["grid"] = a["lengths"] = None
        return f"{name} = {a[name]!r:.60}"
    if way == "extra":
        return f"extra {name}" if op.extra[name](r, a) else ""
    given = a.get(name)
    if given is None or (isinstance(given, list) and not given):
        return ""
    k = r.randrange(len(given)) if isinstance(given, list) else -1
    t = given[k] if k >= 0 else given
    if name == "keys" and a["dropout"] == 0.0:
        return ""  # is not read
    if op.run is run_moved_plan and t.numel() == 0:
        return ""  # has no address to compare, and nothing to read
    changed = spoil_tensor(r, way, t) if isinstance(t, Tensor) else None
    if changed is None:
        return ""
    if way in ("dims", "longer") and k >= 0 and len(given) == 1 and "averages" not in a:
        return ""  # a single layer may have any shape
    if way == "dims" and isinstance(given, Tensor) and name == "layers":
        return ""
    if way in ("dtype", "complex") and name == "lengths" and t.numel() == 0:
        return ""
    if k >= 0:
        given[k] = changed
    else:
        a[name] = changed
    return f"{way} of {name}"


def spread(op: Operator, a: Arguments) -> None:
    """Rows whose numbers do not lie side by side."""
    for name in set(op.rows) - {"weight", "bias"}:
        given = a.get(name)
        if isinstance(given, list) and given:
            given[-1] = torch.stack([given[-1]] * 2, -1)[..., 0]
        elif isinstance(given, Tensor):
            a[name] = torch.stack([given] * 2, -1)[..., 0]


def spoil_tensor(r: random.Random, way: str, t: Tensor) -> Tensor | None:
    """A tensor that cannot be what the operator takes; None where the way does not apply."""
    if way == "dtype":
        return t.to(torch.float32 if not t.is_floating_point() else r.choice([torch.int32, torch.bool]))
    if way == "complex":
        return t.to(torch.complex64)
    if way == "dims":
        return t[None]
    if way == "longer":
        return torch.cat([t, t[:1]]) if t.dim() and t.shape[0] else None
    if way == "meta":
        return t.to("meta")
    if way == "range":
        return torch.full_like(t, r.choice([-1, 10**6])) if t.numel() else None
    if t.numel() == 0:
        return None
    if way == "sparse":
        return t.to_sparse() if t.dim() else None
    t = t.resolve_neg().clone(memory_format=torch.contiguous_format)
    t.untyped_storage().resize_(0 if way == "freed" else t.nbytes - 1)
    return t


# ---- calls


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors_of(v)] if isinstance(value, list | tuple) else []


def run(op: Operator, a: Arguments, seed: int, gradients: bool) -> list[Tensor]:
    """Results, then gradients of a random sum of them."""
    leaves = {}
    for name in op.gradients:
        if gradients and isinstance(a.get(name), Tensor) and a[name].is_floating_point():
            a[name] = leaves[name] = a[name].detach().requires_grad_()
    out = tensors_of(op.run(**a))
    if not leaves:
        return out
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for t in out:
        if t.requires_grad:
            total = total + (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum()
    if not isinstance(total, Tensor):
        return out
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [*out, *(g for g in found if g is not None)]


def in_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().resolve_neg().double() if value.is_floating_point() else value
    if isinstance(value, dk.Alibi):
        return dk.Alibi(*(None if t is None else in_float64(t) for t in value))
    return (
        [in_float64(v) for v in value] if isinstance(value, list) and value and isinstance(value[0], Tensor) else value
    )


def differs(got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> str:
    if len(got) != len(wanted):
        return f"{len(got)} results instead of {len(wanted)}"
    for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
        if g.shape != w.shape:
            return f"result {i} has shape {tuple(g.shape)} instead of {tuple(w.shape)}"
        if not torch.equal(g.isnan(), w.isnan()):
            return f"result {i} has NaN elsewhere"
        error = (g.double() - w.double()).nan_to_num(0.0).abs().max() if g.numel() else 0.0
        least = TOLERANCE[g.dtype if g.dtype in TOLERANCE else torch.float64]
        largest = w.double().nan_to_num(0.0).abs().max() if g.numel() else 0.0
        if error > max(least, TOLERANCE[dtype]) * max(1.0, float(largest)):
            return f"result {i} is wrong by {float(error):.3g}, of {float(largest):.3g}"
    return ""


def check(name: str, seed: int) -> list[str]:
    """What is wrong with one call."""
    op, problems = OPERATORS[name], []
    r = random.Random(seed)
    dtype, invalid, holes = r.choice(FLOATS), r.random() < 0.65, r.random() < 0.1
    gradients, spaced = not holes, r.random() < 0.2

    def arguments() -> tuple[Arguments, str]:
        again = random.Random(seed + 1)
        torch.manual_seed(seed)
        a = op.build(again, dtype)
        if holes and not invalid and op.gradients:
            x = tensors_of(a[op.gradients[0]])[0]
            # A weight that is NaN and dropped counts or does not: no contract says which.
            if x.numel() and not (name == "attend" and a["dropout"]):
                x[(0,) * x.dim()] = NAN
        if spaced and not invalid and "averages" not in a:
            spread(op, a)
        return a, spoil(again, op, a) if invalid else ""

    how = arguments()[1]
    if invalid and not how:
        return []
    for backend in BACKENDS:
        a = arguments()[0]
        what = f"{name}, {backend}, {str(dtype)[6:]}, seed {seed}" + (f", {how}" if invalid else "")
        print(f"call {what}", flush=True)
        try:
            with dk.use_backend(backend):
                got = run(op, a, seed, gradients)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if "are out of bounds for storage of size" in text or "incompatible tensor type" in text:
                continue  # PyTorch's own, of a view or of `.data =` before the operator is called
            if not invalid:
                problems.append(f"refused: {what}: {text[:300]}")
            elif not re.search(r"expected.*(got|found)", text, re.I | re.S):
                problems.append(f"no expected and got: {what}: {text[:200]}")
            continue
        if invalid:
            problems.append(f"accepted: {what}")
            continue
        b = {key: in_float64(value) for key, value in arguments()[0].items()}
        if "low" in b:
            high = [dk.merge_ema_state(*pair).double() for pair in zip(a0(arguments()[0]), b.pop("low"), strict=True)]
            b["averages"] = high
        with dk.use_backend("reference"):
            wanted = run(op, b, seed, gradients)
        lowest = max((t.dtype for t in [*tensors_of(list(a.values())), *got] if t.dtype in TOLERANCE),
                     key=TOLERANCE.__getitem__, default=dtype)  # fmt: skip
        if isinstance(a.get("fill"), dk.Noise):
            lowest = min(lowest, torch.float32, key=lambda of: -TOLERANCE[of])  # noise is made in float32
        if problem := differs(got, wanted, lowest):
            problems.append(f"wrong: {what}: {problem}")
    return problems


def a0(a: Arguments) -> list[Tensor]:
    return a["averages"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("seed", "first", "calls"):
        parser.add_argument(f"--{option}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = list(OPERATORS)
    for i in range(options.first, options.first + options.calls):
        print(f"number {i}", flush=True)
        for problem in check(names[i % len(names)], 10**6 * options.seed + i):
            print(f"finding {problem}".replace("\n", " "), flush=True)
    print("end", flush=True)


if __name__ == "__main__":
    sys.exit(main())
