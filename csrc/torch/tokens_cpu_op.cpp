// gather_tokens, restore_tokens and their gradients on CPU tensors.
#include "arguments.h"

namespace d2v {

Tensor gather_tokens_cpu(const Tensor& x, const Tensor& index, int64_t clones) {
  const Call call = host_call("gather_tokens");
  GatherArgs a = describe_gather(call, x, index, clones);
  check_index_range(call.op, "index", a.index, a.rows, a.n, x.size(1));
  Tensor out = new_tensor(x, {a.rows, a.n, a.C});
  a.out = out.mutable_data_ptr();
  gather_tokens(a, torch_parallel());
  return out;
}

Tensor gather_tokens_backward_cpu(const Tensor& grad, const Tensor& index, int64_t clones, int64_t tokens) {
  const Call call = host_call("gather_tokens_backward");
  GatherBackwardArgs a = describe_gather_backward(call, grad, index, clones, tokens);
  check_index_range(call.op, "index", a.index, a.rows, a.n, tokens);
  Tensor out = new_tensor(grad, {a.rows / clones, tokens, a.C});
  a.out = out.mutable_data_ptr();
  gather_tokens_backward(a, torch_parallel());
  return out;
}

Tensor restore_tokens_cpu(const Tensor& kept, const Tensor& restore, const OptionalTensor& fill,
                          const OptionalTensor& noise_keys, double noise_std) {
  const Call call = host_call("restore_tokens");
  RestoreArgs a = describe_restore(call, kept, restore, fill, noise_keys, noise_std);
  const int64_t limit = a.fill_kind == kFillRows ? a.V + fill->size(1) : INT64_MAX;
  check_index_range(call.op, "restore", a.restore, a.N, a.T, limit);
  Tensor out = new_tensor(kept, {a.N, a.T, a.C});
  a.out = out.mutable_data_ptr();
  restore_tokens(a, torch_parallel());
  return out;
}

std::tuple<Tensor, Tensor> restore_tokens_backward_cpu(const Tensor& grad, const Tensor& restore, int64_t visible,
                                                       int64_t fill_rows) {
  const Call call = host_call("restore_tokens_backward");
  RestoreBackwardArgs a = describe_restore_backward(call, grad, restore, visible, fill_rows);
  check_index_range(call.op, "restore", a.restore, a.N, a.T, fill_rows >= 0 ? visible + fill_rows : INT64_MAX);
  Tensor kept = new_tensor(grad, {a.N, visible, a.C});
  Tensor fill = new_fill_gradient(grad, fill_rows);
  a.kept = kept.mutable_data_ptr();
  a.fill = fill.mutable_data_ptr();
  restore_tokens_backward(a, torch_parallel());
  return {kept, fill};
}

}  // namespace d2v
