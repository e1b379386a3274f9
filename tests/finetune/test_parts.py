"""Heads, masks, augmentation, rates, spelling, decoding and scores, one by one."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.families import make_batch, make_config
from torch import Tensor

from d2v.config import Config, Optim
from d2v.config.finetune import Decoding, FineTune, FineTuneConfig, HeadSettings, TaskOptions
from d2v.data.dataset import Sample
from d2v.finetune import scores
from d2v.finetune.augment import erase_rectangles, mix_images, smooth_targets
from d2v.finetune.data import Labelled, LabelledCollate, LabelledSource, hold_out
from d2v.finetune.decoding import Decoder
from d2v.finetune.objective import FineTuning
from d2v.finetune.run import build_model
from d2v.finetune.spelling import Letters, Pieces
from d2v.model.data2vec import Data2Vec, strip_pretraining
from d2v.model.finetuned import FineTuned, build_finetuned
from d2v.model.saving import write_folder
from d2v.model.task_heads import make_head, vote
from d2v.saved import load_any
from d2v.train.optim import learning_rate_at

from .conftest import write_images


def tuned(name: str, settings: HeadSettings, **encoder: object) -> FineTuned:
    torch.manual_seed(1)
    config = make_config(name, **encoder)
    model = strip_pretraining(Data2Vec(config))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    labels = [str(i) for i in range(settings.outputs)]
    return FineTuned(model, make_head(settings, config.encoder.width), labels).eval()


# ---- the model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("speech-base", HeadSettings("tokens", 5, task="ctc")),
        ("speech1-base", HeadSettings("pooled", 5)),
        ("speech1-base", HeadSettings("votes", 5, task="multi-label")),
        ("speech-tiny", HeadSettings("pooled", 5, pool="linear-softmax", norm_eps=1e-6)),
        ("text1-base", HeadSettings("sentence", 5)),
        ("text-base", HeadSettings("vocabulary", 50, task="tokens")),
    ],
)
def test_padding_is_invisible(name: str, settings: HeadSettings) -> None:
    model = tuned(name, settings)
    lengths = (30, 17) if "text" in name else (4000, 2700)
    inputs, sizes = make_batch(model.config, lengths)
    together = model(inputs, sizes)
    for i, length in enumerate(lengths):
        alone = model(inputs[i : i + 1, :length])
        row = together[i : i + 1, : alone.shape[1]] if alone.dim() == 3 else together[i : i + 1]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_pools_of_images(pool: str) -> None:
    model = tuned("vision-base", HeadSettings("pooled", 4, pool=pool, norm_eps=1e-6))  # type: ignore[arg-type]
    images = torch.randn(2, 3, 32, 32)
    encoded = model.encoder.encode(images)
    pooled = encoded.features.mean(1) if pool == "mean" else encoded.class_token
    head = model.head
    expected = head.out(torch.nn.functional.layer_norm(pooled, (32,), head.norm.weight, head.norm.bias, 1e-6))  # type: ignore[union-attr,operator,arg-type]
    torch.testing.assert_close(model(images), expected)


def test_final_norm_goes_behind_the_pool() -> None:
    model = tuned("vision1-base", HeadSettings("pooled", 4, norm_eps=1e-6))
    assert model.encoder.blocks.norm is None
    kept = tuned("vision1-base", HeadSettings("pooled", 4, pool="class"))
    assert kept.encoder.blocks.norm is not None


def test_vote_is_the_published_formula() -> None:
    logits = torch.randn(2, 7, 3, dtype=torch.float64)
    valid = torch.arange(7) < torch.tensor([7, 4])[:, None]
    p = logits.sigmoid() * valid[..., None]
    expected = torch.logit(p.square().sum(1) / p.sum(1))
    torch.testing.assert_close(vote(logits, valid), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["speech-base", "speech1-base"])
def test_hidden_frames_cannot_be_read(name: str) -> None:
    """Changing the waveform under masked frames alone changes nothing that the others do not see."""
    model = tuned(name, HeadSettings("tokens", 5))
    torch.manual_seed(3)
    inputs = torch.randn(1, 4000)
    tokens = model.count_tokens(inputs)
    mask = torch.zeros(1, int(tokens), dtype=torch.bool)
    mask[:, 40:] = True  # the features of frame t begin at sample 20 t
    other = inputs.clone()
    other[:, 900:] = torch.randn(1, 3100)
    keys = torch.tensor([7])
    first, second = (model(x, mask=mask, noise_keys=keys) for x in (inputs, other))
    torch.testing.assert_close(first, second)
    assert not torch.allclose(model(inputs), model(other))


def test_hidden_channels_are_zero() -> None:
    model = tuned("speech-base", HeadSettings("tokens", 5))
    channels = torch.zeros(1, 32, dtype=torch.bool)
    channels[:, :8] = True
    x = torch.randn(1, 6, 32)
    hidden = model._hide(x, None, channels, None)
    assert hidden[..., :8].eq(0).all() and torch.equal(hidden[..., 8:], x[..., 8:])


def test_mask_without_a_mask_token() -> None:
    model = tuned("speech1-base", HeadSettings("tokens", 5))
    model.encoder.mask_token = None
    with pytest.raises(ValueError, match="mask: expected None for an encoder without a mask token"):
        model(
            torch.randn(1, 2000), mask=torch.zeros(1, int(model.count_tokens(torch.randn(1, 2000))), dtype=torch.bool)
        )


def test_frozen_encoder_has_no_gradient() -> None:
    model = tuned("vision-base", HeadSettings("pooled", 4, norm_eps=1e-6)).train()
    model.frozen = True
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.head.parameters())


def test_labels_fit_the_outputs() -> None:
    encoder = strip_pretraining(Data2Vec(make_config("vision-base")))
    with pytest.raises(ValueError, match="labels: expected 4, one for each output, got 2"):
        FineTuned(encoder, make_head(HeadSettings("pooled", 4), 32), ("a", "b"))
    with pytest.raises(ValueError, match="head: expected 1 output or more, got 0"):
        HeadSettings("pooled", 0)


def test_configuration_round_trip() -> None:
    head = HeadSettings("tokens", 3, task="ctc")
    tune = FineTune("speech-ctc", head, ("<s>", "|", "ö"), TaskOptions(mixup=0.3))
    config = FineTuneConfig.of(make_config("speech-base"), finetune=tune)
    assert FineTuneConfig.from_json(config.to_json()) == config
    names = {"encoder.teacher.blocks.x", "encoder.decoder.x"}
    assert build_finetuned(config, names).encoder.decoder is not None
    assert build_finetuned(config, set()).encoder.decoder is None
    with pytest.raises(ValueError, match=r"task\.layer_decay: expected above 0, at most 1, got 0"):
        FineTuneConfig.of(config, finetune=FineTune(options=TaskOptions(layer_decay=0.0)))


# ---- training ---------------------------------------------------------------------------------------------------


def objective_of(config: Config, options: TaskOptions, source: LabelledSource | None = None) -> FineTuning:
    head = HeadSettings("pooled", 3, norm_eps=1e-6)
    tune = FineTune("vision-classify", head, ("a", "b", "c"), options)
    whole = FineTuneConfig.of(config, finetune=tune)
    model = build_finetuned(whole, set())
    from d2v.data import make_modality

    return FineTuning(whole, model, Labelled(make_modality(whole)), source, source, None)  # type: ignore[arg-type]


def test_rates_of_layers() -> None:
    """Block i of N has d^(N - i); prenet blocks count; the rest keeps its rate, or has d^(N + 1)."""
    config = make_config("vision-base", prenet_depth=2, depth=3)
    objective = objective_of(config, TaskOptions(layer_decay=0.5))
    names = [n for n, _ in objective.model.named_parameters()]
    rates = {n: objective.rate_of(n) for n in names}
    assert rates["encoder.context.blocks.0.norm1.weight"] == 0.5**5
    assert rates["encoder.context.blocks.1.mlp.fc1.weight"] == 0.5**4
    assert rates["encoder.blocks.blocks.0.norm1.weight"] == 0.5**3
    assert rates["encoder.blocks.blocks.2.attn.qkv.bias"] == 0.5
    for name in (
        "encoder.stem.proj.weight",
        "encoder.context.norm.weight",
        "encoder.context.extra_tokens",
        "head.out.bias",
    ):
        assert rates[name] == 1.0, name
    objective.options = TaskOptions(layer_decay=0.5, decay_stem=True)
    assert objective.rate_of("encoder.stem.proj.weight") == 0.5**6 and objective.rate_of("head.out.bias") == 1.0


def test_groups_hold_every_parameter_once() -> None:
    config = make_config("vision-base")
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, decay_all=False, weight_decay=0.1))
    objective = objective_of(config, TaskOptions(layer_decay=0.7))
    groups = objective.parameter_groups()
    found = [p for group in groups for p in group["params"]]
    assert len(found) == len({id(p) for p in found}) == sum(p.requires_grad for p in objective.model.parameters())
    for group in groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] == 0.1) for p in group["params"])


def test_linear_schedule() -> None:
    """GLUE's: a line up to the peak, a line down to the end."""
    optim = Optim(learning_rate=2.0, warmup_steps=4, schedule="linear", final_rate=0.25)
    rates = [learning_rate_at(optim, update, 12) for update in range(1, 14)]
    assert rates[:5] == [0.0, 0.5, 1.0, 1.5, 2.0] and rates[12] == 0.5
    assert np.allclose(np.diff(rates[4:13]), -1.5 / 8)


