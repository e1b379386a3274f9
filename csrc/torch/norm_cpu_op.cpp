// dropout_add_layer_norm and its gradient on CPU tensors.
#include "../core/norm.h"
#include "arguments.h"

namespace d2v {
namespace {

// Weight or bias in the type of the arithmetic, which is small beside the rows; `held` keeps it alive.
const void* affine(const Call& call, const char* name, const OptionalTensor& t, int64_t C, DType rows, Tensor* held) {
  if (!t.has_value()) return nullptr;
  call.check(name, *t, 1);
  check_last_stride(call.op, name, *t);
  check_size(call.op, (std::string("channels of ") + name).c_str(), C, t->size(0));
  element_type(call.op, name, *t);
  const ScalarType wanted = rows == kFloat64 ? ScalarType::Double : ScalarType::Float;
  *held = t->scalar_type() == wanted ? *t : torch::stable::to(*t, wanted);
  return held->const_data_ptr();
}

DropoutArgs dropout_args(const Call& call, const OptionalTensor& keys, double dropout, int64_t N) {
  STD_TORCH_CHECK(dropout >= 0 && dropout < 1, call.op, ": dropout: expected 0 or more and less than 1, got ", dropout);
  if (dropout == 0) return describe_dropout(nullptr, 0, 0);
  STD_TORCH_CHECK(keys.has_value(), call.op, ": keys: expected a tensor where dropout is above 0, got none");
  call.check("keys", *keys, 1);
  check_size(call.op, "number of keys", N, keys->size(0));
  STD_TORCH_CHECK(keys->scalar_type() == ScalarType::Long, call.op, ": dtype of keys: expected int64");
  return describe_dropout(keys->const_data_ptr<int64_t>(), keys->stride(0), dropout);
}

Rows3 rows_like(const Call& call, const char* name, const Tensor& t, const Tensor& like, ScalarType type) {
  const Rows3 rows = call.rows(name, t);
  for (int64_t d = 0; d < 3; ++d)
    check_size(call.op, (std::string("size of ") + name).c_str(), like.size(d), t.size(d));
  STD_TORCH_CHECK(t.scalar_type() == type, call.op, ": dtype of ", name, ": expected one dtype for all");
  return rows;
}

Rows3 rows_like(const Call& call, const char* name, const OptionalTensor& t, const Tensor& like, ScalarType type) {
  return t.has_value() ? rows_like(call, name, *t, like, type) : Rows3{};
}

// Of the branch in the operators of two dtypes.
DType half_type(const Call& call, ScalarType type) {
  const DType half = element_type(call.op, "branch", type);
  STD_TORCH_CHECK(size_of(half) == 2, call.op, ": dtype of branch: expected bfloat16 or float16");
  return half;
}

Tensor rows_or_none(const Tensor& like, bool wanted, ScalarType type) {
  return wanted ? new_tensor(like, {like.size(0), like.size(1), like.size(2)}, type) : new_tensor(like, {0}, type);
}

// All but `half`, and what is written.
NormArgs forward_args(const Call& call, const Tensor& branch, const Tensor& residual, const OptionalTensor& keys,
                      double dropout, double eps, ScalarType type) {
  NormArgs a{};
  a.branch = call.rows("branch", branch);
  a.residual = rows_like(call, "residual", residual, branch, type);
  a.N = branch.size(0), a.T = branch.size(1), a.C = branch.size(2);
  a.type = element_type(call.op, "residual", residual);
  a.dropout = dropout_args(call, keys, dropout, a.N);
  a.eps = eps;
  return a;
}

NormBackwardArgs backward_args(const Call& call, const OptionalTensor& grad_normed, const OptionalTensor& grad_total,
                               const Tensor& total, const OptionalTensor& keys, double dropout, double eps) {
  NormBackwardArgs a{};
  a.total = call.rows("total", total);
  a.grad_normed = rows_like(call, "grad_normed", grad_normed, total, total.scalar_type());
  a.grad_total = rows_like(call, "grad_total", grad_total, total, total.scalar_type());
  a.N = total.size(0), a.T = total.size(1), a.C = total.size(2);
  a.type = element_type(call.op, "total", total);
  a.dropout = dropout_args(call, keys, dropout, a.N);
  a.eps = eps;
  return a;
}

// Runs `a` with new tensors for what it writes; of_branch: where the gradient of the branch goes.
std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const Call& call, NormBackwardArgs a, const Tensor& total,
                                                        const OptionalTensor& weight, const Tensor& of_branch) {
  Tensor held_weight;
  a.weight = affine(call, "weight", weight, a.C, a.type, &held_weight);
  const ScalarType wide = a.type == kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor of_residual = new_tensor(total, {a.N, a.T, a.C});
  Tensor of_weight = new_tensor(total, {a.C}, wide), of_bias = new_tensor(total, {a.C}, wide);
  a.grad_branch = of_branch.dim() == 3 ? of_branch.mutable_data_ptr() : nullptr;
  a.grad_residual = of_residual.mutable_data_ptr();
  a.grad_weight = of_weight.mutable_data_ptr();
  a.grad_bias = of_bias.mutable_data_ptr();
  dropout_add_layer_norm_backward(a, torch_parallel());
  return {of_branch, of_residual, of_weight, of_bias};
}

}  // namespace

