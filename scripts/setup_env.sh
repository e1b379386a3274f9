#!/usr/bin/env bash
# Makes the virtual environment .venv and installs the package with everything its commands and tests need.
# PYTHON: interpreter to start from. One that already has torch >= 2.10 keeps it (e.g. a CUDA build of a cluster module).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}

"$python" - <<'CHECK' || { echo "setup: Python 3.10 or newer is needed, got $("$python" --version 2>&1)" >&2; exit 2; }
import sys
sys.exit(sys.version_info < (3, 10))
CHECK

has_torch=$("$python" - <<'CHECK'
from importlib.metadata import PackageNotFoundError, version
try:
    print(int(tuple(int(p) for p in version("torch").split("+")[0].split(".")[:2]) >= (2, 10)))
except (PackageNotFoundError, ValueError):
    print(0)
CHECK
)
if [ "$has_torch" = 1 ]; then
  echo "setup: $venv on top of the installed torch"
  "$python" -m venv --system-site-packages "$venv"
else
  echo "setup: $venv with torch 2.13.0"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet torch==2.13.0
fi
"$venv/bin/python" -m pip install --quiet --requirement requirements.txt
echo "setup: building the operators"
"$venv/bin/python" -m pip install --quiet --no-build-isolation --editable '.[test]'
touch "$venv/.ready"