def test_soft_cross_entropy() -> None:
    logits, targets = torch.randn(4, 5), torch.tensor([0, 3, 4, 1])
    soft = smooth_targets(targets, 5, 0.1)
    assert torch.allclose(soft.sum(1), torch.ones(4))
    ours = -(soft * logits.log_softmax(-1)).sum(-1)
    theirs = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_targets_follow_the_pixels(mixup: float, cutmix: float) -> None:
    """Images of one value each: the mean of a mixed one is the same mixture as its target."""
    rng = np.random.default_rng(0)
    values = torch.tensor([0.0, 1.0, 2.0, 5.0])
    images = values[:, None, None, None].expand(4, 3, 16, 16).contiguous()
    soft = torch.eye(4)
    options = TaskOptions(mixup=mixup, cutmix=cutmix)
    shares = []
    for _ in range(40):
        mixed, targets = mix_images(images, soft, options, rng)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ values, rtol=1e-4, atol=1e-4)
        shares.append(float(targets[0, 0]))
    assert np.std(shares) > 0.05 and min(shares) >= 0.0 and max(shares) <= 1.0
    assert torch.equal(images, values[:, None, None, None].expand(4, 3, 16, 16))


def test_nothing_is_mixed_or_erased_unasked() -> None:
    rng = np.random.default_rng(0)
    images, soft = torch.randn(4, 3, 8, 8), torch.eye(4)
    assert mix_images(images, soft, TaskOptions(), rng)[0] is images
    assert erase_rectangles(images, 0.0, rng) is images
    mixed, _ = mix_images(images, soft, TaskOptions(mixup=1.0, mix_probability=0.0), rng)
    assert mixed is images


