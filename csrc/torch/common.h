// What the operator files share: element types, index tensors, threads.
//
// Public checks are made in Python. Those here protect memory, since torch.ops.d2v_native can be called directly.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../core/dtype.h"

// Of the operators that Python code calls: torch.ops.d2v_native. A copy for the kernel hub has another one, so that
// several live in one process. The macros let it be replaced by its value before torch's make names of it.
#if !defined(D2V_NAMESPACE)
#define D2V_NAMESPACE d2v_native
#endif
#define D2V_LIBRARY(space, m) STABLE_TORCH_LIBRARY(space, m)
#define D2V_LIBRARY_FRAGMENT(space, m) STABLE_TORCH_LIBRARY_FRAGMENT(space, m)
#define D2V_LIBRARY_IMPL(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)

namespace d2v {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType element_type(const char* op, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::Double:
      return kFloat64;
    default:
      STD_TORCH_CHECK(false, op, ": dtype of ", name,
                      ": expected float32, bfloat16, float16 or float64, got type number ", static_cast<int>(type));
  }
  return kNone;
}

inline DType element_type(const char* op, const char* name, const Tensor& t) {
  return element_type(op, name, t.scalar_type());
}

// A tensor's storage may be freed or cut after the tensor was made (`untyped_storage().resize_`).
inline void check_storage(const char* op, const char* name, const Tensor& t) {
  int64_t elements = 1, bytes = 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return;
    elements += (t.size(d) - 1) * t.stride(d);
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const int64_t needed = (t.storage_offset() + elements) * static_cast<int64_t>(t.element_size());
  STD_TORCH_CHECK(needed <= bytes, op, ": storage of ", name, ": expected ", needed, " bytes, got ", bytes);
}

inline void check_dims(const char* op, const char* name, const Tensor& t, int64_t dims) {
  STD_TORCH_CHECK(t.dim() == dims, op, ": ", name, ": expected ", dims, " dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, ": expected a tensor on the CPU");
}

inline void check_size(const char* op, const char* what, int64_t expected, int64_t got) {
  STD_TORCH_CHECK(expected == got, op, ": ", what, ": expected ", expected, ", got ", got);
}

// Channels side by side; a tensor that is empty or one channel wide has no meaningful last stride.
inline void check_last_stride(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.numel() == 0 || t.size(last) <= 1 || t.stride(last) == 1, op, ": last stride of ", name,
                  ": expected 1, got ", t.stride(last));
}

// A 1-D (rows: one) or 2-D index tensor, wherever it is.
inline Indices describe_indices(const char* op, const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": dtype of ", name,
                  ": expected int32 or int64, got type number ", static_cast<int>(type));
  return {t.const_data_ptr(), type == ScalarType::Long, t.dim() == 2 ? t.stride(0) : 0, t.stride(t.dim() - 1)};
}

// Raises if an index is not in [0, limit).
void check_index_range(const char* op, const char* name, const Indices& index, int64_t rows, int64_t columns,
                       int64_t limit);

// torch's own threads; honours torch.set_num_threads.
Parallel torch_parallel();

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes,
                         std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, sizes, type);
}

// ---- layouts ----

// One contiguous piece of memory, in whatever order of dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) dims.push_back(d);
  }
  std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return t.stride(a) < t.stride(b); });
  int64_t expected = 1;
  for (const int64_t d : dims) {
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.is_contiguous() && b.is_contiguous()) return true;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// ---- the operators; contracts in d2v_kernels ----

Tensor average_layers_cpu(const std::vector<Tensor>& layers, const std::string& norm, const std::string& out_norm,
                          const OptionalTensor& lengths, double eps, ScalarType out_dtype);
void update_ema_cpu(const std::vector<Tensor>& averages, const std::vector<Tensor>& sources,
                    const std::vector<Tensor>& copies, double weight, const OptionalTensor& weight_tensor);
void update_split_ema_cpu(const std::vector<Tensor>& high, const std::vector<Tensor>& low,
                          const std::vector<Tensor>& sources, double weight, const OptionalTensor& weight_tensor);
Tensor gather_tokens_cpu(const Tensor& x, const Tensor& index, int64_t clones);
Tensor gather_tokens_backward_cpu(const Tensor& grad, const Tensor& index, int64_t clones, int64_t tokens);
Tensor restore_tokens_cpu(const Tensor& kept, const Tensor& restore, const OptionalTensor& fill,
                          const OptionalTensor& noise_keys, double noise_std);
std::tuple<Tensor, Tensor> restore_tokens_backward_cpu(const Tensor& grad, const Tensor& restore, int64_t visible,
                                                       int64_t fill_rows);
std::tuple<Tensor, Tensor, Tensor> masked_regression_loss_cpu(const Tensor& prediction, const Tensor& target,
                                                              const OptionalTensor& prediction_rows,
                                                              const OptionalTensor& target_rows, double beta,
                                                              double scale);
Tensor masked_regression_loss_backward_cpu(const Tensor& grad, const Tensor& prediction, const Tensor& target,
                                           const OptionalTensor& prediction_rows, const OptionalTensor& target_rows,
                                           double beta, double scale);
std::tuple<Tensor, Tensor> attention_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const OptionalTensor& slopes, const OptionalTensor& positions,
                                         const OptionalTensor& lengths, const OptionalTensor& valid,
                                         const OptionalTensor& dropout_keys, double dropout, double scale);
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& log_sum, const OptionalTensor& slopes, const OptionalTensor& positions, const OptionalTensor& lengths,
    const OptionalTensor& valid, const OptionalTensor& dropout_keys, double dropout, double scale);
Tensor gelu_cpu(const Tensor& x);
std::tuple<Tensor, Tensor> gelu_backward_cpu(const Tensor& grad, const Tensor& x);
Tensor gelu_backward_in_place_cpu(const Tensor& grad, const Tensor& x);
std::tuple<Tensor, Tensor> conv_layer_norm_gelu_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                    bool residual, double eps);
std::tuple<Tensor, Tensor, Tensor> conv_layer_norm_gelu_backward_cpu(const Tensor& grad, const Tensor& x,
                                                                     const Tensor& y, const Tensor& weight,
                                                                     const OptionalTensor& bias, bool residual,
                                                                     double eps);
Tensor layer_norm_gelu_cpu(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps);
std::tuple<Tensor, Tensor, Tensor> layer_norm_gelu_backward_cpu(const Tensor& grad, const Tensor& x,
                                                                const OptionalTensor& weight,
                                                                const OptionalTensor& bias, double eps);
std::tuple<Tensor, Tensor> dropout_add_layer_norm_cpu(const Tensor& branch, const Tensor& residual,
                                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                                      const OptionalTensor& keys, double dropout, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_backward_cpu(
    const Tensor& grad_normed, const OptionalTensor& grad_total, const Tensor& total, const OptionalTensor& weight,
    const OptionalTensor& keys, double dropout, double eps);
std::tuple<Tensor, Tensor, Tensor> dropout_add_layer_norm_mixed_cpu(const Tensor& branch, const Tensor& residual,
                                                                    const OptionalTensor& weight,
                                                                    const OptionalTensor& bias,
                                                                    const OptionalTensor& keys, double dropout,
                                                                    double eps, bool wide, bool copy);
std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_mixed_backward_cpu(
    const OptionalTensor& grad_normed, const OptionalTensor& grad_copy, const OptionalTensor& grad_total,
    const Tensor& total, const OptionalTensor& weight, const OptionalTensor& keys, double dropout, double eps,
    ScalarType branch_dtype);

}  // namespace d2v
