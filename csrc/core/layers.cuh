// What the kernels of average_layers share.
#pragma once
#include <string.h>

#include "layers_cuda.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace d2v {
namespace {

struct LayerList {
  const void* data[kMaxLayers];
  int64_t batch_stride[kMaxLayers], time_stride[kMaxLayers];
  int64_t first_sample;  // of the launch
  int32_t K;
  bool cut;  // to the lengths
  int32_t length[kListSamples];
};

struct Output {
  void* data;  // (B, T, C) contiguous
  DType type;
  int64_t T, C;
  double eps;
};

// Valid time steps of the sample that is number `local` of the launch.
__device__ __forceinline__ int64_t length_of(const LayerList& list, int64_t local, int64_t T) {
  return list.cut ? list.length[local] : T;
}

// (b, t, c) of layer k.
template <class T>
__device__ __forceinline__ const T* element(const LayerList& list, int k, int64_t b, int64_t t, int64_t c) {
  const int64_t at = b * list.batch_stride[k] + t * list.time_stride[k] + c;
  return in_global(static_cast<const T*>(list.data[k]) + at);
}

// One access. (An assignment of 16 bytes is one by itself only where the compiler does not take it apart and fail to
// put it together again, which it does between branches.)
__device__ __forceinline__ void store_word(uint4* p, uint4 word) {
#if defined(__CUDACC__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
#else
  *p = word;
#endif
}
__device__ __forceinline__ void store_word(uint2* p, uint2 word) {
#if defined(__CUDACC__)
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(word.x), "r"(word.y)
               : "memory");
#else
  *p = word;
#endif
}

template <class TO, int N, class A>
__device__ __forceinline__ void store_as(void* out, int64_t at, const A (&v)[N]) {
  Vec<TO, N> cast;
#pragma unroll
  for (int k = 0; k < N; ++k) cast.v[k] = Narrow<TO>::from(v[k]);
  TO* const to = in_global(static_cast<TO*>(out) + at);
  if constexpr (sizeof(cast) % sizeof(uint4) == 0) {
    uint4 words[sizeof(cast) / sizeof(uint4)];
    memcpy(words, &cast, sizeof(cast));
#pragma unroll
    for (size_t i = 0; i < sizeof(cast) / sizeof(uint4); ++i) store_word(reinterpret_cast<uint4*>(to) + i, words[i]);
  } else if constexpr (sizeof(cast) == sizeof(uint2)) {
    uint2 words;
    memcpy(&words, &cast, sizeof(cast));
    store_word(reinterpret_cast<uint2*>(to), words);
  } else {
    store<N>(to, cast);
  }
}

template <int N, class A>
__device__ __forceinline__ void store_result(const Output& out, int64_t at, const A (&v)[N]) {
  if (out.type == kFloat32) return store_as<float>(out.data, at, v);
  if (out.type == kBFloat16) return store_as<__nv_bfloat16>(out.data, at, v);
  if (out.type == kFloat16) return store_as<__half>(out.data, at, v);
  store_as<double>(out.data, at, v);
}

#if defined(__CUDACC__)
__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }
#else
inline float reciprocal_root(float x) { return 1.0f / sqrtf(x); }
#endif
__device__ __forceinline__ double reciprocal_root(double x) { return 1.0 / sqrt(x); }

// x / count by its rounded reciprocal and one correction: as exact as a division, so that the mean of equal numbers is
// that number, without its rare cases.
__device__ __forceinline__ float divide(float x, float count, float inverse) {
  const float quotient = x * inverse;
  return multiply_add(multiply_add(-quotient, count, x), inverse, quotient);
}

}  // namespace
}  // namespace d2v
