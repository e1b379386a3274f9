#!/usr/bin/env bash
# Builds the portable wheel, the same bits every time: scripts/build_wheel.sh [FOLDER]   (dist unless given)
# It serves every Python from 3.10 and every torch from 2.10, on Linux with glibc 2.28 or newer. PYTHON: an interpreter
# with torch, setuptools, wheel, cmake and ninja. D2V_BUILD_CUDA, D2V_CUDA_ARCHS: docs/install.md.
set -euo pipefail
folder=$(realpath -m "${1:-dist}")
cd "$(dirname "$0")/.."
umask 022
# Times inside the wheel: that of the commit, or a fixed one outside a repository.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 1577836800)}
export D2V_REQUIRE_NATIVE=1
rm -rf build/lib build/bdist.*    # what an earlier build left would be packed, too
"${PYTHON:-python3}" -m pip wheel . --quiet --no-deps --no-build-isolation --wheel-dir "$folder" \
  -C--build-option=--python-tag=py3 -C--build-option=--plat-name="manylinux_2_28_$(uname -m)"
wheel=$(ls -t "$folder"/d2v-*.whl | head -n 1)
sha256sum "$wheel"
if command -v auditwheel >/dev/null && command -v patchelf >/dev/null; then
  # Ends with an error where the tag is not true. torch, whose library it is, is installed beside it.
  auditwheel repair --exclude libtorch_cpu.so --plat "manylinux_2_28_$(uname -m)" --wheel-dir "$(mktemp -d)" "$wheel"
else
  echo "build_wheel: no auditwheel and patchelf: the tag manylinux_2_28 is checked by tests/native/test_old_systems.py only"
fi
