"""How a network is trained before it is measured; each job is one process that leaves a result.json."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch

from d2v.cli import main as d2v
from d2v.config import Config
from d2v.files import write_atomically
from d2v.finetune.run import finetune, read_defaults
from d2v.model.data2vec import Data2Vec, build_model
from d2v.model.masking import make_mask_sampler
from d2v.model.saving import write_folder
from d2v.train.distributed import Ranks
from d2v.train.flops import count_flops, shape_of
from d2v.train.pretraining import Pretraining, load_weights, open_data
from d2v.train.run_dir import RunFolder
from d2v.train.trainer import train

from ..training.cases import change
from .autoencoder import Autoencoding, MaskedAutoencoder, to_data2vec
from .tasks import TASKS, Fold, Task

METHODS = {
    "data2vec2": "data2vec 2.0",
    "data2vec1": "data2vec 1.0",
    "autoencoder": "masked autoencoder",
    "scratch": "supervised from scratch",
    "finetuned": "data2vec 2.0, all weights fine-tuned",
}
SUPERVISED = ("scratch", "finetuned")
"""Methods that train all weights on labels, alike but for the weights they begin with."""
SCRATCH_RATE = 1e-3
TYPICAL = {"speech": 6400, "text": 32}
"""Samples or tokens of a sample for which FLOPs are compared."""


class Job(NamedTuple):
    """One process."""

    task: str
    method: str
    seed: int
    rate: float
    """Learning rate over the recipe's; from scratch and fine-tuned: over `SCRATCH_RATE`."""
    share: float = 1.0
    """Of the task's updates."""
    changes: tuple[str, ...] = ()
    """SECTION.FIELD=VALUE: settings that are tried on held-out data. Empty, with the whole budget: test data."""

    def folder(self, root: Path) -> Path:
        """Where a job leaves its model and its results."""
        words = (self.method, f"x{self.rate:g}", f"seed{self.seed}", *([f"share{self.share:g}"] * (self.share != 1.0)))
        return root / self.task / ",".join((*words, *self.changes)).replace("/", "")


def flops_of_update(config: Config, teacher: bool = True) -> float:
    """FLOPs of one update, with the teacher's forward or without."""
    torch.manual_seed(0)
    model = Data2Vec(config)
    stem, batch = config.stem, config.data.global_batch
    length = TYPICAL.get(stem.modality, 0)
    if stem.modality == "vision":
        tokens = stem.grid[0] * stem.grid[1]
    else:
        tokens = length if stem.modality == "text" else model.stem.count_tokens(length)  # type: ignore[operator]
    sampler = make_mask_sampler(config, tokens=None if stem.modality == "vision" else tokens)
    masks = sampler.draw([0], 0, copies=config.mask.copies)
    shape = shape_of(masks, 1, length)._replace(samples=batch, masked=len(masks.rows) * batch)
    whole = count_flops(config, shape)
    if teacher:
        return whole
    encoder = config.encoder
    width, hidden = encoder.width, int(encoder.width * encoder.mlp_ratio)
    block = tokens * (8 * width**2 + 4 * width * hidden) + 4 * tokens**2 * width
    return whole - batch * block * (encoder.prenet_depth + encoder.depth)


def updates_for(task: Task, method: str, share: float = 1.0) -> int:
    """Updates that cost what data2vec 2.0's cost."""
    budget = share * task.steps * flops_of_update(TASKS[task.name].config())
    return round(budget / flops_of_update(task.config(method), teacher=method != "autoencoder"))


