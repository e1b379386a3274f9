// masked_regression_loss and its gradient on CPU tensors.
#include "../core/loss.h"
#include "arguments.h"

namespace d2v {
namespace {

Indices rows_or_all(const char* op, const char* name, const OptionalTensor& rows, int64_t limit) {
  if (!rows.has_value()) return {nullptr, false, 0, 0};
  const Indices index = host_call(op).index(name, *rows, 1);
  check_index_range(op, name, index, 1, rows->size(0), limit);
  return index;
}

LossArgs loss_args(const char* op, const Tensor& prediction, const Tensor& target,
                   const OptionalTensor& prediction_rows, const OptionalTensor& target_rows, double beta,
                   double scale) {
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor*>{"prediction", &prediction}, {"target", &target}}) {
    check_dims(op, name, *t, 2);
    check_storage(op, name, *t);
    check_last_stride(op, name, *t);
  }
  check_size(op, "channels of target", prediction.size(1), target.size(1));
  LossArgs a{};
  a.prediction = prediction.const_data_ptr();
  a.target = target.const_data_ptr();
  a.prediction_stride = prediction.stride(0);
  a.target_stride = target.stride(0);
  a.prediction_type = element_type(op, "prediction", prediction);
  a.target_type = element_type(op, "target", target);
  a.prediction_index = rows_or_all(op, "prediction_rows", prediction_rows, prediction.size(0));
  a.target_index = rows_or_all(op, "target_rows", target_rows, target.size(0));
  a.P = prediction_rows.has_value() ? prediction_rows->size(0) : prediction.size(0);
  a.C = prediction.size(1);
  check_size(op, "selected target rows", a.P, target_rows.has_value() ? target_rows->size(0) : target.size(0));
  STD_TORCH_CHECK(beta >= 0, op, ": beta: expected 0 or more, got ", beta);
  a.beta = beta;
  a.scale = scale;
  return a;
}

// The kernels take fp64 for both tensors or for neither; another mixture of types is rare enough to be converted.
Tensor matched_target(const Tensor& prediction, const Tensor& target) {
  const bool wide = prediction.scalar_type() == ScalarType::Double;
  if ((target.scalar_type() == ScalarType::Double) == wide) return target;
  return torch::stable::to(target, wide ? ScalarType::Double : ScalarType::Float);
}

Tensor scalar_like(const Tensor& prediction, double value) {
  const bool wide = prediction.scalar_type() == ScalarType::Double;
  Tensor t = new_tensor(prediction, {}, wide ? ScalarType::Double : ScalarType::Float);
  if (wide) {
    *t.mutable_data_ptr<double>() = value;
  } else {
    *t.mutable_data_ptr<float>() = static_cast<float>(value);
  }
  return t;
}

double scalar_value(const char* op, const Tensor& t) {
  check_dims(op, "grad", t, 0);
  switch (element_type(op, "grad", t)) {
    case kFloat64:
      return *t.const_data_ptr<double>();
    case kFloat32:
      return *t.const_data_ptr<float>();
    default:
      STD_TORCH_CHECK(false, op, ": dtype of grad: expected float32 or float64");
  }
  return 0;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> masked_regression_loss_cpu(const Tensor& prediction, const Tensor& target,
                                                              const OptionalTensor& prediction_rows,
                                                              const OptionalTensor& target_rows, double beta,
                                                              double scale) {
  constexpr const char* op = "masked_regression_loss";
  const Tensor matched = matched_target(prediction, target);
  const LossArgs a = loss_args(op, prediction, matched, prediction_rows, target_rows, beta, scale);
  const LossResult r = masked_regression_loss(a, torch_parallel());
  return {scalar_like(prediction, r.loss), scalar_like(prediction, r.prediction_std),
          scalar_like(prediction, r.target_std)};
}

Tensor masked_regression_loss_backward_cpu(const Tensor& grad, const Tensor& prediction, const Tensor& target,
                                           const OptionalTensor& prediction_rows, const OptionalTensor& target_rows,
                                           double beta, double scale) {
  constexpr const char* op = "masked_regression_loss_backward";
  const Tensor matched = matched_target(prediction, target);
  const LossArgs a = loss_args(op, prediction, matched, prediction_rows, target_rows, beta, scale);
  const double upstream = scalar_value(op, grad);
  Tensor out = new_tensor(prediction, {prediction.size(0), a.C});
  masked_regression_loss_backward(a, upstream, prediction.size(0), out.mutable_data_ptr(), torch_parallel());
  return out;
}

}  // namespace d2v
