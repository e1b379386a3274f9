"""The kernel-hub folder loads through the `kernels` package, beside an installed d2v_kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

USE = """
import json, pathlib, sys, torch
import d2v_kernels
from kernels import get_local_kernel

folder = pathlib.Path(sys.argv[1])
kernel = get_local_kernel(folder, backend="cpu")
x = [torch.randn(2, 70, 33, generator=torch.Generator().manual_seed(i)) for i in range(3)]
results = {}
for backend in ("native", "reference"):
    with kernel.use_backend(backend):
        results[backend] = kernel.average_layers(x, norm="instance")
with d2v_kernels.use_backend("reference"):
    ours = d2v_kernels.average_layers(x, norm="instance")
linear = torch.nn.Linear(8, 4)
with kernel.use_backend("native"):
    kernel.layers.GELULinear.forward(linear, torch.ones(3, 8)).sum().backward()
compiled = torch.compile(lambda t: kernel.gelu(t), fullgraph=True, backend="aot_eager")(torch.ones(5))
try:
    kernel.gather_tokens(torch.zeros(1, 4, 2), torch.tensor([[9]]))
    refused = ""
except ValueError as error:
    refused = str(error)
print(json.dumps({
    "id": kernel.__name__, "public": kernel.average_layers.__module__,
    "error": float((results["native"] - results["reference"]).abs().max()),
    "apart": float((results["reference"] - ours).abs().max()),
    "native": hasattr(torch.ops, kernel.__name__ + "_native"),
    "grad": linear.weight.grad is not None, "compiled": compiled.tolist(), "refused": refused,
}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, CPU variant; compiles the three files that name the operators, the rest where it is not built."""
    pytest.importorskip("kernels", reason="the package `kernels` is not installed")
    folder = tmp_path_factory.mktemp("hub")
    done = subprocess.run(
        [sys.executable, "scripts/build_hub.py", "--output", str(folder)],
        cwd=ROOT, env={**os.environ, "D2V_BUILD_CUDA": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.long
def test_the_loader_takes_it(hub: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", USE, str(hub)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["id"].startswith("_d2v_kernels_cpu_") and report["public"].startswith(report["id"])
    assert report["error"] < 1e-5 and report["apart"] == 0 and report["native"] and report["grad"]
    assert report["compiled"] == pytest.approx([0.8413447] * 5)
    assert "gather_tokens" in report["refused"]


@pytest.mark.long
def test_its_own_tools_accept_it(hub: Path) -> None:
    from kernels._rust import Build, Metadata
    from kernels.variants import get_variants_local, resolve_variant

    assert [str(b) for b in Build.open(hub).general.backends] == ["cpu", "cuda"]
    variants = get_variants_local(hub / "build")
    chosen, _ = resolve_variant(variants, "cpu")
    assert chosen is not None, "the loader would take this variant on this machine"
    (variant,) = (hub / "build").iterdir()
    assert variant.name == chosen.variant_str
    assert str(Metadata.read_from_file(variant / "metadata.json").name) == "d2v-kernels"
    checker = pytest.importorskip("kernel_abi_check", reason="kernel-abi-check is not installed")
    for path in variant.glob("lib/*.so"):
        checked = checker.ObjectFile(str(path))
        assert checked.check_manylinux("manylinux_2_28") == [] and checked.check_python_abi("3.10") == []
