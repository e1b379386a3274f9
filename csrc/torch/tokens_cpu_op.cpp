// gather_tokens, restore_tokens and their gradients on CPU tensors.
#include "../core/tokens.h"
#include "common.h"

namespace d2v {
namespace {

Rows3 rows_of(const char* op, const char* name, const Tensor& t) {
  check_dims(op, name, t, 3);
  check_last_stride(op, name, t);
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

}  // namespace

Tensor gather_tokens_cpu(const Tensor& x, const Tensor& index, int64_t clones) {
  constexpr const char* op = "gather_tokens";
  STD_TORCH_CHECK(clones >= 1, op, ": clones: expected at least 1, got ", clones);
  const Rows3 rows = rows_of(op, "x", x);
  const Indices at = indices(op, "index", index, 2);
  const int64_t N = index.size(0), n = index.size(1), C = x.size(2);
  check_size(op, "rows of index", x.size(0) * clones, N);
  check_index_range(op, "index", at, N, n, x.size(1));
  Tensor out = new_tensor(x, {N, n, C});
  gather_tokens({rows, at, N, n, clones, C, element_type(op, "x", x), out.mutable_data_ptr()}, torch_parallel());
  return out;
}

Tensor gather_tokens_backward_cpu(const Tensor& grad, const Tensor& index, int64_t clones, int64_t tokens) {
  constexpr const char* op = "gather_tokens_backward";
  STD_TORCH_CHECK(clones >= 1, op, ": clones: expected at least 1, got ", clones);
  STD_TORCH_CHECK(tokens >= 0, op, ": tokens: expected 0 or more, got ", tokens);
  const Rows3 rows = rows_of(op, "grad", grad);
  const Indices at = indices(op, "index", index, 2);
  const int64_t N = index.size(0), n = index.size(1), C = grad.size(2);
  check_size(op, "rows of grad", N, grad.size(0));
  check_size(op, "columns of grad", n, grad.size(1));
  STD_TORCH_CHECK(N % clones == 0, op, ": rows of index: expected a multiple of ", clones, ", got ", N);
  check_index_range(op, "index", at, N, n, tokens);
  Tensor out = new_tensor(grad, {N / clones, tokens, C});
  gather_tokens_backward({rows, at, N, n, clones, tokens, C, element_type(op, "grad", grad), out.mutable_data_ptr()},
                         torch_parallel());
  return out;
}

Tensor restore_tokens_cpu(const Tensor& kept, const Tensor& restore, const OptionalTensor& fill,
                          const OptionalTensor& noise_keys, double noise_std) {
  constexpr const char* op = "restore_tokens";
  RestoreArgs a{};
  a.kept = rows_of(op, "kept", kept);
  a.restore = indices(op, "restore", restore, 2);
  a.type = element_type(op, "kept", kept);
  a.N = kept.size(0), a.V = kept.size(1), a.C = kept.size(2), a.T = restore.size(1);
  check_size(op, "rows of restore", a.N, restore.size(0));
  STD_TORCH_CHECK(fill.has_value() != noise_keys.has_value(), op, ": fill: expected a tensor or noise keys, got ",
                  fill.has_value() ? "both" : "neither");
  int64_t limit = INT64_MAX;
  if (noise_keys.has_value()) {
    check_dims(op, "noise keys", *noise_keys, 1);
    check_size(op, "number of noise keys", a.N, noise_keys->size(0));
    STD_TORCH_CHECK(noise_keys->scalar_type() == ScalarType::Long, op, ": dtype of noise keys: expected int64");
    a.fill_kind = kFillNoise;
    a.keys = noise_keys->const_data_ptr<int64_t>();
    a.key_stride = noise_keys->stride(0);
    a.noise_std = static_cast<float>(noise_std);
  } else {
    STD_TORCH_CHECK(fill->scalar_type() == kept.scalar_type(), op, ": dtype of fill: expected that of kept");
    if (fill->dim() == 1) {
      check_dims(op, "fill", *fill, 1);
      check_last_stride(op, "fill", *fill);
      check_size(op, "channels of fill", a.C, fill->size(0));
      a.fill_kind = kFillVector;
      a.fill = {fill->const_data_ptr(), 0, 0};
    } else {
      a.fill = rows_of(op, "fill", *fill);
      check_size(op, "samples of fill", a.N, fill->size(0));
      check_size(op, "channels of fill", a.C, fill->size(2));
      a.fill_kind = kFillRows;
      limit = a.V + fill->size(1);
    }
  }
  check_index_range(op, "restore", a.restore, a.N, a.T, limit);
  Tensor out = new_tensor(kept, {a.N, a.T, a.C});
  a.out = out.mutable_data_ptr();
  restore_tokens(a, torch_parallel());
  return out;
}

std::tuple<Tensor, Tensor> restore_tokens_backward_cpu(const Tensor& grad, const Tensor& restore, int64_t visible,
                                                       int64_t fill_rows) {
  constexpr const char* op = "restore_tokens_backward";
  STD_TORCH_CHECK(visible >= 0, op, ": visible: expected 0 or more, got ", visible);
  STD_TORCH_CHECK(fill_rows >= -2, op, ": fill_rows: expected -2 or more, got ", fill_rows);
  RestoreBackwardArgs a{};
  a.grad = rows_of(op, "grad", grad);
  a.restore = indices(op, "restore", restore, 2);
  a.type = element_type(op, "grad", grad);
  a.N = grad.size(0), a.T = grad.size(1), a.C = grad.size(2), a.V = visible, a.fill_rows = fill_rows;
  check_size(op, "rows of restore", a.N, restore.size(0));
  check_size(op, "columns of restore", a.T, restore.size(1));
  check_index_range(op, "restore", a.restore, a.N, a.T, fill_rows >= 0 ? visible + fill_rows : INT64_MAX);
  Tensor kept = new_tensor(grad, {a.N, visible, a.C});
  Tensor fill = fill_rows == -2   ? new_tensor(grad, {0})
                : fill_rows == -1 ? new_tensor(grad, {a.C})
                                  : new_tensor(grad, {a.N, fill_rows, a.C});
  a.kept = kept.mutable_data_ptr();
  a.fill = fill.mutable_data_ptr();
  restore_tokens_backward(a, torch_parallel());
  return {kept, fill};
}

}  // namespace d2v
