"""run.convolution: layers of positions and decoder as one operator compute what the library's convolutions do."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from support.families import make_batch, make_config, make_model
from torch import Tensor

from d2v import Data2Vec
from d2v.config import Config
from d2v.model import decoder, layers

# Lengths of a padded batch, and how many layers are called: decoder of student rows; positions of student and teacher.
CASES = {"speech-base": ((6_000, 5_000), 2 + 2 * 3), "vision-base": (None, 2), "text-base": ((40, 31), 2),
         "speech1-base": ((6_000, 5_000), 2 * 3)}  # fmt: skip


def with_choice(config: Config, choice: str, precision: str = "fp32") -> Config:
    return config.replace("run.convolution", choice).replace("run.precision", precision)


def run(model: Data2Vec, lengths: tuple[int, ...] | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Predictions, targets and gradients of one batch."""
    torch.manual_seed(1)
    if lengths is None:
        inputs, given = torch.randn(2, 3, 32, 32), None
    else:
        inputs, given = make_batch(model.config, lengths)
    tokens = model.stem.measure(inputs, given)[0]
    mask = torch.zeros(2 * model.config.mask.copies, tokens, dtype=torch.bool)
    mask[:, 2 : tokens // 2] = True
    out = model(inputs, given, masks=mask)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.prediction.detach(), out.targets.detach(), gradients


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("name", CASES)
def test_both_forms_agree(name: str, kernel: int) -> None:
    lengths, expected = CASES[name]
    config = make_config(name).replace("decoder.kernel", kernel).replace("decoder.width", 32)
    if config.stem.modality == "speech":
        config = config.replace("stem.position_width", 4 * kernel)
    results: list[Any] = []
    for choice in ("library", "fused"):
        with mock.patch.object(layers, "conv_layer_norm_gelu", wraps=layers.conv_layer_norm_gelu) as fused:
            results.append(run(make_model(with_choice(config, choice)), lengths))
        assert fused.call_count == (expected if choice == "fused" else 0)
        residual = {call.kwargs["residual"] for call in fused.call_args_list}
        assert choice == "library" or (True in residual) == (config.version == 2 and config.decoder.residual)
    (*tensors, gradients), (*others, of_fused) = results
    torch.testing.assert_close(tensors, others, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == of_fused.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_fused[parameter], rtol=1e-3, atol=1e-5 * largest, msg=parameter)


def test_auto_is_the_library_bit_for_bit() -> None:
    config = make_config("speech-base")
    assert config.run.convolution == "auto"
    found = [run(make_model(with_choice(config, choice)), CASES["speech-base"][0]) for choice in ("auto", "library")]
    assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))
    assert all(torch.equal(found[0][2][name], found[1][2][name]) for name in found[0][2])


@pytest.mark.parametrize("name", CASES)
def test_under_autocast(name: str) -> None:
    """In bfloat16, with the teacher's working copies: as near as roundings allow, gradients in float32."""
    results = []
    for choice in ("library", "fused"):
        model = make_model(with_choice(make_config(name), choice, "bf16"))
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(model, CASES[name][0]))
    torch.testing.assert_close(*(r[0].float() for r in results), rtol=0.1, atol=0.1)
    torch.testing.assert_close(*(r[1].float() for r in results), rtol=0.1, atol=0.1)
    assert all(g.dtype == torch.float32 for g in results[1][2].values())


@pytest.mark.parametrize("name", ["speech-base", "vision-base", "text-base"])
def test_on_gpus_the_library_has_rows_of_16_bits_too(name: str) -> None:
    """As exact as the operator, whose rows have them everywhere."""
    results, dtypes = {}, set()

    def convolve_grid(conv: torch.nn.Module, x: Tensor) -> Tensor:
        dtypes.add(x.dtype)
        return layers.convolve_grid(conv, x)

    for choice, keeps in (("exact", False), ("fused", False), ("library", True)):
        model = make_model(with_choice(make_config(name), choice.replace("exact", "library"), "fp32"))
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=choice != "exact"),
            mock.patch.object(layers, "_keeps_layout", lambda _, keeps=keeps: keeps),
            mock.patch.object(decoder, "convolve_grid", convolve_grid if keeps else layers.convolve_grid),
        ):
            results[choice] = run(model, CASES[name][0])
    assert dtypes == {torch.bfloat16}
    exact, *found = (results[choice] for choice in ("exact", "fused", "library"))
    fused, library = (float((r[0].float() - exact[0]).norm() / exact[0].norm()) for r in found)
    assert 0.0 < library <= 1.3 * fused
    of_fused, of_library = (
        sum(float((r[2][n] - g).square().sum()) for n, g in exact[2].items() if n.startswith("decoder")) for r in found
    )
    # Squares; 1.98 times on a processor without bfloat16 units, where the library computes them otherwise.
    assert 0.0 < of_library <= 2.5 * of_fused
