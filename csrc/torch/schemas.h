// Schemas of torch.ops.d2v_native: those of d2v_kernels/ops/*.py, SymInt written int (a test compares them).
#pragma once

namespace d2v {

constexpr const char* kAverageLayers =
    "average_layers(Tensor[] layers, str norm, str out_norm, Tensor? lengths, float eps, ScalarType out_dtype)"
    " -> Tensor";
constexpr const char* kUpdateEma =
    "update_ema_(Tensor(a!)[] averages, Tensor[] sources, Tensor(b!)[] copies, float weight, Tensor? weight_tensor)"
    " -> ()";
constexpr const char* kUpdateSplitEma =
    "update_split_ema_(Tensor(a!)[] high, Tensor(b!)[] low, Tensor[] sources, float weight, Tensor? weight_tensor)"
    " -> ()";
constexpr const char* kGatherTokens = "gather_tokens(Tensor x, Tensor index, int clones) -> Tensor";
constexpr const char* kGatherTokensBackward =
    "gather_tokens_backward(Tensor grad, Tensor index, int clones, int tokens) -> Tensor";
constexpr const char* kRestoreTokens =
    "restore_tokens(Tensor kept, Tensor restore, Tensor? fill, Tensor? noise_keys, float noise_std) -> Tensor";
constexpr const char* kRestoreTokensBackward =
    "restore_tokens_backward(Tensor grad, Tensor restore, int visible, int fill_rows) -> (Tensor, Tensor)";
constexpr const char* kMaskedRegressionLoss =
    "masked_regression_loss(Tensor prediction, Tensor target, Tensor? prediction_rows, Tensor? target_rows,"
    " float beta, float scale) -> (Tensor, Tensor, Tensor)";
constexpr const char* kMaskedRegressionLossBackward =
    "masked_regression_loss_backward(Tensor grad, Tensor prediction, Tensor target, Tensor? prediction_rows,"
    " Tensor? target_rows, float beta, float scale) -> Tensor";
constexpr const char* kAttention =
    "attention(Tensor query, Tensor key, Tensor value, Tensor? slopes, Tensor? positions, Tensor? lengths,"
    " Tensor? valid, Tensor? dropout_keys, float dropout, float scale) -> (Tensor, Tensor)";
constexpr const char* kAttentionBackward =
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor log_sum,"
    " Tensor? slopes, Tensor? positions, Tensor? lengths, Tensor? valid, Tensor? dropout_keys, float dropout,"
    " float scale) -> (Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kLayerNormGelu = "layer_norm_gelu(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor";
constexpr const char* kLayerNormGeluBackward =
    "layer_norm_gelu_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor)";
constexpr const char* kGelu = "gelu(Tensor x) -> Tensor";
constexpr const char* kGeluBackward = "gelu_backward(Tensor grad, Tensor x) -> (Tensor, Tensor)";
constexpr const char* kGeluBackwardInPlace = "gelu_backward_(Tensor(a!) grad, Tensor x) -> Tensor";

constexpr const char* kConvLayerNormGelu =
    "conv_layer_norm_gelu(Tensor x, Tensor weight, Tensor? bias, bool residual, float eps) -> (Tensor, Tensor)";
constexpr const char* kConvLayerNormGeluBackward =
    "conv_layer_norm_gelu_backward(Tensor grad, Tensor x, Tensor y, Tensor weight, Tensor? bias, bool residual,"
    " float eps) -> (Tensor, Tensor, Tensor)";
constexpr const char* kDropoutAddLayerNorm =
    "dropout_add_layer_norm(Tensor branch, Tensor residual, Tensor? weight, Tensor? bias, Tensor? keys, float dropout,"
    " float eps) -> (Tensor, Tensor)";
constexpr const char* kDropoutAddLayerNormBackward =
    "dropout_add_layer_norm_backward(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor? weight,"
    " Tensor? keys, float dropout, float eps) -> (Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kDropoutAddLayerNormMixed =
    "dropout_add_layer_norm_mixed(Tensor branch, Tensor residual, Tensor? weight, Tensor? bias, Tensor? keys,"
    " float dropout, float eps, bool wide, bool copy) -> (Tensor, Tensor, Tensor)";
constexpr const char* kDropoutAddLayerNormMixedBackward =
    "dropout_add_layer_norm_mixed_backward(Tensor? grad_normed, Tensor? grad_copy, Tensor? grad_total, Tensor total,"
    " Tensor? weight, Tensor? keys, float dropout, float eps, ScalarType branch_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)";

// Those that CUDA kernels exist for.
constexpr const char* kCudaSchemas[] = {kAverageLayers,        kUpdateEma,     kUpdateSplitEma,       kGatherTokens,
                                        kGatherTokensBackward, kRestoreTokens, kRestoreTokensBackward};

}  // namespace d2v
