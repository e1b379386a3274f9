"""Shape functions: one per operator, used by its fake kernel and by the real call alike.

Each checks what can be known without reading device values and returns what the result looks like. Messages begin
with the operator's name and give expected and got.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int32, torch.int64)
NORMS = ("none", "layer", "instance", "batch", "group")
VECTOR_FILL, NO_FILL = -1, -2  # values of restore_tokens_backward's fill_rows beside a row count


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def require(condition: bool, op: str, what: str, expected: object, got: object) -> None:
    """Raises `ValueError` with expected and got unless the condition holds."""
    if not condition:
        raise ValueError(f"{op}: {what}: expected {expected}, got {got}")


def _require_float(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in FLOATS:
        raise TypeError(f"{op}: dtype of {name}: expected one of {_names(FLOATS)}, got {_names([t.dtype])}")


def _require_index(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in INDICES:
        raise TypeError(f"{op}: dtype of {name}: expected one of {_names(INDICES)}, got {_names([t.dtype])}")


def _require_dims(op: str, name: str, t: Tensor, layout: str) -> None:
    dims = layout.count(",") + 1
    if t.dim() != dims:
        require(False, op, name, f"{dims} dimensions ({layout})", f"shape {tuple(t.shape)}")


def _require_rows(op: str, name: str, t: Tensor) -> None:
    # A tensor without elements, or of width 1, has no meaningful last stride.
    if t.shape[-1] > 1 and t.stride(-1) != 1 and t.numel() > 0:
        require(False, op, f"last stride of {name}", 1, f"strides {t.stride()}")


def _require_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != first.device:
            require(False, op, f"device of {name}", first.device, t.device)


def check_norm(op: str, name: str, norm: str) -> tuple[str, ...]:
    """Splits a comma-joined norm into its names."""
    names = tuple(norm.split(","))
    for n in names:
        if n not in NORMS:
            raise ValueError(f"{op}: {name}: expected one of {', '.join(NORMS)}, got {n!r}")
    return names


def check_average_layers(
    layers: Sequence[Tensor], norm: str, out_norm: str, lengths: Tensor | None, eps: float, out_dtype: torch.dtype
) -> torch.Size:
    """Shape (B,T,C) of the average."""
    op = "average_layers"
    require(len(layers) > 0, op, "number of layers", "at least 1", 0)
    first = layers[0]
    _require_dims(op, "layers[0]", first, "B, T, C")
    _require_float(op, "layers[0]", first)
    for i, t in enumerate(layers):
        if t.shape != first.shape:
            require(False, op, f"shape of layers[{i}]", tuple(first.shape), tuple(t.shape))
        if t.dtype != first.dtype:
            raise TypeError(f"{op}: dtype of layers[{i}]: expected {_names([first.dtype])}, got {_names([t.dtype])}")
        if t.device != first.device:
            require(False, op, f"device of layers[{i}]", first.device, t.device)
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            _require_rows(op, f"layers[{i}]", t)
    check_norm(op, "norm", norm)
    check_norm(op, "out_norm", out_norm)
    require(eps > 0.0, op, "eps", "above 0", eps)
    if out_dtype not in FLOATS:
        raise TypeError(f"{op}: out_dtype: expected one of {_names(FLOATS)}, got {_names([out_dtype])}")
    if lengths is not None:
        require(tuple(lengths.shape) == (first.shape[0],), op, "shape of lengths", (first.shape[0],), lengths.shape)
        if lengths.dtype != torch.int64:
            raise TypeError(f"{op}: dtype of lengths: expected int64, got {_names([lengths.dtype])}")
        require(lengths.device.type == "cpu", op, "device of lengths", "cpu", lengths.device)
    return first.shape


def check_lengths(lengths: Tensor | None, tokens: int) -> None:
    """Range of the valid lengths; reads host values, so only the real call does it."""
    if lengths is not None and lengths.numel() > 0:
        low, high = (int(v) for v in torch.aminmax(lengths))
        require(low >= 0 and high <= tokens, "average_layers", "lengths", f"0 to {tokens}", f"{low} to {high}")


def check_update_ema(
    averages: Sequence[Tensor],
    sources: Sequence[Tensor],
    copies: Sequence[Tensor],
    weight_tensor: Tensor | None,
    op: str = "update_ema_",
) -> None:
    """Lists of equal length whose entries agree in shape and device."""
    require(len(sources) == len(averages), op, "number of sources", len(averages), len(sources))
    require(len(copies) in (0, len(averages)), op, "number of copies", len(averages), len(copies))
    if weight_tensor is not None:
        require(weight_tensor.dim() == 0, op, "weight", "a 0-D tensor", f"shape {tuple(weight_tensor.shape)}")
        if weight_tensor.dtype != torch.float64:
            raise TypeError(f"{op}: dtype of weight: expected float64, got {_names([weight_tensor.dtype])}")
    device = averages[0].device if averages else None
    for name, tensors in (("sources", sources), ("copies", copies), ("averages", averages)):
        for i, t in enumerate(tensors):
            a = averages[i]
            if t.dtype not in FLOATS:
                _require_float(op, f"{name}[{i}]", t)
            if t.shape != a.shape:
                require(False, op, f"shape of {name}[{i}]", tuple(a.shape), tuple(t.shape))
            if t.device != device:
                require(False, op, f"device of {name}[{i}]", device, t.device)


def check_update_split_ema(
    high: Sequence[Tensor], low: Sequence[Tensor], sources: Sequence[Tensor], weight_tensor: Tensor | None
) -> None:
    """Lists of equal length; entries agree in shape, device and the order of their elements in memory."""
    op = "update_split_ema_"
    check_update_ema(high, sources, [], weight_tensor, op)
    require(len(low) == len(high), op, "number of low halves", len(high), len(low))
    for i, (h, other) in enumerate(zip(high, low, strict=True)):
        for name, t, dtype in (("high", h, torch.bfloat16), ("low", other, torch.int16)):
            if t.dtype != dtype:
                raise TypeError(f"{op}: dtype of {name}[{i}]: expected {_names([dtype])}, got {_names([t.dtype])}")
        require(other.shape == h.shape, op, f"shape of low[{i}]", tuple(h.shape), tuple(other.shape))
        require(other.device == h.device, op, f"device of low[{i}]", h.device, other.device)
        for name, t in (("high", h), ("low", other), ("sources", sources[i])):
            if not lies_flat(h, t):
                require(False, op, f"strides of {name}[{i}]", f"{h.stride()} without gaps", t.stride())


def lies_flat(*tensors: Tensor) -> bool:
    """True if the tensors, of one shape, lie in memory in one order without gaps."""
    if all(t.is_contiguous() for t in tensors):
        return True
    sizes, strides = tensors[0].shape, tensors[0].stride()
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(strides, sizes, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return all(st == other for t in tensors for st, other, n in zip(strides, t.stride(), sizes, strict=True) if n > 1)


def check_gather_tokens(x: Tensor, index: Tensor, clones: int) -> tuple[int, int, int]:
    """Shape (B*clones, n, C) of the gathered rows."""
    op = "gather_tokens"
    _require_dims(op, "x", x, "B, T, C")
    _require_float(op, "x", x)
    _require_rows(op, "x", x)
    _require_dims(op, "index", index, "B*clones, n")
    _require_index(op, "index", index)
    _require_device(op, x, index=index)
    require(clones >= 1, op, "clones", "at least 1", clones)
    require(index.shape[0] == x.shape[0] * clones, op, "rows of index", "B*clones rows", tuple(index.shape))
    return index.shape[0], index.shape[1], x.shape[2]


def check_gather_tokens_backward(grad: Tensor, index: Tensor, clones: int, tokens: int) -> tuple[int, int, int]:
    """Shape (B, tokens, C) of the gradient of x."""
    op = "gather_tokens_backward"
    _require_dims(op, "grad", grad, "B*clones, n, C")
    _require_float(op, "grad", grad)
    _require_rows(op, "grad", grad)
    _require_index(op, "index", index)
    _require_device(op, grad, index=index)
    require(clones >= 1, op, "clones", "at least 1", clones)
    require(grad.shape[:2] == index.shape, op, "shape of index", tuple(grad.shape[:2]), tuple(index.shape))
    require(index.shape[0] % clones == 0, op, "rows of index", f"a multiple of {clones}", index.shape[0])
    return grad.shape[0] // clones, tokens, grad.shape[2]


def check_restore_tokens(
    kept: Tensor, restore: Tensor, fill: Tensor | None, noise_keys: Tensor | None, noise_std: float
) -> tuple[int, int, int]:
    """Shape (N, T, C) of the restored rows."""
    op = "restore_tokens"
    _require_dims(op, "kept", kept, "N, V, C")
    _require_float(op, "kept", kept)
    _require_rows(op, "kept", kept)
    _require_dims(op, "restore", restore, "N, T")
    _require_index(op, "restore", restore)
    _require_device(op, kept, restore=restore, fill=fill, noise_keys=noise_keys)
    require(restore.shape[0] == kept.shape[0], op, "rows of restore", kept.shape[0], restore.shape[0])
    n, _, c = kept.shape
    if (fill is None) == (noise_keys is None):
        raise ValueError(f"{op}: fill: expected a tensor or Noise, got {'neither' if fill is None else 'both'}")
    if fill is not None:
        if fill.dtype != kept.dtype:
            raise TypeError(f"{op}: dtype of fill: expected {_names([kept.dtype])}, got {_names([fill.dtype])}")
        good = tuple(fill.shape) == (c,) or (fill.dim() == 3 and fill.shape[0] == n and fill.shape[2] == c)
        require(good, op, "shape of fill", f"({c},) or ({n}, F, {c})", tuple(fill.shape))
        _require_rows(op, "fill", fill)
    if noise_keys is not None:
        require(tuple(noise_keys.shape) == (n,), op, "shape of noise keys", (n,), tuple(noise_keys.shape))
        if noise_keys.dtype != torch.int64:
            raise TypeError(f"{op}: dtype of noise keys: expected int64, got {_names([noise_keys.dtype])}")
        require(noise_std >= 0.0, op, "noise std", "0 or more", noise_std)
    return n, restore.shape[1], c


def check_restore_tokens_backward(
    grad: Tensor, restore: Tensor, visible: int, fill_rows: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the gradients of kept and of the fill."""
    op = "restore_tokens_backward"
    _require_dims(op, "grad", grad, "N, T, C")
    _require_float(op, "grad", grad)
    _require_rows(op, "grad", grad)
    _require_index(op, "restore", restore)
    _require_device(op, grad, restore=restore)
    require(grad.shape[:2] == restore.shape, op, "shape of restore", tuple(grad.shape[:2]), tuple(restore.shape))
    n, _, c = grad.shape
    fill: tuple[int, ...]
    if fill_rows == VECTOR_FILL:
        fill = (c,)
    elif fill_rows == NO_FILL:
        fill = (0,)
    else:
        fill = (n, fill_rows, c)
    return (n, visible, c), fill


