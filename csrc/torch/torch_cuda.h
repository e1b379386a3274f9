// What of torch's CUDA half the operators need. It lives in libtorch_cuda, which a CPU torch lacks, so it is looked up
// in the copy that `import torch` has loaded: one library then serves every torch, and loads without a GPU as well.
//
// With D2V_EMULATED the operators run on CPU tensors, by the engine of csrc/tests.
#pragma once
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

}  // namespace d2v
