// average_layers on CPU tensors.
#include "../core/layers.h"
#include "common.h"

namespace d2v {
namespace {

constexpr const char* kOp = "average_layers";

Norm norm_of(const char* name, const std::string& norm) {
  if (norm == "none") return kNormNone;
  if (norm == "layer") return kNormLayer;
  if (norm == "instance") return kNormInstance;
  STD_TORCH_CHECK(norm == "batch", kOp, ": ", name, ": expected none, layer, instance or batch, got ", norm);
  return kNormBatch;
}

void check_layer(const Tensor& layer, const Tensor& first) {
  check_dims(kOp, "layer", layer, 3);
  check_last_stride(kOp, "layer", layer);
  STD_TORCH_CHECK(layer.scalar_type() == first.scalar_type(), kOp, ": layers: expected one dtype");
  for (int d = 0; d < 3; ++d) check_size(kOp, "size of a layer", first.size(d), layer.size(d));
}

}  // namespace

Tensor average_layers_cpu(const std::vector<Tensor>& layers, const std::string& norm, const std::string& out_norm,
                          const OptionalTensor& lengths, double eps, ScalarType out_dtype) {
  STD_TORCH_CHECK(!layers.empty(), kOp, ": number of layers: expected at least 1, got 0");
  const Tensor& first = layers[0];
  std::vector<const void*> data;
  std::vector<int64_t> batch_stride, time_stride;
  for (const Tensor& layer : layers) {
    check_layer(layer, first);
    data.push_back(layer.const_data_ptr());
    batch_stride.push_back(layer.stride(0));
    time_stride.push_back(layer.stride(1));
  }
  const int64_t B = first.size(0), T = first.size(1), C = first.size(2);
  std::vector<int64_t> valid;
  if (lengths.has_value()) {
    check_dims(kOp, "lengths", *lengths, 1);
    check_size(kOp, "number of lengths", B, lengths->size(0));
    STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long, kOp, ": dtype of lengths: expected int64");
    for (int64_t b = 0; b < B; ++b) {
      valid.push_back(lengths->const_data_ptr<int64_t>()[b * lengths->stride(0)]);
      STD_TORCH_CHECK(valid.back() >= 0 && valid.back() <= T, kOp, ": lengths: expected 0 to ", T, ", got ",
                      valid.back());
    }
  }
  Tensor out = new_tensor(first, {B, T, C}, out_dtype);
  const LayersArgs args{data.data(),
                        batch_stride.data(),
                        time_stride.data(),
                        static_cast<int64_t>(layers.size()),
                        B,
                        T,
                        C,
                        element_type(kOp, "layers", first),
                        norm_of("norm", norm),
                        norm_of("out_norm", out_norm),
                        lengths.has_value() ? valid.data() : nullptr,
                        eps,
                        out.mutable_data_ptr(),
                        element_type(kOp, "out_dtype", out_dtype)};
  average_layers(args, torch_parallel());
  return out;
}

}  // namespace d2v
