"""Data2Vec: operators used, backends, masks, noise, encode, teacher, state dict, messages."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from support.families import make_batch, make_config
from support.tensors import BACKENDS
from torch import Tensor
from torch.func import functional_call

from d2v import Config, Data2Vec, Output, recipes
from d2v.model import transformer as encoder
from d2v.model.masking import make_mask_sampler
from d2v.model.transformer import Block, add_and_norm_plain, run_block
from d2v_kernels import MaskSampler, registry, use_backend


def tiny(**sections: dict[str, Any]) -> Config:
    """The quick-start recipe with 4 masks and some fields replaced, for example encoder={"depth": 4}."""
    config = recipes.vision_tiny()
    config = dataclasses.replace(config, mask=dataclasses.replace(config.mask, copies=4))
    changes = {k: dataclasses.replace(getattr(config, k), **v) for k, v in sections.items()}
    return dataclasses.replace(config, **changes)


def with_class_token() -> Config:
    return tiny(
        encoder={"extra_tokens": 1, "norm_order": "post", "prenet_depth": 1, "init_std": 0.02},
        loss={"class_weight": 0.01},
        target={"norm": "instance"},
    )


def build(config: Config | None = None, seed: int = 0) -> Data2Vec:
    torch.manual_seed(seed)
    return Data2Vec(config or tiny())


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def run_step(model: Data2Vec, count: int = 4) -> Output:
    masks = make_mask_sampler(model.config).draw(range(count), 0, copies=model.config.mask.copies)
    keys = torch.arange(count * model.config.mask.copies)
    out: Output = model(images(count), masks=masks, noise_keys=keys)
    out.loss.backward()
    model.teacher.update(0.9)
    return out


@pytest.mark.parametrize("make", [tiny, with_class_token])
def test_native_step_equals_reference(make: Any) -> None:
    results = []
    for backend in ("reference", "native"):
        if backend == "native":
            _require_native()
        model = build(make())
        with use_backend(backend):
            out = run_step(model)
        results.append((out, model))
    (a, reference), (b, native) = results
    torch.testing.assert_close(b.prediction, a.prediction, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.targets, a.targets, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.losses, a.losses, rtol=1e-5, atol=1e-5)
    for (name, p), q in zip(reference.named_parameters(), native.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7, msg=name)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)


def _require_native() -> None:
    marks = BACKENDS[1].marks[0]
    if marks.args[0]:
        pytest.skip(marks.kwargs["reason"])


STEP_OPERATORS = (
    "average_layers", "update_ema_", "gather_tokens", "gather_tokens_backward", "restore_tokens",
    "restore_tokens_backward", "masked_regression_loss", "masked_regression_loss_backward",
)  # fmt: skip


@pytest.mark.parametrize("broken", STEP_OPERATORS)
def test_step_fails_without_operator(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each memory-bound step runs through its operator: none has a way around it."""
    choose = registry.choose

    def refuse(case: registry.Case, *args: Any) -> Any:
        if case.op == broken:
            raise RuntimeError(f"broken {broken}")
        return choose(case, *args)

    model = build(with_class_token())
    monkeypatch.setattr(registry, "_chosen", {})
    monkeypatch.setattr(registry, "choose", refuse)
    with pytest.raises(RuntimeError, match=f"broken {broken}"):
        run_step(model)


@pytest.mark.parametrize(
    "name", ["vision-tiny", "speech-base", "text-base", "speech1-base", "text1-base", "vision1-base"]
)
@pytest.mark.parametrize("packed", ["auto", "always"])
def test_forward_reads_nothing_from_the_device(name: str, packed: str) -> None:
    """On the meta device, where tensors have no values, any read of a value raises. Padding does not change that."""
    config = with_class_token() if name == "vision-tiny" else make_config(name)
    model = Data2Vec(config.replace("run.packed", packed))
    if config.stem.modality == "vision":
        inputs, lengths = torch.randn(2, 3, config.stem.image_size, config.stem.image_size), None
    else:
        inputs, lengths = make_batch(config, (2_000, 1_500) if config.stem.modality == "speech" else (31, 20))
    tokens, valid = model.stem.measure(inputs, lengths)
    copies = config.mask.copies
    masks = make_mask_sampler(config, tokens=tokens).draw(range(2), 0, copies=copies, lengths=valid)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: t.detach().to("meta").requires_grad_(t.requires_grad) for name, t in state.items()}
    keys = torch.empty(2 * copies, dtype=torch.int64, device="meta")
    out = functional_call(model, meta, (inputs.to("meta"), lengths, masks.to("meta"), None, keys))
    out.loss.backward()
    assert out.prediction.device.type == "meta"
    assert out.prediction.shape == (int(masks.mask.sum()), config.encoder.width)
    assert all(meta[n].grad is not None for n, p in model.named_parameters() if p.requires_grad)


