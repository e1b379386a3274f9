// average_layers on CUDA tensors.
#include "../core/layers_cuda.h"
#include "torch_cuda.h"

namespace d2v {
namespace {

constexpr const char* kOp = "average_layers";

Norm norm_of(const char* name, const std::string& norm) {
  if (norm == "none") return kNormNone;
  if (norm == "layer") return kNormLayer;
  STD_TORCH_CHECK(norm == "instance", kOp, ": ", name, ": expected none, layer or instance on ", kDeviceName, ", got ",
                  norm);
  return kNormInstance;
}

// Addresses and strides of the layers.
struct Layers {
  std::vector<const void*> data;
  std::vector<int64_t> batch_stride, time_stride;

  Layers(const std::vector<Tensor>& layers, int32_t device) {
    STD_TORCH_CHECK(!layers.empty() && layers.size() <= kMaxLayers, kOp, ": number of layers: expected 1 to ",
                    kMaxLayers, ", got ", layers.size());
    for (const Tensor& layer : layers) {
      check_place(kOp, "layer", layer, 3, device);
      check_last_stride(kOp, "layer", layer);
      STD_TORCH_CHECK(layer.scalar_type() == layers[0].scalar_type(), kOp, ": layers: expected one dtype");
      for (int d = 0; d < 3; ++d) check_size(kOp, "size of a layer", layers[0].size(d), layer.size(d));
      data.push_back(layer.const_data_ptr());
      batch_stride.push_back(layer.stride(0));
      time_stride.push_back(layer.stride(1));
    }
  }
};

std::vector<int64_t> read_lengths(const Tensor& lengths, int64_t B, int64_t T) {
  check_dims(kOp, "lengths", lengths, 1);
  check_size(kOp, "number of lengths", B, lengths.size(0));
  STD_TORCH_CHECK(lengths.scalar_type() == ScalarType::Long, kOp, ": dtype of lengths: expected int64");
  std::vector<int64_t> valid;
  for (int64_t b = 0; b < B; ++b) {
    valid.push_back(lengths.const_data_ptr<int64_t>()[b * lengths.stride(0)]);
    STD_TORCH_CHECK(valid.back() >= 0 && valid.back() <= T, kOp, ": lengths: expected 0 to ", T, ", got ",
                    valid.back());
  }
  return valid;
}

}  // namespace

Tensor average_layers_cuda(const std::vector<Tensor>& layers, const std::string& norm, const std::string& out_norm,
                           const OptionalTensor& lengths, double eps, ScalarType out_dtype) {
  STD_TORCH_CHECK(!layers.empty(), kOp, ": number of layers: expected at least 1, got 0");
  const Tensor& first = layers[0];
  const int32_t device = first.get_device_index();
  const Layers list(layers, device);
  const int64_t B = first.size(0), T = first.size(1), C = first.size(2);
  std::vector<int64_t> valid;
  if (lengths.has_value()) valid = read_lengths(*lengths, B, T);
  Tensor out = new_tensor(first, {B, T, C}, out_dtype);
  const LayersArgs args{list.data.data(),
                        list.batch_stride.data(),
                        list.time_stride.data(),
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
  const Tensor workspace = new_tensor(first, {average_layers_workspace(args)}, ScalarType::Byte);
  check_launch(kOp, launch_average_layers(args, workspace.mutable_data_ptr(), {device, current_stream(kOp, device)}));
  return out;
}

}  // namespace d2v
