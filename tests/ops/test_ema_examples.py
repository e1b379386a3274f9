"""`examples/ema_*.py`: the same numbers as what each replaces."""

from __future__ import annotations

import copy
import importlib.util
import runpy
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"ema_{name}.py"))


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 300), nn.BatchNorm1d(300), nn.Linear(300, 3)).to(dtype)
    model[2].bias.requires_grad_(False)
    return model


def students(model: nn.Module, steps: int = 6) -> Iterator[int]:
    """New weights and statistics in the model, step by step."""
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for t in model.state_dict().values():
                t.copy_(torch.randn(t.shape, generator=generator) if t.is_floating_point() else t + 3)
        yield step


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """But for the rounding of a few steps."""
    assert got.keys() == want.keys()
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("use_buffers", [False, True])
def test_torch(use_buffers) -> None:
    model, make = make_model(), example("torch")["ema_multi_avg_fn"]
    ours, theirs = (
        AveragedModel(model, multi_avg_fn=function(0.9), use_buffers=use_buffers)
        for function in (make, get_ema_multi_avg_fn)
    )
    for _ in students(model):
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert_same(ours.state_dict(), theirs.state_dict())


@pytest.fixture
def timm_class(monkeypatch) -> Any:
    """timm's class; where timm cannot be imported whole (torchvision is missing), from its file alone."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed")
    try:
        importlib.import_module("timm.utils.model_ema")
    except ImportError:
        path = Path(spec.submodule_search_locations[0], "utils", "model_ema.py")
        for name in ("timm", "timm.utils"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        found = importlib.util.spec_from_file_location("timm.utils.model_ema", path)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, "timm.utils.model_ema", module)
    return sys.modules["timm.utils.model_ema"].ModelEmaV3


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.9},
        {"decay": 0.9, "exclude_buffers": True},
        {"decay": 0.9, "foreach": False},
        {"decay": 0.99, "use_warmup": True, "update_after_step": 2},
        {"decay": 0.9, "dtype": torch.float32, "low": True},
    ],
)
def test_timm(timm_class, options) -> None:
    model = make_model(torch.bfloat16 if options.pop("low", False) else torch.float32)
    ours, theirs = example("timm")["ModelEma"](model, **options), timm_class(model, **options)
    for step in students(model):
        for ema in (ours, theirs):
            ema.update(model, step=step if options.get("use_warmup") else None)
    assert_same(ours.state_dict(), theirs.state_dict())
    with pytest.raises(ValueError, match="model: expected the one it was made with, got another Linear"):
        ours.update(nn.Linear(1, 1))


def test_timm_with_a_bfloat16_model(timm_class) -> None:
    """float32 averages, nearer to the truth than stochastic rounding, which timm has here."""
    model = make_model(torch.bfloat16)
    ours, theirs = example("timm")["ModelEma"](model, decay=0.999), timm_class(model, decay=0.999)
    truth = copy.deepcopy(model).double()
    for _ in students(model, 50):
        ours.update(model)
        theirs.update(model)
        for a, s in zip(truth.parameters(), model.parameters(), strict=True):
            a.data.lerp_(s.double(), 0.001)
    for (name, want), got, other in zip(
        truth.named_parameters(), ours.module.parameters(), theirs.module.parameters(), strict=True
    ):
        whole = ours.plan.state_dict()[name]
        torch.testing.assert_close(whole.double(), want.detach(), rtol=1e-5, atol=1e-6)
        assert (got - want).norm() < 0.9 * (other - want).norm()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("options", [{"decay": 0.9}, {"use_ema_warmup": True, "update_after_step": 2}])
def test_diffusers(foreach, options) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils", reason="diffusers is not installed")
    model = make_model()
    ours = example("diffusers")["EMAModel"](model.parameters(), **options)
    theirs = training_utils.EMAModel(model.parameters(), foreach=foreach, **options)
    for _ in students(model):
        ours.step(model.parameters())
        theirs.step(model.parameters())
        assert ours.cur_decay_value == theirs.cur_decay_value
    states = [ema.state_dict() for ema in (ours, theirs)]
    assert_same(*({str(i): t for i, t in enumerate(state.pop("shadow_params"))} for state in states))
    assert states[0] == states[1]


@pytest.mark.parametrize("use_buffers", [False, True])
def test_lightning(use_buffers, tmp_path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def train(make_callback: Callable[..., Any]) -> dict[str, Tensor]:
        module, data = Module(), torch.randn(24, 5, generator=torch.Generator().manual_seed(2))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        callback = make_callback(decay=0.9, use_buffers=use_buffers)
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, **quiet
        )
        trainer.fit(module, loader)
        return module.state_dict()

    ours, theirs = train(example("lightning")["EmaCallback"]), train(lightning.callbacks.EMAWeightAveraging)
    assert_same(ours, theirs)
    assert not torch.equal(ours["net.0.weight"], make_model()[0].weight)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("ema_*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 30