def test_output() -> None:
    config = with_class_token()
    out = run_step(build(config))
    n, masked, width = 16, 48, 64
    assert out.prediction.shape == out.target.shape == (n * masked, width)
    assert out.targets.shape == (4, 64, width)
    assert not out.targets.requires_grad
    assert out.class_prediction is not None
    assert out.class_target is not None
    assert out.class_prediction.shape == out.class_target.shape == (n, width)
    assert out.sample_size == n * masked
    assert torch.allclose(out.loss, sum(out.losses.values(), torch.zeros(())) / out.sample_size)
    rows = make_mask_sampler(config).draw(range(4), 0, copies=4).rows
    expected = out.targets.repeat_interleave(4, 0).flatten(0, 1)[rows]
    assert torch.equal(out.target, expected)


def test_bool_masks_equal_masks() -> None:
    model = build()
    masks = make_mask_sampler(model.config).draw(range(2), 0, copies=4)
    keys = torch.arange(8)
    a = model(images(2), masks=masks, noise_keys=keys)
    b = model(images(2), masks=masks.mask, noise_keys=keys)
    assert torch.equal(a.prediction, b.prediction)


def test_drawn_masks_differ_between_calls_and_are_reproducible() -> None:
    x = images(2)
    first, second = build(), build()
    torch.manual_seed(1)
    a, b = first(x).loss, first(x).loss
    torch.manual_seed(1)
    c = second(x).loss
    assert torch.equal(a, c)
    assert not torch.equal(a, b)


def test_noise_rows_stand_in_ascending_order() -> None:
    model = build()
    masks = make_mask_sampler(model.config).draw(range(1), 0, copies=1)
    noise = torch.randn(1, 48, 64)
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images(1), masks=masks, noise=noise)
    assert torch.equal(seen[0][masks.mask], noise[0])


@pytest.mark.parametrize("order", ["pre", "post"])
def test_block_keeps_its_residual(order: str) -> None:
    """With both branches silenced a pre-norm block is the identity, a post-norm block two norms."""
    block = build(tiny(encoder={"norm_order": order})).blocks.blocks[0]
    for layer in (block.attn.proj, block.mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    x = torch.randn(2, 5, 64)
    if order == "pre":
        assert torch.equal(block(x).output, x)
    else:
        torch.testing.assert_close(block(x).output, block.norm2(block.norm1(x)))


def test_published_pre_norm_loses_the_residual_only_when_asked() -> None:
    config = dataclasses.replace(tiny(), published=frozenset({"pre-norm-without-residual"}))
    block = build(config).blocks.blocks[0]
    x = torch.randn(2, 5, 64)
    _, f = block.branch(x)
    assert torch.equal(block(x).output, f + f)
    sound = build().blocks.blocks[0]
    _, f = sound.branch(x)
    assert not torch.equal(sound(x).output, f + f)


def make_block(order: str, dropout: float = 0.0, **fields: Any) -> Block:
    torch.manual_seed(0)
    block = Block(tiny(encoder={"norm_order": order, "dropout": dropout, **fields}).encoder)
    for norm in (block.norm1, block.norm2):
        if norm.weight is not None:
            torch.nn.init.normal_(norm.weight, 1.0, 0.2)
            torch.nn.init.normal_(norm.bias)
    return block


def run_for_gradients(block: Block, recompute: bool = False) -> list[Tensor]:
    """Output and gradients of a block on fixed input, drawn from a fixed seed."""
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(5)
    y = run_block(block, x, encoder.NO_BIAS, 0, recompute)
    parameters = list(block.parameters())
    return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, 64)).sum() + y.square().sum(), [x, *parameters])]


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layer_scale", [0.0, 0.5])
def test_one_pass_block_equals_the_plain_one(order, affine, layer_scale, monkeypatch) -> None:
    block = make_block(order, norm_affine=affine, layer_scale=layer_scale)
    got = run_for_gradients(block)
    monkeypatch.setattr(encoder, "add_and_norm", add_and_norm_plain)
    torch.testing.assert_close(got, run_for_gradients(block), rtol=1e-4, atol=1e-4)