def check_masked_regression_loss(
    op: str,
    prediction: Tensor,
    target: Tensor,
    prediction_rows: Tensor | None,
    target_rows: Tensor | None,
    beta: float,
) -> torch.dtype:
    """Dtype of the loss: float32, or float64 for a float64 prediction."""
    for name, t in (("prediction", prediction), ("target", target)):
        _require_dims(op, name, t, "rows, C")
        _require_float(op, name, t)
        _require_rows(op, name, t)
    require(target.shape[1] == prediction.shape[1], op, "channels of target", prediction.shape[1], target.shape[1])
    _require_device(op, prediction, target=target, prediction_rows=prediction_rows, target_rows=target_rows)
    counts = []
    for name, rows, t in (
        ("prediction_rows", prediction_rows, prediction),
        ("target_rows", target_rows, target),
    ):
        if rows is not None:
            _require_dims(op, name, rows, "P")
            _require_index(op, name, rows)
        counts.append(t.shape[0] if rows is None else rows.shape[0])
    require(counts[0] == counts[1], op, "selected target rows", f"{counts[0]} (as of the prediction)", counts[1])
    require(beta >= 0.0, op, "beta", "0 or more", beta)
    return torch.float64 if prediction.dtype == torch.float64 else torch.float32


def check_layer_norm_gelu(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """The result looks like x, contiguous."""
    _require_dims(op, "x", x, "rows, C")
    _require_float(op, "x", x)
    _require_rows(op, "x", x)
    _require_device(op, x, weight=weight, bias=bias)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _require_float(op, name, t)
            require(tuple(t.shape) == (x.shape[1],), op, f"shape of {name}", (x.shape[1],), tuple(t.shape))
            _require_rows(op, name, t)
    require(eps > 0.0, op, "eps", "above 0", eps)


def check_layer_norm_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    """The results look like x, weight and bias; shape (0,) for one that is None."""
    op = "layer_norm_gelu_backward"
    check_layer_norm_gelu(op, x, weight, bias, eps)
    _require_float(op, "grad", grad)
    _require_rows(op, "grad", grad)
    _require_device(op, x, grad=grad)
    require(grad.shape == x.shape, op, "shape of grad", tuple(x.shape), tuple(grad.shape))


def check_gelu(op: str, x: Tensor, grad: Tensor | None = None) -> None:
    """The results look like x."""
    _require_float(op, "x", x)
    for name, t in (("x", x), ("grad", grad)):
        if t is not None and not t.is_contiguous():
            require(False, op, f"layout of {name}", "contiguous", f"strides {t.stride()}")
    if grad is not None:
        require_dtype(op, "grad", grad, x.dtype)
        _require_device(op, x, grad=grad)
        require(grad.shape == x.shape, op, "shape of grad", tuple(x.shape), tuple(grad.shape))


def require_dtype(op: str, name: str, t: Tensor, dtype: torch.dtype) -> None:
    """Raises `TypeError` with expected and got unless t has the dtype."""
    if t.dtype != dtype:
        raise TypeError(f"{op}: dtype of {name}: expected {_names([dtype])}, got {_names([t.dtype])}")


def check_gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The result has x's leading dimensions and weight's rows and dtype."""
    op = "gelu_linear"
    _require_float(op, "x", x)
    _require_float(op, "weight", weight)
    require(x.dim() >= 1, op, "x", "shape (..., H)", "a 0-D tensor")
    _require_dims(op, "weight", weight, "C, H")
    require(weight.shape[1] == x.shape[-1], op, "columns of weight", x.shape[-1], weight.shape[1])
    _require_device(op, x, weight=weight, bias=bias)
    if bias is not None:
        require(tuple(bias.shape) == (weight.shape[0],), op, "shape of bias", (weight.shape[0],), tuple(bias.shape))
        require_dtype(op, "bias", bias, weight.dtype)


def check_add_norm(
    op: str, branch: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, keys: Tensor | None,
    dropout: float, eps: float, names: tuple[str, str] = ("branch", "residual"),
) -> torch.dtype:  # fmt: skip
    """Both results look like branch, contiguous; dtype of the arithmetic."""
    for name, x in zip(names, (branch, residual), strict=True):
        _require_dims(op, name, x, "N, T, C")
        _require_float(op, name, x)
        _require_rows(op, name, x)
    require(residual.shape == branch.shape, op, f"shape of {names[1]}", tuple(branch.shape), tuple(residual.shape))
    if residual.dtype != branch.dtype:
        wanted, got = _names([branch.dtype]), _names([residual.dtype])
        raise TypeError(f"{op}: dtype of {names[1]}: expected {wanted}, got {got}")
    n, _, c = branch.shape
    _require_device(op, branch, **{names[1]: residual}, weight=weight, bias=bias, keys=keys)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _require_float(op, name, t)
            require(tuple(t.shape) == (c,), op, f"shape of {name}", (c,), tuple(t.shape))
            _require_rows(op, name, t)
    if keys is not None:
        require(tuple(keys.shape) == (n,), op, "shape of keys", (n,), tuple(keys.shape))
        if keys.dtype != torch.int64:
            raise TypeError(f"{op}: dtype of keys: expected int64, got {_names([keys.dtype])}")
    require(0.0 <= dropout < 1.0, op, "dropout", "0 or more and less than 1", dropout)
    require(dropout == 0.0 or keys is not None, op, "keys", "a tensor where dropout is above 0", None)
    require(eps > 0.0, op, "eps", "above 0", eps)
    return torch.float64 if branch.dtype == torch.float64 else torch.float32


def check_add_norm_backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor | None, keys: Tensor | None,
    dropout: float, eps: float,
) -> torch.dtype:  # fmt: skip
    """Gradients of branch (shape (0,) without dropout: that of residual), residual, weight and bias; the latter two
    have shape (C,) and the returned dtype, that of the arithmetic."""
    op, result = "dropout_add_layer_norm_backward", torch.float32
    for name, grad in (("grad_normed", grad_normed), ("grad_total", grad_total)):
        if grad is not None:
            result = check_add_norm(op, total, grad, weight, None, keys, dropout, eps, ("total", name))
    return result


def check_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor | None,
    positions: Tensor | None,
    lengths: Tensor | None,
    valid: Tensor | None,
    dropout_keys: Tensor | None,
    dropout: float,
) -> torch.dtype:
    """Dtype of the log-sum-exp: float32, or float64 for float64 queries."""
    _require_dims(op, "query", query, "N, T, H, D")
    _require_float(op, "query", query)
    n, t, h, _ = query.shape
    for name, x in (("query", query), ("key", key), ("value", value)):
        require(x.shape == query.shape, op, f"shape of {name}", tuple(query.shape), tuple(x.shape))
        if x.dtype != query.dtype:
            raise TypeError(f"{op}: dtype of {name}: expected {_names([query.dtype])}, got {_names([x.dtype])}")
        _require_rows(op, name, x)
    _require_device(
        op, query, key=key, value=value, slopes=slopes, positions=positions, lengths=lengths, valid=valid,
        dropout_keys=dropout_keys,
    )  # fmt: skip
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    require((slopes is None) == (positions is None), op, "slopes and positions", "both or neither", "one of them")
    optional: tuple[tuple[str, Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]], ...] = (
        ("slopes", slopes, (h,), (compute,)),
        ("lengths", lengths, (n,), INDICES),
        ("valid", valid, (n, t), (torch.bool,)),
        ("dropout keys", dropout_keys, (n,), (torch.int64,)),
    )
    for name, given, shape, dtypes in optional:
        if given is not None:
            require(tuple(given.shape) == shape, op, f"shape of {name}", shape, tuple(given.shape))
            if given.dtype not in dtypes:
                raise TypeError(f"{op}: dtype of {name}: expected one of {_names(dtypes)}, got {_names([given.dtype])}")
    if positions is not None:
        good = positions.dim() == 2 and positions.shape[0] == n and positions.shape[1] <= t
        require(good, op, "shape of positions", f"({n}, at most {t})", tuple(positions.shape))
        _require_index(op, "positions", positions)
    require(0.0 <= dropout < 1.0, op, "dropout", "0 or more and less than 1", dropout)
    require(dropout == 0.0 or dropout_keys is not None, op, "dropout keys", "a tensor where dropout is above 0", None)
    return compute


def check_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, *rest: Any
) -> None:
    """The gradients look like query, key, value and slopes; shape (0,) for slopes that are None."""
    op = "attention_backward"
    dtype = check_attention(op, query, key, value, *rest)
    for name, x in (("grad", grad), ("out", out)):
        require(x.shape == query.shape, op, f"shape of {name}", tuple(query.shape), tuple(x.shape))
        _require_float(op, name, x)
        _require_rows(op, name, x)
    n, t, h, _ = query.shape
    require(tuple(log_sum.shape) == (n, h, t), op, "shape of log_sum", (n, h, t), tuple(log_sum.shape))
    if log_sum.dtype != dtype:
        raise TypeError(f"{op}: dtype of log_sum: expected {_names([dtype])}, got {_names([log_sum.dtype])}")
    _require_device(op, query, grad=grad, out=out, log_sum=log_sum)


def check_index_range(op: str, name: str, index: Tensor, high: int | None) -> None:
    """On the CPU, every index lies in [0, high); device values are never read."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, top = (int(v) for v in torch.aminmax(index))
    bound = "or more" if high is None else f"to {high - 1}"
    require(low >= 0 and (high is None or top < high), op, name, f"0 {bound}", f"{low} to {top}")
