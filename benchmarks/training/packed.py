"""Steps of padded batches with `run.packed` never and always: `python -m benchmarks.training.packed [--only TEXT]`.

1.0 on a CPU, one thread: the lengths of a batch fall evenly from the longest, so that `--padding` of it is padding.
Loss and gradients are compared without dropout first; then the two forms take turns.
"""

from __future__ import annotations

import functools
import statistics

import torch
from torch import Tensor

from d2v import Data2Vec, recipes
from d2v.config import Config
from d2v.model.masking import make_mask_sampler
from d2v.model.stems import PADDING, make_stem
from d2v_kernels import Masks
from d2v_kernels.bench import recipe
from d2v_kernels.bench.timer import seconds_of, take_turns

from ..harness.record import parse
from .cases import change, without_dropout
from .forms import Form, settings

CASES = [("speech1-tiny", 32, 0.6), ("text1-tiny", 16, 64.0), ("speech1-small", 4, 4.0), ("speech1-small", 2, 12.0),
         ("text1-small", 8, 256.0), ("text1-small", 32, 50.0)]  # fmt: skip
"""Recipe, samples, seconds or tokens of the longest."""


def config_of(name: str, precision: str) -> Config:
    """Of a recipe; the small ones of 1.0 are those of 2.0 with 1.0's mask and head."""
    if not name.endswith("1-small"):
        config = recipes.get(name)
    elif name.startswith("speech"):
        config = recipes.get("speech-small").change(
            version=1, encoder={"alibi": "none"}, head={"layers": 1}, ema={"scope": "layers"},
            mask={"kind": "span", "ratio": 0.65, "span": 10, "copies": 1},
        )  # fmt: skip
    else:
        config = recipes.get("text-small").change(
            version=1, stem={"mask_token": 16_383}, head={"layers": 2},
            mask={"kind": "token-span", "ratio": 0.35, "span": 4, "copies": 1},
        )  # fmt: skip
    return change(config, encoder={"layer_drop": 0.0}, run={"precision": precision})


def make_batch(config: Config, samples: int, longest: float, padding: float) -> tuple[Tensor, Tensor, Masks]:
    """Inputs, lengths and masks, on the host."""
    inputs = recipe.make_inputs(config, samples, longest, 0)
    lengths = (torch.linspace(1.0, 1.0 - 2.0 * padding, samples) * inputs.shape[1]).long()
    fill = PADDING if config.stem.modality == "text" else 0
    inputs = inputs.where(torch.arange(inputs.shape[1]) < lengths[:, None], torch.tensor(fill).to(inputs))
    tokens, valid = make_stem(config).measure(inputs, lengths)
    return inputs, lengths, make_mask_sampler(config, tokens=tokens).draw(range(samples), 0, lengths=valid)


def make_forms(config: Config, lengths: Tensor) -> dict[str, Form]:
    """Both forms with equal weights."""
    torch.manual_seed(0)
    state = Data2Vec(config).state_dict()
    forms = {}
    for packed in ("never", "always"):
        form = forms[packed] = Form("d2v", config.replace("run.packed", packed), state, torch.device("cpu"))
        form.network = functools.partial(form.model, lengths=lengths)  # type: ignore[assignment]
    return forms


def check_equal(config: Config, inputs: Tensor, lengths: Tensor, masks: Masks) -> float:
    """Largest difference of a gradient, relative to its largest value, in float32 without dropout; `AssertionError`
    above 1e-4, and where the losses differ by more than 1e-5."""
    padded, packed = make_forms(without_dropout(config), lengths).values()
    losses = [form.forward(inputs, masks) for form in (padded, packed)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0.0)
    pairs = [(a.grad, b.grad) for a, b in zip(padded.parameters, packed.parameters, strict=True)]
    largest = max(float(a.abs().max()) for a, _ in pairs if a is not None)
    worst = 0.0
    for a, b in pairs:
        if a is not None and b is not None:
            worst = max(worst, float((a - b).abs().max()) / max(float(a.abs().max()), 1e-3 * largest))
    assert worst < 1e-4, f"gradients differ by {worst}"
    return worst


def main(arguments: list[str] | None = None) -> None:
    """Prints a line a case."""
    options = parse(
        "training.packed", __doc__, arguments,
        only=("", "measure the cases whose name contains this text"),
        padding=(0.2, "share of a batch that is padding"),
        rounds=(15, "steps of each form"),
    )  # fmt: skip
    for name, samples, longest in CASES:
        for precision in ("fp32", "bf16"):
            title = f"{name} B={samples} x {longest:g}, {precision}"
            if options.only not in title:
                continue
            config = config_of(name, precision)
            inputs, lengths, masks = make_batch(config, samples, longest, options.padding)
            with settings(1):
                error = check_equal(config, inputs, lengths, masks)
                forms = make_forms(config, lengths)
                steps = {
                    n: functools.partial(seconds_of, functools.partial(f.step, inputs, masks)) for n, f in forms.items()
                }
                take_turns(steps, rounds=2, least=2, budget_s=0.0)
                taken = take_turns(steps, rounds=options.rounds, least=5, budget_s=120.0)
            padded, packed = (statistics.median(taken[n]) for n in ("never", "always"))
            ratio = statistics.median(b / a for a, b in zip(taken["never"], taken["always"], strict=True))
            print(
                f"{title}: {1e3 * padded:.1f} ms padded, {1e3 * packed:.1f} packed, ratio {ratio:.3f}, "
                f"least to least {min(taken['always']) / min(taken['never']):.3f}, gradients to {error:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
