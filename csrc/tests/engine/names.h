// The names that kernels use, in terms of the engine. Those that need to know where they stand are macros.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <type_traits>

#include "copies.h"
#include "launch.h"
#include "warp.h"

#undef __shared__
#define __shared__ static_assert(false, "shared memory: use D2V_SHARED");
#undef __launch_bounds__
#define __launch_bounds__(...)

#define threadIdx (::d2v::engine::current_thread->index)
#define blockIdx (::d2v::engine::block_index)
#define blockDim (::d2v::engine::block_shape)
#define gridDim (::d2v::engine::grid_shape)
#define warpSize 32

#define D2V_SITE(what) (::d2v::engine::Site{what, __FILE__, __LINE__})
#define D2V_BARRIER(what, predicate) ::d2v::engine::current_block->barrier(D2V_SITE(what), (predicate))
#define __syncthreads() D2V_BARRIER("__syncthreads", false)
#define __syncthreads_or(p) (D2V_BARRIER("__syncthreads_or", (p) != 0), ::d2v::engine::current_block->any())
#define __syncthreads_and(p) (D2V_BARRIER("__syncthreads_and", (p) != 0), ::d2v::engine::current_block->all())
#define __syncthreads_count(p) (D2V_BARRIER("__syncthreads_count", (p) != 0), ::d2v::engine::current_block->count())

#define __syncwarp(...) ::d2v::engine::synchronize_warp(D2V_SITE("__syncwarp") __VA_OPT__(, ) __VA_ARGS__)
#define D2V_SHUFFLE(what, kind, ...) ::d2v::engine::shuffle(D2V_SITE(what), ::d2v::engine::Shuffle::kind, __VA_ARGS__)
#define __shfl_sync(...) D2V_SHUFFLE("__shfl_sync", kIndex, __VA_ARGS__)
#define __shfl_up_sync(...) D2V_SHUFFLE("__shfl_up_sync", kUp, __VA_ARGS__)
#define __shfl_down_sync(...) D2V_SHUFFLE("__shfl_down_sync", kDown, __VA_ARGS__)
#define __shfl_xor_sync(...) D2V_SHUFFLE("__shfl_xor_sync", kXor, __VA_ARGS__)
#define __ballot_sync(m, p) ::d2v::engine::ballot(D2V_SITE("__ballot_sync"), (m), (p) != 0)
#define __any_sync(m, p) (::d2v::engine::ballot(D2V_SITE("__any_sync"), (m), (p) != 0) != 0)
#define __all_sync(m, p) (::d2v::engine::ballot(D2V_SITE("__all_sync"), (m), (p) != 0) == (m))
#define __reduce_add_sync(m, v) \
  ::d2v::engine::reduce(D2V_SITE("__reduce_add_sync"), (m), (v), [](auto a, auto b) { return a + b; })
#define __reduce_max_sync(m, v) \
  ::d2v::engine::reduce(D2V_SITE("__reduce_max_sync"), (m), (v), [](auto a, auto b) { return a > b ? a : b; })

#define D2V_SHARED(T, name, ...)            \
  using name##_shared_type = T __VA_ARGS__; \
  static const char name##_shared_key = 0;  \
  auto& name = ::d2v::engine::shared_variable<name##_shared_type>(&name##_shared_key)
#define D2V_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::d2v::engine::current_block->dynamic_shared())
#define D2V_PARAMETER(...) const __VA_ARGS__&
#define D2V_CHECK(condition, text)                                                                     \
  do {                                                                                                 \
    if (!(condition)) {                                                                                \
      ::d2v::engine::current_block->fail(::d2v::engine::place(D2V_SITE("D2V_CHECK")) + ": " + (text)); \
    }                                                                                                  \
  } while (0)

namespace d2v::engine {

template <class T>
T& shared_variable(const void* key) {
  return *static_cast<T*>(current_block->shared(key, sizeof(T), alignof(T) < 16 ? 16 : alignof(T)));
}

// Atomic to ThreadSanitizer, but it orders nothing else: as on the device.
template <class T, class F>
T update_atomically(T* p, F f) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics of 4 or 8 bytes");
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits* const bits = reinterpret_cast<Bits*>(p);
  Bits before = __atomic_load_n(bits, __ATOMIC_RELAXED);
  for (;;) {
    T value;
    std::memcpy(&value, &before, sizeof(T));
    const T changed = f(value);
    Bits after;
    std::memcpy(&after, &changed, sizeof(T));
    if (__atomic_compare_exchange_n(bits, &before, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return value;
  }
}

inline char fence_order = 0;

}  // namespace d2v::engine

template <class T, class U>
T atomicAdd(T* p, U v) {
  return d2v::engine::update_atomically(p, [v](T a) { return static_cast<T>(a + static_cast<T>(v)); });
}
template <class T, class U>
T atomicMin(T* p, U v) {
  return d2v::engine::update_atomically(p, [v](T a) { return static_cast<T>(v) < a ? static_cast<T>(v) : a; });
}
template <class T, class U>
T atomicMax(T* p, U v) {
  return d2v::engine::update_atomically(p, [v](T a) { return a < static_cast<T>(v) ? static_cast<T>(v) : a; });
}

inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }

// Orders all who fence, which is more than CUDA does; a fence left out shows all the same.
inline void __threadfence() {
  d2v::engine::release(&d2v::engine::fence_order);
  d2v::engine::acquire(&d2v::engine::fence_order);
}