def test_erased_rectangles() -> None:
    rng = np.random.default_rng(1)
    images = torch.full((200, 3, 16, 16), 9.0)
    erased = erase_rectangles(images, 0.5, rng)
    changed = (erased != 9.0).any(1)
    share = changed.flatten(1).float().mean(1)
    assert 0.35 < float((share > 0).float().mean()) < 0.65
    assert float(share.max()) <= 0.45 and float(share[share > 0].min()) >= 0.01
    assert abs(float(erased[erased != 9.0].mean())) < 0.1 and float(images.min()) == 9.0


def test_masks_of_speech_are_functions_of_the_sample() -> None:
    """Whatever else is in the batch; never on padding; time and channels apart."""
    config = make_config("speech-base", width=48)
    options = TaskOptions(time_mask=0.5, time_span=4, channel_mask=0.3, channel_span=6)
    tune = FineTune("speech-ctc", HeadSettings("tokens", 6, task="ctc"), ("<s>", "<pad>", "|", "a", "b", "c"), options)
    whole = FineTuneConfig.of(config, finetune=tune, data=dataclasses.replace(config.data, unequal="pad"))
    from d2v.data import make_modality

    collate = LabelledCollate(whole, Labelled(make_modality(whole)), Letters(tune.labels), training=True)
    rng = np.random.default_rng(0)
    waves = {i: rng.standard_normal(n).astype(np.float32) for i, n in ((3, 3000), (9, 6000))}
    samples = {i: Sample(i, 2, (wave, "ab c"), ()) for i, wave in waves.items()}  # type: ignore[arg-type]
    both, alone = collate([samples[3], samples[9]]), collate([samples[9]])
    assert both.hidden is not None and alone.hidden is not None and both.channels is not None
    assert torch.equal(both.hidden[1], alone.hidden[0]) and torch.equal(both.channels[1:], alone.channels)  # type: ignore[arg-type]
    assert both.token_lengths is not None and not both.hidden[0, int(both.token_lengths[0]) :].any()
    assert 0.15 < float(both.hidden[1].float().mean()) < 0.6 and 0.0 < float(both.channels.float().mean()) < 0.6
    assert both.target_lengths.tolist() == [5, 5] and both.targets.tolist() == [3, 4, 2, 5, 2] * 2  # type: ignore[union-attr]
    quiet = LabelledCollate(whole, Labelled(make_modality(whole)), Letters(tune.labels), training=False)
    assert quiet([samples[3]]).hidden is None and quiet([samples[3]]).channels is None


