"""`torch.ops.d2v_native` called directly: what would touch foreign memory is refused, with expected and got."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

op: Any = torch.ops.d2v_native
X = torch.ones(2, 3, 4)
INDEX = torch.zeros(2, 3, dtype=torch.int64)
ROWS = torch.ones(5, 4)
ONE = torch.ones(())
HALF = torch.ones(2, 3, 4, dtype=torch.float16)
Q = torch.ones(2, 3, 1, 4)


def attend(query: torch.Tensor = Q, key: torch.Tensor = Q, value: torch.Tensor = Q, **options: Any) -> object:
    names = ("slopes", "positions", "lengths", "valid", "keys")
    rest = [options.get(name) for name in names]
    return op.attention(query, key, value, *rest, options.get("dropout", 0.0), 1.0)


def attend_backward(grad: torch.Tensor = Q, log_sum: torch.Tensor = Q[:, :, :, 0].mT) -> object:
    return op.attention_backward(grad, Q, Q, Q, Q, log_sum, None, None, None, None, None, 0.0, 1.0)


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "layer shape": (
        lambda: op.average_layers([X, torch.ones(2, 3, 5)], "none", "none", None, 1e-5, X.dtype),
        "expected 4, got 5",
    ),
    "layer stride": (
        lambda: op.average_layers([X.transpose(1, 2)], "none", "none", None, 1e-5, X.dtype),
        "last stride of layer: expected 1, got 4",
    ),
    "norm": (lambda: op.average_layers([X], "group", "none", None, 1e-5, X.dtype), "got group"),
    "lengths": (
        lambda: op.average_layers([X], "none", "none", torch.tensor([1, 4]), 1e-5, X.dtype),
        "lengths: expected 0 to 3, got 4",
    ),
    "out dtype": (lambda: op.average_layers([X], "none", "none", None, 1e-5, torch.int32), "out_dtype"),
    "average shape": (lambda: op.update_ema_([X], [X[:1]], [], 0.5, None), "expected 2, got 1"),
    "average count": (lambda: op.update_ema_([X], [], [], 0.5, None), "number of sources: expected 1, got 0"),
    "average dtype": (lambda: op.update_ema_([X.double()], [X], [], 0.5, None), "float64 for both"),
    "average overlaps": (lambda: op.update_ema_([X[:, :1].expand(2, 3, 4)], [X], [], 0.5, None), "overlapping"),
    "gather range": (lambda: op.gather_tokens(X, INDEX + 3, 1), "index: expected 0 to 2, got 3 at row 0, column 0"),
    "gather negative": (lambda: op.gather_tokens(X, INDEX - 1, 1), "expected 0 to 2, got -1"),
    "gather rows": (lambda: op.gather_tokens(X, INDEX, 2), "rows of index: expected 4, got 2"),
    "gather index": (lambda: op.gather_tokens(X, INDEX.short(), 1), "dtype of index: expected int32 or int64"),
    "gather dtype": (lambda: op.gather_tokens(X.int(), INDEX, 1), "dtype of x: expected float32"),
    "gather backward": (lambda: op.gather_tokens_backward(X, INDEX + 7, 1, 7), "expected 0 to 6, got 7"),
    "restore range": (lambda: op.restore_tokens(X, INDEX + 5, X[:, :2], None, 0.0), "expected 0 to 4, got 5"),
    "restore negative": (lambda: op.restore_tokens(X, INDEX - 2, None, INDEX[:, 0], 1.0), "expected 0 or more, got -2"),
    "restore fill": (
        lambda: op.restore_tokens(X, INDEX, torch.ones(5), None, 0.0),
        "channels of fill: expected 4, got 5",
    ),
    "restore fill dtype": (lambda: op.restore_tokens(X, INDEX, HALF, None, 0.0), "dtype of fill"),
    "restore both": (lambda: op.restore_tokens(X, INDEX, X, INDEX[:, 0], 0.0), "got both"),
    "restore backward": (lambda: op.restore_tokens_backward(X, INDEX + 3, 2, 1), "expected 0 to 2, got 3"),
    "loss rows": (
        lambda: op.masked_regression_loss(ROWS, ROWS, torch.tensor([5]), torch.tensor([0]), 0.0, 1.0),
        "prediction_rows: expected 0 to 4, got 5",
    ),
    "loss count": (
        lambda: op.masked_regression_loss(ROWS, ROWS, torch.tensor([1]), None, 0.0, 1.0),
        "selected target rows: expected 1, got 5",
    ),
    "loss channels": (lambda: op.masked_regression_loss(ROWS, ROWS[:, :3], None, None, 0.0, 1.0), "expected 4, got 3"),
    "loss gradient": (
        lambda: op.masked_regression_loss_backward(ROWS, ROWS, ROWS, None, None, 0.0, 1.0),
        "grad: expected 0 dimensions, got 2",
    ),
    "loss gradient dtype": (
        lambda: op.masked_regression_loss_backward(ONE.half(), ROWS, ROWS, None, None, 0.0, 1.0),
        "dtype of grad: expected float32 or float64",
    ),
    "attention shape": (lambda: attend(key=Q[:, :2]), "key: expected 3, got 2"),
    "attention stride": (lambda: attend(value=Q[..., :1].expand(Q.shape)), "last stride of value: expected 1, got 0"),
    "attention bias": (lambda: attend(slopes=torch.ones(1)), "slopes and positions: expected both or neither"),
    "attention slopes": (lambda: attend(slopes=torch.ones(2), positions=INDEX), "number of slopes: expected 1, got 2"),
    "attention slopes dtype": (
        lambda: attend(slopes=torch.ones(1).double(), positions=INDEX),
        "dtype of slopes: expected that of log_sum",
    ),
    "attention positions": (
        lambda: attend(slopes=torch.ones(1), positions=torch.zeros(2, 4).int()),
        "columns of positions: expected at most 3, got 4",
    ),
    "attention lengths": (lambda: attend(lengths=torch.ones(3).int()), "number of lengths: expected 2, got 3"),
    "attention valid": (lambda: attend(valid=torch.ones(2, 2) > 0), "columns of valid: expected 3, got 2"),
    "attention valid dtype": (lambda: attend(valid=torch.ones(2, 3)), "dtype of valid: expected bool"),
    "attention dropout": (lambda: attend(dropout=0.5), "dropout keys: expected a tensor where dropout is above 0"),
    "attention dropout keys": (
        lambda: attend(dropout=0.5, keys=INDEX[0]),
        "number of dropout keys: expected 2, got 3",
    ),
    "attention gradient": (lambda: attend_backward(Q[:1]), "grad: expected 2, got 1"),
    "attention log sum": (lambda: attend_backward(log_sum=Q[:, :, :, 0]), "heads of log_sum: expected 1, got 3"),
    "attention log sum dtype": (
        lambda: attend_backward(log_sum=Q[:, :, :, 0].mT.double()),
        "dtype of log_sum: expected float32",
    ),
    "norm shape": (
        lambda: op.dropout_add_layer_norm(X, X[:1], None, None, None, 0.0, 1e-5),
        "size of residual: expected 2, got 1",
    ),
    "norm weight": (
        lambda: op.dropout_add_layer_norm(X, X, torch.ones(5), None, None, 0.0, 1e-5),
        "channels of weight: expected 4, got 5",
    ),
    "norm dtype": (lambda: op.dropout_add_layer_norm(X, HALF, None, None, None, 0.0, 1e-5), "dtype of residual"),
    "norm of two dtypes": (
        lambda: op.dropout_add_layer_norm_mixed(HALF, HALF, None, None, None, 0.0, 1e-5, True, True),
        "dtype of residual",
    ),
    "norm of one dtype": (
        lambda: op.dropout_add_layer_norm_mixed(X, X, None, None, None, 0.0, 1e-5, True, True),
        "dtype of branch: expected bfloat16 or float16",
    ),
    "norm copy": (
        lambda: op.dropout_add_layer_norm_mixed_backward(X, X, None, X, None, None, 0.0, 1e-5, torch.half),
        "dtype of grad_copy",
    ),
    "norm total": (
        lambda: op.dropout_add_layer_norm_mixed_backward(None, HALF, None, HALF, None, None, 0.0, 1e-5, HALF.dtype),
        "dtype of total: expected float32",
    ),
    "norm keys": (
        lambda: op.dropout_add_layer_norm(X, X, None, None, INDEX[0], 0.1, 1e-5),
        "number of keys: expected 2, got 3",
    ),
    "norm without keys": (lambda: op.dropout_add_layer_norm(X, X, None, None, None, 0.1, 1e-5), "got none"),
    "norm dropout": (lambda: op.dropout_add_layer_norm(X, X, None, None, None, 1.0, 1e-5), "less than 1, got 1"),
    "norm stride": (
        lambda: op.dropout_add_layer_norm_backward(X, X.transpose(1, 2), X, None, None, 0.0, 1e-5),
        "last stride of grad_total: expected 1, got 4",
    ),
    "norm gradient": (
        lambda: op.dropout_add_layer_norm_backward(X[:, :2], None, X, None, None, 0.0, 1e-5),
        "size of grad_normed: expected 3, got 2",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refuses(cpu_library: Path, name: str) -> None:
    call, text = CASES[name]
    with pytest.raises(RuntimeError) as caught:
        call()
    assert text in str(caught.value)


def test_value_error_through_the_public_operator(cpu_library: Path) -> None:
    import d2v_kernels

    with d2v_kernels.use_backend("native"), pytest.raises(ValueError, match=r"^gather_tokens: index: .* got 3"):
        d2v_kernels.gather_tokens(X, INDEX + 3)