std::tuple<Tensor, Tensor> dropout_add_layer_norm_cpu(const Tensor& branch, const Tensor& residual,
                                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                                      const OptionalTensor& keys, double dropout, double eps) {
  const Call call = host_call("dropout_add_layer_norm");
  NormArgs a = forward_args(call, branch, residual, keys, dropout, eps, branch.scalar_type());
  Tensor held_weight, held_bias;
  a.weight = affine(call, "weight", weight, a.C, a.type, &held_weight);
  a.bias = affine(call, "bias", bias, a.C, a.type, &held_bias);
  Tensor normed = new_tensor(branch, {a.N, a.T, a.C}), total = new_tensor(branch, {a.N, a.T, a.C});
  a.normed = normed.mutable_data_ptr();
  a.total = total.mutable_data_ptr();
  dropout_add_layer_norm(a, torch_parallel());
  return {normed, total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_backward_cpu(
    const Tensor& grad_normed, const OptionalTensor& grad_total, const Tensor& total, const OptionalTensor& weight,
    const OptionalTensor& keys, double dropout, double eps) {
  const Call call = host_call("dropout_add_layer_norm_backward");
  const NormBackwardArgs a = backward_args(call, grad_normed, grad_total, total, keys, dropout, eps);
  return run_backward(call, a, total, weight, rows_or_none(total, dropout != 0, total.scalar_type()));
}

std::tuple<Tensor, Tensor, Tensor> dropout_add_layer_norm_mixed_cpu(const Tensor& branch, const Tensor& residual,
                                                                    const OptionalTensor& weight,
                                                                    const OptionalTensor& bias,
                                                                    const OptionalTensor& keys, double dropout,
                                                                    double eps, bool wide, bool copy) {
  const Call call = host_call("dropout_add_layer_norm_mixed");
  NormArgs a = forward_args(call, branch, residual, keys, dropout, eps, ScalarType::Float);
  a.half = half_type(call, branch.scalar_type());
  Tensor held_weight, held_bias;
  a.weight = affine(call, "weight", weight, a.C, a.type, &held_weight);
  a.bias = affine(call, "bias", bias, a.C, a.type, &held_bias);
  Tensor normed = rows_or_none(branch, wide, ScalarType::Float), total = rows_or_none(branch, true, ScalarType::Float);
  Tensor copied = rows_or_none(branch, copy, branch.scalar_type());
  a.normed = wide ? normed.mutable_data_ptr() : nullptr;
  a.copy = copy ? copied.mutable_data_ptr() : nullptr;
  a.total = total.mutable_data_ptr();
  dropout_add_layer_norm(a, torch_parallel());
  return {normed, copied, total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_mixed_backward_cpu(
    const OptionalTensor& grad_normed, const OptionalTensor& grad_copy, const OptionalTensor& grad_total,
    const Tensor& total, const OptionalTensor& weight, const OptionalTensor& keys, double dropout, double eps,
    ScalarType branch_dtype) {
  const Call call = host_call("dropout_add_layer_norm_mixed_backward");
  STD_TORCH_CHECK(total.scalar_type() == ScalarType::Float, call.op, ": dtype of total: expected float32");
  NormBackwardArgs a = backward_args(call, grad_normed, grad_total, total, keys, dropout, eps);
  a.half = half_type(call, branch_dtype);
  a.grad_copy = rows_like(call, "grad_copy", grad_copy, total, branch_dtype);
  return run_backward(call, a, total, weight, rows_or_none(total, true, branch_dtype));
}

}  // namespace d2v