def test_default_channel_spans_follow_the_width() -> None:
    """64 of 768 channels, as published; never more of a wider model."""
    from d2v.finetune.defaults import default_sections

    spans = {w: default_sections("speech-ctc", make_config("speech-base", width=w))[3].channel_span for w in (8, 64)}
    assert spans == {8: 1, 64: 5}
    wide = {w: default_sections("speech-ctc", make_config("speech-base", width=w))[3].channel_span for w in (768, 1024)}
    assert wide == {768: 64, 1024: 64}


def test_no_utterance_loses_all_channels_or_frames() -> None:
    """Whatever spans are asked for: there would be nothing to learn from."""
    config = make_config("speech-base", width=48)
    options = TaskOptions(time_mask=1.0, time_span=60, channel_mask=0.5, channel_span=48)
    tune = FineTune("speech-ctc", HeadSettings("tokens", 6, task="ctc"), ("<s>", "<pad>", "|", "a", "b", "c"), options)
    whole = FineTuneConfig.of(config, finetune=tune, data=dataclasses.replace(config.data, unequal="pad"))
    from d2v.data import make_modality

    collate = LabelledCollate(whole, Labelled(make_modality(whole)), Letters(tune.labels), training=True)
    rng = np.random.default_rng(0)
    lengths = (500, 3000, *[6000] * 30)
    waves = [rng.standard_normal(n).astype(np.float32) for n in lengths]
    batch = collate([Sample(i, 0, (wave, "ab c"), ()) for i, wave in enumerate(waves)])  # type: ignore[arg-type]
    assert batch.hidden is not None and batch.channels is not None and batch.token_lengths is not None
    assert not batch.channels.all(dim=1).any()
    assert (batch.hidden.sum(dim=1) < batch.token_lengths).all() and batch.hidden.any()


def test_start_from_the_teacher(tmp_path: Path) -> None:
    config = make_config("vision-base")
    torch.manual_seed(0)
    model = Data2Vec(config)
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(1.0)
    write_folder(model, tmp_path / "m")
    for weights in ("student", "teacher"):
        head = HeadSettings("pooled", 2, norm_eps=1e-6)
        tune = FineTune("vision-classify", head, ("a", "b"), TaskOptions(weights=weights))  # type: ignore[arg-type]
        start = build_model(FineTuneConfig.of(config, finetune=tune), str(tmp_path / "m"))
        expected = model if weights == "student" else model.teacher
        for name in ("blocks.blocks.1.mlp.fc1.weight", "stem.proj.weight"):
            assert torch.equal(start.encoder.get_parameter(name), expected.get_parameter(name)), (weights, name)
        assert start.encoder.decoder is None and not start.encoder.teacher.owned


