#!/usr/bin/env bash
# Makes the virtual environment and installs the package into it: scripts/setup_env.sh [quickstart|test]
#   quickstart: what `d2v` and the quick start need (default).   test: everything the tests need too.
# PYTHON: interpreter to start from. One that already has torch >= 2.10 keeps it (e.g. a CUDA build of a cluster module).
# VENV: folder of the environment, .venv unless set.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-quickstart}
python=${PYTHON:-python3}
venv=${VENV:-.venv}

"$python" - <<'CHECK' || { echo "setup: Python 3.10 or newer is needed, got $("$python" --version 2>&1)" >&2; exit 2; }
import sys
sys.exit(sys.version_info < (3, 10))
CHECK

has_torch() {
  "$1" - <<'CHECK'
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    found = tuple(int(p) for p in version("torch").split("+")[0].split(".")[:2])
except (PackageNotFoundError, ValueError):
    sys.exit(1)
sys.exit(found < (2, 10))
CHECK
}
pip_install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

if [ ! -x "$venv/bin/python" ]; then
  if has_torch "$python"; then
    echo "setup: $venv on top of the installed torch"
    "$python" -m venv --system-site-packages "$venv"
  else
    echo "setup: $venv"
    "$python" -m venv "$venv"
  fi
fi
has_torch "$venv/bin/python" || { echo "setup: torch 2.13.0"; pip_install torch==2.13.0; }

# Versions of requirements.txt for what the extra names.
echo "setup: dependencies and native build"
pip_install --requirement <(grep -E '^(setuptools|wheel|cmake|ninja|pybind11)==' requirements.txt)
pip_install --no-build-isolation --constraint requirements.txt --editable ".[$extra]"
if [ "$extra" = test ] && [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
  # CUDA builds of torch bring their own Triton. Version 3.6 is for ahead-of-time compilation only.
  "$venv/bin/python" -c 'import triton' 2>/dev/null || pip_install triton==3.9.0
  [ -d "$venv/triton-3.6.0" ] || pip_install --no-deps --target "$venv/triton-3.6.0" triton==3.6.0
fi
touch "$venv/.ready-$extra"
