// What kernels include: CUDA under nvcc; under a host compiler the engine of csrc/tests, which runs the same source
// and which the test that wants it has included before.
//
// (Not cuda.h: with this folder on the include path that name would hide the toolkit's <cuda.h>.)
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Shared memory of a block: D2V_SHARED(float, tile, [8][33]) declares `tile`, D2V_DYNAMIC_SHARED(float, row) a
// pointer to what the launch asked for.
#define D2V_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define D2V_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char d2v_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(d2v_dynamic_shared)
// A parameter too large to be copied for every thread.
#define D2V_PARAMETER(...) const __grid_constant__ __VA_ARGS__
// Stops the kernel with a device-side assertion, in release builds too, as torch's own kernels do: the way in which
// a value that only the device knows can be refused.
#define D2V_CHECK(condition, text)                                            \
  do {                                                                        \
    if (!(condition)) ::d2v::stop_kernel(text, __FILE__, __LINE__, __func__); \
  } while (0)

// As <assert.h> has it, which release builds leave out.
extern "C" __host__ __device__ void __assert_fail(const char* text, const char* file, unsigned line,
                                                  const char* function) noexcept __attribute__((__noreturn__));

namespace d2v {

__device__ __forceinline__ void stop_kernel(const char* text, const char* file, unsigned line, const char* function) {
  __assert_fail(text, file, line, function);
  __builtin_unreachable();  // for ptxas, which else keeps for after the call what nobody needs
}

// Makes a device current, and the one before it again at the end.
class DeviceScope {
 public:
  explicit DeviceScope(int device) : device_(device) {
    status = cudaGetDevice(&before_);
    if (status == cudaSuccess && before_ != device_) status = cudaSetDevice(device_);
  }
  ~DeviceScope() {
    if (before_ >= 0 && before_ != device_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  cudaError_t status;

 private:
  int device_, before_ = -1;
};

template <class T>
struct AsIs {
  using type = T;
};

// cluster: neighbouring blocks along x that run at once and see each other's shared memory.
struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;
};

// kernel<<<grid, block, shared_bytes, stream>>>(args...), except that the error is that of this launch alone, not
// what an earlier call left behind, and that large parameters are not copied on the way.
template <class... P>
cudaError_t launch(void (*kernel)(P...), const LaunchShape& shape, cudaStream_t stream,
                   const typename AsIs<P>::type&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {shape.cluster, 1, 1};
  if (shape.cluster > 1) {
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), addresses);
}
template <class... P>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const typename AsIs<P>::type&... args) {
  return launch(kernel, LaunchShape{grid, block, shared_bytes, 1}, stream, args...);
}

// Lets a kernel have that much dynamic shared memory. Whether it must be asked for depends on the kernel's static
// shared memory, too: without asking, both together may have 48 KiB.
template <class... P>
cudaError_t allow_shared(void (*kernel)(P...), int64_t bytes) {
  if (bytes == 0) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

// What a block may have at most, and how many multiprocessors there are.
inline cudaError_t query_device(int device, int64_t* shared_bytes, int* multiprocessors) {
  int bytes = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *shared_bytes = bytes;
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, device);
}

// Blocks that a cluster may have (of those that every such device allows); 0 before sm_90, 1 where there are bulk
// copies alone.
inline cudaError_t query_clusters(int device, int* blocks) {
  constexpr int kPortable = 8;
  int major = 0, clusters = 0;
  *blocks = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess || major < 9) return error;
  const cudaError_t other = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  *blocks = clusters ? kPortable : 1;
  return other;
}

inline const char* error_text(cudaError_t error) { return cudaGetErrorString(error); }

}  // namespace d2v
#elif defined(D2V_ENGINE)
namespace d2v {
using engine::allow_shared;
using engine::AsIs;
using engine::DeviceScope;
using engine::error_text;
using engine::launch;
using engine::LaunchShape;
using engine::query_clusters;
using engine::query_device;
}  // namespace d2v
#else
#error "nvcc, or csrc/tests/engine/engine.h included before"
#endif
