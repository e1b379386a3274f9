"""Peak memory of one training step of data2vec 2.0 speech: this attention against a bias that is built and kept.

    python -m benchmarks.memory [--seconds 20] [--samples 1] [--copies 8] [--width 768] [--depth 12]

Each form runs forward and backward once in a process of its own, in float32 on the CPU; the figure is the peak resident
memory less what was resident before the step. "plain" is the published formulation of attention: the bias of all rows
and heads as a tensor (N,H,T,T), logits, weights and dropped weights kept for the backward pass; everything else is the
same code. Both forms give the same loss, which is checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import d2v
from d2v import encoder, recipes

FORMS = ("d2v", "plain")


def mix_plain(q: Tensor, k: Tensor, v: Tensor, around: Any, index: int, dropout: float) -> Tensor:
    """`encoder.mix_tokens` with everything materialised, as published."""
    alibi = around.alibi_of(index)
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if alibi is not None:
        distance = (alibi.positions[:, :, None] - alibi.positions[:, None, :]).abs().float()
        bias = -distance[:, None] * alibi.slopes[:, None, None]  # (N,H,T,T)
        logits = logits + bias * alibi.scale.clamp_min(0.0)[:, None, None]
    weights = torch.nn.functional.dropout(logits.softmax(dim=-1), dropout)
    return (weights @ value).transpose(1, 2)


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run_form(form: str, options: argparse.Namespace) -> dict[str, Any]:
    """One step in this process."""
    torch.manual_seed(0)
    config = recipes.speech_base()
    config = dataclasses.replace(
        config,
        encoder=dataclasses.replace(
            config.encoder, width=options.width, depth=options.depth, dropout=0.0, attention_dropout=0.0,
            prenet_dropout=0.0, layer_drop=0.0,
        ),
        decoder=dataclasses.replace(config.decoder, input_dropout=0.0),
        mask=dataclasses.replace(config.mask, copies=options.copies),
        target=dataclasses.replace(config.target, top_k=min(8, options.depth)),
        run=dataclasses.replace(config.run, precision="fp32"),
    )  # fmt: skip
    model = d2v.Data2Vec(config)
    inputs = torch.randn(options.samples, int(16_000 * options.seconds))
    if form == "plain":
        encoder.mix_tokens = mix_plain
    before = resident_bytes()
    out = model(inputs, noise_keys=torch.arange(options.samples * options.copies))
    out.loss.backward()
    return {"form": form, "loss": out.loss.item(), "bytes": peak_bytes() - before, "tokens": out.targets.shape[1]}


def main() -> None:
    """Runs every form in a process of its own and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a crop")
    parser.add_argument("--samples", type=int, default=1, help="crops B")
    parser.add_argument("--copies", type=int, default=8, help="masks M of each crop")
    parser.add_argument("--width", type=int, default=768, help="channels C")
    parser.add_argument("--depth", type=int, default=12, help="blocks")
    parser.add_argument("--form", choices=FORMS, default=None, help="run this form here; unset: both, in own processes")
    options = parser.parse_args()
    if options.form is not None:
        print(json.dumps(run_form(options.form, options)))
        return
    results = []
    for form in FORMS:
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--form", form]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{form:<8}{results[-1]['bytes'] / 1e9:8.2f} GB   loss {results[-1]['loss']:.6f}", flush=True)
    ours, plain = results
    if abs(ours["loss"] - plain["loss"]) > 1e-4 * abs(plain["loss"]):
        sys.exit(f"memory: expected equal losses, got {ours['loss']} and {plain['loss']}")
    print(f"peak {ours['bytes'] / plain['bytes']:.2f} of the plain form; T {ours['tokens']}")


if __name__ == "__main__":
    main()
