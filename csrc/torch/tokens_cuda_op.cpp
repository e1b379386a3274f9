// gather_tokens, restore_tokens and their gradients on CUDA tensors.
#include "../core/tokens_cuda.h"
#include "torch_cuda.h"

namespace d2v {
namespace {

void check_columns(const char* op, int64_t columns) {
  STD_TORCH_CHECK(columns < kMaxIndexColumns, op, ": columns: expected fewer than ", kMaxIndexColumns, ", got ",
                  columns);
}

}  // namespace

Tensor gather_tokens_cuda(const Tensor& x, const Tensor& index, int64_t clones) {
  const Call call = device_call("gather_tokens", x);
  GatherArgs a = describe_gather(call, x, index, clones);
  Tensor out = new_tensor(x, {a.rows, a.n, a.C});
  a.out = out.mutable_data_ptr();
  check_launch(call.op, launch_gather_tokens(a, x.size(1), stream_of(call)));
  return out;
}

Tensor gather_tokens_backward_cuda(const Tensor& grad, const Tensor& index, int64_t clones, int64_t tokens) {
  const Call call = device_call("gather_tokens_backward", grad);
  GatherBackwardArgs a = describe_gather_backward(call, grad, index, clones, tokens);
  check_columns(call.op, a.n);
  Tensor out = new_tensor(grad, {a.rows / clones, tokens, a.C});
  a.out = out.mutable_data_ptr();
  const Tensor workspace = new_workspace(grad, gather_backward_workspace(a));
  check_launch(call.op, launch_gather_tokens_backward(a, workspace.mutable_data_ptr(), stream_of(call)));
  return out;
}

Tensor restore_tokens_cuda(const Tensor& kept, const Tensor& restore, const OptionalTensor& fill,
                           const OptionalTensor& noise_keys, double noise_std) {
  const Call call = device_call("restore_tokens", kept);
  RestoreArgs a = describe_restore(call, kept, restore, fill, noise_keys, noise_std);
  Tensor out = new_tensor(kept, {a.N, a.T, a.C});
  a.out = out.mutable_data_ptr();
  check_launch(call.op, launch_restore_tokens(a, a.fill_kind == kFillRows ? fill->size(1) : 0, stream_of(call)));
  return out;
}

std::tuple<Tensor, Tensor> restore_tokens_backward_cuda(const Tensor& grad, const Tensor& restore, int64_t visible,
                                                        int64_t fill_rows) {
  const Call call = device_call("restore_tokens_backward", grad);
  RestoreBackwardArgs a = describe_restore_backward(call, grad, restore, visible, fill_rows);
  check_columns(call.op, a.T);
  Tensor kept = new_tensor(grad, {a.N, visible, a.C});
  Tensor fill = new_fill_gradient(grad, fill_rows);
  a.kept = kept.mutable_data_ptr();
  a.fill = fill.mutable_data_ptr();
  const Tensor workspace = new_workspace(grad, restore_backward_workspace(a));
  check_launch(call.op, launch_restore_tokens_backward(a, workspace.mutable_data_ptr(), stream_of(call)));
  return {kept, fill};
}

}  // namespace d2v