def test_held_out_samples(tmp_path: Path) -> None:
    from d2v.data import make_modality
    from d2v.finetune.data import open_classes

    config = make_config("vision-base")
    source, classes = open_classes(
        make_modality(config), str(write_images(tmp_path / "x", 20, 0)), "train", None, False
    )
    train, valid = hold_out(source, 0.1, seed=3)
    assert len(train) == 54 and len(valid) == 6 and classes == ["dark", "light", "striped"]
    assert np.bincount(valid.targets).tolist() == [2, 2, 2]
    names = {s.describe(i) for s in (train, valid) for i in range(len(s))}
    assert len(names) == 60 and hold_out(source, 0.1, seed=3)[1].digest() == valid.digest()
    assert hold_out(source, 0.1, seed=4)[1].digest() != valid.digest()
    assert all(train.describe(i).split("/")[-2] == classes[t] for i, t in enumerate(train.targets))


# ---- transcripts ------------------------------------------------------------------------------------------------


def test_letters() -> None:
    letters = Letters.learn(["ab ba", "a|c"])
    assert letters.labels == ("<s>", "<pad>", "</s>", "<unk>", "|", "a", "b", "c")
    ids = letters.encode("ab c")
    assert [letters.labels[i] for i in ids] == ["a", "b", "|", "c", "|"]
    assert letters.decode(ids) == "ab c" and letters.unknown("abz|") == "z|" and letters.encode("z") == []
    assert Letters([*letters.labels[:5], "A", "B"]).case == "upper" and letters.case == "keep"


def test_pieces(text_model: Path) -> None:
    folder = text_model.parent / "tokenizer"
    pieces = Pieces.read(str(folder))
    for text in ("a good film", "é ü", "x"):
        assert pieces.decode(pieces.encode(text)) == text
    assert Pieces(pieces.labels).decode(pieces.encode("bad")) == "bad"


def brute_force(log_p: Tensor, blank: int, space: int) -> dict[tuple[int, ...], float]:
    """Probability of every labelling of a few frames. A space at the very beginning counts as none: the search stands
    behind one when it begins."""
    found: dict[tuple[int, ...], float] = {}
    frames, labels = log_p.shape
    for path in itertools.product(range(labels), repeat=frames):
        joined = tuple(k for k, _ in itertools.groupby((space, *path)) if k != blank)[1:]
        total = math.exp(sum(float(log_p[t, k]) for t, k in enumerate(path)))
        found[joined] = found.get(joined, 0.0) + total
    return found


def test_beam_search_finds_the_most_probable_labelling() -> None:
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    letters = Letters(["<s>", "|", "a", "b"])
    decoder = Decoder(Decoding(method="beam", beam=200), letters, 0)
    greedy = Decoder(Decoding(), letters, 0)
    generator, differing = torch.Generator().manual_seed(0), 0
    for _ in range(30):
        log_p = torch.randn(5, 4, generator=generator).log_softmax(-1)
        best = max(brute_force(log_p, 0, 1).items(), key=lambda item: item[1])[0]
        expected = letters.decode(best)
        assert decoder.decode(log_p) == expected
        differing += greedy.decode(log_p) != expected
    assert differing > 0  # else this test could not tell the two apart


def test_greedy_joins_repeats() -> None:
    letters = Letters(["<s>", "|", "a", "b"])
    path = [2, 2, 0, 2, 1, 1, 3, 0, 0]
    log_p = torch.nn.functional.one_hot(torch.tensor(path), 4).float().log_softmax(-1)
    assert Decoder(Decoding(), letters, 0).decode(log_p) == "aa b"


def test_lexicon_and_language_model(tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    letters = Letters(["<s>", "|", "a", "b"])
    (tmp_path / "words.txt").write_text("ab\nbb\n")
    unigrams = "-9.0\t<unk>\t0\n-9.0\t<s>\t0\n-1.0\t</s>\n-3.0\tab\t0\n-0.05\tbb\t0"
    arpa = f"\\data\\\nngram 1=5\nngram 2=1\n\n\\1-grams:\n{unigrams}\n\n\\2-grams:\n-0.1\tbb </s>\n\n\\end\\\n"
    (tmp_path / "words.arpa").write_text(arpa)
    near = torch.tensor([[0.0, 0.0, 2.0, 1.9], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0], [0.0, 3.0, 0.0, 0.0]])
    words = str(tmp_path / "words.txt")
    log_p = near.log_softmax(-1)
    assert Decoder(Decoding(method="beam", lexicon=words), letters, 0).decode(log_p) == "ab"
    settings = Decoding(method="beam", lexicon=words, lm=str(tmp_path / "words.arpa"), lm_weight=2.0)
    assert Decoder(settings, letters, 0).decode(log_p) == "bb"
    (tmp_path / "words.arpa").write_text("no model")
    with pytest.raises(ValueError, match=r"decode\.lm: expected a KenLM file"):
        Decoder(settings, letters, 0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (Decoding(lm="x"), "decode.lm: expected --decode.method beam"),
        (Decoding(method="beam", lm="x"), "decode.lexicon: expected a file of words"),
        (Decoding(method="beam", lexicon="absent"), "decode.lexicon: expected a text file"),
        (Decoding(method="beam", beam=0), "decode.beam: expected 1 or more, got 0"),
    ],
)
def test_bad_decoding(settings: Decoding, text: str) -> None:
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    with pytest.raises(ValueError, match=text):
        Decoder(settings, Letters(["<s>", "|", "a"]), 0)


