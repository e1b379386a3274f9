"""Steps on paper against counts by hand, formulas of the benches and another way to see which operators run."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks import step
from benchmarks.harness.record import write_rows
from benchmarks.training import estimate as paper
from benchmarks.training.cases import StepCase, make_config
from benchmarks.training.estimate import Kernel, Recorder
from benchmarks.training.forms import group_of, measure_operators
from d2v.model.data2vec import Data2Vec
from d2v.tools.cluster import MACHINES, Cluster
from d2v_kernels.bench import cases as _cases  # noqa: F401  fills FAMILIES
from d2v_kernels.bench.case import BF16, FAMILIES

CASES = {"vision": StepCase("vision-tiny", 2), "speech": StepCase("speech-tiny", 2, 0.4)}
PLAIN = {"add", "addmm", "gelu", "layer_norm_gelu", "mm", "native_layer_norm", "sum"}
"""Operators whose bytes are those of all their tensors."""
Counted = dict[str, tuple[list[Kernel], float]]


class Watcher(Recorder):
    """Counts, besides, every operator that changes something or makes a tensor of its own, by looking at memory."""

    calls: ClassVar[Counter[str]] = Counter()
    bytes: ClassVar[Counter[str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = super().__torch_dispatch__(func, types, args, kwargs), func._schema.name.split("::")[1]
        old, new = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        known = {x.untyped_storage()._cdata for x in old}
        made = not func.is_view and any(x.untyped_storage()._cdata not in known for x in new) and "empty" not in name
        if func._schema.is_mutable or (made and name != "scalar_tensor"):
            self.calls[name] += 1
            self.bytes[name] += sum(x.numel() * x.element_size() for x in (*old, *new))
        return result


@pytest.fixture(scope="module")
def counted() -> Counted:
    return {name: paper.count_step(case) for name, case in CASES.items()}


def named(kernels: list[Kernel], name: str) -> list[Kernel]:
    return [k for k in kernels if k.name == name]


def missed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Operators of which the estimate has other calls or, where all tensors count, other bytes than another count."""
    monkeypatch.setattr(paper, "Recorder", Watcher)
    monkeypatch.setattr(Watcher, "calls", Counter())
    monkeypatch.setattr(Watcher, "bytes", Counter())
    kernels, _ = paper.count_step(CASES["vision"])
    names = set(Watcher.calls) | {k.name for k in kernels if k.name != "update_ema_"}
    wrong = {n for n in names if Watcher.calls[n] != sum(k.calls for k in named(kernels, n))}
    return wrong | {n for n in PLAIN & names if Watcher.bytes[n] != sum(k.bytes for k in named(kernels, n))}


def test_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missed(monkeypatch) == set()


def test_an_operator_that_is_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "SILENT", paper.re.compile(paper.SILENT.pattern + "|native_layer_norm$"))
    assert missed(monkeypatch) == {"native_layer_norm"}


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_model(counted: Counted, name: str) -> None:
    kernels, needed = counted[name]
    assert sum(k.flops for k in kernels) == pytest.approx(needed, rel=1e-3)
    assert {k.group for k in kernels if k.flops} <= set(paper.SHARES)


@pytest.mark.parametrize("recipe", ["text-tiny", "vision1-tiny", "speech1-tiny", "text1-tiny"])
def test_every_family_is_counted(recipe: str) -> None:
    modality = recipe.split("-")[0].rstrip("1")
    kernels, needed = paper.count_step(StepCase(recipe, 2, {"text": 32.0, "speech": 0.4}.get(modality, 0.0)))
    # Relative positions: the gradient of their table is a sum of rows, no product.
    assert sum(k.flops for k in kernels) == pytest.approx(needed, rel=1e-3)
    relative = [k for k in kernels if "scaled_dot_product" in k.name]
    assert bool(relative) == (recipe == "vision1-tiny"), "own attention takes no matrix as a bias"
    assert {k.name for k in relative} <= {
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_efficient_attention_backward",
    }


def test_copies_have_the_mode_of_their_tensors() -> None:
    """PyTorch's own modes are copied with a tensor, and weak references freed once for every copy."""
    with paper._step_on_paper():
        x = torch.zeros(2)
        x[0] = 1.0  # a constant, which a weak reference of the mode stands for
        references = x.fake_mode.fake_tensor_converter.constant_storage_mapping  # type: ignore[attr-defined]
        assert len(references) == 1
        copied = copy.deepcopy(nn.ParameterList([nn.Parameter(x)])), copy.deepcopy(x)
        assert copied[0][0].fake_mode is copied[1].fake_mode is x.fake_mode  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CASES)
