"""How a network is trained before it is measured; each job is one process that leaves a result.json."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

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
from d2v.train.pretraining import Pretraining, open_data
from d2v.train.run_dir import RunFolder
from d2v.train.trainer import train

from ..training.cases import change
from .autoencoder import Autoencoding, MaskedAutoencoder, to_data2vec
from .tasks import Splits, Task

METHODS = {
    "data2vec2": "data2vec 2.0",
    "data2vec1": "data2vec 1.0",
    "autoencoder": "masked autoencoder",
    "scratch": "supervised from scratch",
    "finetuned": "data2vec 2.0, all weights fine-tuned",
}
RATES = (0.5, 1.0, 2.0)
"""Learning rates that are tried, over the recipe's (from scratch: over 1e-3)."""
SUPERVISED = ("scratch", "finetuned")
"""Methods that train all weights on labels, alike but for the weights they begin with."""
SCRATCH_RATE = 1e-3
TYPICAL = {"speech": 6400, "text": 32}
"""Samples or tokens of a sample for which FLOPs are compared."""


def flops_of_update(config: Config, version: int, teacher: bool = True) -> float:
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


def updates_for(task: Task, method: str) -> int:
    """Updates that cost what data2vec 2.0's cost."""
    second = task.config(2)
    budget = task.steps * flops_of_update(second, 2)
    if method == "data2vec1":
        return round(budget / flops_of_update(task.config(1), 1))
    return round(budget / flops_of_update(second, 2, teacher=method != "autoencoder"))


