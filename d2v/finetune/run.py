"""A fine-tuning run: data checked, model built, trained, the best checkpoint chosen, the test set looked at once."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from d2v.config import Config, Data, Optim, Run
from d2v.config.finetune import Decoding, FineTune, FineTuneConfig, HeadSettings, TaskOptions, read_config
from d2v.data import make_modality
from d2v.data.dataset import Modality, Note
from d2v.data.sources import Rejected, describe_rare
from d2v.evaluate.pieces import Uncut, list_entries, list_missing
from d2v.finetune.data import (
    Labelled,
    LabelledSource,
    hold_out,
    list_cut,
    list_unfitting,
    open_classes,
    open_numbers,
    open_transcripts,
)
from d2v.finetune.decoding import Decoder
from d2v.finetune.defaults import default_sections
from d2v.finetune.objective import CHOICE, FineTuning
from d2v.finetune.predict import MEANT
from d2v.finetune.report import RESULT, describe_scores, score_outcomes, write_report
from d2v.finetune.scores import headline, require_jiwer
from d2v.finetune.spelling import Letters, Pieces, Spelling, spelling_of
from d2v.folder import BEST, copy_into, find_model, list_checkpoints
from d2v.model.data2vec import Data2Vec, strip_pretraining
from d2v.model.finetuned import FineTuned
from d2v.model.saving import write_folder
from d2v.model.stems.positions import resize_positions
from d2v.model.task_heads import make_head
from d2v.runtime import prepare_process
from d2v.saved import find_tokenizer, load_any
from d2v.train.checkpoint import find_best
from d2v.train.distributed import Ranks, open_ranks
from d2v.train.run_dir import RunFolder
from d2v.train.trainer import train

TEST = "test"
"""Folder inside the run folder with what was found on the test set."""
SPELLING = "spelling"
"""Folder beside the weights with the tokenizer that a CTC model spells with."""
FEW = 20
"""Held-out samples: fewer are a poor choice."""
CHECKPOINTS = 100
"""One an epoch, but no more than this in a run."""


@dataclass(frozen=True)
class Sets:
    """Labelled samples of a run."""

    modality: Labelled
    train: LabelledSource
    valid: LabelledSource | None
    test: LabelledSource | None
    labels: tuple[str, ...]
    spelling: Spelling | None


def read_defaults(
    task: str, checkpoint: str, tokenizer: str | None = None
) -> tuple[Config, tuple[Optim, Data, Run, TaskOptions]]:
    """Configuration of the pre-trained model, and the sections that a run of the task starts from.

    tokenizer: the folder of the one that is given; None: it has to be with the checkpoint.
    """
    folder = find_model(checkpoint)
    config = read_config(folder / "config.json")
    config = replace(config, data=replace(config.data, tokenizer=tokenizer or find_tokenizer(folder, config)))
    return config, default_sections(task, config)


def finetune(
    task: str, checkpoint: str, train_path: str, test_path: str | None, *, run: Run, optim: Optim, data: Data,
    options: TaskOptions, decode: Decoding | None = None, worst: int = 50, track: Iterable[Any] = (),
    image_size: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Runs or resumes a fine-tuning run; returns the result on the test set, or what was best on held-out data.

    Under torchrun every rank calls it. data.valid: held-out samples; None: a share of the training samples. The result
    is printed as one JSON object. Raises as `d2v.train.pretraining.pretrain` does.
    """
    if task == "speech-ctc":
        require_jiwer()
    base, _ = read_defaults(task, checkpoint, data.tokenizer)
    if image_size is not None:
        base = base.change(stem={"image_size": image_size})
    prepare_process(run.threads, run.keep_pages, run.products)
    encoder = _encoder_config(base, replace(data, path=train_path), run, optim, options)
    sets = open_sets(task, encoder, test_path, options)
    config = make_config(task, encoder, sets, options)
    decoder = make_decoder(config, sets, decode or Decoding())
    with open_ranks(run) as ranks:
        folder = RunFolder(config, ranks)
        model = build_model(config, checkpoint, say=ranks.is_first).to(ranks.device)
        objective = FineTuning(config, model, sets.modality, sets.train, sets.valid, sets.spelling)
        if ranks.is_first:
            print("\n".join(_describe(config, sets)), file=sys.stderr)
        place = train(objective, ranks, folder, track=track)
        result: dict[str, Any] = {}
        if ranks.is_first:
            write_best(place, config)
            result = _conclude(place, config, sets, ranks, decoder, worst)
        ranks.wait()
    return result