def test_fused_convolutions(counted: Counted, name: str) -> None:
    """The same products under another name, without the norms and sums that they hold."""
    kernels, needed = paper.count_step(CASES[name], "fused")
    assert sum(k.flops for k in kernels) == pytest.approx(needed, rel=1e-2)
    groups = {k.group for k in kernels}
    assert paper.FUSED in groups and not groups & {"grouped convolutions"}
    fused = {k.name: k for k in kernels if k.group == paper.FUSED and k.shapes[-1][-1] != 0}
    assert set(fused) == {paper.FUSED, f"{paper.FUSED}_backward"}
    x, weight = (math.prod(s) for s in fused[paper.FUSED].shapes[:2])
    one = fused[paper.FUSED]
    rows, outputs = x // one.shapes[0][-1], one.shapes[1][0]
    assert one.flops / one.calls == 2 * rows * weight
    residual = one.shapes[0][-1] == outputs  # both recipes have it
    # x and (again with residual) x, the convolution's result written and read, the result; float32 weights.
    least = 2 * ((1 + residual) * x + 3 * rows * outputs) + 4 * (weight + outputs)
    assert one.bytes / one.calls == least
    # Residual and casts are no kernels of their own any more.
    assert sum(k.bytes for k in kernels) < sum(k.bytes for k in counted[name][0])


@pytest.mark.parametrize("name", CASES)
def test_every_kernel_takes_time(counted: Counted, name: str) -> None:
    for machine in MACHINES.values():
        assert all(k.seconds(machine) > 0.0 and k.bytes > 0.0 and k.launches > 0.0 for k in counted[name][0])
        lines = paper.summarise(counted[name][0], machine)
        for part in ("calls", "bytes", "flops", "instructions", "launches"):
            assert sum(line[part] for line in lines) == pytest.approx(sum(getattr(k, part) for k in counted[name][0]))
        assert [line["seconds"] for line in lines] == sorted((line["seconds"] for line in lines), reverse=True)