def scaled(config: Config, steps: int, seed: int, rate: float, fold: Fold, folder: Path) -> Config:
    """The recipe for a number of updates; warm-up keeps its share."""
    warmup = max(1, round(config.optim.warmup_steps * steps / max(config.run.steps, 1)))
    optim = {"learning_rate": config.optim.learning_rate * rate, "warmup_steps": min(warmup, steps // 4)}
    run = {
        "dir": str(folder / "run"), "steps": steps, "seed": seed, "threads": 1, "device": "auto", "log_every": 100,
        "checkpoint_every": steps, "collapse_content_spread": 0.0,
    }  # fmt: skip
    return change(config, optim=optim, data={"path": fold.pretrain, "workers": 0}, run=run)


def after_quarters(objective: Pretraining, steps: int, save: Callable[[int], None]) -> None:
    """Lets training call `save(n)` after the n-th quarter of its updates, for n of 1, 2, 3."""
    wanted = {round(steps * n / 4): n for n in (1, 2, 3)}
    end = objective.end_update

    def end_update(update: int, applied: Any) -> None:
        end(update, applied)
        if update in wanted:
            save(wanted[update])

    objective.end_update = end_update  # type: ignore[method-assign]


def pretrain_job(task: Task, job: Job, fold: Fold, folder: Path, given: str | None = None) -> dict[str, Any]:
    """Pre-trains, from the weights of a model `given`, if any; returns what it cost. The models are then in `folder`:
    "model-1" to "model-3" after a quarter, a half and three quarters of the updates, and "model"."""
    steps, autoencoder = updates_for(task, job.method, job.share), job.method == "autoencoder"
    config = scaled(task.config(job.method), steps, job.seed, job.rate, fold, folder)
    ranks = Ranks(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(1)
    source, _ = open_data(config)
    objective = (Autoencoding if autoencoder else Pretraining)(config, source, None, ranks.device)
    if given is not None:
        load_weights(objective.model, given, "given")
        objective.lenient = True
    spent, saving = [], 0.0

    def save(name: str) -> None:
        nonlocal saving
        spent.append(time.process_time() - begin - saving)
        model: Data2Vec = objective.model
        model = to_data2vec(model, config) if isinstance(model, MaskedAutoencoder) else model
        shutil.rmtree(folder / name, ignore_errors=True)
        write_folder(model, folder / name, config)
        if (folder / "run" / "tokenizer").is_dir():
            shutil.copytree(folder / "run" / "tokenizer", folder / name / "tokenizer")
        saving = time.process_time() - begin - spent[-1]

    if not job.changes and job.share == 1.0:
        after_quarters(objective, steps, lambda n: save(f"model-{n}"))
    begin = time.process_time()
    train(objective, ranks, RunFolder(config, ranks))
    objective.model.cpu()
    save("model")
    return {"steps": steps, "cpu_seconds": spent[-1], "quarters": spent[:-1],
            "flops": steps * flops_of_update(task.config(job.method), not autoencoder)}  # fmt: skip


def probe(task: Task, job: Job, fold: Fold, model: Path, baselines: tuple[str, ...] = ()) -> dict[str, Any]:
    """Accuracies of the three probes of a model and of raw features, by their names."""
    output = model.with_name(f"probe-{model.name}.json")
    weights = "student" if job.method == "autoencoder" else "teacher"
    data = ["--checkpoint", str(model), "--train", fold.train, "--test", fold.test]
    arguments = ["evaluate", "probe", *data, "--weights", weights, "--pool", task.pool, "--seed", str(job.seed),
                 "--output", str(output)]  # fmt: skip
    if code := d2v([*arguments, *(["--baselines", *baselines] if baselines else [])]):
        raise SystemExit(code)
    result = json.loads(output.read_text())
    keys = ("linear_probe", "knn", "few_label")
    return {name: {k: result[k][name] for k in keys} for name in result["knn"]}


def write_untrained(task: Task, seed: int, fold: Fold, folder: Path) -> Path:
    """The network of data2vec 2.0 with its initial weights, as a model folder."""
    # The tokenizer of text is that of the pre-training.
    data = {"path": fold.pretrain} if task.finetune == "text-classify" else {}
    config = change(task.config(), data=data, run={"seed": seed})
    untrained = folder / "untrained"
    if not untrained.is_dir():
        write_folder(build_model(config), untrained, config)
        if config.stem.modality == "text":
            source, _ = open_data(config)
            source.prepare(untrained, fresh=True)
    return untrained


def find_pretrained(task: Task, seed: int, root: Path, part: str) -> Path:
    """The model folder of data2vec 2.0, which is fine-tuned; part: of the job's folder.

    Raises:
        ValueError: there is none.
    """
    model = Job(task.name, "data2vec2", seed, task.rate("data2vec2")).folder(root) / part / "model"
    if not model.is_dir():
        raise ValueError(f"finetuned: expected a model of data2vec2 in {str(model)!r}, found none")
    return model


def fine_tune(
    task: Task, rate: float, seed: int, start: Path, train: str, test: str, folder: Path, **length: float
) -> tuple[float, float]:  # fmt: skip
    """Accuracy on test data of a network trained from the weights at `start`, and its CPU seconds. length: `epochs` or
    `steps`."""
    given = task.config().data
    _, (optim, data, run, options) = read_defaults(task.finetune, str(start))
    optim = dataclasses.replace(optim, learning_rate=SCRATCH_RATE * rate, weight_decay=0.05, clip=3.0)
    options = dataclasses.replace(
        options, epochs=length.get("epochs", options.epochs), layer_decay=1.0, mixup=0.0, cutmix=0.0, erasing=0.0,
        label_smoothing=0.0, drop_path=0.0, time_mask=0.0, valid_share=0.1,
    )  # fmt: skip
    steps = int(length.get("steps", run.steps))
    run = dataclasses.replace(run, dir=str(folder), seed=seed, threads=1, precision="fp32", steps=steps)
    data = dataclasses.replace(data, workers=0, global_batch=16, crop_scale=given.crop_scale, speed=given.speed)
    begin = time.process_time()
    found = finetune(task.finetune, str(start), train, test, run=run, optim=optim, data=data, options=options)
    score = found["accuracy"]
    return score["value"] if isinstance(score, dict) else score, time.process_time() - begin


def supervised_job(task: Task, job: Job, fold: Fold, folder: Path, start: Path) -> dict[str, Any]:
    """Accuracy of the network trained from the weights at `start` on all labels, which is the cost, and on a few."""
    common = (task, job.rate, job.seed, start)
    all_labels, seconds = fine_tune(*common, fold.train, fold.test, folder / "all", epochs=job.share * task.epochs)
    few, _ = fine_tune(*common, fold.few, fold.test, folder / "few", epochs=job.share * 100.0)
    scores = {"linear_probe": all_labels, "knn": all_labels, "few_label": few}
    return {"scores": {job.method: scores}, "cpu_seconds": seconds}


def run_apart(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int) -> list[Any]:
    """Results of a function for each tuple of arguments, the last of which is the file that keeps the result; in
    `jobs` processes, whose output goes to a `.log` beside it. What is there already is not done again."""
    todo = [call for call in calls if not call[-1].is_file()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(_run_and_store, function, call): call[-1] for call in todo}
        for done in as_completed(futures):
            file = futures[done]
            print(f"{file.parent.name:<60} {done.result():6.0f} s", flush=True)
    return [json.loads(call[-1].read_text()) for call in calls]


def _run_and_store(function: Callable[..., Any], call: tuple[Any, ...]) -> float:
    """Seconds that it took."""
    file, begin = call[-1], time.monotonic()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        result = function(*call[:-1])
    write_atomically(file, json.dumps(result, indent=1))
    return time.monotonic() - begin


def measure(task: Task, job: Job, fold: Fold, choose: bool, root: Path, part: str) -> dict[str, Any]:
    """Scores and costs of one job on one fold; part: of the job's folder, for what is learned from the fold."""
    folder = job.folder(root) / part
    folder.mkdir(exist_ok=True)
    if job.method in SUPERVISED:
        if job.method == "scratch":
            start = write_untrained(task, job.seed, fold, folder)
        else:
            start = find_pretrained(task, job.seed, root, part)
        return supervised_job(task, job, fold, folder / ("choose" if choose else "test"), start)
    cost = folder / "cost.json"
    if not cost.is_file():
        write_atomically(cost, json.dumps(pretrain_job(task, job, fold, folder)))
    if choose:
        return {**json.loads(cost.read_text()), "scores": probe(task, job, fold, folder / "model")}
    names: tuple[str, ...] = ()
    if job.method == "data2vec2":
        names = ("random_init", *(task.baselines if job.seed == 0 or task.redrawn else ()))
    during = [probe(task, job, fold, folder / f"model-{n}")["pretrained"] for n in (1, 2, 3)]
    scores = probe(task, job, fold, folder / "model", names)
    return {**json.loads(cost.read_text()), "scores": scores, "during": during}


def mean_scores(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over folds of the scores of each kind of features and probe."""
    first = found[0]["scores"]
    return {n: {k: statistics.mean(f["scores"][n][k] for f in found) for k in first[n]} for n in first}


def run_job(job: Job, choose: bool, root: Path, data: Path) -> dict[str, Any]:
    """One job: trains, measures on held-out folds (choose) or on test data.

    Raises:
        SystemExit: a probe failed.
        ValueError: a setting that there is not; no data; nothing to fine-tune.
    """
    task, folder = TASKS[job.task].with_changes(job.changes), job.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    splits = task.splits(data, folder / "data", job.seed)
    folds = splits.choose if choose else (splits.final,)
    parts = ["" if f.pretrain == splits.final.pretrain else f"fold-{n}" for n, f in enumerate(folds)]
    found = [measure(task, job, f, choose, root, part) for f, part in zip(folds, parts, strict=True)]
    seconds = sum(f["cpu_seconds"] for f in found)
    means = {"scores": mean_scores(found), "cpu_seconds": seconds}
    return {**job._asdict(), "folder": str(folder), **found[0], **means}


def result_file(job: Job, choose: bool, root: Path) -> Path:
    """Where a job leaves its result."""
    return job.folder(root) / f"result-{'choose' if choose else 'test'}.json"
