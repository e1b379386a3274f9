"""`d2v import` and `d2v export`, and the loading example that exports carry."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.families import make_config

import d2v
from d2v import recipes
from d2v.config.finetune import HeadSettings
from d2v.data.tokenizer import BytePairs, DocumentReader, save_tokenizer, train_tokenizer
from d2v.interop import convert, fairseq
from d2v.interop.convert import export_checkpoint, import_checkpoint
from d2v.interop.torch_file import read_torch_file
from d2v.model.data2vec import strip_pretraining
from d2v.model.saving import write_folder
from d2v.model.task_heads import make_head
from d2v.saved import load_model

from .test_huggingface import tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """An exported data2vec 2.0 image model."""
    torch.manual_seed(0)
    tiny = recipes.vision_tiny()
    config = dataclasses.replace(tiny, stem=dataclasses.replace(tiny.stem, position_scale=1.0))
    write_folder(d2v.Data2Vec(config), tmp_path / "ours")
    return tmp_path / "ours"


def test_loading_example_runs(image_folder: Path) -> None:
    example = re.search(r"```python\n(.*?)```", (image_folder / "README.md").read_text(), re.DOTALL)
    assert example is not None and example[1].count("\n") <= 30
    done = subprocess.run(
        [sys.executable, "-c", example[1]], cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 64, 64])" in done.stdout


@pytest.mark.parametrize("recipe", ["speech1-base", "vision-base", "text-base"])
def test_loading_example_of_a_fine_tuned_model(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(recipe)
    encoder = strip_pretraining(d2v.Data2Vec(config))
    kind = {"speech": "tokens", "vision": "pooled", "text": "sentence"}[config.stem.modality]
    head = make_head(HeadSettings(kind, 3, norm_eps=1e-6 if kind == "pooled" else None), 32)  # type: ignore[arg-type]
    folder = d2v.FineTuned(encoder, head, ("ant", "bee", "cat")).save(tmp_path / "m")
    example = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert example is not None and example[1].count("\n") <= 30
    exec(compile(example[1], "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "3)" in shown and any(label in shown for label in ("ant", "bee", "cat"))
    assert d2v.FineTuned.load(folder).labels == ("ant", "bee", "cat")


def test_fine_tuned_only(image_folder: Path) -> None:
    with pytest.raises(ValueError, match="expected a fine-tuned model, got a pre-trained one"):
        d2v.FineTuned.load(image_folder)


def test_fairseq_there_and_back(image_folder: Path, tmp_path: Path) -> None:
    export_checkpoint(str(image_folder), "fairseq", str(tmp_path / "m.pt"))
    said = import_checkpoint(str(tmp_path / "m.pt"), str(tmp_path / "again"))
    assert "licence" in said and "vision" in said
    first, second = (fairseq.parameters(load_model(str(f), "cpu")[0]) for f in (image_folder, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    export_checkpoint(str(tmp_path / "again"), "fairseq", str(tmp_path / "n.pt"))
    a, b = read_torch_file(tmp_path / "m.pt"), read_torch_file(tmp_path / "n.pt")
    assert a["cfg"] == b["cfg"] and list(a["model"]) == list(b["model"])


def test_half_precision_survives_an_import(image_folder: Path, tmp_path: Path) -> None:
    export_checkpoint(str(image_folder), "fairseq", str(tmp_path / "m.pt"))
    state = read_torch_file(tmp_path / "m.pt")
    state["model"] = {n: t.half() if isinstance(t, torch.Tensor) else t for n, t in state["model"].items()}
    torch.save(state, tmp_path / "half.pt")
    import_checkpoint(str(tmp_path / "half.pt"), str(tmp_path / "again"))
    export_checkpoint(str(tmp_path / "again"), "fairseq", str(tmp_path / "n.pt"))
    again = read_torch_file(tmp_path / "n.pt")["model"]
    assert all(torch.equal(t, again[n]) and t.dtype == again[n].dtype for n, t in state["model"].items() if n != "_ema")


def test_huggingface_there_and_back(tmp_path: Path) -> None:
    model = tiny_model("hf_vision")
    write_folder(model, tmp_path / "ours")
    export_checkpoint(str(tmp_path / "ours"), "huggingface", str(tmp_path / "theirs"))
    import_checkpoint(str(tmp_path / "theirs"), str(tmp_path / "again"))
    images = torch.randn(2, 3, 24, 24)
    again = load_model(str(tmp_path / "again"), "cpu")[0]
    torch.testing.assert_close(again.encode(images).features, model.encode(images).features)


def test_bad_targets_leave_nothing(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"1\.0"):
        export_checkpoint(str(image_folder), "huggingface", str(tmp_path / "x"))
    with pytest.raises(ValueError, match="format: expected one of safetensors"):
        export_checkpoint(str(image_folder), "gguf", str(tmp_path / "x"))
    with pytest.raises(ValueError, match="from: expected a checkpoint file"):
        import_checkpoint(str(tmp_path / "absent.pt"), str(tmp_path / "x"))
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="checkpoint: expected a file"):
        import_checkpoint(str(tmp_path / "bad.pt"), str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="output: expected an absent or empty folder"):
        export_checkpoint(str(image_folder), "safetensors", str(image_folder))


def test_tokenizers_go_along_both_ways(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat number {i}" for i in range(50)))
    config = make_config("text1-base")
    config = dataclasses.replace(config, stem=dataclasses.replace(config.stem, vocabulary=300, mask_token=299))
    write_folder(d2v.Data2Vec(config), tmp_path / "run")
    save_tokenizer(train_tokenizer(DocumentReader([text]), 300)[0], tmp_path / "run" / "tokenizer")
    for source, foreign, output in (("run", "hf", "back"), ("back", "again", "twice")):
        export_checkpoint(str(tmp_path / source), "huggingface", str(tmp_path / foreign))
        assert "Its tokenizer is in" in import_checkpoint(str(tmp_path / foreign), str(tmp_path / output))
    kept = (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes()
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == kept
    assert (tmp_path / "twice" / "tokenizer" / "tokenizer.json").read_bytes() == kept
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert "The tokenizer was not taken along: from: cannot read" in import_checkpoint(
        str(tmp_path / "hf"), str(tmp_path / "other")
    )
    (tmp_path / "hf" / "tokenizer.json").unlink()
    assert "`d2v data tokenizer" in import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "none"))


def test_embeddings_go_where_the_special_tokens_go(tmp_path: Path) -> None:
    """Folders for transformers often have <mask> as token 4; here it is the last."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names, alphabet = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    made.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    size = made.get_vocab_size()
    config = make_config("text1-base")
    config = dataclasses.replace(config, stem=dataclasses.replace(config.stem, vocabulary=size, mask_token=size - 1))
    write_folder(d2v.Data2Vec(config), tmp_path / "run")
    export_checkpoint(str(tmp_path / "run"), "huggingface", str(tmp_path / "hf"))
    made.save(str(tmp_path / "hf" / "tokenizer.json"))
    assert "embeddings moved with them" in import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "new"))
    before, after = (d2v.Data2Vec.from_checkpoint(tmp_path / n).stem.embed_tokens.weight for n in ("run", "new"))
    ids = BytePairs(tmp_path / "new" / "tokenizer").encode(["the cat"])[0]
    assert ids != made.encode("the cat").ids
    assert torch.equal(after[ids], before[made.encode("the cat").ids])
    assert torch.equal(after[-1], before[4])
    # A teacher that averages the stem has embeddings of its own.
    whole = d2v.Data2Vec(config.change(ema={"scope": "all"}))
    mine, averaged = whole.stem.embed_tokens.weight, whole.teacher.get_parameter("stem.embed_tokens.weight")
    first = averaged[4].clone()
    assert "embeddings moved with them" in convert._take_tokenizer(tmp_path / "hf", whole)[1]
    assert torch.equal(averaged[-1], first) and torch.equal(mine, averaged)
    made.add_tokens(["more"])
    made.save(str(tmp_path / "hf" / "tokenizer.json"))
    assert f"got others and {size + 1} tokens for {size} embeddings" in import_checkpoint(
        str(tmp_path / "hf"), str(tmp_path / "other")
    )
