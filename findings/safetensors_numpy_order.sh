#!/bin/sh
# safetensors 0.8.0: NumPy arrays that are not in C order are written with their values in another order.
#
# `safetensors.numpy.save` and `save_file` take any array and raise for none of these; the torch side refuses tensors that
# are not contiguous. Seen here, after a round trip:
#   an array in Fortran order, a transposed view and a view with steps have the right shape and dtype and other values;
#   arrays in C order, empty ones and big-endian ones come back as they were.
# np.ascontiguousarray before saving is the remedy. Weights that are transposed for another framework are such views.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" safetensors==0.8.0 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

plain = np.arange(12, dtype=np.float32).reshape(3, 4)
arrays = {
    "C order": plain, "empty": np.zeros((0, 4), np.float32), "big-endian": plain.astype(">f4"),
    "Fortran order": np.asfortranarray(plain), "transposed": plain.T, "steps": plain[::-1, ::2],
}
print(f"safetensors {safetensors.__version__}, numpy {np.__version__}")
whole = {}
for name, array in arrays.items():
    back = load(save({"x": array}))["x"]
    whole[name] = bool(np.array_equal(back, array))
    print(f"{name}: shape {back.shape}, as it was: {whole[name]}, contiguous copy: "
          f"{bool(np.array_equal(load(save({'x': np.ascontiguousarray(array)}))['x'], array))}")
same = [name for name, good in whole.items() if not good] == ["Fortran order", "transposed", "steps"]
print("as stated" if same else "changed")
sys.exit(not same)
PY
