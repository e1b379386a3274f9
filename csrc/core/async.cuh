// Asynchronous copies from global to shared memory, 16 bytes each (cp.async, sm_80 and newer; before that, plain ones).
//
// A thread's copies up to commit_copies() are a group; wait_copies<N>() returns when all of its groups but the N last
// ones have arrived. Other threads see them after a barrier that follows. Shared memory that was read must not be
// copied to before a barrier: a copy is not ordered behind a read of the same thread.
#pragma once
#include "device.h"

#if defined(__CUDACC__)
namespace d2v {

__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(global)) : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

__device__ __forceinline__ void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int N>
__device__ __forceinline__ void wait_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

}  // namespace d2v
#else
namespace d2v {
using engine::commit_copies;
using engine::copy_async;
using engine::wait_copies;
}  // namespace d2v
#endif
