// Registration of the CUDA kernels of torch.ops.d2v_native; the schemas are in ops_cpu.cpp. With D2V_EMULATED the same
// code registers torch.ops.d2v_emu on CPU tensors.
#include "torch_cuda.h"

#if defined(D2V_EMULATED)
STABLE_TORCH_LIBRARY(d2v_emu, m) {
  m.def(
      "average_layers(Tensor[] layers, str norm, str out_norm, Tensor? lengths, float eps, ScalarType out_dtype)"
      " -> Tensor");
  m.def(
      "update_ema_(Tensor(a!)[] averages, Tensor[] sources, Tensor(b!)[] copies, float weight, Tensor? weight_tensor)"
      " -> ()");
  m.def("gather_tokens(Tensor x, Tensor index, int clones) -> Tensor");
  m.def("gather_tokens_backward(Tensor grad, Tensor index, int clones, int tokens) -> Tensor");
  m.def("restore_tokens(Tensor kept, Tensor restore, Tensor? fill, Tensor? noise_keys, float noise_std) -> Tensor");
  m.def("restore_tokens_backward(Tensor grad, Tensor restore, int visible, int fill_rows) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(d2v_emu, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(d2v_native, CUDA, m) {
#endif
  m.impl("average_layers", TORCH_BOX(&d2v::average_layers_cuda));
  m.impl("update_ema_", TORCH_BOX(&d2v::update_ema_cuda));
  m.impl("gather_tokens", TORCH_BOX(&d2v::gather_tokens_cuda));
  m.impl("gather_tokens_backward", TORCH_BOX(&d2v::gather_tokens_backward_cuda));
  m.impl("restore_tokens", TORCH_BOX(&d2v::restore_tokens_cuda));
  m.impl("restore_tokens_backward", TORCH_BOX(&d2v::restore_tokens_backward_cuda));
}
