#!/bin/sh
# onnxruntime 1.32.0: what becomes of NaN in maxima.
#
# A maximum is used to see whether a model's output is sound. Seen here, float32 on the CPU:
#   ReduceMax of [NaN, 1, 2] is NaN, of [1, NaN, 2] and [1, 2, NaN] it is 2: the place decides;
#   MaxPool drops NaN: of [1, NaN] it makes 1;
#   ThresholdedRelu makes 0 of NaN;
#   Max, Min, Clip and Relu keep NaN.
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

NAN = float("nan")


def run(operator: str, *values: list, **attributes: object) -> list[float]:
    inputs = [np.array(value, np.float32) for value in values]
    names = [f"input{i}" for i in range(len(inputs))]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(a.shape)) for n, a in zip(names, inputs, strict=True)]
    result = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node(operator, names, ["output"], **attributes)], "graph", infos, [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, inputs, strict=True)))[0].ravel().tolist()


print(f"onnxruntime {ort.__version__}, onnx {onnx.__version__}")
maxima = [run("ReduceMax", row, keepdims=0)[0] for row in ([NAN, 1, 2], [1, NAN, 2], [1, 2, NAN])]
pooled = run("MaxPool", [[[1, NAN, NAN, 3]]], kernel_shape=[2], strides=[2])
threshold = run("ThresholdedRelu", [NAN, 2])
kept = {
    "Max": run("Max", [NAN, 1], [0, NAN]), "Min": run("Min", [NAN, 1], [0, NAN]),
    "Clip": run("Clip", [NAN, NAN], 0.0, 1.0), "Relu": run("Relu", [NAN, NAN]),
}
print(f"ReduceMax with NaN first, second, last: {maxima}; MaxPool: {pooled}; ThresholdedRelu: {threshold}; {kept}")
same = (
    np.array_equal(maxima, [NAN, 2, 2], equal_nan=True) and pooled == [1, 3] and threshold == [0, 2]
    and all(np.isnan(value).all() for value in kept.values())
)
print("as stated" if same else "changed")
sys.exit(not same)
PY
