// What of torch's CUDA half the operators need. It lives in libtorch_cuda, which a CPU torch lacks, so it is looked up
// in the copy that `import torch` has loaded: one library then serves every torch, and loads without a GPU as well.
//
// With D2V_EMULATED the operators run on CPU tensors, by the engine of csrc/tests.
#pragma once
#include "../core/ema.h"
#include "common.h"
#if !defined(D2V_EMULATED)
#include <dlfcn.h>
#endif

namespace d2v {

#if defined(D2V_EMULATED)

constexpr const char* kDeviceName = "CPU (emulated CUDA)";
inline bool is_on_device(const Tensor& t) { return t.is_cpu(); }
inline void* current_stream(const char*, int32_t) { return nullptr; }

#else

constexpr const char* kDeviceName = "CUDA";
inline bool is_on_device(const Tensor& t) { return t.is_cuda(); }

inline void* find_torch_cuda(const char* name) {
  void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library ? dlsym(library, name) : nullptr;
}

// torch's current stream of a device.
inline void* current_stream(const char* op, int32_t device) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get = reinterpret_cast<GetStream>(find_torch_cuda("aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(get != nullptr, op, ": this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, op, ": no current stream on CUDA device ", device);
  return stream;
}

#endif

// ---- checks that protect memory ----

inline void check_place(const char* op, const char* name, const Tensor& t, int64_t dims, int32_t device) {
  STD_TORCH_CHECK(t.dim() == dims, op, ": ", name, ": expected ", dims, " dimensions, got ", t.dim());
  STD_TORCH_CHECK(is_on_device(t) && t.get_device_index() == device, op, ": ", name, ": expected a tensor on ",
                  kDeviceName, " device ", device);
}

// Raises unless `error`, of a launch, is 0.
inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": launch failed: ", d2v_cuda_error_text(error));
}

// ---- the operators; contracts in d2v_kernels ----

Tensor average_layers_cuda(const std::vector<Tensor>& layers, const std::string& norm, const std::string& out_norm,
                           const OptionalTensor& lengths, double eps, ScalarType out_dtype);
void update_ema_cuda(const std::vector<Tensor>& averages, const std::vector<Tensor>& sources,
                     const std::vector<Tensor>& copies, double weight, const OptionalTensor& weight_tensor);
Tensor gather_tokens_cuda(const Tensor& x, const Tensor& index, int64_t clones);
Tensor gather_tokens_backward_cuda(const Tensor& grad, const Tensor& index, int64_t clones, int64_t tokens);
Tensor restore_tokens_cuda(const Tensor& kept, const Tensor& restore, const OptionalTensor& fill,
                           const OptionalTensor& noise_keys, double noise_std);
std::tuple<Tensor, Tensor> restore_tokens_backward_cuda(const Tensor& grad, const Tensor& restore, int64_t visible,
                                                        int64_t fill_rows);

}  // namespace d2v
