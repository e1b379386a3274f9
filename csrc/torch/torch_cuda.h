// What of torch's CUDA half the operators need. It lives in libtorch_cuda, which a CPU torch lacks, so it is looked up
// in the copy that `import torch` has loaded: one library then serves every torch, and loads without a GPU as well.
//
// With D2V_EMULATED the operators run on CPU tensors, by the engine of csrc/tests.
#pragma once
#include "../core/stream.h"
#include "arguments.h"
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

// A call on the device of its first tensor.
inline Call device_call(const char* op, const Tensor& first) {
  return {op, kDeviceName, first.get_device_index(), is_on_device};
}
inline Stream stream_of(const Call& call) { return {call.device, current_stream(call.op, call.device)}; }

inline Tensor new_workspace(const Tensor& like, int64_t bytes) { return new_tensor(like, {bytes}, ScalarType::Byte); }

// Raises unless `error`, of a launch, is 0.
inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": launch failed: ", d2v_cuda_error_text(error));
}

// ---- the operators; contracts in d2v_kernels ----

Tensor average_layers_cuda(const std::vector<Tensor>& layers, const std::string& norm, const std::string& out_norm,
                           const OptionalTensor& lengths, double eps, ScalarType out_dtype);
void update_ema_cuda(const std::vector<Tensor>& averages, const std::vector<Tensor>& sources,
                     const std::vector<Tensor>& copies, double weight, const OptionalTensor& weight_tensor);
void update_split_ema_cuda(const std::vector<Tensor>& high, const std::vector<Tensor>& low,
                           const std::vector<Tensor>& sources, double weight, const OptionalTensor& weight_tensor);
Tensor gather_tokens_cuda(const Tensor& x, const Tensor& index, int64_t clones);
Tensor gather_tokens_backward_cuda(const Tensor& grad, const Tensor& index, int64_t clones, int64_t tokens);
Tensor restore_tokens_cuda(const Tensor& kept, const Tensor& restore, const OptionalTensor& fill,
                           const OptionalTensor& noise_keys, double noise_std);
std::tuple<Tensor, Tensor> restore_tokens_backward_cuda(const Tensor& grad, const Tensor& restore, int64_t visible,
                                                        int64_t fill_rows);

}  // namespace d2v