# ---- scores -----------------------------------------------------------------------------------------------------


def test_scores_of_classes_are_scikit_learns() -> None:
    from sklearn import metrics

    rng = np.random.default_rng(0)
    for classes in (2, 4):
        truth, predicted = rng.integers(classes, size=60), rng.integers(classes, size=60)
        predicted[:40] = truth[:40]
        found = scores.score_classes(truth, predicted, classes)
        average = "binary" if classes == 2 else "macro"
        assert found["f1"] == pytest.approx(metrics.f1_score(truth, predicted, average=average), abs=1e-6)
        assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(truth, predicted), abs=1e-6)
        assert found["accuracy"] == pytest.approx((truth == predicted).mean(), abs=1e-6)
        for name in ("accuracy", "f1", "matthews"):
            assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]


def test_wilson_interval() -> None:
    """Values of the textbook formula: 8 of 10."""
    score = scores.score_proportion(8, 10)
    assert score.low == pytest.approx(0.4902, abs=1e-4) and score.high == pytest.approx(0.9433, abs=1e-4)
    assert scores.score_proportion(0, 5).low == 0.0 and scores.score_proportion(5, 5).high == 1.0


def test_scores_of_numbers_are_scipys() -> None:
    from scipy import stats

    rng = np.random.default_rng(1)
    truth = rng.standard_normal(50)
    predicted = truth + 0.5 * rng.standard_normal(50)
    found = scores.score_numbers(truth, predicted)
    assert found["pearson"] == pytest.approx(stats.pearsonr(truth, predicted)[0], abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(truth, predicted)[0], abs=1e-6)
    assert found["rmse"] == pytest.approx(float(np.sqrt(np.mean((truth - predicted) ** 2))), abs=1e-6)


def test_bootstrap_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(60):
        values = rng.standard_normal(40)
        score = scores.bootstrap(lambda rows, v=values: float(v[rows].mean()), 40, draws=300, seed=trial)  # type: ignore[misc]
        hits += score.low <= 0.0 <= score.high
    assert 50 <= hits <= 60


def test_error_rates() -> None:
    pytest.importorskip("jiwer", reason="jiwer is not installed")
    found = scores.score_transcripts(["a b c", "d e"], ["a x c", "d"])
    assert found["wer"] == pytest.approx(2 / 5) and found["cer"] == pytest.approx((1 + 2) / 8)
    assert scores.score_transcripts(["ab"], [""])["wer"] == 1.0


# ---- imported models --------------------------------------------------------------------------------------------


def test_imported_classifiers_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model without class names needs a file of them."""
    from d2v.cli import main

    model = tuned("vision-base", HeadSettings("pooled", 3, norm_eps=1e-6))
    write_folder(model, tmp_path / "m")
    again, config, _ = load_any(str(tmp_path / "m"), "cpu")
    images = torch.randn(2, 3, 32, 32)
    assert isinstance(config, FineTuneConfig) and torch.equal(again(images), model(images))
    data = write_images(tmp_path / "data", 3, 0)
    command = ["evaluate", "model", "--checkpoint", str(tmp_path / "m"), "--test", str(data), "--device", "cpu"]
    assert main(command) == 2 and "of classes that the training data lacks" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("striped\ndark\nlight\n")
    assert main([*command, "--labels", str(tmp_path / "names.txt"), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "result.json").is_file() and '"samples": 9' in capsys.readouterr().out
