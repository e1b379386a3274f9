// Registration of the CUDA kernels of torch.ops.d2v_native; the schemas are registered in ops_cpu.cpp. With
// D2V_EMULATED the same code registers torch.ops.d2v_emu on CPU tensors.
#include "schemas.h"
#include "torch_cuda.h"

#if defined(D2V_EMULATED)
STABLE_TORCH_LIBRARY(d2v_emu, m) {
  for (const char* schema : d2v::kCudaSchemas) m.def(schema);
}
STABLE_TORCH_LIBRARY_IMPL(d2v_emu, CPU, m) {
#else
D2V_LIBRARY_IMPL(D2V_NAMESPACE, CUDA, m) {
#endif
  m.impl("average_layers", TORCH_BOX(&d2v::average_layers_cuda));
  m.impl("update_ema_", TORCH_BOX(&d2v::update_ema_cuda));
  m.impl("update_split_ema_", TORCH_BOX(&d2v::update_split_ema_cuda));
  m.impl("gather_tokens", TORCH_BOX(&d2v::gather_tokens_cuda));
  m.impl("gather_tokens_backward", TORCH_BOX(&d2v::gather_tokens_backward_cuda));
  m.impl("restore_tokens", TORCH_BOX(&d2v::restore_tokens_cuda));
  m.impl("restore_tokens_backward", TORCH_BOX(&d2v::restore_tokens_backward_cuda));
}
