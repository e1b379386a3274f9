// Schemas of torch.ops.d2v_native and their CPU registration.
#include <torch/csrc/stable/c/shim.h>

#include "../core/dispatch.h"
#include "../core/ema.h"
#include "../core/tokens.h"
#include "common.h"
#include "schemas.h"

namespace d2v {
namespace {

void run_on_torch(int64_t n, int64_t grain, ParallelBody body, void* context) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace

Parallel torch_parallel() { return {run_on_torch, static_cast<int>(torch::stable::get_num_threads())}; }

void check_index_range(const char* op, const char* name, const Indices& index, int64_t rows, int64_t columns,
                       int64_t limit) {
  BadIndex bad;
  if (!find_bad_index(index, rows, columns, limit, &bad)) return;
  if (limit == INT64_MAX) {
    STD_TORCH_CHECK(false, op, ": ", name, ": expected 0 or more, got ", bad.value, " at row ", bad.row, ", column ",
                    bad.column);
  }
  STD_TORCH_CHECK(false, op, ": ", name, ": expected 0 to ", limit - 1, ", got ", bad.value, " at row ", bad.row,
                  ", column ", bad.column);
}

}  // namespace d2v

extern "C" {
// An EmaUpdate, for plans of the pybind11 module, which knows nothing of torch.
D2V_EXPORT void d2v_update_ema(const d2v::EmaTensor* tensors, int64_t count, const int64_t* first_chunk,
                               double weight) {
  d2v::update_ema(tensors, count, first_chunk, weight, d2v::torch_parallel());
}

D2V_EXPORT const char* d2v_cpu_isa() { return d2v::cpu_isa(); }
}

D2V_LIBRARY(D2V_NAMESPACE, m) {
  for (const char* schema : d2v::kCudaSchemas) m.def(schema);
  m.def(d2v::kMaskedRegressionLoss);
  m.def(d2v::kMaskedRegressionLossBackward);
  m.def(d2v::kAttention);
  m.def(d2v::kAttentionBackward);
  m.def(d2v::kConvLayerNormGelu);
  m.def(d2v::kConvLayerNormGeluBackward);
  m.def(d2v::kLayerNormGelu);
  m.def(d2v::kLayerNormGeluBackward);
  m.def(d2v::kGelu);
  m.def(d2v::kGeluBackward);
  m.def(d2v::kGeluBackwardInPlace);
  m.def(d2v::kDropoutAddLayerNorm);
  m.def(d2v::kDropoutAddLayerNormBackward);
  m.def(d2v::kDropoutAddLayerNormMixed);
  m.def(d2v::kDropoutAddLayerNormMixedBackward);
}

D2V_LIBRARY_IMPL(D2V_NAMESPACE, CPU, m) {
  m.impl("average_layers", TORCH_BOX(&d2v::average_layers_cpu));
  m.impl("update_ema_", TORCH_BOX(&d2v::update_ema_cpu));
  m.impl("update_split_ema_", TORCH_BOX(&d2v::update_split_ema_cpu));
  m.impl("gather_tokens", TORCH_BOX(&d2v::gather_tokens_cpu));
  m.impl("gather_tokens_backward", TORCH_BOX(&d2v::gather_tokens_backward_cpu));
  m.impl("restore_tokens", TORCH_BOX(&d2v::restore_tokens_cpu));
  m.impl("restore_tokens_backward", TORCH_BOX(&d2v::restore_tokens_backward_cpu));
  m.impl("masked_regression_loss", TORCH_BOX(&d2v::masked_regression_loss_cpu));
  m.impl("masked_regression_loss_backward", TORCH_BOX(&d2v::masked_regression_loss_backward_cpu));
  m.impl("attention", TORCH_BOX(&d2v::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&d2v::attention_backward_cpu));
  m.impl("conv_layer_norm_gelu", TORCH_BOX(&d2v::conv_layer_norm_gelu_cpu));
  m.impl("conv_layer_norm_gelu_backward", TORCH_BOX(&d2v::conv_layer_norm_gelu_backward_cpu));
  m.impl("layer_norm_gelu", TORCH_BOX(&d2v::layer_norm_gelu_cpu));
  m.impl("layer_norm_gelu_backward", TORCH_BOX(&d2v::layer_norm_gelu_backward_cpu));
  m.impl("gelu", TORCH_BOX(&d2v::gelu_cpu));
  m.impl("gelu_backward", TORCH_BOX(&d2v::gelu_backward_cpu));
  m.impl("gelu_backward_", TORCH_BOX(&d2v::gelu_backward_in_place_cpu));
  m.impl("dropout_add_layer_norm", TORCH_BOX(&d2v::dropout_add_layer_norm_cpu));
  m.impl("dropout_add_layer_norm_backward", TORCH_BOX(&d2v::dropout_add_layer_norm_backward_cpu));
  m.impl("dropout_add_layer_norm_mixed", TORCH_BOX(&d2v::dropout_add_layer_norm_mixed_cpu));
  m.impl("dropout_add_layer_norm_mixed_backward", TORCH_BOX(&d2v::dropout_add_layer_norm_mixed_backward_cpu));
}
