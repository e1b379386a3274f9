// gelu, layer_norm_gelu and their gradients on CPU tensors.
#include "../core/gelu.h"
#include "arguments.h"

namespace d2v {
namespace {

DType flat(const char* op, const char* name, const Tensor& t) {
  host_call(op).check(name, t);
  STD_TORCH_CHECK(t.is_contiguous(), op, ": layout of ", name, ": expected contiguous");
  return element_type(op, name, t);
}

void check_like(const char* op, const char* name, const Tensor& expected, const Tensor& t) {
  STD_TORCH_CHECK(flat(op, name, t) == element_type(op, "x", expected), op, ": dtype of ", name,
                  ": expected that of x");
  check_same_shape(host_call(op), name, expected, t);
}

// Weight or bias in the type computed in; keeps alive what the kernels read.
OptionalTensor vector_of(const char* op, const char* name, const Tensor& x, const OptionalTensor& t) {
  if (!t.has_value()) return std::nullopt;
  check_dims(op, name, *t, 1);
  check_storage(op, name, *t);
  check_size(op, name, x.size(1), t->size(0));
  element_type(op, name, *t);
  return torch::stable::contiguous(torch::stable::to(*t, compute_type(x)));
}

const void* address(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

NormGeluArgs norm_args(const char* op, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                       double eps) {
  check_last_stride(op, "x", x);
  return {x.const_data_ptr(),       x.stride(0),     x.size(0),     x.size(1),
          element_type(op, "x", x), address(weight), address(bias), eps};
}

// The sums of one vector in its own type; of none where it has none.
Tensor part_of(const Tensor& sums, int64_t row, const Tensor& x, const OptionalTensor& like) {
  if (!like.has_value()) return new_tensor(x, {0});
  return torch::stable::to(torch::stable::clone(torch::stable::select(sums, 0, row)), like->scalar_type());
}

}  // namespace

Tensor gelu_cpu(const Tensor& x) {
  const DType type = flat("gelu", "x", x);
  Tensor out = torch::stable::empty_like(x);
  gelu(type, x.const_data_ptr(), out.mutable_data_ptr(), x.numel(), torch_parallel());
  return out;
}

std::tuple<Tensor, Tensor> gelu_backward_cpu(const Tensor& grad, const Tensor& x) {
  const DType type = flat("gelu_backward", "x", x);
  check_like("gelu_backward", "grad", x, grad);
  Tensor out = torch::stable::empty_like(x), y = torch::stable::empty_like(x);
  gelu_backward(type, grad.const_data_ptr(), x.const_data_ptr(), out.mutable_data_ptr(), y.mutable_data_ptr(),
                x.numel(), torch_parallel());
  return {out, y};
}

Tensor gelu_backward_in_place_cpu(const Tensor& grad, const Tensor& x) {
  const DType type = flat("gelu_backward_", "x", x);
  check_like("gelu_backward_", "grad", x, grad);
  Tensor y = torch::stable::empty_like(x);
  gelu_backward(type, grad.const_data_ptr(), x.const_data_ptr(), grad.mutable_data_ptr(), y.mutable_data_ptr(),
                x.numel(), torch_parallel());
  return y;
}

Tensor layer_norm_gelu_cpu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  constexpr const char* op = "layer_norm_gelu";
  check_dims(op, "x", x, 2);
  check_storage(op, "x", x);
  const OptionalTensor w = vector_of(op, "weight", x, weight), b = vector_of(op, "bias", x, bias);
  Tensor out = new_tensor(x, {x.size(0), x.size(1)});
  layer_norm_gelu(norm_args(op, x, w, b, eps), out.mutable_data_ptr(), torch_parallel());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_gelu_backward_cpu(const Tensor& grad, const Tensor& x,
                                                                const OptionalTensor& weight,
                                                                const OptionalTensor& bias, double eps) {
  constexpr const char* op = "layer_norm_gelu_backward";
  check_dims(op, "x", x, 2);
  check_storage(op, "x", x);
  const OptionalTensor w = vector_of(op, "weight", x, weight), b = vector_of(op, "bias", x, bias);
  const ScalarType type = compute_type(x);
  check_same_shape(host_call(op), "grad", x, grad);
  const Tensor g = grad.scalar_type() == x.scalar_type() ? grad : torch::stable::to(grad, type);
  check_last_stride(op, "grad", g);
  const bool wanted = weight.has_value() || bias.has_value();
  Tensor out = new_tensor(x, {x.size(0), x.size(1)}), sums = new_tensor(x, {wanted ? 2 : 0, x.size(1)}, type);
  const NormGeluGradient gradient{g.const_data_ptr(), g.stride(0), element_type(op, "grad", g), out.mutable_data_ptr(),
                                  wanted ? sums.mutable_data_ptr() : nullptr};
  layer_norm_gelu_backward(norm_args(op, x, w, b, eps), gradient, torch_parallel());
  return {out, part_of(sums, 0, x, weight), part_of(sums, 1, x, bias)};
}

}  // namespace d2v
