"""Published checkpoint files: read, written again, refused."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support import published, published_first, published_second
from support.golden import load_case

import d2v
from d2v import recipes
from d2v.interop import fairseq
from d2v.interop.fairseq.config import describe, translate
from d2v.interop.fairseq.names import family_of
from d2v.interop.huggingface.config import write_config
from d2v.interop.torch_file import read_torch_file

FAMILIES = ("d2v1_audio", "d2v1_text", "d2v1_vision", "d2v2_audio", "d2v2_image", "d2v2_text")
STOCK = (
    "speech_base", "speech_large", "vision_base", "vision_large", "vision_huge14", "text_base", "text_large",
    "speech1_base", "vision1_base", "text1_base", "eat_base", "eat_large",
)  # fmt: skip


def published_state(case: str, half: bool = False) -> dict[str, Any]:
    """What the published code would have saved for a golden case."""
    tensors, about = load_case(case)
    dtype = torch.float16 if half else torch.float32
    model: dict[str, Any] = {
        n.removeprefix("student/"): t.to(dtype) if t.is_floating_point() else t
        for n, t in tensors.items()
        if n.startswith("student/")
    }
    teacher = {n.removeprefix("teacher/"): t for n, t in tensors.items() if n.startswith("teacher/")}
    prefix = {"d2v1_audio": "encoder.", "d2v1_text": "encoder.sentence_encoder.", "d2v1_vision": "encoder."}.get(
        case, ""
    )
    for name, tensor in teacher.items():  # what the published code copies is the student's, in its precision
        if torch.equal(tensor, tensors.get(f"student/{prefix}{name}", torch.empty(0))):
            teacher[name] = model[prefix + name].to(tensor.dtype)
    model["encoder._ema" if case == "d2v1_text" else "_ema"] = teacher
    return {"args": None, "cfg": {"model": about["config"]}, "model": model, "last_optimizer_state": None}


def make_published(family: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A small published configuration with random tensors of a student and a teacher."""
    name = family.partition("_")[2]
    if family == "d2v2_image":
        config = published.make_config(**options)
        student = published.make_tensors(config, seed=1)
        return config, student, published.make_teacher(config, student, seed=2)
    module = published_first if family.startswith("d2v1") else published_second
    config = module.make_config(name, **options)
    shapes = module.make_shapes(config, name)
    student, other = (published_second.make_tensors(shapes, seed=seed) for seed in (1, 2))
    names = module.teacher_names(config, name, shapes)
    copied: set[str] = set()
    if isinstance(names, tuple):
        names, copied = names
    return config, student, {theirs: (student if ours in copied else other)[ours] for ours, theirs in names.items()}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", FAMILIES)
def test_round_trip(tmp_path: Path, case: str, half: bool) -> None:
    state = published_state(case, half)
    torch.save(state, tmp_path / "a.pt")
    model = fairseq.load(tmp_path / "a.pt")
    assert family_of(model) == case and model.config.published <= {"positions-see-padding"}
    fairseq.save(model, tmp_path / "b.pt")
    again = read_torch_file(tmp_path / "b.pt")
    assert again["cfg"]["model"] == state["cfg"]["model"]
    key = "encoder._ema" if case == "d2v1_text" else "_ema"
    first, second = dict(state["model"]), dict(again["model"])
    teacher, teacher_again = first.pop(key), second.pop(key)
    for ours, theirs in ((second, first), (teacher_again, teacher)):
        for name, tensor in ours.items():
            if name in theirs:  # fixed tables and what the published code copies may be absent there
                expected = theirs[name]
                assert tensor.dtype == expected.dtype or ours is teacher_again, name
                assert torch.equal(tensor.float(), expected.float()), name
        missing = {n for n in theirs if n not in ours and theirs[n].is_floating_point()}
        assert not missing - {"version", "encoder.sentence_encoder.version"}, missing


