"""The CUDA library that the installation built: it loads on any torch and brings its kernels, GPU or not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from d2v_kernels import _native, registry

OPERATORS = tuple(registry.OPERATORS)
# Every operator is in one of the two lists; a kernel that is added moves its name up.
WITH_CUDA = {
    "average_layers",
    "update_ema_",
    "update_split_ema_",
    "gather_tokens",
    "gather_tokens_backward",
    "restore_tokens",
    "restore_tokens_backward",
}
WITHOUT_CUDA = {
    "attention",
    "attention_backward",
    "conv_layer_norm_gelu",
    "conv_layer_norm_gelu_backward",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_backward",
    "dropout_add_layer_norm_mixed",
    "dropout_add_layer_norm_mixed_backward",
    "gelu",
    "gelu_backward",
    "gelu_backward_",
    "layer_norm_gelu",
    "layer_norm_gelu_backward",
    "masked_regression_loss",
    "masked_regression_loss_backward",
}

# In a process of its own: a CPU torch must not keep the library loaded in the others' tests.
SCRIPT = """
import ctypes, json, os, sys, torch
folder, operators = sys.argv[1], sys.argv[2].split(",")
ctypes.CDLL(f"{folder}/libd2v_cpu.so", mode=os.RTLD_NOW)
before = [o for o in operators if torch._C._dispatch_has_kernel_for_dispatch_key(f"d2v_native::{o}", "CUDA")]
library = ctypes.CDLL(f"{folder}/libd2v_cuda.so", mode=os.RTLD_NOW)
after = [o for o in operators if torch._C._dispatch_has_kernel_for_dispatch_key(f"d2v_native::{o}", "CUDA")]
text = library.d2v_cuda_error_text
text.restype = ctypes.c_char_p
launch = library.d2v_launch_ema
address, number = ctypes.c_void_p, ctypes.c_int64
launch.argtypes = [address, address, number, ctypes.c_double, address, ctypes.c_int32, address]
nothing = launch(None, None, 0, 0.5, None, 0, None)
group = (ctypes.c_int64 * 3)(0, 0, 1)
no_device = launch(None, group, 1, 0.5, None, 1000, None)
print(json.dumps({"before": before, "after": after, "invalid": text(1).decode(), "nothing": nothing,
                  "no_device": [no_device, text(no_device).decode()]}))
"""


@pytest.fixture(scope="module")
def loaded(toolkit) -> dict:
    """What a fresh process finds. With nvcc on this machine the library must have been built."""
    for name in (_native.CPU_LIBRARY, _native.CUDA_LIBRARY):
        assert (_native.LIB / f"{name}.so").is_file(), f"{name} is not built: {_native.build_record()}"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(_native.LIB), ",".join(OPERATORS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_operator_is_listed() -> None:
    assert set(OPERATORS) == WITH_CUDA | WITHOUT_CUDA
    assert not WITH_CUDA & WITHOUT_CUDA


def test_kernels_are_registered(loaded) -> None:
    assert loaded["before"] == []
    assert set(loaded["after"]) == WITH_CUDA


def test_errors_have_a_text(loaded) -> None:
    assert loaded["invalid"] == "invalid argument"
    assert loaded["nothing"] == 0
    code, text = loaded["no_device"]
    assert code != 0
    assert text not in ("", "no error")


def test_library_needs_no_cuda_to_load(toolkit) -> None:
    """Neither libcudart nor libtorch_cuda: one file serves every torch."""
    path = _native.LIB / f"{_native.CUDA_LIBRARY}.so"
    dynamic = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].split("]")[0] for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert "libtorch_cpu.so" in needed
    assert not [n for n in needed if "cuda" in n or "python" in n], needed
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic
