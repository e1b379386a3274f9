// gather_tokens, restore_tokens and their gradients on CUDA tensors.
#include "../core/tokens_cuda.h"
#include "torch_cuda.h"

namespace d2v {
namespace {

// What all tensors of a call share.
struct Call {
  const char* op;
  int32_t device;

  Rows3 rows(const char* name, const Tensor& t) const {
    check_place(op, name, t, 3, device);
    check_last_stride(op, name, t);
    return {t.const_data_ptr(), t.stride(0), t.stride(1)};
  }
  Indices index(const char* name, const Tensor& t) const {
    check_place(op, name, t, 2, device);
    return describe_indices(op, name, t);
  }
  Stream stream() const { return {device, current_stream(op, device)}; }
};

Tensor new_workspace(const Tensor& like, int64_t bytes) { return new_tensor(like, {bytes}, ScalarType::Byte); }

void check_columns(const char* op, int64_t columns) {
  STD_TORCH_CHECK(columns < kMaxIndexColumns, op, ": columns: expected fewer than ", kMaxIndexColumns, ", got ",
                  columns);
}

void describe_noise(const Call& call, const Tensor& keys, double std, RestoreArgs* a) {
  check_place(call.op, "noise keys", keys, 1, call.device);
  check_size(call.op, "number of noise keys", a->N, keys.size(0));
  STD_TORCH_CHECK(keys.scalar_type() == ScalarType::Long, call.op, ": dtype of noise keys: expected int64");
  a->fill_kind = kFillNoise;
  a->keys = keys.const_data_ptr<int64_t>();
  a->key_stride = keys.stride(0);
  a->noise_std = static_cast<float>(std);
}

void describe_fill(const Call& call, const Tensor& fill, RestoreArgs* a) {
  STD_TORCH_CHECK(element_type(call.op, "fill", fill) == a->type, call.op, ": dtype of fill: expected that of kept");
  if (fill.dim() == 1) {
    check_place(call.op, "fill", fill, 1, call.device);
    check_last_stride(call.op, "fill", fill);
    check_size(call.op, "channels of fill", a->C, fill.size(0));
    a->fill_kind = kFillVector;
    a->fill = {fill.const_data_ptr(), 0, 0};
    return;
  }
  a->fill_kind = kFillRows;
  a->fill = call.rows("fill", fill);
  check_size(call.op, "samples of fill", a->N, fill.size(0));
  check_size(call.op, "channels of fill", a->C, fill.size(2));
}

}  // namespace

Tensor gather_tokens_cuda(const Tensor& x, const Tensor& index, int64_t clones) {
  const Call call = {"gather_tokens", x.get_device_index()};
  STD_TORCH_CHECK(clones >= 1, call.op, ": clones: expected at least 1, got ", clones);
  const Rows3 rows = call.rows("x", x);
  const Indices at = call.index("index", index);
  const int64_t N = index.size(0), n = index.size(1), C = x.size(2);
  check_size(call.op, "rows of index", x.size(0) * clones, N);
  Tensor out = new_tensor(x, {N, n, C});
  const GatherArgs args = {rows, at, N, n, clones, C, element_type(call.op, "x", x), out.mutable_data_ptr()};
  check_launch(call.op, launch_gather_tokens(args, x.size(1), call.stream()));
  return out;
}

Tensor gather_tokens_backward_cuda(const Tensor& grad, const Tensor& index, int64_t clones, int64_t tokens) {
  const Call call = {"gather_tokens_backward", grad.get_device_index()};
  STD_TORCH_CHECK(clones >= 1, call.op, ": clones: expected at least 1, got ", clones);
  STD_TORCH_CHECK(tokens >= 0, call.op, ": tokens: expected 0 or more, got ", tokens);
  const Rows3 rows = call.rows("grad", grad);
  const Indices at = call.index("index", index);
  const int64_t N = index.size(0), n = index.size(1), C = grad.size(2);
  check_size(call.op, "rows of grad", N, grad.size(0));
  check_size(call.op, "columns of grad", n, grad.size(1));
  STD_TORCH_CHECK(N % clones == 0, call.op, ": rows of index: expected a multiple of ", clones, ", got ", N);
  check_columns(call.op, n);
  Tensor out = new_tensor(grad, {N / clones, tokens, C});
  const GatherBackwardArgs args = {
      rows, at, N, n, clones, tokens, C, element_type(call.op, "grad", grad), out.mutable_data_ptr()};
  const Tensor workspace = new_workspace(grad, gather_backward_workspace(args));
  check_launch(call.op, launch_gather_tokens_backward(args, workspace.mutable_data_ptr(), call.stream()));
  return out;
}

Tensor restore_tokens_cuda(const Tensor& kept, const Tensor& restore, const OptionalTensor& fill,
                           const OptionalTensor& noise_keys, double noise_std) {
  const Call call = {"restore_tokens", kept.get_device_index()};
  RestoreArgs a{};
  a.kept = call.rows("kept", kept);
  a.restore = call.index("restore", restore);
  a.type = element_type(call.op, "kept", kept);
  a.N = kept.size(0), a.V = kept.size(1), a.C = kept.size(2), a.T = restore.size(1);
  check_size(call.op, "rows of restore", a.N, restore.size(0));
  STD_TORCH_CHECK(fill.has_value() != noise_keys.has_value(), call.op, ": fill: expected a tensor or noise keys, got ",
                  fill.has_value() ? "both" : "neither");
  if (noise_keys.has_value()) {
    describe_noise(call, *noise_keys, noise_std, &a);
  } else {
    describe_fill(call, *fill, &a);
  }
  Tensor out = new_tensor(kept, {a.N, a.T, a.C});
  a.out = out.mutable_data_ptr();
  check_launch(call.op, launch_restore_tokens(a, a.fill_kind == kFillRows ? fill->size(1) : 0, call.stream()));
  return out;
}

std::tuple<Tensor, Tensor> restore_tokens_backward_cuda(const Tensor& grad, const Tensor& restore, int64_t visible,
                                                        int64_t fill_rows) {
  const Call call = {"restore_tokens_backward", grad.get_device_index()};
  STD_TORCH_CHECK(visible >= 0, call.op, ": visible: expected 0 or more, got ", visible);
  STD_TORCH_CHECK(fill_rows >= -2, call.op, ": fill_rows: expected -2 or more, got ", fill_rows);
  RestoreBackwardArgs a{};
  a.grad = call.rows("grad", grad);
  a.restore = call.index("restore", restore);
  a.type = element_type(call.op, "grad", grad);
  a.N = grad.size(0), a.T = grad.size(1), a.C = grad.size(2), a.V = visible, a.fill_rows = fill_rows;
  check_size(call.op, "rows of restore", a.N, restore.size(0));
  check_size(call.op, "columns of restore", a.T, restore.size(1));
  check_columns(call.op, a.T);
  Tensor kept = new_tensor(grad, {a.N, visible, a.C});
  Tensor fill = fill_rows == -2   ? new_tensor(grad, {0})
                : fill_rows == -1 ? new_tensor(grad, {a.C})
                                  : new_tensor(grad, {a.N, fill_rows, a.C});
  a.kept = kept.mutable_data_ptr();
  a.fill = fill.mutable_data_ptr();
  const Tensor workspace = new_workspace(grad, restore_backward_workspace(a));
  check_launch(call.op, launch_restore_tokens_backward(a, workspace.mutable_data_ptr(), call.stream()));
  return {kept, fill};
}

}  // namespace d2v
