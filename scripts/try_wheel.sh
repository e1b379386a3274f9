#!/usr/bin/env bash
# Builds the portable wheel once and uses it under several torches: scripts/try_wheel.sh [VERSION ...]
# (2.10.0 2.13.0 2.15.0 unless given). Each goes into an environment of its own, 6 GB where pip takes a CUDA build, and
# is removed again. PYTHON: an interpreter with what the tests need.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- 2.10.0 2.13.0 2.15.0
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pythons=()
for version in "$@"; do
  echo "try_wheel: installing torch $version"
  "$python" -m venv "$work/$version"
  # A machine's settings may hold torch back to what lies on it.
  "$work/$version/bin/pip" install --quiet "torch==$version" numpy 2>/dev/null ||
    PIP_CONFIG_FILE=/dev/null "$work/$version/bin/pip" install --quiet "torch==$version" numpy
  pythons+=(--other-python "$work/$version/bin/python")
done
"$python" -m pytest -q -s tests/native/test_wheel.py -k under_other_pythons "${pythons[@]}"