def test_block_uses_the_operator_on_a_cpu_with_dropout_or_two_dtypes(monkeypatch) -> None:
    calls: list[float] = []
    operator = encoder.dropout_add_layer_norm
    monkeypatch.setattr(
        encoder, "dropout_add_layer_norm", lambda *a, **o: (calls.append(o["dropout"]), operator(*a, **o))[1]
    )
    block, x = make_block("post", 0.25), torch.randn(2, 3, 64)
    block(x)
    assert calls == [0.25, 0.25]
    make_block("post", 0.25).eval()(x)  # without dropout PyTorch's own steps are as quick
    assert len(calls) == 2
    with torch.autocast("cpu", torch.bfloat16):
        block(x)
        block(x.bfloat16())
        block.eval()(x)
        block(x.bfloat16())
    assert calls[2:] == [0.25, 0.25, 0.25, 0.25, 0.0, 0.0]
    block.to("meta").train()(x.to("meta"))
    assert len(calls) == 8


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_block_under_autocast_equals_the_plain_one(order, drop_path, monkeypatch) -> None:
    block = make_block(order, 0.0)
    block.drop_path = drop_path
    with torch.autocast("cpu", torch.bfloat16):
        got = run_for_gradients(block)
        monkeypatch.setattr(encoder, "add_and_norm", add_and_norm_plain)
        want = run_for_gradients(block)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() <= 0.02 * y.norm()


@pytest.mark.parametrize("order", ["pre", "post"])
def test_recomputed_blocks_drop_the_same(order) -> None:
    block = make_block(order, 0.3)
    kept, recomputed = run_for_gradients(block), run_for_gradients(block, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    assert not torch.equal(kept[0], run_for_gradients(block.eval())[0])


def test_dropout_of_a_block_has_the_right_mean() -> None:
    """Both branches lose their elements: the mean over many draws is the block without dropout, to first order."""
    block = make_block("pre", 0.1)
    x = torch.randn(1, 5, 64).expand(4000, 5, 64)
    with torch.no_grad():
        u = torch.cat([block.branch(part)[0] for part in x.split(500)])
        wanted = block.eval().branch(x[:1])[0][0]
    error = (u.mean(0) - wanted).abs().max() / (u - x).abs().max()
    assert error < 5.0 * (0.1 / 0.9 / 4000) ** 0.5
    assert ((u - x) == 0).double().mean().sub(0.1).abs() < 0.002


def test_teacher_stops_after_the_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny(encoder={"depth": 4}, target={"top_k": 2}))
    calls: list[str] = []
    for name, module in model.teacher.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: calls.append(name))
        if isinstance(module, Block):
            merge = module.merge
            monkeypatch.setattr(
                module, "merge", lambda *a, merge=merge, name=name: (calls.append(f"{name}.merge"), merge(*a))[1]
            )
    features = model.stem(images(1))
    tensors = model.teacher.collect(images(1), features, None, 2, "ffn")
    assert len(tensors) == 2
    assert "blocks.blocks.2.merge" in calls
    assert "blocks.blocks.3.merge" not in calls
    assert "blocks.norm" not in calls


@pytest.mark.parametrize("config", [tiny(), with_class_token()])
def test_encode(config: Config) -> None:
    model = build(config)
    model.train()
    out = model.encode(images(2))
    assert out.features.shape == (2, 64, 64)
    assert out.valid.dtype == torch.bool
    assert out.valid.all()
    assert (out.class_token is None) == (config.encoder.extra_tokens == 0)
    assert model.training
    assert model.blocks.training
    assert not out.features.requires_grad
    assert torch.equal(model.teacher.encode(images(2)).features, out.features)
    depth = config.encoder.prenet_depth + config.encoder.depth
    last = model.encode(images(2), layer=depth).features
    assert torch.equal(last, out.features) == (config.encoder.norm_order == "post")
    assert not torch.equal(model.encode(images(2), layer=0).features, last)
    with pytest.raises(ValueError, match=f"layer: expected 0 to {depth}, got {depth + 1}"):
        model.encode(images(2), layer=depth + 1)


