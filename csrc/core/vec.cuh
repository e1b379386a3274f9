// Several elements of global memory in one access, and the conversions between element and arithmetic types.
#pragma once
#include <string.h>

#include "device.h"

namespace d2v {

// Arithmetic is fp32, for fp64 elements fp64.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// Rounds to nearest, ties to even. From fp64 to a 16-bit type through fp32, as torch's cast does.
template <class T>
struct Narrow {
  static __device__ __forceinline__ T from(double x) { return static_cast<T>(x); }
};
template <>
struct Narrow<float> {
  static __device__ __forceinline__ float from(float x) { return x; }
};
template <>
struct Narrow<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 from(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Narrow<__half> {
  static __device__ __forceinline__ __half from(float x) { return __float2half_rn(x); }
};

__device__ __forceinline__ float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }
__device__ __forceinline__ double multiply_add(double x, double y, double z) { return fma(x, y, z); }

// Up to 16 bytes are one access; a longer Vec is several of 16.
constexpr int kAccessBytes = 16;
template <class T, int N>
struct alignas(sizeof(T) * N < kAccessBytes ? sizeof(T) * N : kAccessBytes) Vec {
  T v[N];
};

template <int N, class T>
__device__ __forceinline__ bool is_vec_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Vec<T, N>) == 0;
}

// p comes from a table in memory, so the compiler cannot see that it points to global memory, and would emit generic
// accesses.
template <class T>
__device__ __forceinline__ T* in_global(T* p) {
#if defined(__CUDACC__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

template <int N, class T>
__device__ __forceinline__ Vec<T, N> load(const T* p) {
  return *reinterpret_cast<const Vec<T, N>*>(p);
}
template <int N, class T>
__device__ __forceinline__ void store(T* p, const Vec<T, N>& v) {
  *reinterpret_cast<Vec<T, N>*>(p) = v;
}

// What load() gives, kept as it came until it is widened: bfloat16 stays in 32-bit words, of which a shift and a mask
// make two numbers; taken apart into elements first, they would be three instructions more.
template <class T, int N>
struct PackedOf {
  using type = Vec<T, N>;
};
template <>
struct PackedOf<__nv_bfloat16, 8> {
  using type = Vec<uint32_t, 4>;
};
template <class T, int N>
using Packed = typename PackedOf<T, N>::type;

template <int N, class T>
__device__ __forceinline__ Packed<T, N> load_packed(const T* p) {
  Packed<T, N> v;
#if defined(__CUDACC__)
  v = *reinterpret_cast<const Packed<T, N>*>(p);
#else
  memcpy(&v, p, sizeof(v));
#endif
  return v;
}

// From here on these numbers are kept: the compiler does not make them again from what they came from.
template <int N>
__device__ __forceinline__ void keep([[maybe_unused]] float (&x)[N]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : "+f"(x[n]));
#endif
}

template <class T, int N>
__device__ __forceinline__ void widen(const Vec<T, N>& from, Acc<T> (&to)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) to[n] = widen(from.v[n]);
}
template <int W>
__device__ __forceinline__ void widen(const Vec<uint32_t, W>& from, float (&to)[2 * W]) {
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const uint32_t low = from.v[i] << 16, high = from.v[i] & 0xffff0000u;
    memcpy(&to[2 * i], &low, sizeof(low));
    memcpy(&to[2 * i + 1], &high, sizeof(high));
  }
}

}  // namespace d2v
