"""Inputs as other people's code has them: other strides, dynamic shapes, vmap."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_kernels import (
    Alibi,
    Masks,
    MaskSampler,
    _checks,
    alibi_slopes,
    attend,
    average_layers,
    conv_layer_norm_gelu,
    dropout_add_layer_norm,
    gather_tokens,
    gelu,
    gelu_linear,
    layer_norm_gelu,
    masked_regression_loss,
    masks_from_bool,
    products,
    restore_tokens,
    update_ema_,
)

INDEX = torch.tensor([[0, 2, 1], [3, 1, 1]])

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # of (2,T,8)
    "average_layers": lambda x: average_layers([x.detach(), x.detach()], norm="layer"),
    "gather_tokens": lambda x: gather_tokens(x, INDEX),
    "restore_tokens": lambda x: restore_tokens(x, INDEX, fill=torch.zeros(8)),
    "restore_tokens fill": lambda x: restore_tokens(torch.ones(2, 1, 8), INDEX, fill=x),
    "dropout_add_layer_norm branch": lambda x: dropout_add_layer_norm(x, torch.ones_like(x))[0],
    "dropout_add_layer_norm residual": lambda x: dropout_add_layer_norm(torch.ones_like(x).contiguous(), x)[1],
    "conv_layer_norm_gelu": lambda x: conv_layer_norm_gelu(x, torch.ones(8, 4, 3), residual=True),
    "gelu": gelu,
    "gelu_linear": lambda x: gelu_linear(x, torch.ones(3, 8)),
    "layer_norm_gelu": layer_norm_gelu,
    "masked_regression_loss": lambda x: masked_regression_loss(x, torch.ones_like(x).contiguous()).loss,
    "attend": lambda x: attend(x[:, :, None], x[:, :, None], x[:, :, None]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_channels_that_do_not_lie_side_by_side(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a convolution's output: copied with one warning, values and gradients as of the copy."""
    monkeypatch.setattr(_checks, "_noted", set())
    run, first = FUNCTIONS[name], torch.randn(2, 8, 5).requires_grad_()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = [run(x) for x in (first.mT, first.mT, first.mT.contiguous())]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[2])
    texts = [str(warning.message) for warning in said]
    silent = name in ("gelu", "gelu_linear", "conv_layer_norm_gelu")  # of any strides, as documented
    assert len(set(texts)) == len(texts) and all("has strides (40, 1" in text for text in texts)
    assert bool(texts) != silent
    if results[0].requires_grad:
        grads = [torch.autograd.grad(out.square().sum(), first)[0] for out in (results[0], results[2])]
        assert torch.equal(*grads)


def test_the_operators_themselves_refuse_them() -> None:
    with pytest.raises(ValueError, match="gather_tokens: last stride of x: expected 1, got strides"):
        torch.ops.d2v.gather_tokens(torch.ones(2, 8, 5).mT, INDEX, 1)
    x = torch.ones(2, 8, 5).mT
    x.untyped_storage().resize_(16)
    with pytest.raises(ValueError, match="gather_tokens: storage of a tensor"):
        gather_tokens(x, INDEX)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dynamic_shapes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One graph for all lengths, eager values, where the same library multiplies."""
    monkeypatch.setattr(products, "_choice", "library")
    torch.compiler.reset()
    run = FUNCTIONS[name]
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(run, dynamic=True, fullgraph=True, backend=count)
    for tokens in (5, 9, 23):
        x = torch.randn(2, tokens, 8)
        assert torch.equal(compiled(x), run(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("at", [0, 2])
def test_vmap_is_one_call_after_the_other(name: str, at: int) -> None:
    run = FUNCTIONS[name]
    x = torch.randn(3, 2, 5, 8)
    out = torch.func.vmap(run, in_dims=at)(x.movedim(0, at).contiguous())
    assert torch.allclose(out, torch.stack([run(one) for one in x]), atol=1e-6)


class Watch(TorchDispatchMode):
    """Names of the operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_short_cut(name: str) -> None:
    """Past the dispatcher: the bits and gradients of the operator; not where a mode or the profiler watches."""
    run, x = FUNCTIONS[name], torch.randn(2, 5, 8, requires_grad=True)
    with Watch() as watch:
        through = run(x)
    assert any(op.startswith(("d2v.", "aten._scaled_dot_product")) for op in watch.seen), watch.seen
    direct = run(x)
    assert torch.equal(direct, through) and direct.requires_grad == through.requires_grad
    if direct.requires_grad:
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (direct, through)]
        assert torch.equal(*grads)


