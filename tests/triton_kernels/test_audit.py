"""Where the kernels cast, reduce, multiply and compare, and why each place means the same in interpreter and compiler.

Known differences (3.6.0 to 3.9.0): the interpreter cuts float32 to bfloat16 where generated code rounds to even; it
adds, multiplies and compares bfloat16 as 16-bit integers; its `maximum` keeps a NaN in 3.6.0, where generated code and
later interpreters return the number; its conversions to float8 round half up, lose the carry and wrap.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .audit import Audit, Finding

FOLDER = Path(__file__).resolve().parents[2] / "d2v_kernels" / "triton"

# Pointers to what the operators allocate in float32 or take as integers.
WIDE = {
    "lengths", "valid", "positions", "dropout_keys", "tokens._restore_noise_kernel:keys", "index", "restore",
    "norm._norm_kernel:keys", "norm._norm_backward_kernel:keys",
    "prediction_rows", "target_rows", "table",  # integers
    "slopes", "log_sum", "delta", "parts", "weight_sums", "bias_sums", "sums", "means", "spreads", "m2s", "batch_means",
    "batch_spreads", "errors", "moments", "deviations", "loss", "prediction_std", "target_std",
    "shift_sums", "runtime._column_sums_kernel:x",  # float32
}  # fmt: skip
COPY = "what was loaded, in its own type"
INTEGERS = "lengths and counts of rows, integers"
COUNT = "a count of rows in float32, never NaN"
REASONS = {
    ("cast", "runtime.rounded"): "the one place of narrow casts",
    ("arithmetic", "runtime.rounded"): "x is float32: `dot` rounds what is not narrow already",
    ("reduction", "runtime.dot"): "the compiler's tensor cores add in float32, the interpreter is given float32",
    ("store", "ema._update_chunk"): "`_moved` gives the average's own type, rounded or as loaded",
    ("store", "tokens._gather_kernel"): COPY,
    ("store", "tokens._restore_kernel"): COPY,
    ("store", "tokens._restore_noise_kernel"): COPY,
}  # fmt: skip
EXTREMA = {
    ("attention._attention_kernel", "tl.max(s, 1)"): "drops NaN: exp2(NaN - shift) in the row's sum brings it back",
    ("attention._attention_kernel", "tl.maximum(most, tl.max(s, 1))"): "as above; a maximum of NaN alone shifts by 0",
    ("attention._attention_kernel", "tl.minimum(tl.load(lengths + n).to(tl.int32), tokens)"): INTEGERS,
    ("attention._attention_dq_kernel", "tl.minimum(tl.load(lengths + n).to(tl.int32), tokens)"): INTEGERS,
    ("attention._attention_dkdv_kernel", "tl.minimum(tl.load(lengths + n).to(tl.int32), tokens)"): INTEGERS,
    ("convolution._convolution_weights_kernel", "tl.minimum(rows, begin + per_split)"): INTEGERS,
    ("runtime_norm._backward_kernel", "tl.minimum(rows, (split + 1) * per_split)"): INTEGERS,
    ("norm._norm_backward_kernel", "tl.minimum(rows, (split + 1) * per_split)"): INTEGERS,
    ("layers._one_read_kernel", "tl.maximum(length, 1)"): INTEGERS,
    ("layers._statistics_kernel", "tl.maximum(length, 1)"): INTEGERS,
    ("layers._statistics_kernel", "tl.maximum(counts, 0.0)"): COUNT,
    ("layers._merge_kernel", "tl.maximum(counts + more, 1.0)"): COUNT,
    ("layers._merge_kernel", "tl.maximum(tl.sum(counts, 0, keep_dims=True), 1.0)"): COUNT,
    ("loss._partial_loss_kernel", "tl.minimum(count - begin, per_split)"): INTEGERS,
    (
        "loss._partial_loss_kernel",
        "tl.maximum(((rows - lane + BLOCK_R - 1) // BLOCK_R).to(tl.float32), 0.0)",
    ): COUNT,
    ("loss._merge_loss_kernel", "tl.minimum(count - split * per_split, per_split)"): INTEGERS,
    ("loss._merge_loss_kernel", "tl.maximum(total - 1.0, 1.0)"): COUNT,
    ("tokens._inverse_gather_kernel", "tl.min(left, 0)"): "numbers of entries, integers",
}


def sources() -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.py")) if path.name != "__init__.py"}


def test_every_place_has_its_reason() -> None:
    found = Audit(sources(), WIDE).find()
    extrema = {(f.place, f.text) for f in found if f.kind == "extremum"}
    others = {(f.kind, f.place) for f in found if f.kind != "extremum"}
    assert extrema == EXTREMA.keys()
    assert others == REASONS.keys(), sorted(str(f) for f in found if (f.kind, f.place) not in REASONS)


def test_every_kernel_is_read() -> None:
    """As many functions as there are decorators, and no float8."""
    texts = sources()
    audit = Audit(texts, WIDE)
    assert len(list(audit.every)) == sum(text.count("@triton.jit") for text in texts.values()) >= 40
    assert not [name for name, text in texts.items() if "float8" in text or "fp8" in text]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("tl.store(out, tl.load(x).to(tl.float32).to(tl.bfloat16))", "cast"),
        ("tl.store(out, rounded(tl.load(x).to(out.dtype.element_ty), TYPE))", "cast"),
        ("tl.store(out, tl.load(x).to(tl.float32) * 2.0)", "store"),  # a store casts by itself
        ("y = tl.load(x)\n    tl.store(sums, tl.sum(y, 0))", "reduction"),
        ("y = tl.trans(tl.load(x))\n    tl.store(sums, tl.dot(y, y))", "reduction"),
        ("tl.store(out, rounded(doubled(tl.load(x)), TYPE))", "arithmetic"),
        ("y = doubled_wide(tl.load(x))\n    tl.store(sums, tl.max(y, 0))", "extremum"),
        ("y = tl.load(x).to(tl.float32)\n    tl.store(sums, tl.where(y > 0.0, y, 0.0))", "extremum"),
        ("y = tl.load(x).to(tl.float32)\n    tl.store(sums, tl.clamp(y, -1.0, 1.0))", "extremum"),
    ],
)
def test_wrong_guesses_are_found(body: str, kind: str) -> None:
    helpers = "@triton.jit\ndef doubled(a):\n    return a + a\n"
    helpers += "@triton.jit\ndef doubled_wide(a):\n    return a.to(tl.float32)\n"
    planted = f"{helpers}@triton.jit\ndef kernel(x, out, sums, TYPE):\n    {body}\n"
    found = Audit({"planted": planted}, {"sums"}).find()
    assert kind in {f.kind for f in found}, found
    right = f"{helpers}@triton.jit\ndef kernel(x, out, sums, TYPE):\n    y = doubled_wide(tl.load(x))\n" + (
        "    tl.store(sums, tl.sum(y + y, 0))\n    tl.store(out, rounded(y, TYPE))\n"
    )
    callers = {f for f in Audit({"right": right}, {"sums"}).find() if f.place.endswith("kernel")}
    assert not callers


def test_arguments_are_followed() -> None:
    """A narrow argument makes the other function's arithmetic narrow; a wide one does not."""
    text = "@triton.jit\ndef inner(a):\n    return a * 2.0\n@triton.jit\ndef kernel(x, out):\n    inner({})\n"
    narrow, wide = text.format("tl.load(x)"), text.format("tl.load(x).to(tl.float32)")
    assert Audit({"f": narrow}, set()).find() == {Finding("arithmetic", "f.inner", "a * 2.0")}
    assert not Audit({"f": wide}, set()).find()