def _describe(config: FineTuneConfig, sets: Sets) -> list[str]:
    """The samples of a run, and what of the held-out and of the test samples will not be looked at; the trainer
    reports the others."""
    count = len(sets.labels)
    what = f"{count} labels" if sets.spelling is not None else "numbers" if count == 1 else f"{count} classes"
    held_out = sets.valid or ()
    texts = [f"{len(sets.train)} training, {len(held_out)} held-out {sets.modality.noun}, {what}"]
    if 0 < len(held_out) < FEW and not config.data.valid:
        texts.append("so few choose a checkpoint by chance: --task.valid-share 0 trains on all and takes the last")
    for name, source in (("valid", sets.valid if config.data.valid else None), ("test", sets.test)):
        if source is None:
            continue
        texts += [f"{name}: left out {count} {reason}" for reason, count in source.left_out.items()]
        if source.rejected:
            first = f"{source.rejected[0].name}: {source.rejected[0].reason}"
            texts.append(f"{name}: {len(source.rejected)} of {source.indexed} cannot be used; first {first}")
    held = sets.train if config.data.valid or sets.valid is None else sets.train.join(sets.valid)
    if config.finetune.head.task == "classification":
        texts += describe_rare(held.targets, sets.labels, held.describe)
    for name, source in (("train", sets.train), ("valid", sets.valid)):
        if source is not None and (found := list_cut(source, sets.modality.inner)):
            texts.append(f"{name}: cut {list_entries(found)}")
    if sets.spelling is not None:
        for name, source in (("train", sets.train), ("valid", sets.valid), ("test", sets.test)):
            if source is not None and (found := list_unfitting(source, sets.modality, sets.spelling)):
                texts.append(f"{name}: transcripts longer than their frames teach nothing: {list_entries(found)}")
    return texts


# ---- data -------------------------------------------------------------------------------------------------------


def open_sets(task: str, config: Config, test_path: str | None, options: TaskOptions) -> Sets:
    """Opens and checks all labelled samples of a run; `ValueError` says what is wrong with which."""
    modality, kind = make_modality(config), _meaning(task, options)
    paths = {"train": config.data.path, "valid": config.data.valid, "test": test_path}
    found: dict[str, LabelledSource] = {}
    labels: Sequence[str] | None = None
    spelling: Spelling | None = None
    for name, path in paths.items():
        if path is not None:
            used = Uncut(config).modality if name == "test" else modality
            found[name], labels, spelling = _open(kind, used, path, name, options, labels, spelling)
    train_set, valid = found["train"], found.get("valid")
    if valid is None and options.valid_share:
        train_set, valid = hold_out(train_set, options.valid_share, config.run.seed)
    return Sets(Labelled(modality), train_set, valid, found.get("test"), tuple(labels or ["number"]), spelling)


def _open(
    kind: str, modality: Modality, path: str, option: str, options: TaskOptions, labels: Sequence[str] | None,
    spelling: Spelling | None, max_seconds: float | None = None,
) -> tuple[LabelledSource, Sequence[str] | None, Spelling | None]:  # fmt: skip
    """Labelled samples for a head's task; labels and spelling: those of the training samples, None while these are
    opened themselves, which decide them. max_seconds: recordings with transcripts that are longer are left out; None:
    the modality's."""
    skip = options.bad_labels == "skip"
    if kind == "ctc":
        longest = round((max_seconds or modality.config.data.max_seconds) * modality.rate)
        check = spelling.unknown if spelling is not None else None
        source = open_transcripts(modality, path, option, case=options.case, longest=longest, skip=skip, check=check)
        spelling = spelling or learn_spelling(source.targets, options)
        return source, spelling.labels, spelling
    if kind == "regression":
        return open_numbers(modality, path, option, skip), None, None
    if kind in ("classification", "multi-label"):
        return *open_classes(modality, path, option, labels, skip, kind == "multi-label"), None
    raise ValueError(f"checkpoint: expected a head for {', '.join(MEANT)}, got {kind}")