def test_profilers_see_operators() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gelu(torch.ones(3))
    assert "d2v::gelu" in {event.key for event in profile.key_averages()}


def test_the_schema_is_kept() -> None:
    """What PyTorch would convert or refuse goes to it."""
    x = torch.randn(1, 3, 4)
    index = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=r"(?i)expected"):
        gather_tokens(x, index, clones=2.0)  # type: ignore[arg-type]
    assert torch.equal(layer_norm_gelu(x, eps=1), layer_norm_gelu(x, eps=1.0))


ARRAY = torch.ones(1, 3, 4).numpy()


@pytest.mark.parametrize(
    "call",
    [
        lambda x, i: gelu(ARRAY),
        lambda x, i: gelu_linear(ARRAY, x[0]),
        lambda x, i: gelu_linear(x, x[0], ARRAY),
        lambda x, i: conv_layer_norm_gelu(ARRAY, x),
        lambda x, i: conv_layer_norm_gelu(x, x.mT, ARRAY),
        lambda x, i: layer_norm_gelu(ARRAY),
        lambda x, i: layer_norm_gelu(x, ARRAY),
        lambda x, i: gather_tokens(ARRAY, i),
        lambda x, i: gather_tokens(x, i.numpy()),
        lambda x, i: restore_tokens(x, i[:1].numpy(), fill=x[0, 0]),
        lambda x, i: masked_regression_loss(x, ARRAY),
        lambda x, i: masked_regression_loss(x, x, i[0].numpy(), i[0]),
        lambda x, i: average_layers([x, ARRAY]),
        lambda x, i: dropout_add_layer_norm(x, x, ARRAY),
        lambda x, i: attend(x[None], x[None], ARRAY[None]),
    ],
)
def test_arrays_are_no_tensors(call: Callable[[Tensor, Tensor], object]) -> None:
    with pytest.raises(TypeError, match=r"^\w+: .*expected (a tensor|tensors), got ndarray$"):
        call(torch.randn(1, 3, 4), torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("attend", "average_layers")])
def test_forward_mode_is_refused(name: str) -> None:
    """PyTorch would drop the tangents without a word."""
    x = torch.randn(2, 5, 8)
    with pytest.raises(
        (NotImplementedError, RuntimeError), match=r"forward mode|setup_context|jvp|storage of TensorWrapper"
    ):
        torch.func.jvp(FUNCTIONS[name], (x,), (torch.ones_like(x),))


def test_vmap_never_writes() -> None:
    with pytest.raises(NotImplementedError, match="expected tensors that are written without vmap"):
        torch.func.vmap(lambda a: update_ema_([a], [a], 0.5))(torch.ones(3, 4))


@pytest.mark.parametrize("clue", ["valid", "slopes"])
def test_the_layout_of_other_attention_functions_is_refused(clue: str) -> None:
    x = torch.randn(2, 4, 9, 8)  # (N, H, T, D)
    positions = torch.arange(9).expand(2, 9)
    options = {"valid": torch.ones(2, 9).bool()} if clue == "valid" else {"alibi": Alibi(alibi_slopes(4), positions)}
    with pytest.raises(ValueError, match=r"expected \(N, T, H, D\), got \(2, 4, 9, 8\), which fits as \(N, H, T, D\)"):
        attend(x, x, x, **options)
    x = x.transpose(1, 2)
    assert attend(x, x, x, **options).shape == (2, 9, 4, 8)


def test_what_is_printed_fits_a_line() -> None:
    sampler = MaskSampler("block", grid=(14, 14), ratio=0.8, span=3, inverse=True)
    assert eval(repr(sampler)).rule == sampler.rule
    masks = masks_from_bool(torch.tensor([[True, False, True]]))
    assert repr(masks) == "Masks(1 rows of 3 tokens, 2 masked, cpu)" and isinstance(masks, Masks)