def test_bytes_by_hand(counted: Counted) -> None:
    kernels = counted["vision"][0]
    model = Data2Vec(make_config(CASES["vision"], "bf16"))
    products = [part for part in model.teacher.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    casts = [p for part in products for p in part.parameters(False)]
    averaged = sum(p.numel() for p in model.teacher.parameters())
    # Average read and written, student read, and the copy: 2 bytes of what products take, else 4.
    (ema,) = named(kernels, "update_ema_")
    assert ema.bytes == 16 * averaged - 2 * sum(p.numel() for p in casts)
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    # AdamW reads weight, gradient, two moments and a count of steps, and writes weight and moments.
    (adam,) = named(kernels, "_fused_adamw_")
    assert adam.bytes == 28 * count + 4 * len(trained)
    assert sum(k.calls for k in named(kernels, "linalg_vector_norm")) == len(trained) + 1  # and of the norms


def test_bytes_are_those_of_the_benches(counted: Counted) -> None:
    kernels, config = counted["speech"][0], make_config(CASES["speech"], "bf16")
    gather = max(named(kernels, "gather_tokens"), key=lambda k: k.bytes / k.calls)
    (b, t, c), (n, visible) = gather.shapes[:2]
    size = FAMILIES["gather_tokens"].make("x", b, t, c, n // b, visible, dtype=torch.float32, goals={}).bytes
    assert gather.bytes / gather.calls in (pytest.approx(size, rel=0.05), pytest.approx(size / 2, rel=0.05))
    (restore,) = named(kernels, "restore_tokens")
    (n, visible, c), (_, tokens) = restore.shapes[:2]
    size = FAMILIES["restore_tokens"].make("x", n, tokens, visible, c, dtype=torch.float32, goals={}).bytes
    assert restore.bytes in (pytest.approx(size, rel=0.05), pytest.approx(size / 2, rel=0.05))
    (average,) = named(kernels, "average_layers")
    assert average.bytes == FAMILIES["average_layers"].make(
        "x", config.target.top_k, *average.shapes[0], dtype=BF16, goals={}
    ).bytes  # fmt: skip


def test_time_by_hand() -> None:
    machine = Cluster(peak=100.0, memory_rate=10.0, issue=1.0)
    start = paper.START
    assert Kernel("matrix products", "mm", (), flops=120.0, bytes=1.0).seconds(machine) == pytest.approx(2.0 + start)
    assert Kernel("gelu", "gelu", (), bytes=30.0, instructions=2.0, launches=2).seconds(machine) == 3.0 + 2 * start
    both = Kernel("attention", "attention", (), flops=30.0, bytes=10.0, instructions=2.0)
    assert both.seconds(machine) == pytest.approx(3.0 + start)


def test_groups_of_operators() -> None:
    names = {
        "aten::mm": "matrix products", "aten::cudnn_convolution": "convolutions", "aten::native_layer_norm": "norms",
        "d2v::attention_backward": "attention", "aten::_scaled_dot_product_flash_attention": "attention",
        "d2v::gelu_backward_": "gelu", "d2v::layer_norm_gelu": "layer_norm_gelu", "aten::_to_copy": "copies and casts",
        "aten::_fused_adamw_": "optimiser and clipping", "aten::add": "element-wise", "aten::mul_": "element-wise",
    }  # fmt: skip
    assert {name: group_of(name) for name in names} == names
    assert group_of("aten::convolution", [(2, 8, 9), (8, 2, 3)]) == "grouped convolutions"
    assert group_of("aten::convolution_backward", [(2, 8, 9), (2, 8, 9), (8, 8, 3)]) == "convolutions"


def test_measured_groups_have_the_same_names() -> None:
    forms, batches = step.make_forms(CASES["vision"], ["d2v"], torch.device("cpu"), "bf16")
    found = measure_operators(forms[0], batches[0], steps=1)
    assert found["groups"]["matrix products"] > 0.0
    # The moving average has a call of its own; no dropout in this recipe.
    groups = {line.group for line in paper.count_step(CASES["vision"], "auto")[0]}  # what a step takes on this CPU
    assert groups - {"update_ema"} <= set(found["groups"]) | {"sums"}


def test_table_with_and_without_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counted: Counted) -> None:
    monkeypatch.setattr(paper, "RESULTS", tmp_path)
    monkeypatch.setattr(paper, "find_case", lambda recipe: CASES["vision"])
    monkeypatch.setattr(paper, "count_step", lambda case, convolution="library": counted["vision"])
    text = paper.estimate("h200", "vision-base")
    assert text.startswith("ESTIMATE, no measurement") and "measured" not in text.split("\n", 1)[1]
    assert "MFU 0%: target 40% NOT reached" in text
    row = {"kind": "step", "case": CASES["vision"].name, "machine": {"gpu": "NVIDIA H200", "date": "2026-01-01"},
           "forms": {"d2v": {"groups": {"matrix products": 0.0123, "unheard of": 0.0045}}}}  # fmt: skip
    write_rows(tmp_path / "gpu.jsonl", [row])
    text = paper.estimate("h200", "vision-base")
    assert "ms, measured" in text and "| 12.3 |" in text and "| unheard of |" in text
    assert "measured" not in paper.estimate("a100", "vision-base").split("\n", 1)[1]
    found = json.loads(paper.estimate("h200", "vision-base", as_json=True))
    assert found["estimate"] and found["measured"] == row["forms"]["d2v"]["groups"]  # type: ignore[index]
    assert sum(k["seconds"] for k in found["kernels"]) == pytest.approx(sum(g["seconds"] for g in found["groups"]))
    quick = dataclasses.replace(MACHINES["h200"], peak=1e21, memory_rate=1e18, issue=1e21, launch=0.0)
    monkeypatch.setitem(MACHINES, "h200", quick)
    monkeypatch.setattr(paper, "START", 0.0)
    assert "images a second" in paper.estimate("h200", "vision-base") and "900 reached" in paper.estimate(
        "h200", "vision-base"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["h300", "vision-tiny"], "machine: expected one of h200"),
     (["h200", "vision-tinny"], "did you mean 'vision-tiny'"),
     (["h200"], "expected a machine and a recipe, got 'h200'")],
)  # fmt: skip
def test_unknown_names(words: list[str], expected: str) -> None:
    with pytest.raises(SystemExit, match=expected):
        step.main(["--estimate", *words])


def test_recipes_without_a_case_have_their_own_micro_batch() -> None:
    assert paper.find_case("vision-huge14").samples > 0
    assert paper.find_case("speech-base").name == "speech-base B=3 x 20 s"
