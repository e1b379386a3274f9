// average_layers on CUDA tensors.
#include "../core/layers_cuda.h"
#include "torch_cuda.h"

namespace d2v {

Tensor average_layers_cuda(const std::vector<Tensor>& layers, const std::string& norm, const std::string& out_norm,
                           const OptionalTensor& lengths, double eps, ScalarType out_dtype) {
  constexpr const char* op = "average_layers";
  STD_TORCH_CHECK(!layers.empty() && layers.size() <= kMaxLayers, op, ": number of layers: expected 1 to ", kMaxLayers,
                  ", got ", layers.size());
  const Tensor& first = layers[0];
  const Call call = device_call(op, first);
  const LayerArguments arguments(call, layers, lengths);
  Tensor out = new_tensor(first, {first.size(0), first.size(1), first.size(2)}, out_dtype);
  const LayersArgs args = arguments.describe(first, norm, out_norm, eps, out);
  const Tensor workspace = new_workspace(first, average_layers_workspace(args));
  check_launch(op, launch_average_layers(args, workspace.mutable_data_ptr(), stream_of(call)));
  return out;
}

}  // namespace d2v
