#!/bin/sh
# onnxruntime 1.32.0: GroupNormalization where the mean is large.
#
# The speech models of this field begin with a group norm. Seen here, float32 on the CPU, standard normal values with a
# mean added, largest error against float64:
#   GroupNormalization (operator set 21): 0.006 at a mean of 100, 0.5 at 1,000, and NaN among the outputs at 10,000;
#   LayerNormalization and InstanceNormalization of the same values: below 0.002 at 10,000.
# GroupNormalization runs as the function of ONNX's own definition, whose variance is E[x^2] - E[x]^2.
# Ends with 0 while this is so, with 1 when it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
PYTHONPATH="$folder/site" python3 - "$folder" <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper


def run(operator: str, *inputs: np.ndarray, **attributes: object) -> np.ndarray:
    names = [f"input{i}" for i in range(len(inputs))]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(a.shape)) for n, a in zip(names, inputs, strict=True)]
    result = helper.make_tensor_value_info("output", TensorProto.FLOAT, list(inputs[0].shape))
    graph = helper.make_graph([helper.make_node(operator, names, ["output"], **attributes)], "graph", infos, [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, inputs, strict=True)))[0]


print(f"onnxruntime {ort.__version__}, onnx {onnx.__version__}")
normal = np.random.default_rng(0).standard_normal((1, 4, 768)).astype(np.float32)
ones, zeros, errors = np.ones(4, np.float32), np.zeros(4, np.float32), {}
for mean in (0, 100, 1_000, 10_000):
    x = normal + np.float32(mean)
    rows = x.astype(np.float64)
    expected = (rows - rows.mean(2, keepdims=True)) / np.sqrt(rows.var(2, keepdims=True) + 1e-5)
    found = (
        run("GroupNormalization", x, ones, zeros, num_groups=4, epsilon=1e-5), run("InstanceNormalization", x, ones, zeros),
        run("LayerNormalization", x, np.ones(768, np.float32), np.zeros(768, np.float32)),
    )
    errors[mean] = [float(np.abs(value - expected).max()) for value in found]
    print(f"mean {mean}: error of group, instance, layer norm {errors[mean]}")
group = [errors[mean][0] for mean in errors]
same = (
    group[0] < 1e-5 and group[1] > 1e-4 and group[2] > 0.1 and not group[3] < 1.0
    and all(max(errors[mean][1:]) < 5e-3 for mean in errors)
)
print("as stated" if same else "changed")
sys.exit(not same)
PY
