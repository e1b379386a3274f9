// average_layers on CPU tensors.
#include "arguments.h"

namespace d2v {

Tensor average_layers_cpu(const std::vector<Tensor>& layers, const std::string& norm, const std::string& out_norm,
                          const OptionalTensor& lengths, double eps, ScalarType out_dtype) {
  constexpr const char* op = "average_layers";
  STD_TORCH_CHECK(!layers.empty(), op, ": number of layers: expected at least 1, got 0");
  const Tensor& first = layers[0];
  const LayerArguments arguments(host_call(op), layers, lengths);
  Tensor out = new_tensor(first, {first.size(0), first.size(1), first.size(2)}, out_dtype);
  average_layers(arguments.describe(first, norm, out_norm, eps, out), torch_parallel());
  return out;
}

}  // namespace d2v
