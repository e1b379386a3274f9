"""Builds the operators for the `kernels` loader: a folder with build/<variant>/, build.toml and benchmarks/.

    python scripts/build_hub.py --output hub && kernels benchmark ./hub

The variant is for CPUs, or with D2V_BUILD_CUDA=1 for this machine's CUDA version too. The operators get a namespace of
their own (torch.ops.<id>, <id>_native), so that this copy lives beside an installed d2v_kernels in one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HUB = ROOT / "packaging" / "hub"
NAME, VERSION, STABLE_ABI = "d2v_kernels", 1, "210"


def identify(backend: str) -> str:
    """A name that no other build has: of what is compiled and imported."""
    digest = hashlib.sha256()
    for folder in (ROOT / "csrc", ROOT / NAME, HUB):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".toml"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return f"_{NAME}_{backend}_{digest.hexdigest()[:8]}"


def build(output: Path, backend: str) -> Path:
    """Compiles into a temporary folder and lays the variant out; returns its folder."""
    name = identify(backend)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "D2V_NAMESPACE": f"{name}_native", "D2V_REQUIRE_NATIVE": "1"}
        environment["D2V_BUILD_CUDA"] = "0" if backend == "cpu" else "1"
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build", "--build-base", folder, "--build-lib", folder],
            cwd=ROOT, env=environment, check=True,
        )  # fmt: skip
        package = Path(folder) / NAME
        record = json.loads((package / "lib" / "build.json").read_text())
        suffix = "cpu" if backend == "cpu" else "cu" + "".join(record["cuda"].split(".")[:2])
        system = f"{platform.machine()}-{platform.system().lower()}"
        variant = output / "build" / f"torch-stable-abi{STABLE_ABI}-{suffix}-{system}"
        shutil.rmtree(variant, ignore_errors=True)
        shutil.copytree(package, variant, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HUB / "layers.py", variant)
    with (variant / "__init__.py").open("a") as file:
        file.write("\nfrom . import layers  # noqa: E402\n")
    metadata = {
        "name": NAME.replace("_", "-"), "id": name, "version": VERSION, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": backend},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="an older variant is replaced")
    output = parser.parse_args().output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    variant = build(output, "cuda" if os.environ.get("D2V_BUILD_CUDA") == "1" else "cpu")
    shutil.copy(HUB / "build.toml", output)
    shutil.copytree(HUB / "benchmarks", output / "benchmarks", dirs_exist_ok=True)
    print(variant)


if __name__ == "__main__":
    main()