WHOLE = {"ema_layers_only": False, "ema_transformer_only": False}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("d2v1_audio", {"extractor_mode": "default"}),
    ("d2v1_audio", {**WHOLE, "average_top_k_layers": 3}),
    ("d2v1_vision", {"ema_transformer_only": False}),
    ("d2v2_audio", {"extractor_mode": "default", "ema_local_encoder": True}),
    ("d2v2_audio", {"keep_masked_pct": 0.25, "learned_alibi": True, "alibi_max_pos": 30}),
    ("d2v2_image", {"keep_masked_pct": 0.5, "local_dim": 12}),
    ("d2v2_image", {"use_alibi_encoder": True, "learned_alibi": True, "alibi_max_pos": 16, "local_dim": 24}),
    ("d2v2_image", {"transformer_decoder": True, "decoder_layers": 1}),
    ("d2v2_image", {"transformer_decoder": True, "enc_dec_transformer": True}),
    (
        "d2v2_image",
        {
            "shared_decoder": {
                "decoder_layers": 2,
                "decoder_dim": 8,
                "decoder_kernel": 3,
                "decoder_groups": 2,
                "decoder_residual": True,
                "projection_layers": 1,
                "projection_ratio": 2.0,
            }
        },
    ),
    ("d2v2_image", {"recon_loss": 0.5, "embed_dim": 48, "ema_encoder_only": True}),
]


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_options_round_trip(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """Configuration and tensors of a file with options that no published model has; the teacher is not the student."""
    config, student, teacher = make_published(family, options)
    torch.save({"cfg": {"model": config}, "model": {**student, "_ema": teacher}}, tmp_path / "a.pt")
    model = fairseq.load(tmp_path / "a.pt")
    fairseq.save(model, tmp_path / "b.pt")
    again = read_torch_file(tmp_path / "b.pt")
    written = again["cfg"]["model"]
    for part in (config, *config.get("modalities", {}).values()):
        where = written if part is config else next(iter(written["modalities"].values()))
        assert {n: where[n] for n in options if n in part} == {n: part[n] for n in options if n in part}
    second = fairseq.load(tmp_path / "b.pt")
    assert second.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    averaged = fairseq.teacher_parameters(model)
    shared = {"mask_emb", "final_proj.weight", "final_proj.bias"}  # the teacher has no use for them
    for name in averaged.keys() & teacher.keys() - shared:
        assert torch.equal(averaged[name], teacher[name].float()), name


@pytest.mark.parametrize("name", STOCK)
def test_described_options_translate_back(name: str) -> None:
    config = getattr(recipes, name)()
    model = dataclasses.replace(
        config, encoder=dataclasses.replace(config.encoder, width=96, depth=config.target.top_k)
    )
    family = f"d2v{config.version}_" + {"speech": "audio", "text": "text"}.get(
        config.stem.modality, "vision" if config.version == 1 else "image"
    )
    key = "modality_encoders.TEXT.local_encoder" if config.version == 2 else "encoder.sentence_encoder"
    shapes = {f"{key}.embed_tokens.weight": (config.stem.vocabulary, 96)}
    back = translate(describe(model, family), family, shapes, config.stem.mask_token)
    for section in ("stem", "decoder", "target", "head") if config.version == 2 else ("stem", "target"):
        assert getattr(back, section) == getattr(model, section), section
    assert back.loss_scale == pytest.approx(model.loss_scale) and back.loss.beta == model.loss.beta
    assert back.ema.start == model.ema.start and back.ema.end == model.ema.end
    for field in ("width", "heads", "depth", "prenet_depth", "norm_order", "dropout", "layer_drop", "alibi"):
        assert getattr(back.encoder, field) == getattr(model.encoder, field), field
    for field in ("ratio", "span", "copies", "inverse"):
        assert getattr(back.mask, field) == pytest.approx(getattr(model.mask, field)), field


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("text_base", {"stem": {"width": 48}}, "stem.width: expected encoder.width, got 48"),
    ("text1_base", {"stem": {"width": 48}}, "stem.width"),
    ("vision1_base", {"stem": {"width": 48}}, "stem.width"),
    ("text_base", {"mask": {"keep_masked": 0.1}}, "mask.keep_masked: expected 0 for mask.span 1, got 0.1"),
    ("speech_base", {"decoder": {"kind": "transformer"}}, "decoder.kind: expected conv, got transformer"),
    ("vision_base", {"decoder": {"kind": "cross", "heads": 4}}, "decoder.heads: expected 8, got 4"),
    ("speech1_base", {"ema": {"scope": "all"}}, "target.top_k: expected encoder.depth with ema.scope all, got 8"),
]


@pytest.mark.parametrize(("name", "changes", "text"), REFUSED)
def test_what_the_published_code_has_no_option_for(name: str, changes: dict[str, Any], text: str) -> None:
    config = getattr(recipes, name)().change(**changes)
    family = f"d2v{config.version}_" + {"speech": "audio", "text": "text"}.get(
        config.stem.modality, "vision" if config.version == 1 else "image"
    )
    with pytest.raises(NotImplementedError, match=text):
        describe(config, family)
    if config.version == 1 and "stem" in changes:
        with pytest.raises(NotImplementedError, match=r"huggingface: stem\.width: expected 768, got 48"):
            write_config(config)


def test_other_norms_of_waveforms_do_not_go_to_transformers() -> None:
    config = recipes.speech1_base().change(stem={"convolution_norm": "group"})
    with pytest.raises(NotImplementedError, match=r"stem.convolution_norm: expected layer, got group"):
        write_config(config)


def test_older_files_hold_a_namespace(tmp_path: Path) -> None:
    state = published_state("d2v1_audio")
    state["args"], state["cfg"] = argparse.Namespace(**state["cfg"]["model"]), None
    torch.save(state, tmp_path / "a.pt")
    assert fairseq.load(tmp_path / "a.pt").config.stem.modality == "speech"


def test_unknown_heads_are_named(tmp_path: Path) -> None:
    state = published_state("d2v1_audio")
    tensors = {f"w2v_encoder.w2v_model.{n}": t for n, t in state["model"].items() if n != "_ema"}
    tensors["decoder.embed_tokens.weight"] = torch.ones(5, 8)
    config = {"_name": "wav2vec_seq2seq", "w2v_args": {"model": state["cfg"]["model"]}}
    torch.save({"cfg": {"model": config}, "model": tensors}, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=r"left out the heads decoder\.embed_tokens"):
        model = fairseq.load(tmp_path / "a.pt")
    assert isinstance(model, d2v.Data2Vec)
    own = fairseq.parameters(model)
    assert torch.equal(own["post_extract_proj.weight"], state["model"]["post_extract_proj.weight"])


def test_vision_repository_names(tmp_path: Path) -> None:
    """Names and shapes of the separate 1.0 vision repository, made from a model of ours."""
    config = recipes.vision1_base()
    config = dataclasses.replace(
        config, stem=dataclasses.replace(config.stem, image_size=24, patch_size=4),
        encoder=dataclasses.replace(config.encoder, width=32, heads=4, depth=4),
        target=dataclasses.replace(config.target, top_k=2),
    )  # fmt: skip
    torch.manual_seed(0)
    model = d2v.Data2Vec(config).eval()
    tensors = {}
    names = {"cls_emb": "cls_token", "mask_emb": "mask_token"}
    for name, tensor in fairseq.parameters(model).items():
        name = names.get(name, name).replace("patch_embed.conv", "patch_embed.proj").replace("final_proj", "lm_head")
        name = name.removeprefix("encoder.").replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.2.", ".mlp.fc2.")
        tensors[name] = tensor.clone()
    torch.save({"model": tensors, "args": argparse.Namespace(model="beit_base_patch16_224")}, tmp_path / "a.pth")
    again = fairseq.load(tmp_path / "a.pth").eval()
    images = torch.randn(2, 3, 24, 24)
    assert again.config.encoder.norm_eps == 1e-6 and again.config.target.norm == "layer"
    torch.testing.assert_close(again.encode(images).features, model.encode(images).features)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda s: s["model"].pop("post_extract_proj.bias"), ValueError, "missing .'post_extract_proj.bias'"),
        (lambda s: s["model"].update(odd=torch.ones(1)), ValueError, "unexpected .'odd'"),
        (lambda s: s["model"].update({"mask_emb": torch.ones(3)}), ValueError, r"expected shape .* got \(3,\)"),
        (lambda s: s.update(cfg=None), ValueError, "expected the model's options under 'cfg' or 'args'"),
        (lambda s: s.update(model={"a": torch.ones(1)}), ValueError, "expected names of a data2vec model"),
        (lambda s: s.pop("model"), ValueError, "tensors under 'model'"),
        (lambda s: s["cfg"]["model"].update(layer_type="other"), NotImplementedError, "layer_type: expected trans"),
    ],
    ids=["missing", "unexpected", "shape", "options", "foreign", "no model", "not built"],
)  # fmt: skip
def test_refused(tmp_path: Path, change: Any, error: type[Exception], text: str) -> None:
    state = published_state("d2v1_audio")
    change(state)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(error, match=text):
        fairseq.load(tmp_path / "a.pt")
