// conv_layer_norm_gelu and its gradient on CPU tensors.
#include "../core/convolution.h"
#include "../core/gelu.h"
#include "arguments.h"

namespace d2v {
namespace {

Tensor checked(const Call& call, const char* name, const Tensor& t) {
  call.check(name, t);
  STD_TORCH_CHECK(t.is_contiguous(), call.op, ": layout of ", name, ": expected contiguous");
  return t;
}

// A sequence (N, T, C) is a grid of one row.
ConvolutionArgs describe(const Call& call, const Tensor& x, const Tensor& weight) {
  const int64_t axes = x.dim() - 2;
  STD_TORCH_CHECK(axes == 1 || axes == 2, call.op, ": x: expected 3 or 4 dimensions, got ", x.dim());
  checked(call, "x", x);
  check_dims(call.op, "weight", weight, x.dim());
  checked(call, "weight", weight);
  ConvolutionArgs a{};
  a.x = x.const_data_ptr();
  a.type = element_type(call.op, "x", x);
  a.N = x.size(0), a.H = axes == 2 ? x.size(1) : 1, a.W = x.size(axes), a.C = x.size(axes + 1), a.D = weight.size(0);
  a.kernel_h = axes == 2 ? weight.size(2) : 1, a.kernel_w = weight.size(axes + 1);
  STD_TORCH_CHECK(weight.size(1) > 0 && a.C > 0 && a.C % weight.size(1) == 0, call.op,
                  ": channels of x: expected a multiple of ", weight.size(1), ", got ", a.C);
  a.groups = a.C / weight.size(1);
  STD_TORCH_CHECK(a.D % a.groups == 0, call.op, ": rows of weight: expected a multiple of ", a.groups, ", got ", a.D);
  a.before_h = a.kernel_h / 2, a.before_w = a.kernel_w / 2;
  return a;
}

Tensor empty_rows(const ConvolutionArgs& a, const Tensor& x, int64_t channels) {
  if (x.dim() == 3) return new_tensor(x, {a.N, a.W, channels});
  return new_tensor(x, {a.N, a.H, a.W, channels});
}

NormGeluArgs norm_of_rows(const Call& call, const ConvolutionArgs& a, const Tensor& y, double eps) {
  return {y.const_data_ptr(), a.D, a.N * a.H * a.W, a.D, element_type(call.op, "y", y), nullptr, nullptr, eps};
}

}  // namespace

std::tuple<Tensor, Tensor> conv_layer_norm_gelu_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                    bool residual, double eps) {
  const Call call = host_call("conv_layer_norm_gelu");
  const ConvolutionArgs a = describe(call, x, weight);
  STD_TORCH_CHECK(!residual || a.C == a.D, call.op, ": rows of weight with residual: expected ", a.C, ", got ", a.D);
  Tensor y = empty_rows(a, x, a.D), out = empty_rows(a, x, a.D), shift;
  if (bias.has_value()) {
    check_same_shape(call, "bias", torch::stable::select(torch::stable::flatten(weight, 1, -1), 1, 0), *bias);
    shift = torch::stable::contiguous(torch::stable::to(*bias, compute_type(x)));
  }
  const ConvolutionEnds ends{bias.has_value() ? shift.const_data_ptr() : nullptr, nullptr, y.mutable_data_ptr()};
  convolution(a, {weight.const_data_ptr(), element_type(call.op, "weight", weight), false}, ends, torch_parallel());
  NormGeluArgs norm = norm_of_rows(call, a, y, eps);
  norm.added = residual ? x.const_data_ptr() : nullptr;
  layer_norm_gelu(norm, out.mutable_data_ptr(), torch_parallel());
  return {out, y};
}

std::tuple<Tensor, Tensor, Tensor> conv_layer_norm_gelu_backward_cpu(const Tensor& grad, const Tensor& x,
                                                                     const Tensor& y, const Tensor& weight,
                                                                     const OptionalTensor& bias, bool residual,
                                                                     double eps) {
  const Call call = host_call("conv_layer_norm_gelu_backward");
  ConvolutionArgs a = describe(call, x, weight);
  for (const Tensor& t : {checked(call, "grad", grad), checked(call, "y", y)}) {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.dim() == x.dim() && t.numel() == a.N * a.H * a.W * a.D,
                    call.op, ": grad and y: expected the dtype and the rows of x with the channels of weight");
  }
  // Gradient of the convolution's result; its sum over rows is that of the bias.
  Tensor of_y = empty_rows(a, x, a.D), totals = new_tensor(x, {bias.has_value() ? a.D : 0}, compute_type(x));
  const NormGeluGradient norm{grad.const_data_ptr(),   a.D,     a.type,
                              of_y.mutable_data_ptr(), nullptr, bias.has_value() ? totals.mutable_data_ptr() : nullptr};
  layer_norm_gelu_backward(norm_of_rows(call, a, y, eps), norm, torch_parallel());
  Tensor of_weight = torch::stable::new_empty(weight, weight.sizes(), compute_type(x));
  convolution_backward_weight(a, of_y.const_data_ptr(), of_weight.mutable_data_ptr(), torch_parallel());
  Tensor of_x = torch::stable::empty_like(x);
  std::swap(a.C, a.D);
  a.x = of_y.const_data_ptr();
  a.before_h = a.kernel_h - 1 - a.before_h, a.before_w = a.kernel_w - 1 - a.before_w;
  const ConvolutionEnds ends{nullptr, residual ? grad.const_data_ptr() : nullptr, of_x.mutable_data_ptr()};
  convolution(a, {weight.const_data_ptr(), element_type(call.op, "weight", weight), true}, ends, torch_parallel());
  const ScalarType bias_type = bias.has_value() ? bias->scalar_type() : x.scalar_type();
  return {of_x, torch::stable::to(of_weight, weight.scalar_type()), torch::stable::to(totals, bias_type)};
}

}  // namespace d2v