def scaled(config: Config, steps: int, seed: int, rate: float, splits: Splits, folder: Path) -> Config:
    """The recipe for a number of updates; warm-up keeps its share."""
    warmup = max(1, round(config.optim.warmup_steps * steps / max(config.run.steps, 1)))
    optim = {"learning_rate": config.optim.learning_rate * rate, "warmup_steps": min(warmup, steps // 4)}
    run = {
        "dir": str(folder / "run"), "steps": steps, "seed": seed, "threads": 1, "device": "auto", "log_every": 100,
        "checkpoint_every": steps, "collapse_content_spread": 0.0,
    }  # fmt: skip
    return change(config, optim=optim, data={"path": splits.pretrain, "workers": 0}, run=run)


def pretrain_job(task: Task, method: str, seed: int, rate: float, splits: Splits, folder: Path) -> dict[str, Any]:
    """Pre-trains; returns what it cost. The model is then in `folder` / "model"."""
    version = 1 if method == "data2vec1" else 2
    steps = updates_for(task, method)
    config = scaled(task.config(version), steps, seed, rate, splits, folder)
    ranks = Ranks(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(1)
    source, _ = open_data(config)
    kind = Autoencoding if method == "autoencoder" else Pretraining
    objective = kind(config, source, None, ranks.device)
    begin, cpu = time.monotonic(), time.process_time()
    train(objective, ranks, RunFolder(config, ranks))
    cost = {"seconds": time.monotonic() - begin, "cpu_seconds": time.process_time() - cpu, "steps": steps}
    model = objective.model.cpu()
    if isinstance(model, MaskedAutoencoder):
        model = to_data2vec(model, config)
    shutil.rmtree(folder / "model", ignore_errors=True)
    write_folder(model, folder / "model", config)
    if (folder / "run" / "tokenizer").is_dir():
        shutil.copytree(folder / "run" / "tokenizer", folder / "model" / "tokenizer")
    teacher = method != "autoencoder"
    return {**cost, "flops": steps * flops_of_update(task.config(version), version, teacher)}


def probe_job(task: Task, seed: int, method: str, splits: Splits, test: str, folder: Path) -> dict[str, Any]:
    """Accuracies of the three probes; on test data with the baselines, beside data2vec 2.0."""
    names: tuple[str, ...] = ()
    if method == "data2vec2" and test == splits.test:
        names = ("random_init", *(task.baselines if seed == 0 or task.redrawn else ()))
    output = folder / f"probe-{'test' if test == splits.test else 'valid'}.json"
    weights = "student" if method == "autoencoder" else "teacher"
    arguments = ["evaluate", "probe", "--checkpoint", str(folder / "model"), "--train", splits.train, "--test", test,
                 "--weights", weights, "--pool", task.pool, "--seed", str(seed), "--output", str(output)]  # fmt: skip
    if code := d2v([*arguments, *(["--baselines", *names] if names else [])]):
        raise SystemExit(code)
    result = json.loads(output.read_text())
    keys = ("linear_probe", "knn", "few_label")
    return {name: {k: result[k][name] for k in keys} for name in result["knn"]}


def write_untrained(task: Task, seed: int, splits: Splits, folder: Path) -> Path:
    """The network of data2vec 2.0 with its initial weights, as a model folder."""
    # The tokenizer of text is that of the pre-training.
    data = {"path": splits.pretrain} if task.finetune == "text-classify" else {}
    config = change(task.config(2), data=data, run={"seed": seed})
    untrained = folder / "untrained"
    if not untrained.is_dir():
        write_folder(build_model(config), untrained, config)
        if config.stem.modality == "text":
            source, _ = open_data(config)
            source.prepare(untrained, fresh=True)
    return untrained


def linear(result: dict[str, Any]) -> float:
    """What chooses a setting: the linear probe, or the accuracy of all labels."""
    scores = result["scores"].get("pretrained") or result["scores"][result["method"]]
    return float(scores["linear_probe"])


def find_pretrained(task: Task, seed: int, root: Path) -> Path:
    """The model folder of data2vec 2.0 with the rate that was best on held-out data."""
    tried = [json.loads(f.read_text()) for f in sorted((root / task.name).glob("data2vec2-*-seed0/result-choose.json"))]
    if not tried:
        raise ValueError(f"finetuned: expected results of data2vec2 in {str(root / task.name)!r}, found none")
    return root / task.name / f"data2vec2-x{max(tried, key=linear)['rate']:g}-seed{seed}" / "model"


def supervised_job(
    task: Task, method: str, seed: int, rate: float, splits: Splits, test: str, folder: Path, start: Path
) -> dict[str, Any]:
    """Accuracy of the network trained from the weights at `start` on all labels, and on a few."""
    config = task.config(2)
    result, cpu = {}, time.process_time()
    for name, path in (("all", splits.train), ("few", splits.few)):
        if not path:
            continue
        _, (optim, data, run, options) = read_defaults(task.finetune, str(start))
        optim = dataclasses.replace(optim, learning_rate=SCRATCH_RATE * rate, weight_decay=0.05, clip=3.0)
        epochs = task.epochs if name == "all" else 100.0
        options = dataclasses.replace(
            options, epochs=epochs, layer_decay=1.0, mixup=0.0, cutmix=0.0, erasing=0.0, label_smoothing=0.0,
            drop_path=0.0, time_mask=0.0, valid_share=0.1,
        )  # fmt: skip
        place = folder / f"{name}-{'test' if test == splits.test else 'valid'}"
        run = dataclasses.replace(run, dir=str(place), seed=seed, threads=1, precision="fp32")
        same = {"crop_scale": config.data.crop_scale, "speed": config.data.speed}
        data = dataclasses.replace(data, workers=0, global_batch=16, **same)
        found = finetune(
            task.finetune, str(start), path, test, run=run, optim=optim, data=data, options=options
        )  # fmt: skip
        result[name] = found["accuracy"]["value"] if isinstance(found["accuracy"], dict) else found["accuracy"]
    scores = {"linear_probe": result["all"], "knn": result["all"], "few_label": result.get("few", float("nan"))}
    return {"scores": {method: scores}, "cpu_seconds": time.process_time() - cpu}


def result_file(root: Path, task: str, method: str, seed: int, rate: float, stage: str) -> Path:
    """Where a job leaves its result."""
    return root / task / f"{method}-x{rate:g}-seed{seed}" / f"result-{stage}.json"


def run_job(task: Task, method: str, seed: int, rate: float, stage: str, root: Path, data: Path) -> dict[str, Any]:
    """One job: trains, measures on held-out ("choose") or test data ("test"); returns and stores its result."""
    file = result_file(root, task.name, method, seed, rate, stage)
    folder = file.parent
    splits = task.prepare(data, root / task.name / f"data-seed{seed}-{method}-x{rate:g}", seed)
    if stage == "choose" and splits.choose_train:
        splits = dataclasses.replace(splits, train=splits.choose_train, few=splits.choose_few)
    folder.mkdir(parents=True, exist_ok=True)
    measured = splits.test if stage == "test" else splits.valid
    result: dict[str, Any] = {"task": task.name, "method": method, "seed": seed, "rate": rate, "stage": stage}
    if method in SUPERVISED:
        untrained = method == "scratch"
        start = write_untrained(task, seed, splits, folder) if untrained else find_pretrained(task, seed, root)
        result |= supervised_job(task, method, seed, rate, splits, measured, folder, start)
    else:
        cost = folder / "cost.json"
        if not cost.is_file():
            write_atomically(cost, json.dumps(pretrain_job(task, method, seed, rate, splits, folder)))
        result |= json.loads(cost.read_text()) | {"scores": probe_job(task, seed, method, splits, measured, folder)}
    write_atomically(file, json.dumps(result, indent=1))
    return result