def learn_spelling(transcripts: Sequence[str], options: TaskOptions) -> Spelling:
    """The labels of CTC."""
    if options.units == "letters":
        return Letters.learn(transcripts)
    if options.bpe is None:
        raise ValueError("task.bpe: expected the folder of a tokenizer with task.units bpe, got nothing")
    return Pieces.read(options.bpe)


# ---- configuration and model ------------------------------------------------------------------------------------


def _encoder_config(base: Config, data: Data, run: Run, optim: Optim, options: TaskOptions) -> Config:
    """The encoder's configuration with the run's sections and the task's dropouts."""
    given = {
        name: getattr(options, name)
        for name in ("drop_path", "dropout", "attention_dropout", "activation_dropout", "layer_drop")
        if getattr(options, name) is not None
    }
    if "dropout" in given:
        given["prenet_dropout"] = given["dropout"]
    stem = replace(base.stem, gradient_scale=0.0) if options.freeze_stem else base.stem
    values = {f.name: getattr(base, f.name) for f in dataclasses.fields(Config)}
    changed = {
        "stem": stem, "encoder": replace(base.encoder, **given), "data": data, "run": run, "optim": optim,
    }  # fmt: skip
    return Config(**{**values, **changed})


def make_config(task: str, config: Config, sets: Sets, options: TaskOptions) -> FineTuneConfig:
    """The configuration of a run from that of its encoder: numbers of updates from numbers of epochs, the head from the
    labels."""
    run, optim = config.run, config.optim
    per_epoch = len(sets.train) / config.data.global_batch
    steps = run.steps or max(1, round(options.epochs * per_epoch))
    if not run.steps and options.epochs <= 0.0:
        raise ValueError(f"task.epochs: expected above 0 where run.steps is 0, got {options.epochs}")
    every = run.checkpoint_every
    if every == Run().checkpoint_every:
        every = min(steps, max(1, round(per_epoch), steps // CHECKPOINTS))
    _, best = headline(_meaning(task, options))
    run = replace(
        run, steps=steps, checkpoint_every=every, keep_best=run.keep_best or (CHOICE if sets.valid else None),
        best=run.best if run.keep_best else best,  # type: ignore[arg-type]
    )  # fmt: skip
    optim = replace(
        optim, warmup_steps=optim.warmup_steps or round(options.warmup * steps),
        hold_steps=optim.hold_steps or round(options.hold * steps),
    )  # fmt: skip
    tuned = FineTune(task, make_head_settings(task, config, sets.labels, options), sets.labels, options)
    return FineTuneConfig.of(config, run=run, optim=optim, finetune=tuned)


def _meaning(task: str, options: TaskOptions) -> Any:
    if options.regression and options.multi_label:
        raise ValueError("task.multi-label: expected nothing with --task.regression, got both")
    if task == "speech-ctc":
        return "ctc"
    return "regression" if options.regression else "multi-label" if options.multi_label else "classification"


def make_head_settings(task: str, config: Config, labels: Sequence[str], options: TaskOptions) -> HeadSettings:
    """The published head of a task."""
    common: dict[str, Any] = {
        "outputs": len(labels), "task": _meaning(task, options), "dropout": options.head_dropout,
    }  # fmt: skip
    if task != "vision-classify":
        kinds: dict[str, Any] = {"speech-ctc": "tokens", "speech-classify": "pooled", "text-classify": "sentence"}
        return HeadSettings(kinds[task], **common)
    if options.pool == "class" and not config.encoder.extra_tokens:
        raise ValueError("task.pool: expected mean for a model without a class token, got class")
    # A pre-norm encoder has a norm before its class token already.
    normed = options.pool == "mean" or config.encoder.norm_order == "post"
    eps = config.encoder.norm_eps if config.version == 1 else 1e-6
    return HeadSettings("pooled", pool=options.pool, norm_eps=eps if normed else None, **common)


def build_model(config: FineTuneConfig, checkpoint: str, *, say: bool = True) -> FineTuned:
    """The model before the first update: pre-trained encoder, random head (a function of run.seed). say: print what
    became of the positions of another image size."""
    source = Data2Vec.from_checkpoint(checkpoint)
    torch.manual_seed(config.run.seed)
    encoder = strip_pretraining(Data2Vec(config))
    if source.mask_token is None or config.stem.modality == "vision":
        encoder.mask_token = None
    tensors, note = resize_positions(source.state_dict(), source.config, config)
    if say and note is not None:
        print(f"note: {checkpoint}: {note}", file=sys.stderr)
    if config.finetune.options.weights == "teacher":
        if isinstance(source.config, FineTuneConfig):
            raise ValueError("task.weights: expected student for a fine-tuned model, got teacher")
        tensors |= {n.removeprefix("teacher."): t for n, t in tensors.items() if n.startswith("teacher.")}
    own = encoder.state_dict()
    if source.blocks.norm is None and encoder.blocks.norm is not None:
        encoder.blocks.norm, own = None, {n: t for n, t in own.items() if not n.startswith("blocks.norm.")}
    copy_into(own, {n: t for n, t in tensors.items() if n in own}, f"checkpoint {checkpoint!r}")
    head = make_head(config.finetune.head, config.encoder.width)
    return FineTuned(encoder, head, config.finetune.labels)


# ---- the end ----------------------------------------------------------------------------------------------------


def write_best(folder: Path, config: FineTuneConfig) -> Path:
    """The checkpoint with the best held-out score as an exported folder `best` of the run; returns that."""
    place = folder / BEST
    found = list_checkpoints(folder / "checkpoints")
    chosen = find_best(found, config.run)
    best, why = (chosen, f"by {config.run.keep_best}") if chosen else (found[-1], "the last")
    shutil.rmtree(place, ignore_errors=True)
    write_folder(FineTuned.load(best), place, config)
    if config.stem.modality == "text" and config.data.tokenizer is not None:
        shutil.copytree(config.data.tokenizer, place / "tokenizer")
    if config.finetune.options.units == "bpe" and config.finetune.options.bpe is not None:
        shutil.copytree(config.finetune.options.bpe, place / SPELLING)
    print(f"chose {best.name}, {why}: {place}", file=sys.stderr)
    return place


def _conclude(
    folder: Path, config: FineTuneConfig, sets: Sets, ranks: Ranks, decoder: Decoder | None, worst: int
) -> dict[str, Any]:
    """Evaluates the chosen model on the test set, once in the life of a run."""
    file = folder / TEST / RESULT
    if sets.test is None:
        return {}
    if file.is_file():
        print(f"the test set was looked at before: {file}", file=sys.stderr)
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        result.pop("per_class", None)  # is not printed
    else:
        model = FineTuned.load(folder / BEST, config.run.device)
        objective = FineTuning(config, model, sets.modality, sets.test, sets.test, sets.spelling)
        result = judge(objective, sets.test, ranks.device, decoder, file.parent, worst, Uncut(config))
    print(json.dumps(result))
    return result


def judge(
    objective: FineTuning, source: LabelledSource, device: torch.device, decoder: Decoder | None, folder: Path | None,
    worst: int, uncut: Uncut, precision: str = "fp32",
) -> dict[str, Any]:  # fmt: skip
    """Scores of a model on labelled samples, written into `folder` with the confusion matrix and the worst samples.

    What cannot be decoded, is cut, or has a transcript longer than its frames is named on standard error.
    """
    outcomes, notes = objective.predict_whole(source, device, decoder, uncut, precision)
    entries = {
        "left out": [*list_missing(source.base), *name_notes(source, notes, "bad")],
        "cut": name_notes(source, notes, "cut"),
        "no loss for": [
            Rejected(source.describe(o.row), "its transcript is longer than its frames") for o in outcomes
            if not math.isfinite(o.loss)
        ],
    }  # fmt: skip
    for what, found in entries.items():
        if found:
            print(f"test: {what} {list_entries(found)}", file=sys.stderr)
    if not outcomes:
        raise ValueError(f"test: expected {objective.noun} that can be decoded, got none of {len(source)}")
    labels = objective.model.labels
    result = score_outcomes(outcomes, objective.task, labels)
    lost = len(source) - len(outcomes) + len(source.rejected)
    result["left_out"] = {**source.left_out, **({"undecodable": lost} if lost else {})}
    if folder is not None:
        write_report(folder, source, outcomes, result, labels, worst)
    print(describe_scores(result))
    return result


def name_notes(source: LabelledSource, notes: Sequence[Note], kind: str) -> list[Rejected]:
    """Samples with notes of a kind, by name."""
    return [Rejected(source.describe(note.sample_id), note.text) for note in notes if note.kind == kind]


def make_decoder(config: FineTuneConfig, sets: Sets, settings: Decoding) -> Decoder | None:
    """The decoder of the test set, made before the training so that what it lacks is reported then."""
    if sets.spelling is None:
        if settings != Decoding():
            raise ValueError("decode: expected nothing but for speech-ctc, got settings")
        return None
    return Decoder(settings, sets.spelling, config.finetune.head.blank)


def evaluate_model(
    checkpoint: str, test: str, *, decode: Decoding | None = None, labels: str | None = None, batch: int = 32,
    device: str = "auto", output: str | None = None, worst: int = 50, bad_labels: str = "refuse",
    precision: str = "fp32", max_seconds: float | None = None, max_tokens: int | None = None,
    allow_commands: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Scores of a fine-tuned model on labelled data; prints one JSON object, which it returns.

    labels: file with the names of the outputs, one a line, in place of those of the model. output: folder for the
    result; None: `evaluation` in the run folder, where `checkpoint` names one.
    """
    model, config, place = load_any(checkpoint, device)
    if not isinstance(model, FineTuned) or not isinstance(config, FineTuneConfig):
        raise ValueError(f"checkpoint: expected a fine-tuned model, got a pre-trained one at {checkpoint!r}")
    config = config.change(data={"allow_commands": allow_commands})
    if labels is not None:
        names = Path(labels).read_text(encoding="utf-8-sig").splitlines()
        if len(set(names)) < len(names):
            double = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"labels: expected another name for each output, got {double!r} twice in {labels!r}")
        model = FineTuned(model.encoder, model.head, names)
    kind, options = model.head.settings.task, config.finetune.options
    tuned = replace(config.finetune, labels=model.labels)
    data = replace(config.data, global_batch=batch, micro_batch=batch, workers=0, unequal="pad")
    config = replace(config, finetune=tuned, data=data)
    uncut = Uncut(config, max_seconds, max_tokens)
    spelling: Spelling | None = None
    options = replace(options, bad_labels=bad_labels)  # type: ignore[arg-type]
    if kind == "ctc":
        require_jiwer()
        beside = [str(p) for p in (Path(checkpoint) / SPELLING, Path(checkpoint) / BEST / SPELLING) if p.is_dir()]
        spelling = spelling_of(options.units, model.labels, beside[0] if beside else options.bpe)
        if not config.finetune.task and isinstance(spelling, Letters):
            options = replace(options, case=spelling.case)  # type: ignore[arg-type]
    source, _, _ = _open(kind, uncut.modality, test, "test", options, model.labels, spelling, max_seconds)
    objective = FineTuning(config, model.eval(), Labelled(uncut.modality), source, source, spelling)
    decoder = None
    if spelling is not None:
        decoder = Decoder(decode or Decoding(), spelling, model.head.settings.blank)
    folder = Path(output) if output is not None else None
    if folder is None and (Path(checkpoint) / "metrics.jsonl").is_file():
        folder = Path(checkpoint) / "evaluation"
    result = judge(objective, source, place, decoder, folder, worst, uncut, precision)
    print(json.dumps(result))
    return result
