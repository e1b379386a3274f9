"""Attention of bf16 tensors at every instruction level: which products run, errors, NaN, dropout, bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2v_kernels import _native

from .conftest import run_python

LEVELS = ("base", "avx2", "avx512", "avx512bf16", "amx")

_PRELUDE = """
import torch, torch.nn.functional as F
from d2v_kernels import _native, use_backend
op = torch.ops.d2v_native
LEVEL = _native.build_record()["isa"]
print(LEVEL)
torch.manual_seed(1)

def make(n, t, h, d, size=1.0):
    query, key, value = torch.randn(n, t, 3, h, d).unbind(2)
    return [x.bfloat16() for x in (size * query, key, value, torch.randn(n, t, h, d))]

def run(q, k, v, g, slopes=None, positions=None, lengths=None, valid=None, keys=None, dropout=0.0, scale=0.125):
    rest = slopes, positions, lengths, valid, keys, dropout, scale
    out, log_sum = op.attention(q, k, v, *rest)
    return [out, log_sum, *op.attention_backward(g, q, k, v, out, log_sum, *rest)[: 3 if slopes is None else 4]]

def composed(q, k, v, g, attend):
    leaves = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, g.transpose(1, 2))
    return [x.transpose(1, 2).detach() for x in (out, *gradients)]
"""

_ERRORS = """
for n, t, h, d in ((2, 17, 2, 32), (2, 40, 2, 64), (1, 197, 2, 64), (1, 301, 1, 80), (1, 33, 3, 15)):
    for size in (1.0, 4.0):
        inputs = make(n, t, h, d, size)
        truth = composed(*(x.double() for x in inputs), lambda q, k, v: (0.125 * q @ k.mT).softmax(-1) @ v)
        theirs = composed(*inputs, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.125))
        ours = run(*inputs)
        for name, x, y, z in zip(("out", "query", "key", "value"), [ours[0], *ours[2:]], theirs, truth):
            error, allowed = ((a.double() - z).square().mean().sqrt() for a in (x, y))
            assert error <= 1.5 * allowed, (t, d, size, name, float(error), float(allowed))
"""

_PRODUCTS = """
# Weights in bf16 or in fp32: results that tell one from the other. Ten keys, so that no sum is rounded much.
q, k, v, g = make(8, 10, 4, 16)
s = 0.125 * q.double().transpose(1, 2) @ k.double().transpose(1, 2).mT
weights = (s - s.amax(-1, keepdim=True)).exp()
total, value = weights.sum(-1, keepdim=True), v.double().transpose(1, 2)
narrow, wide = ((w.double() @ value / total).transpose(1, 2).bfloat16() for w in (weights.bfloat16(), weights))
out = run(q, k, v, g)[0]
as_narrow, as_wide = (float((out == x).double().mean()) for x in (narrow, wide))
assert float((narrow == wide).double().mean()) < 0.9
wanted, other = (as_narrow, as_wide) if LEVEL in ("avx512bf16", "amx") else (as_wide, as_narrow)
assert wanted > 0.99 > 0.9 > other, (as_narrow, as_wide)
"""

_NAN = """
inputs = make(2, 40, 2, 33)
valid = torch.rand(2, 40) > 0.3
plain = run(*inputs, lengths=torch.tensor([40, 29]), valid=valid)
masked = ~(valid & (torch.arange(40) < torch.tensor([[40], [29]])))
for x, bad in zip(inputs[1:3], (float("nan"), float("inf"))):
    x[masked] = bad
for x, y in zip(plain, run(*inputs, lengths=torch.tensor([40, 29]), valid=valid)):
    assert torch.equal(x, y)
for which in (0, 1, 2):
    q, k, v, g = make(1, 40, 1, 8)
    (q, k, v)[which][0, 3, 0, 2] = float("nan")
    out, log_sum, *gradients = run(q, k, v, g)
    assert out.isnan().any(-1)[0, :, 0].tolist() == [which != 0 or i == 3 for i in range(40)]
    assert log_sum.isnan().sum() == (1, 40, 0)[which]
    for gradient, wanted in zip(gradients, ((1, 40), (40, 40), (40, 40))[which]):
        assert gradient.isnan().any(-1).sum() == wanted
tiny = torch.full((1, 20, 1, 32), 2.0**-130).bfloat16()
for x in run(tiny, tiny, tiny, tiny):
    assert x.isfinite().all()
empty = run(*make(2, 5, 1, 16), lengths=torch.tensor([0, 5]))
assert empty[1][0].eq(float("inf")).all() and not any(x[0].any() for x in (empty[0], *empty[2:]))
"""

_DROPOUT = """
t, d = 61, 64
q, k, _, g = (0.1 * x for x in make(2, t, 3, d))
unit = torch.eye(t, d).bfloat16()[:, None].expand(2, t, 3, d).contiguous()
valid, keys = torch.rand(2, t) > 0.2, torch.tensor([5, -(2**40)])
ours = run(q, k, unit, g, valid=valid, keys=keys, dropout=0.4)[0]
with use_backend("reference"):
    theirs = torch.ops.d2v.attention(q, k, unit, None, None, None, valid, keys, 0.4, 0.125)[0]
assert torch.equal(ours == 0, theirs == 0)
dropped = (ours[..., :t] == 0)[valid[:, None, None].expand(2, t, 3, t)]
assert abs(float(dropped.double().mean()) - 0.4) < 0.02
"""

_BITS = """
for t, d in ((17, 32), (130, 64), (300, 40)):
    slopes, keys = 0.1 * torch.rand(3), torch.tensor([3, 4])
    joint = torch.randn(2, t, 3, 3, d).bfloat16()
    q, k, v = joint.unbind(2)
    grad = torch.randn(2, t, 3, d).bfloat16()
    rest = dict(slopes=slopes, positions=torch.randint(0, 90, (2, t - 1)), keys=keys, dropout=0.2)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(q, k, v, grad, **rest))
        results.append(run(*(x.contiguous() for x in (q, k, v)), grad, **rest))
    alone = {**rest, "positions": rest["positions"][:1], "keys": keys[:1]}
    results.append(run(*(x[:1] for x in (q, k, v)), grad[:1], **alone)[:5])  # one row: queries split among threads
    for other in results[1:]:
        for x, y in zip(results[0], other):
            assert torch.equal(x[: len(y)], y), (t, d)
"""

_PARTS = (_ERRORS, _PRODUCTS, _NAN, _DROPOUT, _BITS)


@pytest.mark.parametrize("level", LEVELS)
def test_bf16(cpu_library: Path, level: str) -> None:
    if level not in _native.build_record()["isa_levels"]:
        pytest.skip(f"level {level} is not built")
    script = "".join(f"    {line}\n" for part in _PARTS for line in part.splitlines())
    got = run_python(_PRELUDE + f"if LEVEL == {level!r}:\n" + script, D2V_KERNELS_ISA=level).strip()
    if got != level:
        pytest.skip(f"the processor has no {level}, only {got}")