def test_encode_is_free_of_dropout() -> None:
    model = build(tiny(encoder={"dropout": 0.5, "prenet_dropout": 0.5, "attention_dropout": 0.5, "layer_drop": 0.5}))
    assert torch.equal(model.encode(images(1)).features, model.encode(images(1)).features)
    features = model.stem(images(1))
    first, second = (model.teacher.collect(images(1), features, None, 3, "ffn") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_teacher_is_never_trained() -> None:
    model = build()
    assert not any(p.requires_grad for p in model.teacher.parameters())
    run_step(model)
    assert all(p.grad is None for p in model.teacher.parameters())
    assert not model.teacher.training


def test_state_dict_round_trip() -> None:
    model, other = build(seed=0), build(seed=1)
    run_step(model)
    model.teacher.update(0.5)
    other.load_state_dict(model.state_dict())
    a, b = run_step(model), run_step(other)
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.targets, b.targets)


def test_copies_of_a_model_are_independent() -> None:
    model = build()
    run_step(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.stem.proj.weight.zero_()
    twin.teacher.update(0.0)
    assert float(twin.teacher.stem.proj.weight.abs().sum()) == 0.0
    assert float(model.teacher.stem.proj.weight.abs().sum()) > 0.0


@pytest.mark.parametrize("scope", ["all", "encoder", "blocks"])
def test_teacher_owns_what_its_scope_says(scope: str) -> None:
    model = build(tiny(ema={"scope": scope}))
    parts = ("stem", "positions", "context", "blocks")
    assert model.teacher.owned == {"all": parts, "encoder": parts[1:], "blocks": parts[3:]}[scope]
    run_step(model)


class TestWorkingCopies:
    """The teacher's bfloat16 weights beside the float32 averages."""

    config = tiny(run={"precision": "bf16"})

    def targets(self, model: Data2Vec) -> Tensor:
        out: Output = model(images(2), masks=make_mask_sampler(model.config).draw(range(2), 0, copies=4))
        return out.targets

    def test_targets_are_near_those_of_float32(self) -> None:
        exact, rounded = self.targets(build()), self.targets(build(self.config))
        assert not torch.equal(exact, rounded)
        torch.testing.assert_close(rounded, exact, rtol=0.0, atol=0.15)

    def test_averages_stay_in_float32_and_alone_in_the_state(self) -> None:
        model = build(self.config)
        self.targets(model)
        assert {p.dtype for p in model.teacher.parameters()} == {torch.float32}
        assert model.state_dict().keys() == build().state_dict().keys()

    def test_update_writes_the_copies(self) -> None:
        model = build(self.config)
        before = self.targets(model)
        with torch.no_grad():
            for p in model.blocks.parameters():
                p.add_(torch.randn_like(p))
        model.teacher.update(0.0)
        working = model.teacher._working["blocks"].state_dict()
        dtypes = set()
        for name, p in model.teacher.blocks.state_dict().items():
            dtypes.add(working[name].dtype)
            assert torch.equal(working[name], p.to(working[name].dtype)), name
        assert dtypes == {torch.bfloat16, torch.float32}  # products, norms
        assert not torch.equal(before, self.targets(model))

    def test_loaded_averages_reach_the_copies(self) -> None:
        model, other = build(self.config, seed=0), build(self.config, seed=1)
        self.targets(other)
        other.load_state_dict(model.state_dict())
        assert torch.equal(self.targets(model), self.targets(other))

    def test_cast_model_keeps_float32_averages(self) -> None:
        model = build().bfloat16()
        assert {p.dtype for p in model.teacher.parameters()} == {torch.float32}
        out = model(images(2).bfloat16())
        out.loss.backward()
        model.teacher.update(0.9)
        assert out.targets.dtype == torch.float32
        assert torch.isfinite(out.loss)


def test_bfloat16_autocast() -> None:
    model = build(tiny(run={"precision": "bf16"}))
    masks = make_mask_sampler(model.config).draw(range(2), 0, copies=4)
    keys = torch.arange(8)
    exact = build()(images(2), masks=masks, noise_keys=keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images(2), masks=masks, noise_keys=keys)
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(float(exact.loss.detach()), rel=0.02)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_float64_model() -> None:
    model = build().double()
    out = model(images(1).double())
    assert out.loss.dtype == out.targets.dtype == torch.float64


def test_drop_path_and_layer_drop_train() -> None:
    model = build(tiny(encoder={"drop_path": 0.5, "layer_drop": 0.3, "dropout": 0.1, "activation_dropout": 0.1}))
    losses = {float(model(images(2), noise_keys=torch.arange(8)).loss.detach()) for _ in range(4)}
    assert len(losses) == 4


def test_initialisation_is_the_published_one() -> None:
    model = build(with_class_token())
    qkv = model.blocks.blocks[0].attn.qkv
    assert float(qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not qkv.bias.any()
    assert float(model.context.extra_tokens.detach().std()) == pytest.approx(1.0, rel=0.3)
    plain = build().blocks.blocks[0].attn.qkv
    assert float(plain.weight.detach().std()) == pytest.approx((1 / 64 / 3) ** 0.5, rel=0.05)
    bound = (6.0 / (3 * 16 + 64)) ** 0.5
    assert float(model.stem.proj.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
    assert float(model.decoder.proj.weight.detach().std()) == pytest.approx((1 / 64 / 3) ** 0.5, rel=0.05)


MASK = torch.zeros(4, 64, dtype=torch.bool)
UNEQUAL = MASK.clone()
UNEQUAL[:, :10] = True
UNEQUAL[2, 20] = True
EQUAL = MASK.clone()
EQUAL[:, :48] = True


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"inputs": torch.zeros(2, 3, 32, 28)}, ValueError, r"inputs: expected shape \(B, 3, 32, 32\), got \(2, 3,"),
        ({"inputs": torch.zeros(2, 1, 32, 32)}, ValueError, r"inputs: .*got \(2, 1, 32, 32\)"),
        ({"inputs": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, TypeError, "inputs: expected floating .* got uint8"),
        ({"lengths": torch.tensor([3, 4])}, ValueError, "lengths: expected None for images"),
        ({"masks": MASK[:3]}, ValueError, r"masks: .*N a multiple of the 2 samples, got \(3, 64\)"),
        ({"masks": MASK[:, :60]}, ValueError, r"masks: expected \(N, 64\)"),
        ({"masks": MASK.float()}, ValueError, "masks: expected bool"),
        ({"masks": MASK[:0]}, ValueError, "masks: expected"),
        ({"masks": UNEQUAL}, ValueError, r"row 0 has 10; got \[11\] in rows \[2\]"),
        ({"masks": EQUAL, "noise": torch.zeros(4, 47, 64)}, ValueError, r"noise: expected shape \(4, 48, 64\)"),
        ({"noise_keys": torch.zeros(3, dtype=torch.int64)}, ValueError, "noise keys"),
        ({"inputs": torch.zeros(0, 3, 32, 32)}, ValueError, "masks|inputs"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    model = build()
    with pytest.raises(error, match=text):
        model(**{"inputs": torch.zeros(2, 3, 32, 32), **arguments})


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"encoder": {"heads": 5}}, "encoder.width: expected a multiple of encoder.heads"),
        ({"encoder": {"width": 66, "heads": 2}}, "encoder.width: expected a multiple of 4"),
        ({"target": {"top_k": 4}}, "target.top_k"),
        ({"stem": {"patch_size": 5}}, "stem.patch_size: expected a divisor of stem.image_size 32, got 5"),
        ({"decoder": {"groups": 7}}, "decoder.groups: expected a divisor"),
        ({"loss": {"class_weight": 0.1}}, "encoder.extra_tokens: expected at least 1, got 0"),
        ({"mask": {"kind": "blocks"}}, "MaskSampler: kind"),
        ({"target": {"norm": "spatial"}}, "norm: expected one of"),
    ],
)
def test_bad_configuration_is_named(sections: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build(tiny(**sections))(images(1))


def test_sampler_follows_the_configuration() -> None:
    sampler = make_mask_sampler(recipes.vision_base())
    assert isinstance(sampler, MaskSampler)
    masks = sampler.draw([0, 1], 0, copies=2)
    assert masks.mask.shape == (4, 196)
    assert masks.mask.sum(dim=1).tolist() == [157] * 4
